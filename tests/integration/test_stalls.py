"""A wait that nothing ends: the process says what it waits for, and exits, wherever it is stuck."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc_worker.mirrors import Mirror
from dev import local_convex as convex
from dev.processes import ProcessError
from tests.integration.application import CHECK_INS, TABLES, Database, toml
from tests.integration.running import ROOT, SECONDS, Child, child, environment

pytestmark = pytest.mark.one_postgres

# Of a machine that is busy a wait that is well takes up to so long.
LIMIT_SECONDS = 4.0
# The worker as it is, but for the limit, of which the least that may be set is a minute, and what must be below it.
IMPATIENT = f"""
from cdc_worker import liveness, reader, worker
reader._LOOKOUT_SECONDS = {LIMIT_SECONDS / 3}
liveness._SAY_SECONDS = 1.0
worker.Liveness = lambda _: liveness.Liveness({LIMIT_SECONDS})
from cdc_worker.__main__ import main
main()
"""
# As if no deadline of its own held: they are all far away.
ENDLESS: dict[str, Any] = {
    "CDC_STATEMENT_SECONDS": 600,
    "CDC_CONVEX_TIMEOUT_SECONDS": 300,
    "CDC_STALL_SECONDS": 7200,
    "CDC_LEASE_SECONDS": 30,
}
STATEMENT = "a statement in Postgres"


@pytest.fixture
def mirror() -> Mirror:
    """Of a check-in without a note there can be no document."""
    name = f"check-ins-{uuid.uuid4().hex[:8]}"
    return CHECK_INS.model_copy(
        update={"name": name, "query": CHECK_INS.query.replace("coalesce(note, 'Checked in')", "note")}
    )


@pytest.fixture
def db(database: str, mirror: Mirror) -> Iterator[Database]:
    with Database(database, TABLES, [mirror]) as opened:
        yield opened


@contextlib.contextmanager
def locked(db: Database, table: str) -> Iterator[None]:
    with psycopg.connect(db.dsn) as holder:
        holder.execute(f"lock table {table} in access exclusive mode")
        yield


def check_in(db: Database, note: str | None) -> None:
    db.execute("""insert into "CheckIn" values (gen_random_uuid(), 'u', %s, null, now())""", note)


def ring(db: Database) -> None:
    db.execute("notify cdc_outbox")


def nothing(_: Database) -> None:
    pass


# What is locked once the worker is at work (or, from the start, where it is stuck before), what it then has to do, and
# what it may say beside the statement itself.
STATIONS: dict[str, tuple[bool, str, Callable[[Database], None], str]] = {
    "lease": (False, "cdc.checkpoint", nothing, STATEMENT),
    "reader": (True, "cdc.outbox", ring, "the log in Postgres"),
    "checkpoint": (True, "cdc.checkpoint", lambda db: check_in(db, "good"), "a checkpoint in Postgres"),
    "parking": (True, "cdc.parked_key", lambda db: check_in(db, None), "the outcome of a batch"),
}


@pytest.mark.parametrize("station", STATIONS)
def test_a_lock_that_is_never_let_go(
    db: Database, local_convex: convex.LocalConvex, mirror: Mirror, tmp_path: Path, station: str
) -> None:
    at_work, table, then, other = STATIONS[station]
    env = environment(db.dsn, local_convex, tmp_path / "cdc_worker.toml", **ENDLESS)
    with contextlib.ExitStack() as stack:
        if not at_work:
            stack.enter_context(locked(db, table))
        worker = stack.enter_context(child(tmp_path, env, mirrors=[mirror], program=("-c", IMPATIENT)))
        if at_work:
            worker.said("backfill.done")
            stack.enter_context(locked(db, table))
        then(db)
        stalled(worker, {STATEMENT, other})


def test_a_convex_that_never_answers(
    db: Database, fresh_convex: convex.LocalConvex, mirror: Mirror, tmp_path: Path
) -> None:
    env = environment(db.dsn, fresh_convex, tmp_path / "cdc_worker.toml", **ENDLESS)
    fresh_convex.process.signal(signal.SIGSTOP)
    with child(tmp_path, env, mirrors=[mirror], program=("-c", IMPATIENT)) as worker:
        stalled(worker, {"an answer from Convex"})
    fresh_convex.process.signal(signal.SIGCONT)


def stalled(worker: Child, waits_for: set[str]) -> None:
    assert worker.process.wait(60) == 1
    said = worker.said("worker.stalled")
    assert said["waits_for"].removesuffix(" (shard 0/1)") in waits_for
    assert said["level"] == "critical"


def test_one_with_nothing_to_do_is_not_stuck(
    db: Database, local_convex: convex.LocalConvex, mirror: Mirror, tmp_path: Path
) -> None:
    """However seldom it says how things stand, and notes a position that moves on with nothing in it."""
    env = environment(db.dsn, local_convex, tmp_path / "cdc_worker.toml", CDC_HEARTBEAT_SECONDS=3600)
    with child(tmp_path, env, mirrors=[mirror], program=("-c", IMPATIENT)) as worker:
        worker.said("backfill.done")
        check_in(db, "good")
        until_delivered = "select saves > 0 from cdc.checkpoint"
        deadline = time.monotonic() + SECONDS
        while not db.one(until_delivered):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(ProcessError):
            worker.process.wait(2 * LIMIT_SECONDS)
        worker.term()
        assert worker.process.wait(30) == 0
        assert "worker.stalled" not in [line["event"] for line in worker.lines]


def test_a_log_that_nobody_reads(
    db: Database, local_convex: convex.LocalConvex, mirror: Mirror, tmp_path: Path
) -> None:
    """The platform's log router hangs: each line blocks the process in the middle of its event loop, even the last."""
    config = tmp_path / "cdc_worker.toml"
    config.write_text(toml([mirror]))
    env = environment(db.dsn, local_convex, config, LOG_LEVEL="DEBUG")
    reading, writing = os.pipe()
    os.write(writing, b"x" * 65_536)  # as much as it takes
    try:
        with subprocess.Popen([sys.executable, "-c", IMPATIENT, "run"], env=env, cwd=ROOT, stderr=writing) as worker:
            try:
                assert worker.wait(60) == 1
            finally:
                worker.kill()
    finally:
        os.close(reading)
        os.close(writing)
