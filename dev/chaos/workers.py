"""The real worker as real processes: `cdc-worker run` as production starts it, environment, TOML, signals and all.

Around it are the failpoints, and its longest waits are short (quick.py).
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dev.chaos.failpoints import Act, Failpoints
from dev.chaos.forks import Fork
from dev.chaos.quick import make_quick


class WorkerProcess:
    """One process; its log is a file of JSON lines. It ends with us, however we go."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._fork = Fork(_work, dict(environment), str(log))
        self.asleep = False
        self.stopping = False
        # Failpoints that it has passed, and what they did.
        self.passed: set[str] = set()
        self.acts: list[Act] = []

    @property
    def alive(self) -> bool:
        return self._fork.alive

    @property
    def exit_code(self) -> int | None:
        return self._fork.exit_code

    def events(self) -> Iterator[dict[str, Any]]:
        """What it has logged so far."""
        with contextlib.suppress(FileNotFoundError):
            for line in self.log.read_text(errors="replace").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    yield {"event": line}

    def said(self, event: str) -> bool:
        return any(each.get("event") == event for each in self.events())

    def listen(self) -> list[Act]:
        """What its failpoints have done since the last call."""
        done: list[Act] = []
        with contextlib.suppress(EOFError, OSError):
            while self._fork.pipe.poll():
                what, name = self._fork.pipe.recv()
                if what == "passed":
                    self.passed.add(name)
                else:
                    done.append(what)
        if "freeze" in done:
            self.asleep = True
        self.acts += done
        return done

    def arm(self, point: str, passage: int, act: Act) -> None:
        self._order((point, passage, act))

    def disarm(self) -> None:
        self._order(None)

    def sleep(self) -> None:
        self._fork.signal(signal.SIGSTOP)
        self.asleep = True

    def wake(self) -> None:
        self._fork.signal(signal.SIGCONT)
        self.asleep = False

    def terminate(self) -> None:
        """SIGTERM: it stops in order."""
        self.stopping = True
        self._fork.signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.listen()
        self._fork.kill()

    def _order(self, order: tuple[str, int, Act] | None) -> None:
        with contextlib.suppress(OSError):
            self._fork.pipe.send(order)


def _work(orders: Connection, environment: dict[str, str], log: str) -> None:
    """In the child: `cdc-worker run`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["cdc-worker", "run"]
    make_quick()
    failpoints = Failpoints(orders.send)
    failpoints.install()
    threading.Thread(target=_obey, args=(orders, failpoints), daemon=True).start()
    # Here, not above: whoever only looks at a schedule needs no worker.
    from cdc_worker.__main__ import main  # noqa: PLC0415

    main()


def _obey(orders: Connection, failpoints: Failpoints) -> None:
    """Arms what it is told to, and ends the process when nobody can tell it any more."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            order = orders.recv()
            if order is None:
                failpoints.disarm()
            else:
                failpoints.arm(*order)
    os._exit(1)
