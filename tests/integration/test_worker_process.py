"""The command `run` in a process of its own: signals, exit codes, two workers, and what stands in the log."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from dev import local_convex as convex
from dev import postgres
from dev.link import link_to
from tests.integration.application import CHECK_INS, STATUS, TABLES, Database, rows_of, through, toml
from tests.integration.mirrored import Mirrored, convex_at, eventually
from tests.integration.running import SECONDS, Child, child, environment

pytestmark = pytest.mark.one_postgres

MIRRORS = (CHECK_INS, STATUS)
# Less than what a platform gives, and the resolver below takes; time enough for an interpreter to start.
ENDS_SECONDS = 30
SECRET_NOTE = "what nobody may read in a log"


@pytest.fixture
def db(database: str) -> Iterator[Database]:
    with Database(database, TABLES, MIRRORS) as opened:
        yield opened


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "cdc_worker.toml"


def until(look: Callable[[], object], expected: object) -> None:
    asyncio.run(eventually(look, expected))


def check_in(db: Database, user: str, key: str) -> None:
    db.execute(
        """insert into "CheckIn" values (%s, %s, %s, %s, now())""",
        f"{user}-{key}", user, SECRET_NOTE, json.dumps({"inside": SECRET_NOTE}),
    )  # fmt: skip


def test_sigterm_ends_it_in_order(
    db: Database, local_convex: convex.LocalConvex, mirrored: Mirrored, config: Path, user: str
) -> None:
    # No heartbeat between the last lines, and a drain that no busy machine exceeds.
    env = environment(db.dsn, local_convex, config, CDC_HEARTBEAT_SECONDS=3600, CDC_DRAIN_SECONDS=20)
    with child(config.parent, env, mirrors=MIRRORS) as worker:
        worker.said("backfill.done", times=len(MIRRORS))
        check_in(db, user, "1")
        until(lambda: len(mirrored.activities(user)), 1)
        worker.term()
        assert worker.process.wait(ENDS_SECONDS) == 0
        events = [line["event"] for line in worker.lines]
        first = events.index("worker.stop_requested")
        assert events[first:] == ["worker.stop_requested", "session.stopping", "session.drained", "worker.stopped"]
        assert worker.process.stdout.read_text() == ""
    assert db.one("select holder is null from cdc.checkpoint") is True


def test_a_second_signal_ends_it_at_once(
    db: Database, fresh_convex: convex.LocalConvex, config: Path, user: str
) -> None:
    env = environment(db.dsn, fresh_convex, config, CDC_DRAIN_SECONDS=25, CDC_CONVEX_TIMEOUT_SECONDS=300)
    with child(config.parent, env, mirrors=MIRRORS) as worker:
        worker.said("session.open")
        fresh_convex.process.signal(signal.SIGSTOP)
        check_in(db, user, "1")
        # Something that the stop waits for.
        until(lambda: worker.lines[-1].get("keys_under_way"), 1)
        worker.term()
        worker.said("session.stopping")
        worker.process.signal(signal.SIGINT)
        # Long before the drain would have ended, and with another code.
        assert worker.process.wait(15) == 1
        assert worker.lines[-1]["event"] == "worker.killed"


def test_sigterm_ends_it_also_if_nobody_reads_its_log_any_more(
    db: Database, local_convex: convex.LocalConvex, config: Path
) -> None:
    config.write_text(toml(MIRRORS))
    env = environment(db.dsn, local_convex, config) | {"CONVEX_URL": f"http://127.0.0.1:{postgres.free_port()}"}
    with subprocess.Popen(
        [sys.executable, "-m", "cdc_worker", "run"], stderr=subprocess.PIPE, env=env, cwd=config.parent
    ) as worker:
        assert worker.stderr is not None
        try:
            while b"convex.unreachable" not in worker.stderr.readline():
                pass
            worker.stderr.close()
            worker.terminate()
            worker.wait(ENDS_SECONDS)
        finally:
            worker.kill()


class Unread:
    """A worker whose log is a pipe, which the test may close."""

    def __init__(self, config: Path, env: dict[str, str]) -> None:
        config.write_text(toml(MIRRORS))
        argv = [sys.executable, "-m", "cdc_worker", "run"]
        self.process = subprocess.Popen(argv, stderr=subprocess.PIPE, env=env, cwd=config.parent)
        assert self.process.stderr is not None
        self.stderr = self.process.stderr

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.stderr.close()

    async def until_said(self, event: str) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            for line in self.stderr:
                said: dict[str, Any] = json.loads(line)
                if said["event"] == event:
                    return said
            raise AssertionError(f"it ended, and never said {event}")

        return await asyncio.to_thread(read)


@pytest.mark.parametrize("state", ["session.open", "lease.standby", "convex.unreachable"])
async def test_it_ends_with_the_first_line_that_nobody_takes(
    db: Database, local_convex: convex.LocalConvex, config: Path, state: str
) -> None:
    """Also where it has just said that the database is away, so that what looks the same would not be said."""
    port, convex_port = db.connection.info.port, postgres.free_port()
    env = environment(db.dsn, local_convex, config)
    async with link_to("127.0.0.1", port) as link:
        behind = env | {"DATABASE_URL": through(link.port, db.dsn)}
        behind |= {"CDC_HEARTBEAT_SECONDS": "300", "CDC_STALL_SECONDS": "600"}
        if state == "convex.unreachable":
            behind["CONVEX_URL"] = f"http://127.0.0.1:{convex_port}"
        with contextlib.ExitStack() as running:
            first = running.enter_context(Unread(config, env)) if state == "lease.standby" else None
            if first is not None:
                await first.until_said("session.open")
            worker = running.enter_context(Unread(config, behind))
            name = (await worker.until_said("worker.started"))["holder"]
            await worker.until_said(state)
            link.lead_to("127.0.0.1", postgres.free_port())
            link.cut()
            await worker.until_said("database.unreachable")
            if state == "session.open":
                worker.stderr.close()
            looked = db.one("select expires_at from cdc.worker where name = %s", name)
            link.lead_to("127.0.0.1", port)
            if state != "session.open":
                is_back = "select expires_at > %s from cdc.worker where name = %s"
                await eventually(lambda: db.one(is_back, looked, name), expected=True)
                worker.stderr.close()
            if first is not None:
                first.process.kill()
            if state == "convex.unreachable":
                running.enter_context(convex_at(convex_port, admin_key=local_convex.admin_key))
            assert await asyncio.to_thread(worker.process.wait, ENDS_SECONDS) == 1


@pytest.mark.parametrize("host_of", ["Postgres", "Convex"])
def test_sigterm_ends_it_while_a_name_is_looked_up(
    db: Database, local_convex: convex.LocalConvex, config: Path, host_of: str
) -> None:
    """A resolver that does not answer is asked in a thread, which nothing can end."""
    slow = """
import socket, time
look_up = socket.getaddrinfo
def slowly(host, *args, **kwargs):
    if host in ("slow.test", b"slow.test"):
        time.sleep(60)
    return look_up(host, *args, **kwargs)
socket.getaddrinfo = slowly
from cdc_worker.__main__ import app
app()
"""
    env = environment(db.dsn, local_convex, config)
    env |= {"DATABASE_URL": "postgresql://slow.test/x"} if host_of == "Postgres" else {"CONVEX_URL": "http://slow.test"}
    with child(config.parent, env, mirrors=MIRRORS, program=("-c", slow)) as worker:
        worker.said("worker.started" if host_of == "Postgres" else "convex.unreachable")
        time.sleep(0.5)
        worker.term()
        # The resolver takes a minute.
        assert worker.process.wait(ENDS_SECONDS) == 0
        assert worker.lines[-1]["event"] == "worker.stopped"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_worker_stands_by_and_takes_over(
    db: Database, local_convex: convex.LocalConvex, mirrored: Mirrored, config: Path, user: str, how: signal.Signals
) -> None:
    env = environment(db.dsn, local_convex, config, CDC_LEASE_SECONDS=120)
    with (
        child(config.parent, env, mirrors=MIRRORS, name="first") as first,
        child(config.parent, env, name="second") as second,
    ):
        leader, standby = _in_order(first, second)
        assert standby.said("lease.standby")["holder"] == leader.lines[0]["holder"]
        check_in(db, user, "1")
        until(lambda: len(mirrored.activities(user)), 1)
        assert "session.open" not in [line["event"] for line in standby.lines]
        leader.process.signal(how)
        check_in(db, user, "2")
        # Long before the lease would have run out.
        standby.said("lease.acquired")
        until(lambda: len(mirrored.activities(user)), 2)


def _in_order(first: Child, second: Child) -> tuple[Child, Child]:
    """Who has the lease, and who has not."""
    deadline = time.monotonic() + SECONDS
    while True:
        for one, other in ((first, second), (second, first)):
            if "session.open" in [line["event"] for line in one.lines]:
                return one, other
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_log_has_no_row_and_no_secret(
    db: Database, local_convex: convex.LocalConvex, mirrored: Mirrored, config: Path, user: str
) -> None:
    # Everything that has something to say: rows that are parked for each reason, a broken mirror, a rescan.
    query = CHECK_INS.query.replace(
        "'check-in' as type", "case when id like '%%bad%%' then note else 'check-in' end as type"
    )
    failing = CHECK_INS.model_copy(update={"name": "failing", "query": query.replace("%%", "%")})
    casting = rows_of('"CheckIn"', name="casting")
    casting = casting.model_copy(update={"query": casting.query.replace("'row'", "(note::int)::text")})
    mirrors = (failing, casting, STATUS)
    db.migrate(mirrors)
    env = environment(db.dsn, local_convex, config, LOG_LEVEL="DEBUG")
    with child(config.parent, env, mirrors=mirrors) as worker:
        worker.said("session.open")
        check_in(db, user, "good")
        check_in(db, user, "bad")
        until(lambda: len(mirrored.activities(user)), 1)
        worker.said("key.parked", times=2)
        db.execute('alter table "CheckIn" rename column note to remark')
        db.execute("""update "CheckIn" set remark = remark || ' again'""")
        worker.said("mirror.broken")
        worker.said("worker.heartbeat")
        worker.term()
        assert worker.process.wait(ENDS_SECONDS) == 0
        text = worker.process.stderr.read_text()
        lines = worker.lines
    assert {line["level"] for line in lines} >= {"debug", "info", "error"}
    for line in lines:
        assert line["event"].replace(".", "").replace("_", "").isalpha()
        assert line["timestamp"].endswith("Z")
    password = db.dsn.split(":")[2].split("@")[0]
    for secret in (SECRET_NOTE, password, local_convex.admin_key, local_convex.admin_key.split("|")[1]):
        assert secret not in text


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no database": ({"DATABASE_URL": ""}, "DATABASE_URL is not set"),
    "a bound": ({"CDC_BATCH_KEYS": "501"}, "CDC_BATCH_KEYS: Input should be less than or equal to 500 (it is '501')"),
    "no config": ({"CDC_CONFIG": "nowhere.toml"}, "there is no nowhere.toml"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_wrong_setting_is_one_line_and_exit_2(db: Database, config: Path, what: str) -> None:
    given, words = REFUSALS[what]
    with child(config.parent, environment(db.dsn, None, config, **given), mirrors=None) as worker:
        assert worker.process.wait(ENDS_SECONDS) == 2
        text = worker.process.stderr.read_text()
    assert text.startswith(f"cdc-worker: {words}")
    assert len(text.splitlines()) == 1


def test_a_database_that_is_out_of_reach_is_one_line_and_exit_1(config: Path) -> None:
    env = environment(f"postgresql://someone:s3cret@127.0.0.1:{postgres.free_port()}/nowhere", None, config)
    with child(config.parent, env, "migrate", mirrors=MIRRORS) as command:
        assert command.process.wait(ENDS_SECONDS) == 1
        text = command.process.stderr.read_text()
    assert text.startswith("cdc-worker: the database is out of reach: ")
    assert "s3cret" not in text
    assert len(text.splitlines()) == 1


def test_backfill_of_a_mirror_that_is_not_there(db: Database, config: Path) -> None:
    with child(config.parent, environment(db.dsn, None, config), "backfill", "nothing", mirrors=MIRRORS) as command:
        assert command.process.wait(ENDS_SECONDS) == 2
        assert 'no mirror "nothing" (there are: check-ins, status)' in command.process.stderr.read_text()


def test_backfill_marks_every_row(db: Database, config: Path) -> None:
    db.execute("""insert into "User" select n::text from generate_series(1, 2500) as n""")
    db.captured()
    db.execute("update cdc.backfill set phase = 'done'")
    with child(config.parent, environment(db.dsn, None, config), "backfill", "status", mirrors=MIRRORS) as command:
        assert command.process.wait(ENDS_SECONDS) == 0
        assert command.said("backfill.done")["keys"] == 2500
    assert len(set(db.captured())) == 2500


def test_the_environment_is_not_needed_for_help() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "cdc_worker", "--help"],
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 0
    for word in ("run", "migrate", "backfill", "DATABASE_URL"):
        assert word in ran.stdout
