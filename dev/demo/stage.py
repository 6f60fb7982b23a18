"""What the demo plays on: Postgres, the local Convex, and the worker, started as production starts it."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg

from dev import local_convex, postgres
from dev.local_convex import LocalConvex
from dev.processes import Process

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parent.parent
SCHEMA: Final = HERE / "schema.sql"
CONFIG: Final = HERE / "cdc_worker.toml"
DATABASE: Final = "demo"
# `migrate` waits for locks of others; here there are none.
MIGRATE_SECONDS: Final = 60.0

# The worker's settings that a person who has it running elsewhere may have in the environment.
_SETTINGS: Final = frozenset(
    {
        *("DATABASE_URL", "LISTEN_DATABASE_URL", "CONVEX_URL", "NEXT_PUBLIC_CONVEX_URL", "CONVEX_DEPLOY_KEY"),
        *("LOG_LEVEL", "LOG_FORMAT"),
    }
)


class StageError(Exception):
    """Something the demo needs did not start, or has ended; says what it printed."""


@dataclass(frozen=True)
class Servers:
    """Both ends, without the worker between them."""

    database_url: str
    postgres_version: str
    convex: LocalConvex


@contextlib.contextmanager
def servers() -> Iterator[Servers]:
    """Postgres with the application's empty tables, and the local Convex; both start at once."""
    # The pool ends first: what a thread has started is on the stack by then, even when we are interrupted.
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        starting = pool.submit(stack.enter_context, postgres.start("wheel"))
        convex = pool.submit(stack.enter_context, local_convex.start(public_reads=True))
        server = starting.result()
        with server.admin() as connection:
            connection.execute(f"create database {DATABASE} owner {postgres.APPLICATION}")
        url = server.dsn(DATABASE)
        with psycopg.connect(url) as connection:
            connection.execute(SCHEMA.read_bytes())
        yield Servers(url, server.version, convex.result())


class Worker:
    """The two commands of the Procfile, as child processes with nothing but their environment."""

    def __init__(self, servers: Servers, folder: Path) -> None:
        self.log: Final = folder / "worker.log"
        self._folder = folder
        self._running: Process | None = None
        ours = {
            name: value for name, value in os.environ.items() if name not in _SETTINGS and not name.startswith("CDC_")
        }
        self._env = ours | {
            "DATABASE_URL": servers.database_url,
            "CONVEX_URL": servers.convex.url,
            "CONVEX_DEPLOY_KEY": servers.convex.admin_key,
            "CDC_CONFIG": str(CONFIG),
            "CDC_HEARTBEAT_SECONDS": "10",
            "LOG_FORMAT": "json",
        }

    def migrate(self) -> None:
        """`release:` of the Procfile. Raises StageError."""
        with self._start("migrate") as migrating:
            if migrating.wait(MIGRATE_SECONDS) != 0:
                raise StageError(
                    f"cdc_worker migrate ended with {migrating.returncode}; its last lines:\n{migrating.tail()}"
                )

    def start(self) -> None:
        """`worker:` of the Procfile."""
        self._running = self._start("run")

    def check(self) -> None:
        """Raises StageError if it has ended: it never should by itself."""
        if self._running is not None and self._running.returncode is not None:
            raise StageError(
                f"cdc_worker run ended with {self._running.returncode}; its last lines:\n{self._running.tail(15)}"
            )

    def tail(self) -> str:
        """The end of its log, for a failure."""
        return "" if self._running is None else self._running.tail(15)

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop()

    def _start(self, command: str) -> Process:
        return Process(
            [sys.executable, "-m", "cdc_worker", command],
            stdout=self.log,
            env=self._env,
            cwd=ROOT,
            # Its own promise is to be gone well inside 30 s.
            ladder=((signal.SIGTERM, 20.0),),
            # Where we could not do it: after a SIGKILL of the demo.
            remove=[self._folder] if command == "run" else [],
        )


@contextlib.contextmanager
def worker(servers: Servers) -> Iterator[Worker]:
    """The worker, not started yet; stopped, and its log removed, at the end."""
    folder = Path(tempfile.mkdtemp(prefix="cdc-demo-"))
    each = Worker(servers, folder)
    try:
        yield each
    finally:
        each.stop()
        shutil.rmtree(folder, ignore_errors=True)
