"""Liveness is progress: whatever is begun must come to an end, well or badly, within a stated time.

A failed attempt is progress: an outage of hours is waited out by retrying, and a restart would only add the
platform's own delay for processes that crash. What this catches is a wait that nothing ends: then the process
says what it waits for, and exits, so that the platform starts it anew. It looks from a thread of its own, so
that a stuck event loop is seen, too; even one that is stuck because nobody takes what it writes to its log.
"""

import asyncio
import contextlib
import copy
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import structlog

log = structlog.get_logger()

_LOOP = "its own event loop"
# For the last line: what hangs may be the reader of the log.
_SAY_SECONDS = 5.0


class Liveness:
    """Who is at work, and since when nothing came of it."""

    def __init__(self, limit_seconds: float, *, give_up: Callable[[], None] = lambda: os._exit(1)) -> None:
        self._limit_seconds = limit_seconds
        self._give_up = give_up
        self._where = ""
        # By name, or by a key of its own for each single wait.
        self._since: dict[object, tuple[str, float]] = {}
        self._ended = threading.Event()

    def within(self, where: str) -> Self:
        """The same, with the place added to each name: several shards have the same ones."""
        part = copy.copy(self)
        vars(part)["_where"] = f" ({where})"
        return part

    def moved(self, who: str) -> None:
        """`who` has come to an end of something, and goes on to the next."""
        self._since[who + self._where] = (who + self._where, time.monotonic())

    def works(self, who: str) -> None:
        """`who` has something to do, if not for some time already."""
        self._since.setdefault(who + self._where, (who + self._where, time.monotonic()))

    def rests(self, who: str) -> None:
        """`who` has nothing to do."""
        self._since.pop(who + self._where, None)

    @contextlib.contextmanager
    def waits_for(self, what: str) -> Iterator[None]:
        """A single wait, which has to end, well or badly, whatever others do meanwhile."""
        wait = object()
        self._since[wait] = (what + self._where, time.monotonic())
        try:
            yield
        finally:
            del self._since[wait]

    def start(self) -> None:
        threading.Thread(target=self._watch, name="cdc_worker.liveness", daemon=True).start()

    async def run(self) -> None:
        """The event loop turns, whatever is or is not to be done; for as long as this is not cancelled."""
        try:
            while True:
                self.moved(_LOOP)
                await asyncio.sleep(self._limit_seconds / 10)
        finally:
            self.rests(_LOOP)

    def end(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._limit_seconds / 10):
            for what, since in list(self._since.values()):
                silent = time.monotonic() - since
                if silent > self._limit_seconds:
                    saying = threading.Thread(target=_say, args=(what, silent), daemon=True)
                    saying.start()
                    saying.join(_SAY_SECONDS)
                    self._give_up()
                    return


def _say(what: str, silent: float) -> None:
    log.critical(
        "worker.stalled",
        waits_for=what,
        silent_seconds=round(silent),
        cure="exiting, so that the platform starts it anew; nothing is lost",
    )
