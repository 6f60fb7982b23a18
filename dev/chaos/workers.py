"""The real worker as real processes, quick to start: forked from a server that has imported everything already.

What runs is `cdc-worker run` as production starts it, environment, TOML, signal handlers and all. A fork takes 10 ms
where a fresh interpreter takes 500, so that even a property test can afford SIGKILL, which no cancelled task in this
process could stand for: a cancelled task still runs its `finally`.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["cdc_worker.__main__", "psycopg_binary", "aiohttp", "dev.chaos.workers"])


class WorkerProcess:
    """One process; its log is a file of JSON lines. It ends with us, however we go."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        ours, theirs = multiprocessing.Pipe()
        self._life = ours
        self._process = _CONTEXT.Process(target=_work, args=(dict(environment), str(log), theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.asleep = False

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

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

    def sleep(self) -> None:
        self._signal(signal.SIGSTOP)
        self.asleep = True

    def wake(self) -> None:
        self._signal(signal.SIGCONT)
        self.asleep = False

    def terminate(self) -> None:
        """SIGTERM: it stops in order."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.join(5.0)
        self._life.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)


def _work(environment: dict[str, str], log: str, life: Connection) -> None:
    """In the child: `cdc-worker run`."""
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["cdc-worker", "run"]
    # Here, not above: whoever only looks at a schedule needs no worker.
    from cdc_worker.__main__ import main  # noqa: PLC0415

    main()


def _end_with(life: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(1)
