"""Processes that are quick to start: forked from a server that has imported everything already.

A fork takes 10 ms where a fresh interpreter takes 500, so that even thousands of schedules can afford SIGKILL, which
no cancelled task in this process could stand for: a cancelled task still runs its `finally`.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("cdc_worker.__main__", "cdc_worker.worker", "psycopg_binary", "dev.chaos.workers", "dev.chaos.writers"),
        # A child imports the program that it comes from.
        *(["pytest"] if "pytest" in sys.modules else []),
    ]
)


class Fork:
    """A process that runs `work(pipe, *args)`, and a pipe to it that is closed when we end, however we go."""

    def __init__(self, work: Callable[..., None], *args: Any) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=work, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        """Its exit code when it has ended; None if it has not by then."""
        self._process.join(seconds)
        return self._process.exitcode

    def signal(self, number: signal.Signals) -> None:
        """Nothing happens if it has ended."""
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.join(5.0)
        self.pipe.close()


__all__ = ["Connection", "Fork"]
