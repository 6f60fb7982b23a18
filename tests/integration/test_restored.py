"""Postgres is set back to a backup, or Convex is another one than before: the documents end equal to the rows."""

import asyncio
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from psycopg import sql

from cdc_worker import care
from cdc_worker.mirrors import Mirror
from dev import local_convex as convex
from dev import postgres
from dev.processes import unprivileged
from tests.integration.application import CHECK_INS, STATUS, TABLES, Database, check_in, renamed
from tests.integration.mirrored import Mirrored, convex_at, eventually
from tests.integration.running import SECONDS, Running, quick_settings, worker_at_work

pytestmark = pytest.mark.one_postgres

T = TypeVar("T")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(care, "_MENDING_SECONDS", 0.2)
    monkeypatch.setattr(care, "_RESCAN_SECONDS", 0.05)


@pytest.fixture
def mirrors() -> tuple[Mirror, ...]:
    return renamed(CHECK_INS, STATUS)


@pytest.fixture
def server(postgres_flavour: postgres.Flavour) -> Iterator[postgres.Server]:
    """For this test alone: it is stopped, and set back."""
    with postgres.start(postgres_flavour) as started:
        yield started


@pytest.fixture
def dsn(server: postgres.Server) -> str:
    return server.dsn(postgres.create_database(server))


def begin(db: Database, user: str) -> None:
    """What is in the backup."""
    for key in ("kept", "changed later", "deleted later"):
        check_in(db, user, key)
    db.execute("""insert into "User" values (%s, 'A', '2026-01-02')""", user)
    db.execute("""insert into "Alert" values (%s, %s, 'L1', '2026-01-02Z')""", f"{user}-alert", user)


def go_on(db: Database, user: str) -> None:
    """What is not: nothing of it may be left in the mirror."""
    check_in(db, user, "added later")
    db.execute("""update "CheckIn" set note = 'changed' where id = %s""", f"{user}-changed later")
    db.execute("""delete from "CheckIn" where id = %s""", f"{user}-deleted later")
    db.execute("""update "Alert" set level = 'L4' where "userId" = %s""", user)
    db.execute("""insert into "User" values (%s)""", f"{user}-later")


State = tuple[list[str], str | None, bool]


def state(mirrored: Mirrored, user: str) -> State:
    """The check-ins, the alert's level, and whether the second user has a status."""
    level = (mirrored.status(user) or {}).get("alertLevel")
    return mirrored.descriptions(user), level, mirrored.status(f"{user}-later") is not None


BEFORE: State = (["changed later", "deleted later", "kept"], "L1", False)
AFTER: State = (["added later", "changed", "kept"], "L4", True)


async def rescanned(running: Running, *, since: int) -> str:
    """The cause that the worker gave for looking at everything anew, after so many lines."""
    deadline = asyncio.get_running_loop().time() + SECONDS
    while not (said := [line for line in running.log.lines[since:] if line["event"] == "session.rescan"]):
        assert asyncio.get_running_loop().time() < deadline, running.log.lines[since:]
        await asyncio.sleep(0.01)
    assert {line["level"] for line in said} == {"warning"}
    return str(said[0]["cause"])


async def flows(db: Database, mirrored: Mirrored, user: str) -> None:
    """A change after all that is mirrored as ever."""
    check_in(db, user, "new")
    await eventually(lambda: "new" in mirrored.descriptions(user), expected=True)


# Postgres.


async def backed_up(dsn: str, mirrors: Sequence[Mirror], mirrored: Mirrored, user: str, backup: Callable[[], T]) -> T:
    """A backup of a database that is mirrored, and goes on when it has been made."""
    with Database(dsn, TABLES) as db:
        await asyncio.to_thread(db.migrate, mirrors)
        begin(db, user)
        await eventually(lambda: state(mirrored, user), BEFORE)
        made = await asyncio.to_thread(backup)
        go_on(db, user)
        await eventually(lambda: state(mirrored, user), AFTER)
    return made


async def test_a_dump_that_is_restored_under_the_same_name(
    mirrors: Sequence[Mirror],
    server: postgres.Server,
    dsn: str,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
) -> None:
    async with worker_at_work(quick_settings(dsn, local_convex), mirrors) as running:
        backup = await backed_up(dsn, mirrors, mirrored, user, lambda: dump(server, dsn))
        since = len(running.log.lines)
        await asyncio.to_thread(backup.drop_database)
        await asyncio.to_thread(backup.restore, "--single-transaction")
        assert "another Postgres than before" in await rescanned(running, since=since)
        await eventually(lambda: state(mirrored, user), BEFORE)
        with Database(dsn) as db:
            await flows(db, mirrored, user)
        await running.stop()


async def test_a_dump_that_is_restored_piece_by_piece(
    mirrors: Sequence[Mirror],
    server: postgres.Server,
    dsn: str,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
) -> None:
    """As pg_restore does it unless it is told otherwise: the worker meets tables without rows, and without keys."""
    async with worker_at_work(quick_settings(dsn, local_convex), mirrors) as running:
        backup = await backed_up(dsn, mirrors, mirrored, user, lambda: dump(server, dsn))
        since = len(running.log.lines)
        await asyncio.to_thread(backup.drop_database)
        for section in ("pre-data", "data", "post-data"):
            await asyncio.to_thread(backup.restore, f"--section={section}")
            # Time to meet it: it asks several times a second.
            await asyncio.wait({running.task}, timeout=1.0)
            assert not running.task.done(), f"died of {running.died_of()} after {section}"
        await eventually(lambda: state(mirrored, user), BEFORE)
        with Database(dsn) as db:
            await flows(db, mirrored, user)
        await running.stop()
        assert len([line for line in running.log.lines[since:] if line["event"] == "session.rescan"]) <= 2


class Dump:
    """A dump of a database, made now."""

    def __init__(self, server: postgres.Server, name: str) -> None:
        self._server, self._name = server, name
        self._file = server.folder / f"{name}.dump"
        self._run("pg_dump", "--format=custom", f"--file={self._file}", self._dsn())

    def _dsn(self) -> str:
        return self._server.dsn(self._name, user=postgres.SUPERUSER, tcp=False)

    def _run(self, program: str, *words: str) -> None:
        subprocess.run([self._server.bin_dir / program, *words], check=True, timeout=30, capture_output=True)

    def drop_database(self) -> None:
        """Drops the database, which may be in use, and makes an empty one of the same name."""
        postgres.drop_database(self._server, self._name)
        with self._server.admin() as connection:
            connection.execute(
                sql.SQL("create database {} owner {}").format(*map(sql.Identifier, (self._name, postgres.APPLICATION)))
            )

    def restore(self, *words: str) -> None:
        self._run("pg_restore", *words, "--exit-on-error", f"--dbname={self._dsn()}", str(self._file))


def dump(server: postgres.Server, dsn: str) -> Dump:
    return Dump(server, dsn.rpartition("/")[2])


@pytest.mark.parametrize("position", ["noted", "moved on"])
async def test_a_data_folder_that_is_set_back(
    mirrors: Sequence[Mirror],
    server: postgres.Server,
    dsn: str,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
    position: str,
) -> None:
    """The same cluster, database and tables in all but their age: only the epoch that Convex holds tells."""
    async with worker_at_work(quick_settings(dsn, local_convex), mirrors) as running:
        with Database(dsn, TABLES) as db:
            await asyncio.to_thread(db.migrate, mirrors)
            begin(db, user)
            await eventually(lambda: state(mirrored, user), BEFORE)
        backup = await asyncio.to_thread(copy_of, server)
        with Database(dsn) as db:
            go_on(db, user)
            await eventually(lambda: state(mirrored, user), AFTER)
            if position == "moved on":
                # Transaction ids far beyond those of the backup.
                db.execute("do $$ begin for n in 1..500 loop perform pg_current_xact_id(); commit; end loop; end $$")
                await flows(db, mirrored, user)
        since = len(running.log.lines)
        await asyncio.to_thread(set_back, server, backup)
        assert "Postgres was set back to an older state" in await rescanned(running, since=since)
        await eventually(lambda: state(mirrored, user), BEFORE)
        with Database(dsn) as db:
            await flows(db, mirrored, user)
        await running.stop()


async def test_a_data_folder_that_is_set_back_to_a_copy_of_a_running_server(
    mirrors: Sequence[Mirror],
    server: postgres.Server,
    dsn: str,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
) -> None:
    """As a snapshot of a disk or of a virtual machine: the session that is at work is in it, with its epoch."""
    async with worker_at_work(quick_settings(dsn, local_convex), mirrors):
        backup = await backed_up(dsn, mirrors, mirrored, user, lambda: hot_copy_of(server))
        await asyncio.to_thread(set_back, server, backup)
        await eventually(lambda: state(mirrored, user), BEFORE)


def hot_copy_of(server: postgres.Server) -> Path:
    copied = server.folder / "backup"
    uid, gid = unprivileged() or (None, None)
    subprocess.run(
        [
            *(server.bin_dir / "pg_basebackup", "--pgdata", copied, "--checkpoint=fast", "--wal-method=fetch"),
            *("--no-sync", "--dbname", server.dsn(postgres.SUPERUSER, user=postgres.SUPERUSER, tcp=False)),
        ],
        user=uid,
        group=gid,
        extra_groups=None if uid is None else [],
        cwd=server.folder,
        check=True,
        timeout=30,
        capture_output=True,
    )
    return copied


def copy_of(server: postgres.Server) -> Path:
    """A cold copy of the server's data; it runs again afterwards."""
    server.stop()
    copied = server.folder / "backup"
    clone(server.folder / "data", copied)
    server.start()
    return copied


def set_back(server: postgres.Server, backup: Path) -> None:
    server.stop()
    shutil.rmtree(server.folder / "data")
    clone(backup, server.folder / "data")
    server.start()


def clone(source: Path, target: Path) -> None:
    # With owners and rights: the server drops to a user of its own.
    subprocess.run(["cp", "--archive", source, target], check=True, timeout=30)


# Convex.


async def test_an_empty_deployment_at_the_same_address(mirrors: Sequence[Mirror], database: str, user: str) -> None:
    port = postgres.free_port()
    with Database(database, TABLES, mirrors) as db, convex_at(port) as first:
        mirrored = Mirrored(first.url, first.admin_key)
        async with worker_at_work(quick_settings(database, first), mirrors) as running:
            begin(db, user)
            await eventually(lambda: state(mirrored, user), BEFORE)
            await running.said("backfill.done", times=len(mirrors))
            since = len(running.log.lines)
            await asyncio.to_thread(first.process.stop)
            with convex_at(port):
                assert state(mirrored, user) == ([], None, False)
                # Whatever is asked of it tells.
                go_on(db, user)
                assert "another deployment" in await rescanned(running, since=since)
                await eventually(lambda: state(mirrored, user), AFTER)
                await running.stop()


async def test_a_deployment_that_was_set_back_within_an_epoch(
    mirrors: Sequence[Mirror],
    database: str,
    fresh_convex: convex.LocalConvex,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It remembers less than it was told: here somebody else tells it so."""
    monkeypatch.setattr(care, "_SELDOM_SECONDS", 0.2)
    mirrored = Mirrored(fresh_convex.url, fresh_convex.admin_key)
    with Database(database, TABLES, mirrors) as db:
        async with worker_at_work(quick_settings(database, fresh_convex), mirrors) as running:
            begin(db, user)
            await eventually(lambda: state(mirrored, user), BEFORE)
            epoch = running.log.of("session.open")[0]["epoch"]
            since = len(running.log.lines)
            await asyncio.to_thread(mirrored.note_saves, "0", epoch, 1_000_000)
            go_on(db, user)
            assert "the deployment was set back" in await rescanned(running, since=since)
            await running.stop()


async def test_a_deployment_that_was_set_back_within_an_epoch_while_no_worker_ran(
    mirrors: Sequence[Mirror],
    database: str,
    fresh_convex: convex.LocalConvex,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an operator restores a backup: the worker is stopped before, or restarted soon after."""
    monkeypatch.setattr(care, "_SELDOM_SECONDS", 0.2)
    settings = quick_settings(database, fresh_convex)
    mirrored = Mirrored(fresh_convex.url, fresh_convex.admin_key)
    with Database(database, TABLES, mirrors) as db:
        async with worker_at_work(settings, mirrors):
            begin(db, user)
            await eventually(lambda: state(mirrored, user), BEFORE)
        async with worker_at_work(settings, mirrors) as running:
            epoch = (await running.said("session.open"))["epoch"]
            backup = db.one("select told_saves from cdc.checkpoint")
            go_on(db, user)
            await eventually(lambda: state(mirrored, user), AFTER)
            await eventually(lambda: db.one("select told_saves from cdc.checkpoint") > backup, expected=True)
            assert not running.log.of("session.rescan"), "it is as the worker before had left it"
        await asyncio.to_thread(mirrored.note_saves, "0", epoch, backup)
        async with worker_at_work(settings, mirrors) as running:
            assert "the deployment was set back" in await rescanned(running, since=0)


async def test_a_postgres_that_was_restored_is_not_taken_for_a_convex_that_was(
    mirrors: Sequence[Mirror], database: str, fresh_convex: convex.LocalConvex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save after a restore is not what Convex was told at the opening."""
    monkeypatch.setattr(care, "_SELDOM_SECONDS", 0.2)
    settings = quick_settings(database, fresh_convex)
    with Database(database, TABLES, mirrors) as db:
        async with worker_at_work(settings, mirrors) as running:
            await running.said("session.open")
        db.execute("update cdc.checkpoint set incarnation = 'of another cluster'")
        async with worker_at_work(settings, mirrors) as running:
            await running.said("session.open")
            opened = db.one("select told_saves from cdc.checkpoint")
            await eventually(lambda: db.one("select told_saves from cdc.checkpoint") > opened, expected=True)
        causes = [line["cause"] for line in running.log.of("session.rescan")]
        assert causes == ["this is another Postgres than before (restored, failed over, or copied)"]


async def test_triggers_that_come_back(
    mirrors: Sequence[Mirror],
    database: str,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was written without them is found all the same; and it is said for as long as they are missing."""
    monkeypatch.setattr(care, "_SELDOM_SECONDS", 0.2)
    monkeypatch.setattr(care, "_MENDING_SECONDS", 0.1)
    monkeypatch.setattr(care, "_MISSING_REMINDER_SECONDS", 0.5)
    with Database(database, TABLES, mirrors) as db:
        async with worker_at_work(quick_settings(database, local_convex), mirrors) as running:
            begin(db, user)
            await eventually(lambda: state(mirrored, user), BEFORE)
            db.execute("""alter table "CheckIn" disable trigger user""")
            assert (await running.said("capture.missing", times=2))["tables"] == ['"CheckIn"']
            go_on(db, user)
            db.execute("""alter table "CheckIn" enable trigger user""")
            await running.said("capture.restored")
            await eventually(lambda: state(mirrored, user), AFTER)
            await running.stop()


async def test_triggers_that_were_off_between_two_looks(
    mirrors: Sequence[Mirror],
    database: str,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `pg_restore --data-only --disable-triggers` leaves them: nobody saw them off."""
    monkeypatch.setattr(care, "_SELDOM_SECONDS", 0.2)
    with Database(database, TABLES, mirrors) as db:
        async with worker_at_work(quick_settings(database, local_convex), mirrors) as running:
            begin(db, user)
            await eventually(lambda: state(mirrored, user), BEFORE)
            await running.said("backfill.done", times=2)
            db.execute("""begin; alter table "CheckIn" disable trigger user""")
            go_on(db, user)
            db.execute("""alter table "CheckIn" enable trigger user; commit""")
            assert (await running.said("capture.restored"))["tables"] == ['"CheckIn"']
            await eventually(lambda: state(mirrored, user), AFTER)
            assert len(running.log.of("capture.restored")) == 1
            assert running.log.of("capture.missing") == []
            await running.stop()
        # And `migrate` makes them such that it would be seen once more.
        db.migrate(mirrors)
        assert db.execute("select distinct tgenabled from pg_trigger where tgname like 'cdc_%'") == [("A",)]
