"""What the cases play on: a Postgres with durable commits, an application's table, a sink, and the real worker."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, LiteralString, Self

import psycopg

from dev import postgres
from dev.bench import meter, sink
from dev.processes import Process

ROOT: Final = Path(__file__).parents[2]
PATIENCE_SECONDS: Final = 60.0
# A statement of so many rows, as an import makes them.
BULK: Final = 10_000

# As a small managed Postgres is set, but for what is said in docs/performance.md.
SETTINGS: Final = {
    "shared_buffers": "512MB",
    "max_wal_size": "2GB",
    "max_connections": "120",
    "autovacuum_naptime": "1min",
}

# The same table twice: the first is mirrored, the second is what writers would have without us.
TABLES: LiteralString = """
create table bench_event (
    id bigint primary key, user_id text not null, kind text not null, note text, details jsonb,
    created_at timestamptz not null default now()
);
create table bench_plain (like bench_event including all);
"""
# About 400 bytes as a document.
ROWS: LiteralString = """
select i, 'user-' || mod(i, 2000), 'check-in', 'Note ' || i || ' ' || repeat(md5(i::text), 4),
       jsonb_build_object('mood', 'good', 'score', mod(i, 10), 'device', md5((i + 1)::text),
                          'place', jsonb_build_object('lat', 52.5, 'lon', 13.4), 'tags', jsonb_build_array('a', 'b')),
       now()
"""
CONFIG: Final = """
[[mirror]]
name = "events"
target = "activity"
key = ["id"]
query = '''
select id, user_id, kind as type, note as description, created_at as timestamp, details as metadata from bench_event
'''
sources = [{ table = "bench_event", key = ["id"] }]
"""


class BenchError(Exception):
    """A part of the stage did not do what the measurement needs; says what it printed."""


class Stage:
    """One database with the application's tables, and the sink that its workers talk to."""

    def __init__(self, server: postgres.Server, dsn: str, convex: sink.Client, folder: Path, shards: int) -> None:
        self.server = server
        self.dsn = dsn
        self.sink = convex
        self.folder = folder
        self.shards = shards
        self.rows = 0
        self._config = folder / "cdc_worker.toml"
        self._config.write_text(CONFIG)
        self.connection = psycopg.connect(dsn, autocommit=True)

    @property
    def socket_dsn(self) -> str:
        return self.server.dsn(self.connection.info.dbname, tcp=False)

    def execute(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        cursor = self.connection.execute(statement, params or None)
        return cursor.fetchall() if cursor.description is not None else []

    def one(self, statement: str, *params: Any) -> Any:
        ((value,),) = self.execute(statement, *params)
        return value

    def wal(self) -> int:
        """Bytes of write-ahead log since the beginning of time."""
        return int(self.one("select (pg_current_wal_insert_lsn() - '0/0')::bigint"))

    def add(self, rows: int, *, table: str = "bench_event", bulk: int = BULK) -> None:
        """So many rows more, in statements of `bulk` rows."""
        for start in range(0, rows, bulk):
            first = self.rows + start + 1
            last = self.rows + min(start + bulk, rows)
            self.execute(f"insert into {table} {ROWS} from generate_series({first}, {last}) as i")
        self.rows += rows

    def migrate(self) -> None:
        with self._command("migrate", self._environment({})) as process:
            if process.wait(PATIENCE_SECONDS) != 0:
                raise BenchError(f"migrate failed:\n{process.tail()}")

    def settle(self) -> None:
        """One worker's life, so that the first comparison of everything is not measured with what comes after."""
        self.sink.control()
        with self.worker():
            self.sink.wait(opens=self.shards, seconds=PATIENCE_SECONDS)
            self.until("select not exists (select from cdc.backfill where phase <> 'done')")
            self.until("select count(*) from cdc.checkpoint where saved_at > now() - interval '1 hour'")

    def until(self, question: str, *params: Any) -> None:
        """Waits until a query says true."""
        for _ in range(1_500):
            if self.one(question, *params):
                return
            self.one("select pg_sleep(0.02)")
        raise BenchError(f"waited in vain for: {question}")

    @contextlib.contextmanager
    def worker(
        self, settings: Mapping[str, Any] | None = None, *, dsn: str | None = None, module: Sequence[str] = ()
    ) -> Iterator["Running"]:
        """`cdc-worker run` as production starts it, or under another program, such as a profiler."""
        environment = self._environment(settings or {}, dsn)
        with self._command("run", environment, module=module or ("-m", "cdc_worker")) as process:
            running = Running(process, self.server)
            try:
                yield running
            except BaseException:
                sys.stderr.write(process.tail(15) + "\n")
                raise

    def _command(self, command: str, environment: Mapping[str, str], module: Sequence[str] = ()) -> Process:
        return Process(
            [sys.executable, *(module or ("-m", "cdc_worker")), command],
            stdout=self.folder / "worker.log",
            env=environment,
            cwd=ROOT,
            ladder=((signal.SIGTERM, 15.0),),
        )

    def _environment(self, settings: Mapping[str, Any], dsn: str | None = None) -> dict[str, str]:
        ours = ("CDC_", "CONVEX_", "LOG_", "LISTEN_", "NEXT_PUBLIC_CONVEX")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return inherited | {
            "DATABASE_URL": dsn or self.dsn,
            "CONVEX_URL": self.sink.url,
            "CONVEX_DEPLOY_KEY": sink.KEY,
            "CDC_CONFIG": str(self._config),
            "CDC_SHARDS": str(self.shards),
            "LOG_FORMAT": "json",
            **{name: str(value) for name, value in settings.items()},
        }


class Running:
    """A worker that runs, and what it and Postgres have cost so far."""

    def __init__(self, process: Process, server: postgres.Server) -> None:
        self.process = process
        self._server = server
        self._pid: int | None = None

    @property
    def pid(self) -> int:
        # Whoever asks has seen the program at work.
        if self._pid is None:
            self._pid = meter.program_of(self.process.keeper_pid)
        return self._pid

    def cost(self) -> "Cost":
        return Cost(meter.cpu_seconds(self.pid), meter.tree_cpu_seconds(self._server.pid), meter.peak_bytes(self.pid))


@dataclass(frozen=True)
class Cost:
    """Processor seconds of the worker and of Postgres, and the worker's peak of memory."""

    worker_seconds: float
    postgres_seconds: float
    peak_bytes: int

    @classmethod
    def of(cls, workers: Sequence[Running]) -> Self:
        """Of several workers on one stage: all their time, and the largest one's memory."""
        each = [running.cost() for running in workers]
        return cls(
            sum(cost.worker_seconds for cost in each), each[0].postgres_seconds, max(cost.peak_bytes for cost in each)
        )

    def since(self, before: Self) -> "Cost":
        return Cost(
            self.worker_seconds - before.worker_seconds,
            self.postgres_seconds - before.postgres_seconds,
            self.peak_bytes,
        )


@contextlib.contextmanager
def stage(server: postgres.Server, *, captured: bool = True, shards: int = 1) -> Iterator[Stage]:
    """A fresh database with empty tables, and a sink that belongs to it."""
    folder = Path(tempfile.mkdtemp(prefix="cdc-bench-"))
    try:
        with postgres.database(server) as dsn, sink.start() as convex:
            each = Stage(server, dsn, convex, folder, shards)
            try:
                each.execute(TABLES)
                if captured:
                    each.migrate()
                    each.settle()
                yield each
            finally:
                each.connection.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def durable_server() -> Iterator[postgres.Server]:
    """The installed Postgres if there is one, else the wheel's; commits reach the disk."""
    flavour: postgres.Flavour = "installed" if postgres.bin_dir("installed") is not None else "wheel"
    with postgres.start(flavour, durable=True, settings=SETTINGS) as server:
        yield server


@contextlib.contextmanager
def altered(server: postgres.Server, settings: Mapping[str, int]) -> Iterator[None]:
    """For every backend of the server, for a while."""
    with server.admin() as connection:
        for name, value in settings.items():
            connection.execute(f"alter system set {name} = {value}".encode())
        connection.execute("select pg_reload_conf()")
        yield
        for name in settings:
            connection.execute(f"alter system reset {name}".encode())
        connection.execute("select pg_reload_conf()")
