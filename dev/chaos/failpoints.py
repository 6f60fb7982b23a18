"""Failpoints: the worker's step boundaries, at which a schedule kills it, freezes it, breaks the step or delays it.

They are put around the worker's own methods in the processes that the suite starts (workers.py), so that the worker
as it is shipped has none, and pays nothing. tests/chaos/test_failpoints.py says when a name no longer fits.
"""

import asyncio
import functools
import importlib
import inspect
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import psycopg

from cdc_worker.errors import Transient

Act = Literal["kill", "freeze", "raise", "sleep"]
"""SIGKILL, SIGSTOP, the kind of error that the step can meet, or a delay."""

_SLEEP_SECONDS = 0.2


def _gone() -> Exception:
    return psycopg.OperationalError("failpoint: the connection is gone")


def _unknown() -> Exception:
    return Transient("failpoint: the connection broke")


@dataclass(frozen=True)
class Point:
    """A passage into a function of the worker, or out of it."""

    module: str
    # "Class.method", or the name of a function that its module calls by that name.
    function: str
    side: Literal["before", "after"]
    # What the step can meet; None if nothing.
    error: Callable[[], Exception] | None = None

    @property
    def acts(self) -> tuple[Act, ...]:
        return ("kill", "freeze", "raise", "sleep") if self.error is not None else ("kill", "freeze", "sleep")

    def place(self) -> tuple[Any, str]:
        """What holds the function, and under which name. Raises AttributeError or ImportError if nothing does."""
        holder: Any = importlib.import_module(f"cdc_worker.{self.module}")
        *classes, name = self.function.split(".")
        for each in classes:
            holder = getattr(holder, each)
        getattr(holder, name)
        return holder, name


POINTS: Final[dict[str, Point]] = {
    "lease taken": Point("allotment", "Allotment.acquire", "after", _gone),
    "epoch known, not noted": Point("checkpoint", "Checkpoint.note_epoch", "before", _gone),
    "epoch noted": Point("checkpoint", "Checkpoint.note_epoch", "after", _gone),
    "page to be read": Point("late_read", "LateReader.read", "before", _gone),
    "page read": Point("late_read", "LateReader.read", "after", _gone),
    "page to be added": Point("lanes", "Lanes.add", "before"),
    "page added": Point("lanes", "Lanes.add", "after"),
    "request to be sent": Point("deployment", "Deployment.send", "before", _unknown),
    "request answered": Point("deployment", "Deployment.send", "after", _unknown),
    "keys to be parked": Point("parking", "Parking.park", "before", _gone),
    "keys parked": Point("parking", "Parking.park", "after", _gone),
    "parked keys settled": Point("parking", "Parking.settle", "after", _gone),
    "batch to be settled": Point("lanes", "Lanes.settle", "before"),
    "batch settled": Point("lanes", "Lanes.settle", "after"),
    "checkpoint to be saved": Point("checkpoint", "Checkpoint.save", "before", _gone),
    "checkpoint saved": Point("checkpoint", "Checkpoint.save", "after", _gone),
    "lease to be released": Point("checkpoint", "Checkpoint.release", "before", _gone),
    "lease released": Point("checkpoint", "Checkpoint.release", "after", _gone),
    "gate to be closed": Point("listener", "Bell.arm", "before", _gone),
    "gate closed": Point("listener", "Bell.arm", "after", _gone),
    "partition to be truncated": Point("rotation", "_turn", "before", _gone),
    "partition truncated, not committed": Point("rotation", "_turn", "after", _gone),
    "rescan to be noted": Point("backfill", "request", "before", _gone),
    "rescan noted": Point("backfill", "request", "after", _gone),
    "page of a rescan to be marked": Point("backfill", "step", "before", _gone),
    "page of a rescan marked": Point("backfill", "step", "after", _gone),
}


class Failpoints:
    """Those of this process. `report` is told of each point at its first passage, and of each act before it is done."""

    def __init__(self, report: Callable[[tuple[str, str]], None]) -> None:
        self._report = report
        self._passed: set[str] = set()
        self._armed: dict[str, tuple[int, Act]] = {}

    def install(self) -> None:
        """Puts all of them around the worker's functions."""
        for name, point in POINTS.items():
            holder, attribute = point.place()
            setattr(holder, attribute, self._around(getattr(holder, attribute), name, point))

    def arm(self, name: str, passage: int, act: Act) -> None:
        """From now on, its passages are counted. Called from another thread."""
        self._armed[name] = (passage, act)

    def disarm(self) -> None:
        self._armed.clear()

    def _around(self, function: Callable[..., Any], name: str, point: Point) -> Callable[..., Any]:
        before = point.side == "before"

        @functools.wraps(function)
        async def waiting(*args: Any, **named: Any) -> Any:
            if before and self._due(name, point) is not None:
                await asyncio.sleep(_SLEEP_SECONDS)
            result = await function(*args, **named)
            if not before and self._due(name, point) is not None:
                await asyncio.sleep(_SLEEP_SECONDS)
            return result

        @functools.wraps(function)
        def at_once(*args: Any, **named: Any) -> Any:
            if before and self._due(name, point) is not None:
                time.sleep(_SLEEP_SECONDS)
            result = function(*args, **named)
            if not before and self._due(name, point) is not None:
                time.sleep(_SLEEP_SECONDS)
            return result

        return waiting if inspect.iscoroutinefunction(function) else at_once

    def _due(self, name: str, point: Point) -> Literal["sleep"] | None:
        """Counts the passage, and does what is due; a delay is left to the caller."""
        if name not in self._passed:
            self._passed.add(name)
            self._report(("passed", name))
        armed = self._armed.get(name)
        if armed is None:
            return None
        left, act = armed
        if left > 1:
            self._armed[name] = (left - 1, act)
            return None
        del self._armed[name]
        self._report((act, name))
        if act in {"kill", "freeze"}:
            os.kill(os.getpid(), signal.SIGKILL if act == "kill" else signal.SIGSTOP)
        if act == "raise" and point.error is not None:
            raise point.error()
        return "sleep" if act == "sleep" else None
