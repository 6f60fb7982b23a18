"""Liveness is progress: who has something to do must come to an end of it, well or badly, within a stated time.

A failed attempt is progress: an outage of hours is waited out by retrying, and a restart would only add the
platform's own delay for processes that crash. What this catches is a wait that nothing ends: then the process
says what it waits for, and exits, so that the platform starts it anew. It looks from a thread of its own, so
that a stuck event loop is seen, too.
"""

import copy
import os
import threading
import time
from collections.abc import Callable
from typing import Self

import structlog

log = structlog.get_logger()


class Liveness:
    """Who is at work, and since when nothing came of it."""

    def __init__(self, limit_seconds: float, *, give_up: Callable[[], None] = lambda: os._exit(1)) -> None:
        self._limit_seconds = limit_seconds
        self._give_up = give_up
        self._where = ""
        self._since: dict[str, float] = {}
        self._ended = threading.Event()

    def within(self, where: str) -> Self:
        """The same, for those who have the same names elsewhere."""
        part = copy.copy(self)
        vars(part)["_where"] = f" ({where})"
        return part

    def moved(self, who: str) -> None:
        """`who` has come to an end of something, and goes on to the next."""
        self._since[who + self._where] = time.monotonic()

    def rests(self, who: str) -> None:
        """`who` has nothing to do."""
        self._since.pop(who + self._where, None)

    def start(self) -> None:
        threading.Thread(target=self._watch, name="cdc_worker.liveness", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._limit_seconds / 10):
            for who, since in list(self._since.items()):
                silent = time.monotonic() - since
                if silent > self._limit_seconds:
                    log.critical(
                        "worker.stalled",
                        waits_for=who,
                        silent_seconds=round(silent),
                        cure="exiting, so that the platform starts it anew; nothing is lost",
                    )
                    self._give_up()
                    return
