"""The worker end to end, in this process: what is in Postgres is in Convex, whatever is out of order meanwhile."""

import asyncio
import contextlib
import json
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc_worker import backfill as rescans
from cdc_worker import care, checkpoint, parking, reader, registry, session, shards
from cdc_worker.capture import CHANNEL
from cdc_worker.catalog import check
from cdc_worker.mirrors import Mirror, Source
from cdc_worker.outbox import Position
from cdc_worker.plan import Plan
from cdc_worker.safe_json import restore
from dev import local_convex as convex
from dev import postgres
from tests.integration.application import CHECK_INS, STATUS, TABLES, Database, renamed, rows_of
from tests.integration.interposed import Interposed, hangs_after, held_until
from tests.integration.mirrored import Mirrored, convex_at, eventually
from tests.integration.running import Running, child, environment, quick_settings, worker_at_work

# What differs between versions of Postgres is tested in test_capture.py and test_migrate.py.
pytestmark = pytest.mark.one_postgres

Work = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at seldom, so that it costs nothing, is looked at often here."""
    monkeypatch.setattr(care, "_MENDING_SECONDS", 0.2)
    monkeypatch.setattr(care, "_RESCAN_SECONDS", 0.05)


@pytest.fixture
def mirrors() -> tuple[Mirror, ...]:
    return (*renamed(CHECK_INS), STATUS)


@pytest.fixture
def work(db: Database, local_convex: convex.LocalConvex, mirrors: Sequence[Mirror]) -> Work:
    """A worker between the test's database and the shared Convex; further settings by name."""

    def start(mirrors: Sequence[Mirror] = mirrors, **given: Any) -> AbstractAsyncContextManager[Running]:
        return worker_at_work(quick_settings(db.dsn, local_convex, **given), mirrors)

    return start


def check_in(db: Database, user: str, key: str, note: str | None = None) -> None:
    db.execute(
        """insert into "CheckIn" values (%s, %s, %s, null, '2026-01-02 03:04:05.678')""", f"{user}-{key}", user, note
    )


# Rows and documents.


async def test_rows_from_before_and_after_the_start_arrive(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    check_in(db, user, "1", "before")
    async with work() as running:
        await eventually(lambda: mirrored.descriptions(user), ["before"])
        await running.said("session.open")
        check_in(db, user, "2", "after")
        await eventually(lambda: mirrored.descriptions(user), ["after", "before"])
        db.execute("""update "CheckIn" set note = 'changed' where "userId" = %s and note = 'after'""", user)
        await eventually(lambda: mirrored.descriptions(user), ["before", "changed"])
        db.execute("""delete from "CheckIn" where "userId" = %s and note = 'before'""", user)
        await eventually(lambda: mirrored.descriptions(user), ["changed"])
        db.execute("""update "CheckIn" set id = id || 'moved'""")
        await eventually(lambda: mirrored.keys(mirrors[0].name), [f"{user}-2moved"])
        await asyncio.to_thread(db.execute, 'truncate "CheckIn"')
        await eventually(lambda: mirrored.descriptions(user), [])


async def test_a_document_as_a_whole(db: Database, work: Work, mirrored: Mirrored, user: str) -> None:
    mood = {"a": 1, "b": [True, None, "x"], "ü": {"$k": 2**60}}
    # Without a zone it is UTC, whatever the session's zone.
    db.execute("set time zone 'America/New_York'")
    db.execute(
        """insert into "CheckIn" values (%s, %s, null, %s, '2026-01-02 03:04:05.678')""", user, user, json.dumps(mood)
    )
    async with work():
        await eventually(lambda: len(mirrored.activities(user)), 1)
        (found,) = mirrored.activities(user)
        assert json.loads(restore(found.pop("metadata"))) == mood
        assert found == {
            "userId": user, "type": "check-in", "description": "Checked in", "timestamp": 1767323045678.0
        }  # fmt: skip


async def test_a_status_of_several_tables(db: Database, work: Work, mirrored: Mirrored, user: str) -> None:
    async with work():
        db.execute(
            """insert into "User" values (%s, 'A', '2026-01-02 03:04:05', '2026-01-02 03:04:05.9999+01')""", user
        )
        times = {"lastCheckIn": 1767323045000.0, "nextDue": 1767319445999.0}
        await eventually(lambda: mirrored.status(user), {"userId": user, **times})
        db.execute("""insert into "Alert" values (%s, %s, 'L2', '1969-12-31 23:59:59.9995Z')""", f"{user}-1", user)
        alert = {"alertLevel": "L2", "alertTriggeredAt": -1.0}
        await eventually(lambda: mirrored.status(user), {"userId": user, **times, **alert})
        db.execute("""insert into "Alert" values (%s, %s, 'L4', '1970-01-01Z')""", f"{user}-2", user)
        await eventually(lambda: (mirrored.status(user) or {}).get("alertLevel"), "L4")
        db.execute("""update "Alert" set "resolvedAt" = now() where "userId" = %s""", user)
        await eventually(lambda: mirrored.status(user), {"userId": user, **times})
        db.execute("""update "User" set "lastCheckInAt" = null where id = %s""", user)
        await eventually(lambda: mirrored.status(user), {"userId": user, "nextDue": times["nextDue"]})
        db.execute("""delete from "User" where id = %s""", user)
        await eventually(lambda: mirrored.status(user), None)


KEYS = {
    "uuid": ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    "bigint": ("bigint", "-9223372036854775808"),
    "smallint": ("smallint", "7"),
    "text with everything": ("text", 'a:b "c" ü\\ {}'),
}


@pytest.mark.parametrize("what", KEYS)
async def test_keys(db: Database, work: Work, mirrored: Mirrored, what: str) -> None:
    kind, key = KEYS[what]
    mirror = rows_of("t", name=f"keys-{uuid.uuid4().hex[:8]}")
    db.execute(f"create table t (id {kind} primary key)")
    db.migrate([mirror])
    async with work([mirror]):
        db.execute("insert into t values (%s)", key)
        await eventually(lambda: mirrored.keys(mirror.name), [key])
        db.execute("delete from t")
        await eventually(lambda: mirrored.keys(mirror.name), [])


async def test_composite_keys(db: Database, work: Work, mirrored: Mirrored) -> None:
    mirror = rows_of("t", name=f"keys-{uuid.uuid4().hex[:8]}", key=("id", "part"))
    db.execute("create table t (id uuid, part text, primary key (id, part))")
    db.migrate([mirror])
    one, other = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
    async with work([mirror]):
        db.execute("""insert into t values (%s, 'a'), (%s, 'b "ü" \\'), (%s, 'a')""", one, one, other)
        keys = [f'["{one}", "a"]', f'["{one}", "b \\"ü\\" \\\\"]', f'["{other}", "a"]']
        await eventually(lambda: mirrored.keys(mirror.name), keys)
        db.execute("delete from t where id = %s and part = 'a'", one)
        await eventually(lambda: mirrored.keys(mirror.name), keys[1:])


async def test_more_rows_than_a_page(db: Database, work: Work, mirrored: Mirrored) -> None:
    mirror = rows_of("t", name=f"many-{uuid.uuid4().hex[:8]}")
    db.execute("create table t (id int primary key); insert into t select generate_series(1, 700)")
    db.migrate([mirror])
    async with work([mirror], CDC_PAGE_ROWS=100, CDC_BATCH_KEYS=30):
        await eventually(lambda: len(mirrored.keys(mirror.name)), 700)
        db.execute("delete from t where id > 10")
        await eventually(lambda: len(mirrored.keys(mirror.name)), 10)


async def test_only_the_last_of_many_changes_is_delivered(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    check_in(db, user, "1", "0")
    with db.connection.transaction():
        for n in range(100):
            db.execute("""update "CheckIn" set note = %s""", str(n))
    async with work() as running:
        await eventually(lambda: mirrored.descriptions(user), ["99"])
        await running.at_rest(db)
        await running.stop()
    # The first update changed nothing; the first start's own rescan has marked the key once for its row, and once for
    # its document if that was there by then. It has also marked what tests before have left of statuses.
    rows = "select count(*) from cdc.outbox o join cdc.mirror m on m.id = o.mirror where m.name = %s"
    assert db.one(rows, mirrors[0].name) in {101, 102}


async def test_what_was_acknowledged_is_not_read_again(db: Database, work: Work, mirrored: Mirrored, user: str) -> None:
    mirror = rows_of("t", name=f"again-{user}")
    db.execute("create table t (id int primary key)")
    db.migrate([mirror])
    db.execute("insert into t values (1)")
    async with work([mirror]) as running:
        await eventually(lambda: mirrored.keys(mirror.name), ["1"])
        await running.at_rest(db)
    async with work([mirror]) as running:
        db.execute("insert into t values (2)")
        await eventually(lambda: mirrored.keys(mirror.name), ["1", "2"])
        await running.stop()
        assert [line["keys"] for line in running.log.of("batch.applied")] == [1]


# Convex is not there, or is another one.


async def test_slow_checkpoints_are_rare(
    db: Database, work: Work, mirrored: Mirrored, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they become while somebody holds a snapshot for hours."""
    save, saves = checkpoint.Checkpoint.save, 0

    async def slow_save(self: checkpoint.Checkpoint, position: Position) -> None:
        nonlocal saves
        saves += 1
        await asyncio.sleep(0.05)
        await save(self, position)

    async with work() as running:
        await running.said("backfill.done", times=2)
        await running.at_rest(db)
        monkeypatch.setattr(checkpoint.Checkpoint, "save", slow_save)
        began = time.monotonic()
        for n in range(60):
            check_in(db, user, str(n), "note")
            await asyncio.sleep(0.025)
        assert saves <= time.monotonic() - began + 2, "one in a second"
        await eventually(lambda: len(mirrored.descriptions(user)), 60)
        noted = "select exists (select from cdc.outbox, cdc.checkpoint where not pg_visible_in_snapshot(xid, position))"
        await eventually(lambda: db.one(noted), expected=False)


async def test_convex_is_out_of_reach_at_the_start_and_later_and_comes_back_empty(
    mirrors: Sequence[Mirror], db: Database, user: str
) -> None:
    port = postgres.free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(convex_at(port)).process.stop()
    gone = convex.LocalConvex(f"http://127.0.0.1:{port}", "local-convex|00aa", None)  # type: ignore[arg-type]
    mirrored = Mirrored(gone.url, gone.admin_key)
    check_in(db, user, "1", "before")
    async with worker_at_work(quick_settings(db.dsn, gone), mirrors) as running:
        said = await running.said("convex.unreachable")
        assert said["cause"] == "no connection"
        check_in(db, user, "2", "meanwhile")
        with convex_at(port):
            await eventually(lambda: mirrored.descriptions(user), ["before", "meanwhile"])
            await running.said("convex.recovered")
        check_in(db, user, "3", "without it")
        await running.said("convex.unreachable", times=2)
        with convex_at(port):
            # Another deployment, as far as anyone can tell: it is filled.
            await eventually(lambda: mirrored.descriptions(user), ["before", "meanwhile", "without it"])
            assert "another deployment" in running.log.of("session.rescan")[-1]["cause"]
            await running.stop()
    assert len(running.log.of("convex.unreachable")) == 2


async def test_convex_hangs_and_goes_on(
    mirrors: Sequence[Mirror], db: Database, fresh_convex: convex.LocalConvex, user: str
) -> None:
    mirrored = Mirrored(fresh_convex.url, fresh_convex.admin_key)
    settings = quick_settings(db.dsn, fresh_convex, CDC_CONVEX_TIMEOUT_SECONDS=1)
    async with worker_at_work(settings, mirrors) as running:
        await running.said("session.open")
        fresh_convex.process.signal(signal.SIGSTOP)
        check_in(db, user, "1")
        said = await running.said("convex.unreachable")
        assert said["cause"] == "no answer in time"
        check_in(db, user, "2")
        fresh_convex.process.signal(signal.SIGCONT)
        await eventually(lambda: len(mirrored.activities(user)), 2)
        await running.said("convex.recovered")
        await running.stop()
        assert running.log.events.count("session.open") == 1


async def test_a_wrong_key_is_said_and_nothing_is_lost(db: Database, work: Work, mirrored: Mirrored, user: str) -> None:
    check_in(db, user, "1")
    async with work(convex_deploy_key="wrong|00") as running:
        said = await running.said("convex.misconfigured")
        assert "401" in said["cause"]
        assert "CONVEX_DEPLOY_KEY does not belong to this deployment" in said["cause"]
        await running.stop()
    async with work():
        await eventually(lambda: len(mirrored.activities(user)), 1)


async def test_functions_that_are_not_deployed_are_said_and_waited_for(
    mirrors: Sequence[Mirror], db: Database, user: str, tmp_path: Path
) -> None:
    port = postgres.free_port()
    check_in(db, user, "1")
    empty = tmp_path / "convex"
    (empty / "_generated").mkdir(parents=True)
    with convex_at(port, functions=empty) as without:
        mirrored = Mirrored(without.url, without.admin_key)
        async with worker_at_work(quick_settings(db.dsn, without), mirrors) as running:
            said = await running.said("convex.misconfigured")
            assert "convex/ folder" in said["cause"]
            without.process.stop()
            with convex_at(port):
                await eventually(lambda: len(mirrored.activities(user)), 1)
                await running.said("convex.recovered")
                await running.stop()


async def test_a_deployment_that_lists_no_documents_is_no_reason_to_die(
    mirrors: Sequence[Mirror], db: Database, user: str, tmp_path: Path
) -> None:
    # Everything but cdc:keys is there, as in the middle of a deploy.
    older = tmp_path / "convex"
    shutil.copytree(convex.ROOT / "convex", older)
    functions = older / "cdc.ts"
    functions.write_text(functions.read_text().replace("export const keys =", "export const otherKeys ="))
    (tmp_path / "node_modules").symlink_to(convex.ROOT / "dev/node_modules")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    check_in(db, user, "1")
    with convex.start(functions=older) as without:
        mirrored = Mirrored(without.url, without.admin_key)
        async with worker_at_work(quick_settings(db.dsn, without), mirrors) as running:
            await eventually(lambda: len(mirrored.activities(user)), 1)
            await running.said("convex.misconfigured")
            check_in(db, user, "2")
            await eventually(lambda: len(mirrored.activities(user)), 2)
            await running.stop()


async def test_without_a_convex_url_it_waits_and_keeps(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    async with worker_at_work(quick_settings(db.dsn, None), mirrors) as running:
        said = await running.said("convex.not_configured")
        assert said["missing"] == ["CONVEX_URL", "CONVEX_DEPLOY_KEY"]
        check_in(db, user, "1")
        await running.stop()
        assert running.log.events == ["worker.started", "convex.not_configured", "worker.stopped"]
    async with work():
        await eventually(lambda: len(mirrored.activities(user)), 1)


async def test_another_empty_deployment_is_filled(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, fresh_convex: convex.LocalConvex, user: str
) -> None:
    db.execute("""insert into "User" values (%s)""", user)
    check_in(db, user, "1")
    async with work():
        await eventually(lambda: (len(mirrored.activities(user)), mirrored.status(user)), (1, {"userId": user}))
    other = Mirrored(fresh_convex.url, fresh_convex.admin_key)
    async with worker_at_work(quick_settings(db.dsn, fresh_convex), mirrors) as running:
        await eventually(lambda: (len(other.activities(user)), other.status(user)), (1, {"userId": user}))
        assert "another deployment" in (await running.said("session.rescan"))["cause"]


# Postgres is not there, or not as it should be.


async def test_postgres_is_out_of_reach_at_the_start_and_later(
    mirrors: Sequence[Mirror],
    postgres_flavour: postgres.Flavour,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
) -> None:
    with postgres.start(postgres_flavour) as server:
        dsn = server.dsn(postgres.create_database(server))
        with Database(dsn, TABLES, mirrors) as db:
            check_in(db, user, "1")
        server.stop()
        async with worker_at_work(quick_settings(dsn, local_convex), mirrors) as running:
            said = await running.said("database.unreachable")
            assert "refused" in said["cause"]
            server.start()
            await eventually(lambda: len(mirrored.activities(user)), 1)
            await running.said("session.open")
            modes: tuple[postgres.Mode, ...] = ("fast", "immediate")
            for n, mode in enumerate(modes, 2):
                await asyncio.to_thread(server.restart, mode)
                with Database(dsn) as db:
                    check_in(db, user, str(n))
                await eventually(lambda: len(mirrored.activities(user)), n)
                await running.said("session.open", times=n)
            await running.stop()
            assert len(running.log.of("database.unreachable")) <= 3  # said once for each, not once for each try


async def test_a_database_that_is_not_migrated_is_waited_for(  # fixtures
    mirrors: Sequence[Mirror], database: str, local_convex: convex.LocalConvex, mirrored: Mirrored, user: str
) -> None:
    with Database(database, TABLES) as db:
        check_in(db, user, "1")
        async with worker_at_work(quick_settings(database, local_convex), mirrors) as running:
            said = await running.said("database.not_ready")
            assert "run `cdc-worker migrate`" in said["cause"]
            await asyncio.to_thread(db.migrate, mirrors)
            await eventually(lambda: len(mirrored.activities(user)), 1)
            await running.said("session.open")


async def test_a_mirror_that_is_not_migrated_is_waited_for(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    changed = mirrors[0].model_copy(update={"query": mirrors[0].query.replace("'Checked in'", "'Another text'")})
    check_in(db, user, "1")
    async with work([changed, STATUS]) as running:
        said = await running.said("database.not_ready")
        assert f'mirror "{mirrors[0].name}" is not as the database knows it' in said["cause"]
        await asyncio.sleep(0.5)
        assert running.log.of("lease.acquired") == [], "it could do nothing with it, and others might"
        await asyncio.to_thread(db.migrate, [changed, STATUS])
        await eventually(lambda: mirrored.descriptions(user), ["Another text"])


async def test_a_lease_whose_session_does_not_open_is_said_once(
    db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    check_in(db, user, "1")
    db.execute("alter table cdc.parked_key rename to elsewhere")
    async with work() as running:
        await running.said("database.refuses")
        tries = db.one("select token from cdc.checkpoint")
        await eventually(lambda: db.one("select token from cdc.checkpoint") > tries + 1, expected=True)
        levels = [line["level"] for line in running.log.of("lease.acquired")]
        assert levels.count("info") == 1, "said when it begins, not at every try"
        db.execute("alter table cdc.elsewhere rename to parked_key")
        await eventually(lambda: mirrored.descriptions(user), ["Checked in"])


async def test_through_a_pooler_it_polls(
    mirrors: Sequence[Mirror],
    db: Database,
    pooled_database: str,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader, "_LOOKOUT_SECONDS", 300.0)  # a bell that never rings would be trusted as long
    async with worker_at_work(quick_settings(pooled_database, local_convex), mirrors) as running:
        opened = await running.said("session.open")
        assert opened["listen"] is False
        assert "LISTEN_DATABASE_URL" in (await running.said("listen.unavailable"))["cure"]
        for n in range(1, 4):
            await asyncio.sleep(0.2)  # it has gone to rest
            check_in(db, user, str(n))
            await eventually(lambda: len(mirrored.activities(user)), n)
    # No lock was left behind on a connection that the pooler lends to others.
    assert db.one("select count(*) from pg_locks where locktype = 'advisory' and granted") == 0


async def test_through_a_pooler_it_listens_on_a_direct_connection(
    mirrors: Sequence[Mirror],
    db: Database,
    pooled_database: str,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
) -> None:
    # No poll within this test: what arrives was rung for.
    settings = quick_settings(pooled_database, local_convex, listen_database_url=db.dsn, CDC_POLL_SECONDS=60)
    async with worker_at_work(settings, mirrors) as running:
        assert (await running.said("session.open"))["listen"] is True
        for n in range(1, 4):
            await eventually(db.gate_is_kept, expected=True)
            check_in(db, user, str(n))
            await eventually(lambda: len(mirrored.activities(user)), n)
        await running.stop()
        assert running.log.of("listen.unavailable") == []


async def test_a_listener_that_dies_is_replaced(db: Database, work: Work, mirrored: Mirrored, user: str) -> None:
    async with work(CDC_POLL_SECONDS=60) as running:
        await running.said("session.open")
        await eventually(db.gate_is_kept, expected=True)
        # By the lease's own word: what the listener last said depends on whether it has just been woken.
        assert db.execute("select pg_terminate_backend(holder_pid) from cdc.checkpoint") == [(True,)]
        await running.said("session.open", times=2)
        check_in(db, user, "1")
        await eventually(lambda: len(mirrored.activities(user)), 1)


# What is wrong with one mirror, or one row, is its own.


async def test_a_query_that_breaks_parks_its_keys_and_comes_back(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    async with work() as running:
        await running.said("session.open")
        check_in(db, user, "1", "fine")
        await eventually(lambda: mirrored.descriptions(user), ["fine"])
        # In a thread: the worker lives in this loop, and may hold a lock that the statement waits for.
        await asyncio.to_thread(db.execute, """alter table "CheckIn" rename column note to remark""")
        check_in(db, user, "2", "while broken")
        db.execute("""update "CheckIn" set remark = 'changed while broken' where remark = 'fine'""")
        db.execute("""insert into "User" values (%s)""", user)
        await eventually(lambda: mirrored.status(user), {"userId": user})
        said = await running.said("mirror.broken")
        assert (said["mirror"], said["cause"]) == (mirrors[0].name, 'column "note" does not exist')
        # A worker at work keeps the file that it was started with.
        assert said["cure"].endswith("mend it in cdc_worker.toml, run migrate, restart the worker")
        # Not how often: the rescan of the first start may come to a key as well.
        parked = "select key, class, reason from cdc.parked_key order by key"
        reason = 'column "note" does not exist'
        both = [(f"{user}-{n}", "mirror", reason) for n in (1, 2)]
        await eventually(lambda: [(k, c, r.rpartition(": ")[2]) for k, c, r in db.execute(parked)], both)
        assert mirrored.descriptions(user) == ["fine"]
        await asyncio.to_thread(db.execute, """alter table "CheckIn" rename column remark to note""")
        await running.said("mirror.mended")
        # It knows by itself that there is something to read: no need to wait for the next look.
        await eventually(lambda: mirrored.descriptions(user), ["changed while broken", "while broken"])
        await eventually(lambda: db.execute(parked), [])
        await running.stop()
        assert len(running.log.of("mirror.broken")) == 1


async def test_a_key_that_is_parked_after_its_mirror_was_mended_is_read_anew(
    mirrors: Sequence[Mirror], db: Database, local_convex: convex.LocalConvex, mirrored: Mirrored, user: str
) -> None:
    """While Convex is away, what was read of a broken mirror waits in memory, and nobody else knows of it."""
    async with Interposed(local_convex) as between:
        settings = quick_settings(db.dsn, between.convex, CDC_IN_FLIGHT=1)
        async with worker_at_work(settings, mirrors) as running:
            await running.said("backfill.done", times=2)
            await running.at_rest(db)
            away = asyncio.Event()
            between.fault = held_until(away)
            check_in(db, user, "1", "under way")
            await eventually(lambda: between.open, 1)
            await asyncio.to_thread(db.execute, """alter table "CheckIn" rename column note to remark""")
            check_in(db, user, "2", "while broken")
            await running.said("mirror.broken")
            await asyncio.to_thread(db.execute, """alter table "CheckIn" rename column remark to note""")
            await running.said("mirror.mended")
            between.fault = None
            away.set()
            await eventually(lambda: mirrored.descriptions(user), ["under way", "while broken"])
            await running.at_rest(db)
            assert db.one("select count(*) from cdc.parked_key") == 0


async def test_keys_of_a_broken_mirror_are_not_said_with_each_write(
    db: Database, work: Work, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever looks whether it was mended puts the reason in other words.
    monkeypatch.setattr(care, "_MENDING_SECONDS", 0.05)
    async with work() as running:
        await running.said("backfill.done", times=2)
        await asyncio.to_thread(db.execute, """alter table "CheckIn" rename column note to remark""")

        async def another(number: int) -> None:
            check_in(db, user, str(number))
            await eventually(lambda: db.one("select count(*) from cdc.parked_key where class = 'mirror'"), number)
            # What is in the database already is said a moment later.
            await running.at_rest(db)

        for number in range(1, 7):
            await another(number)
        assert [line["keys"] for line in running.log.of("key.parked")] == [1]
        monkeypatch.setattr(parking, "_REMINDER_SECONDS", 0.0)
        await another(7)
        assert [line["keys"] for line in running.log.of("key.parked")] == [1, 6]


async def test_a_table_that_is_dropped_and_comes_back(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    async with work() as running:
        check_in(db, user, "1", "first")
        await eventually(lambda: mirrored.descriptions(user), ["first"])

        def drop() -> None:
            with db.connection.transaction():
                check_in(db, user, "2", "last")
                db.execute('drop table "CheckIn"')

        # In a thread, as above.
        await asyncio.to_thread(drop)
        await running.said("mirror.broken")
        db.execute("""insert into "User" values (%s)""", user)
        await eventually(lambda: mirrored.status(user), {"userId": user})
        db.execute(TABLES[TABLES.index('create table "CheckIn"') : TABLES.index("create type")])
        await asyncio.to_thread(db.migrate, mirrors)
        check_in(db, user, "3", "anew")
        await eventually(lambda: mirrored.descriptions(user), ["anew"])


async def test_a_mirror_that_is_broken_at_the_start_lets_others_flow(
    db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    check_in(db, user, "1")
    db.execute("""insert into "User" values (%s); alter table "CheckIn" drop column mood""".replace("%s", f"'{user}'"))
    async with work() as running:
        said = await running.said("mirror.broken")
        assert 'column "mood" does not exist' in said["cause"]
        assert said["cure"].endswith("mend it in cdc_worker.toml, run migrate, restart the worker")
        await eventually(lambda: mirrored.status(user), {"userId": user})


async def test_a_table_that_is_locked_holds_up_no_other_mirror(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    # An ALTER TABLE that rewrites, a VACUUM FULL: minutes, and nobody's fault.
    async with work() as running:
        await running.said("session.open")
        with psycopg.connect(db.dsn) as altering:
            altering.execute("""insert into "CheckIn" values (%s, %s, null, null, now())""", (f"{user}-1", user))
            altering.commit()
            await eventually(lambda: len(mirrored.activities(user)), 1)
            await asyncio.to_thread(altering.execute, 'lock table "CheckIn" in access exclusive mode')
            # A change of it that is in the log already.
            db.execute(
                "insert into cdc.outbox (slot, mirror, key) select 0, id, %s from cdc.mirror where name = %s",
                f"{user}-1",
                mirrors[0].name,
            )
            db.execute("""insert into "User" values (%s)""", user)
            await eventually(lambda: mirrored.status(user), {"userId": user})


async def test_a_foreign_server_that_is_away_holds_up_no_other_mirror(
    mirrors: Sequence[Mirror],
    db: Database,
    work: Work,
    mirrored: Mirrored,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a foreign table, or dblink, says through the worker's own good connection.
    db.execute(
        """
        create table away (is_away bool); insert into away values (true);
        create function name_there(id text) returns text language plpgsql stable as $$ begin
            if (select is_away from away) then
                raise exception 'could not connect to server "there"' using errcode = '08001';
            end if;
            return 'there';
        end $$
        """
    )
    far = mirrors[0].model_copy(
        update={"query": mirrors[0].query.replace("coalesce(note, 'Checked in')", "name_there(id)")}
    )
    await asyncio.to_thread(db.migrate, [far, mirrors[1]])
    async with work([far, mirrors[1]]) as running:
        check_in(db, user, "1")
        assert (await running.said("mirror.broken"))["cause"] == 'could not connect to server "there"'
        db.execute("""insert into "User" values (%s)""", user)
        await eventually(lambda: mirrored.status(user), {"userId": user})
        looks = 0

        async def look(*given: Any) -> Plan:
            nonlocal looks
            looks += 1
            return await check(*given)

        # A look that reads no row finds nothing wrong, and is not believed.
        monkeypatch.setattr(registry, "check", look)
        await eventually(lambda: looks >= 3, True)
        db.execute("update away set is_away = false")
        await eventually(lambda: mirrored.descriptions(user), ["there"])
        await running.said("mirror.mended")
        await running.stop()
        said = [event for event in running.log.events if event in {"session.open", "mirror.broken", "mirror.mended"}]
        assert said == ["session.open", "mirror.broken", "mirror.mended"]


EITHER = {"53200": "out of shared memory", "58030": "could not read block 7: Input/output error"}


def _failing(mirror: Mirror, column: str, table: str) -> Mirror:
    return mirror.model_copy(update={"query": mirror.query.replace(column, f"checked('{table}', {column})")})


@pytest.fixture
def failing(db: Database, mirrors: Sequence[Mirror]) -> Sequence[Mirror]:
    """Mirrors each of whose queries can be made to fail, by a row in a table."""
    db.execute(
        """
        create table failing (what text, state text, said text);
        create function checked(name text, value text) returns text language plpgsql stable as $$
        declare f failing; begin
            select * into f from failing where what = name limit 1;
            if found then raise exception '%', f.said using errcode = f.state; end if;
            return value;
        end $$
        """
    )
    (activity, status) = mirrors
    made = [_failing(activity, "coalesce(note, 'Checked in')", "CheckIn"), _failing(status, "u.id", "User")]
    db.migrate(made)
    return made


@pytest.mark.parametrize("state", EITHER)
async def test_memory_or_a_file_that_one_mirror_lacks_holds_up_no_other(
    failing: Sequence[Mirror],
    db: Database,
    work: Work,
    mirrored: Mirrored,
    user: str,
    state: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Longer than a key takes from its reading until it is parked: a look before then has nothing to try the query with.
    monkeypatch.setattr(care, "_MENDING_SECONDS", 1.5)
    async with work(failing) as running:
        await eventually(lambda: running.log.events.count("backfill.done"), 2)
        db.execute("insert into failing values ('CheckIn', %s, %s)", state, EITHER[state])
        with db.connection.transaction():
            check_in(db, user, "1")
            check_in(db, user, "2")
            db.execute("""insert into "User" values (%s)""", user)
        assert (await running.said("mirror.broken"))["cause"] == EITHER[state]
        await eventually(lambda: mirrored.status(user), {"userId": user})
        await asyncio.sleep(3.5)  # it is looked at again and again
        db.execute("truncate failing")
        await eventually(lambda: len(mirrored.descriptions(user)), 2)
        # Its keys are marked before it is said.
        await running.said("mirror.mended")
        await running.stop()
        said = [event for event in running.log.events if event in {"session.open", "mirror.broken", "mirror.mended"}]
        assert said == ["session.open", "mirror.broken", "mirror.mended"]


@pytest.mark.parametrize("state", EITHER)
async def test_memory_or_a_file_that_all_mirrors_lack_is_the_database_s(
    failing: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str, state: str
) -> None:
    async with work(failing) as running:
        await eventually(lambda: running.log.events.count("backfill.done"), 2)
        check_in(db, user, "0")
        db.execute("""insert into "User" values (%s)""", f"{user}-0")
        # Both are read, so that no page is left of which only one mirror fails.
        await running.at_rest(db)
        assert len(mirrored.descriptions(user)) == 1
        db.execute("insert into failing select t, %s, %s from unnest(array['CheckIn', 'User']) t", state, EITHER[state])
        check_in(db, user, "1")
        assert (await running.said("database.refuses"))["cause"] == EITHER[state]
        assert db.one("select count(*) from cdc.parked_key") == 0
        db.execute("truncate failing")
        await eventually(lambda: len(mirrored.descriptions(user)), 2)
        assert "mirror.broken" not in running.log.events


async def test_memory_that_one_mirror_lacks_at_the_start_holds_up_no_other(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    """Where a query locks thousands of partitions, that is so before any row is read: as it is planned."""
    db.execute(
        """
        create table failing ();
        create function planned() returns bool language plpgsql immutable as $$ begin
            if exists (select from failing) then
                raise exception 'out of shared memory' using errcode = '53200';
            end if;
            return true;
        end $$
        """
    )
    wide = mirrors[0].model_copy(update={"query": f"select * from ({mirrors[0].query}) as q where planned()"})
    db.migrate([wide, mirrors[1]])
    db.execute("insert into failing default values")
    check_in(db, user, "1")
    db.execute("""insert into "User" values (%s)""", user)
    async with work([wide, mirrors[1]]) as running:
        assert (await running.said("mirror.broken"))["cause"] == "out of shared memory"
        await eventually(lambda: mirrored.status(user), {"userId": user})
        db.execute("truncate failing")
        await eventually(lambda: len(mirrored.descriptions(user)), 1)
        assert running.log.events.count("session.open") == 1
    alone = wide.model_copy(update={"name": f"{wide.name}-alone"})
    db.migrate([alone])
    db.execute("insert into failing default values")
    async with work([alone]) as running:
        assert (await running.said("database.refuses"))["cause"] == "out of shared memory"
        assert "mirror.broken" not in running.log.events


async def test_a_rescan_that_passes_the_memory_holds_up_no_mirror(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    """Its query sorts all rows; that of a page reads a few."""
    db.execute(
        """create function checked(id text) returns text language plpgsql stable as $$ begin
            if id like '%-old' then raise exception 'out of memory' using errcode = '53200'; end if;
            return id;
        end $$"""
    )
    check_in(db, user, "old")
    large = mirrors[0].model_copy(
        update={"query": f"select * from ({mirrors[0].query}) as q where checked(id) is not null"}
    )
    db.migrate([large, mirrors[1]])
    db.execute("delete from cdc.outbox")
    async with work([large, mirrors[1]]) as running:
        assert mirrors[0].name in (await running.said("care.failed"))["cause"]
        check_in(db, user, "new")
        db.execute("""insert into "User" values (%s)""", user)
        await eventually(lambda: len(mirrored.descriptions(user)), 1)
        await eventually(lambda: mirrored.status(user), {"userId": user})
        assert running.log.events.count("session.open") == 1


POISON = Mirror(
    name="ratios",
    target="activity",
    key=("id",),
    query="select id, owner as user_id, 'alert' as type, (100 / n)::text as description, now() as timestamp from ratio",
    sources=(Source(table="ratio", key=("id",)),),
)


async def test_a_row_that_breaks_the_query_is_parked_alone(
    db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    db.execute("create table ratio (id int primary key, owner text, n int)")
    db.migrate([POISON])
    db.execute("insert into ratio select n, %s, n from generate_series(0, 10) as n", user)
    async with work([POISON]) as running:
        await eventually(lambda: len(mirrored.activities(user)), 10)
        said = await running.said("key.parked")
        assert (said["mirror"], said["kind"], said["keys"]) == (POISON.name, "row", 1)
        assert "DivisionByZero" in said["reason"]
        assert "parked list" in said["cure"]
        assert db.execute("select key, class from cdc.parked_key") == [("0", "row")]
        db.execute("update ratio set n = 100 where id = 0")
        await eventually(lambda: len(mirrored.activities(user)), 11)
        await eventually(lambda: db.execute("select key from cdc.parked_key"), [])
        db.execute("update ratio set n = 0 where id = 5")
        await running.said("key.parked", times=2)
        db.execute("delete from ratio where id = 5")
        await eventually(
            lambda: (len(mirrored.activities(user)), db.execute("select key from cdc.parked_key")), (10, [])
        )


UNFIT = {
    "null": ("null", "the reason names the column", "description is null"),
    "too large": ("repeat('x', 1100000)", "", "Convex holds 1048576"),
}


@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
async def test_a_row_whose_text_a_type_cannot_read_is_parked_alone(
    db: Database, work: Work, mirrored: Mirrored, user: str, together: bool
) -> None:
    """Postgres says the same of it as of a query that is wrong: a syntax error."""
    name = f"searches-{uuid.uuid4().hex[:8]}"
    columns = f"id, '{user}' as user_id, 'alert' as type, words::tsquery::text as description, now() as timestamp"
    searches = rows_of("search", name=name).model_copy(update={"query": f"select {columns} from search"})
    db.execute("create table search (id int primary key, words text)")
    await asyncio.to_thread(db.migrate, [searches])
    async with work([searches]) as running:
        if together:
            db.execute("insert into search values (1, 'a'), (2, 'a b'), (3, 'c')")
        else:
            db.execute("insert into search values (1, 'a'), (3, 'c')")
            await running.said("backfill.done")
            await eventually(lambda: mirrored.descriptions(user), ["'a'", "'c'"])
            db.execute("insert into search values (2, 'a b')")
        said = await running.said("key.parked")
        assert (said["kind"], said["keys"]) == ("row", 1)
        db.execute("update search set words = 'd' where id = 3")
        await eventually(lambda: mirrored.descriptions(user), ["'a'", "'d'"])
        assert db.execute("select key, class from cdc.parked_key") == [("2", "row")]
        await running.stop()
        assert "mirror.broken" not in running.log.events


async def test_a_text_that_no_type_can_read_is_not_quoted(db: Database, work: Work) -> None:
    """Also if it is of the only row there is, so that nothing tells it from a query that is wrong."""
    columns = "id, 'u' as user_id, 'alert' as type, words::tsquery::text as description, now() as timestamp"
    searches = rows_of("search").model_copy(update={"query": f"select {columns} from search"})
    db.execute("create table search (id int primary key, words text)")
    await asyncio.to_thread(db.migrate, [searches])
    async with work([searches]) as running:
        db.execute("insert into search values (1, 'very secret')")
        await running.said("mirror.broken")
        await running.said("key.parked")
        # It is looked at whether it can be read again.
        await running.said("worker.heartbeat")
        assert "secret" not in f"{running.log.lines} {db.execute('select reason from cdc.parked_key')}"
        db.execute("update search set words = 'fine' where id = 1")
        await running.said("key.settled")


LOUD = {
    "a schema": ("language sql return upper($1)", "alter schema {} rename to {}", 'schema "lib" does not exist'),
    "a table of a function": (
        "language plpgsql stable as $$ begin return (select upper($1) from lib.one); end $$",
        "alter table lib.{} rename to {}",
        'relation "lib.one" does not exist',
    ),
}


@pytest.mark.parametrize("what", LOUD)
async def test_what_is_gone_for_all_rows_breaks_the_mirror_until_it_is_back(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str, what: str
) -> None:
    body, rename, cause = LOUD[what]
    name = "lib" if what == "a schema" else "one"
    db.execute("create schema lib; create table lib.one (); insert into lib.one default values")
    db.execute(f"create function lib.loud(text) returns text {body}")
    query = mirrors[0].query.replace("coalesce(note, 'Checked in')", "lib.loud(note)")
    loud = mirrors[0].model_copy(update={"query": query})
    await asyncio.to_thread(db.migrate, [loud])
    async with work([loud]) as running:
        await running.said("backfill.done")
        await asyncio.to_thread(db.execute, rename.format(name, "gone"))
        # A key without a row can be read, and says nothing of the query.
        with db.connection.transaction():
            check_in(db, user, "0", "deleted")
            check_in(db, user, "1", "hello")
            db.execute("""delete from "CheckIn" where id = %s""", f"{user}-0")
        assert (await running.said("mirror.broken"))["cause"] == cause
        await asyncio.to_thread(db.execute, rename.format("gone", name))
        await eventually(lambda: mirrored.descriptions(user), ["HELLO"])


@pytest.mark.parametrize("what", UNFIT)
async def test_a_row_that_is_no_document_is_parked_alone(
    db: Database, work: Work, mirrored: Mirrored, user: str, what: str
) -> None:
    mirror = POISON.model_copy(
        update={
            "query": POISON.query.replace("(100 / n)::text", f"case n when 0 then {UNFIT[what][0]} else 'fine' end")
        }
    )
    db.execute("create table ratio (id int primary key, owner text, n int)")
    db.migrate([mirror])
    db.execute("insert into ratio select n, %s, n from generate_series(0, 3) as n", user)
    async with work([mirror]) as running:
        assert UNFIT[what][2] in (await running.said("key.parked"))["reason"]
        await eventually(lambda: len(mirrored.activities(user)), 3)


async def test_of_many_reasons_the_most_frequent_are_said(
    db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    # Each too large by a size of its own, which the reason names.
    large = "case n when 0 then 'fine' else repeat('x', 1050000 + n) end"
    mirror = POISON.model_copy(update={"query": POISON.query.replace("(100 / n)::text", large)})
    db.execute("create table ratio (id int primary key, owner text, n int)")
    db.migrate([mirror])
    async with work([mirror]) as running:
        # A rescan would park them once more.
        await running.said("backfill.done")
        db.execute("insert into ratio select n, %s, n from generate_series(0, 7) as n", user)
        await eventually(lambda: len(mirrored.activities(user)), 1)
        await running.at_rest(db)
        await running.stop()
        assert db.one("select count(*) from cdc.parked_key") == 7
        said = [line for line in running.log.of("key.parked") if line["kind"] == "several"]
        assert [(line["keys"], line["reason"], line["mirrors"]) for line in said] == [(2, "2 reasons more", ["ratios"])]
        assert len(running.log.of("key.parked")) == 6


async def test_a_document_that_convex_rejects_is_parked_alone(
    db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    mirror = POISON.model_copy(
        update={
            "query": POISON.query.replace("'alert' as", "case n when 0 then 'secret-type' else 'alert' end as").replace(
                "100 / n", "n"
            )
        }
    )
    db.execute("create table ratio (id int primary key, owner text, n int)")
    db.migrate([mirror])
    db.execute("insert into ratio select n, %s, n from generate_series(0, 3) as n", user)
    async with work([mirror]) as running:
        said = await running.said("key.parked")
        assert said["kind"] == "rejected"
        assert "secret-type" not in said["reason"]
        await eventually(lambda: len(mirrored.activities(user)), 3)
        db.execute("update ratio set n = 7 where id = 0")
        await eventually(
            lambda: (len(mirrored.activities(user)), db.execute("select key from cdc.parked_key")), (4, [])
        )


async def test_a_parked_key_whose_table_was_truncated_is_settled(db: Database, work: Work, user: str) -> None:
    db.execute("create table ratio (id int primary key, owner text, n int)")
    db.migrate([POISON])
    db.execute("insert into ratio values (1, %s, 0)", user)
    async with work([POISON]) as running:
        await running.said("key.parked")
        await running.said("backfill.done")
        # Neither a row nor a document is left to lead a rescan to the key.
        await asyncio.to_thread(db.execute, "truncate ratio")
        await eventually(lambda: db.execute("select key from cdc.parked_key"), [])


NASTY = {
    "a NUL": '{"a": "\\u0000"}',
    "a lone surrogate": '{"\\ud800": "\\udfff"}',
    "an empty key": '{"": {"": 1}}',
    "deep arrays": "[" * 200 + "]" * 200,
    "very deep arrays": "[" * 900 + "]" * 900,
    "very deep objects": '{"a":' * 900 + "1" + "}" * 900,
    "deeper than any parser": "[" * 5000 + "]" * 5000,
    "wide": json.dumps(list(range(9000))),
    "many fields": json.dumps({f"k{n}": n for n in range(2000)}),
    "a long key": json.dumps({"k" * 2000: 1}),
    "a number of a thousand digits": "1" * 1000,
    "a number of five thousand digits": "1" * 5000,
    "an exponent beyond everything": "1e999999",
    "reserved keys": '{"_id": 1, "$integer": "AAAA", "$float": 1, "__proto__": 1, "constructor": 2}',
    "minus nought": "-0.0",
}


async def test_any_json_arrives(db: Database, work: Work, mirrored: Mirrored, user: str) -> None:
    mirror = Mirror(
        name="nasty",
        target="activity",
        key=("id",),
        query=f"""
            select id, '{user}' as user_id, 'alert' as type, id as description, now() as timestamp, body as metadata
            from nasty
        """,
        sources=(Source(table="nasty", key=("id",)),),
    )
    db.execute("create table nasty (id text primary key, body json)")
    db.migrate([mirror])
    for what, text in NASTY.items():
        db.execute("insert into nasty values (%s, %s)", what, text)
    async with work([mirror]) as running:
        await eventually(lambda: mirrored.descriptions(user), sorted(NASTY))
        assert running.log.of("key.parked") == []
        found = {each["description"]: restore(each["metadata"]) for each in mirrored.activities(user)}
        for what in ("a NUL", "a lone surrogate", "an empty key", "wide", "many fields", "reserved keys"):
            assert json.loads(found[what]) == json.loads(NASTY[what])


async def test_what_the_role_is_set_to_changes_nothing(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    """Writer and worker alike. The key has characters that the role's encoding lacks, and some that are quoted."""
    name = db.dsn.rsplit("/", 1)[1]
    for setting in (
        *("client_encoding = 'latin1'", "standard_conforming_strings = off", "array_nulls = off", "search_path = ''"),
        *("datestyle = 'SQL, DMY'", "timezone = 'Asia/Kathmandu'", "bytea_output = 'escape'", "row_security = off"),
        *("transform_null_equals = on", "extra_float_digits = -15", "plan_cache_mode = force_generic_plan"),
    ):
        db.execute(f"alter database {name} set {setting}")
    mirror = mirrors[0].model_copy(
        update={
            "query": mirrors[0].query.replace('"CheckIn"', 'public."CheckIn"'),
            "sources": (Source(table='public."CheckIn"', key=("id",)),),
        }
    )
    key = f"""{user} \u20ac \\ ' " {{}} , null"""
    with Database(db.dsn) as writer:
        writer.migrate([mirror])
        async with work([mirror]) as running:
            await running.said("backfill.done")
            writer.execute("set client_encoding = utf8")
            for note in ("one", "two"):
                writer.execute("""delete from public."CheckIn\"""")
                writer.execute("""insert into public."CheckIn" values (%s, %s, %s, null, now())""", key, user, note)
                await eventually(lambda: mirrored.descriptions(user), [note])
            assert mirrored.keys(mirror.name) == [key]
            assert [line for line in running.log.lines if line["level"] in {"warning", "error"}] == []


async def test_a_document_that_just_fits_arrives(db: Database, work: Work, mirrored: Mirrored, user: str) -> None:
    """A request that is a little larger than one document may be."""
    note = "x" * 1_048_200
    check_in(db, user, "1", note)
    async with work():
        await eventually(lambda: mirrored.descriptions(user), [note])


NUMBERS = {"n": 6 * [8_000 * [1]]}
# What is left to the description. In Convex' own count an object or array is 2 bytes, a field its name and one more, a
# number 9, a string its UTF-8 and 2 more. Here userId, type, description, timestamp and metadata, one after the other.
ROOM = 1_048_576 - 2 - (7 + 15) - (5 + 10) - (12 + 2) - (10 + 9) - (9 + 2 + 2 + 2 + 6 * (2 + 8_000 * 9))
# For the key, the version and Convex' own fields.
BESIDE = 250


@pytest.mark.parametrize("text", ["\n", "\\", "x", "é"])
async def test_a_document_is_measured_as_convex_measures_it(
    db: Database, work: Work, mirrored: Mirrored, user: str, text: str
) -> None:
    """Not by its JSON text, which is longer for an escape and shorter for a number."""
    insert = 'insert into "CheckIn" values (%s, %s, %s, %s, now())'
    fits = text * ((ROOM - BESIDE) // len(text.encode()))
    db.execute(insert, f"{user}-fits", user, fits, json.dumps(NUMBERS))
    db.execute(insert, f"{user}-not", user, text * (ROOM // len(text.encode()) + 1), json.dumps(NUMBERS))
    async with work():
        await eventually(lambda: mirrored.descriptions(user) == [fits], expected=True)
        await eventually(
            lambda: db.execute("select key, class, reason like '%Convex holds 1048576' from cdc.parked_key"),
            [(f"{user}-not", "row", True)],
        )


@pytest.mark.parametrize("state", ["54000", "54001"])
async def test_a_row_that_passes_a_limit_of_postgres_is_parked_alone(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str, state: str
) -> None:
    """A text whose JSON passes 1 GB, a value that is nested too deep for the stack: nothing that ends by waiting."""
    db.execute(
        f"""create function checked(note text) returns text language plpgsql as $$ begin
            if note = 'bad' then raise exception 'too much' using errcode = '{state}'; end if; return note;
        end $$"""
    )
    mirror = mirrors[0].model_copy(
        update={"query": mirrors[0].query.replace("coalesce(note,", "coalesce(checked(note),")}
    )
    db.migrate([mirror])
    async with work([mirror]):
        for note in ("bad", "good"):
            check_in(db, user, note, note)
        await eventually(lambda: mirrored.descriptions(user), ["good"])
        await eventually(lambda: db.execute("select key, class from cdc.parked_key"), [(f"{user}-bad", "row")])


async def test_a_parked_key_that_is_longer_than_an_index_row_stops_nobody(
    mirrors: Sequence[Mirror], db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    mirror = mirrors[0].model_copy(update={"query": mirrors[0].query.replace("coalesce(note, 'Checked in')", "note")})
    db.execute('alter table "CheckIn" drop constraint "CheckIn_pkey"')
    db.migrate([mirror])
    # Random, so that nothing makes them short.
    long = "".join(uuid.uuid4().hex for _ in range(500))
    async with work([mirror]) as running:
        await running.said("backfill.done")
        for end in ("a", "b"):
            check_in(db, user, long + end)
        check_in(db, user, "good", "good")
        await eventually(lambda: mirrored.descriptions(user), ["good"])
        parked = "select count(*), sum(attempts) from cdc.parked_key"
        await eventually(lambda: db.execute(parked), [(2, 2)])
        db.execute("""update "CheckIn" set "createdAt" = now() where note is null""")
        await eventually(lambda: db.execute(parked), [(2, 4)])
        db.execute("""update "CheckIn" set note = 'mended' where note is null""")
        await eventually(lambda: db.execute(parked), [(0, None)])
        await eventually(lambda: mirrored.descriptions(user), ["good", "mended", "mended"])
        assert running.log.of("database.refuses") == []


async def test_a_rescan_that_fails_holds_up_no_other_and_quotes_no_row(
    db: Database, work: Work, mirrored: Mirrored
) -> None:
    good, bad = rows_of("good", name=f"good-{uuid.uuid4().hex[:8]}"), rows_of("bad", name=f"bad-{uuid.uuid4().hex[:8]}")
    bad = bad.model_copy(update={"query": f"{bad.query} where note::int > 0"})
    db.execute("create table bad (id text, note text); insert into bad values ('1', 's3cret')")
    db.execute("create table good (id text); insert into good values ('1')")
    db.migrate([bad])
    db.migrate([bad, good])
    async with work([bad, good]) as running:
        await eventually(lambda: mirrored.keys(good.name), ["1"])
        failed = await running.said("care.failed")
        assert failed["cause"] == f'rescan of mirror "{bad.name}": InvalidTextRepresentation (22P02)'
        db.execute("update bad set note = '2'")
        await eventually(lambda: mirrored.keys(bad.name), ["1"])
        assert "s3cret" not in str(running.log.lines)


async def test_a_long_rescan_keeps_the_worker_from_no_other_care(
    mirrors: Sequence[Mirror], db: Database, work: Work, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(care, "_SELDOM_SECONDS", 0.2)
    monkeypatch.setattr(rescans, "_PAGE_KEYS", 1)
    db.execute(
        """insert into "CheckIn" select n::text, %s, null, null, now() from generate_series(1, 1000) as n""", user
    )
    async with work() as running:
        await eventually(lambda: db.one("select max(marked) > 5 from cdc.backfill"), expected=True)
        db.execute("""alter table "Alert" disable trigger user""")
        await running.said("capture.missing")
        assert [line for line in running.log.of("backfill.done") if line["mirror"] == mirrors[0].name] == []
        monkeypatch.setattr(rescans, "_PAGE_KEYS", 1_000)
        await running.said("backfill.done", times=2)


@pytest.mark.parametrize("phase", ["saves", "documents"])
async def test_care_that_waits_for_convex_keeps_the_worker_from_no_other(
    mirrors: Sequence[Mirror],
    db: Database,
    fresh_convex: convex.LocalConvex,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
) -> None:
    for name in ("_PATIENCE_SECONDS", "_SELDOM_SECONDS", "_MENDING_SECONDS", "_RESCAN_SECONDS"):
        monkeypatch.setattr(care, name, 0.2)
    async with (
        Interposed(fresh_convex) as between,
        worker_at_work(quick_settings(db.dsn, between.convex, CDC_CONVEX_TIMEOUT_SECONDS=0.5), mirrors) as running,
    ):
        await running.said("backfill.done", times=2)
        # It is done without an answer, and then nothing is done any more.
        for n, fault in enumerate((hangs_after, held_until(asyncio.Event()))):
            between.fault = fault
            if phase == "documents":
                db.execute("update cdc.backfill set phase = 'documents', after = null, finished_at = null")
            else:
                saves = db.one("select saves from cdc.checkpoint")
                db.execute(f"create table moves_the_position_{n} (); notify {CHANNEL}")
                await eventually(partial(db.one, "select saves > %s from cdc.checkpoint", saves), expected=True)
            await asyncio.sleep(1.5)  # it has waited for Convex, and does so again
        db.execute("""alter table "Alert" disable trigger user""")
        await running.said("capture.missing")
        db.execute("""alter table "Alert" enable trigger user""")
        await running.said("capture.restored")
        between.fault = None
        await running.said("backfill.done", times=4)
        await eventually(lambda: db.one("select told_saves = saves from cdc.checkpoint"), expected=True)
        assert running.log.events.count("session.rescan") == 1, "the first time at this deployment"


async def test_a_database_that_refuses_ddl_keeps_the_log_from_turning_and_nothing_else(
    postgres_server: postgres.Server, db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    check_in(db, user, "1", "from before")
    db.execute("update cdc.rotation set rotated_at = now() - interval '1 day'")
    with postgres_server.admin(db.dsn.rpartition("/")[2]) as superuser:
        superuser.execute(
            "create function refuse() returns event_trigger language plpgsql as $$ begin raise 'not here'; end $$;"
            " create event trigger refuse on ddl_command_start execute function refuse()"
        )
    async with work() as running:
        assert (await running.said("care.failed"))["cause"] == "turning the log: RaiseException (P0001)"
        await running.said("backfill.done", times=2)
        await eventually(lambda: mirrored.descriptions(user), ["from before"])


async def test_a_column_that_is_gone_is_not_said_with_each_write(db: Database, work: Work, mirrored: Mirrored) -> None:
    mirror = rows_of("t", name=f"gone-{uuid.uuid4().hex[:8]}", watch=("note",))
    db.execute("create table t (id text, note text)")
    db.migrate([mirror])
    async with work([mirror]) as running:
        await running.said("backfill.done")
        db.execute("alter table t drop column note")
        for key in ("1", "2", "3"):
            db.execute("insert into t values (%s)", key)
            await eventually(lambda: mirrored.keys(mirror.name)[-1:], [key])
        assert len(running.log.of("capture.rescan")) == 1


async def test_rows_that_a_policy_hides_are_not_taken_for_deleted(
    db: Database, work: Work, mirrored: Mirrored, user: str
) -> None:
    check_in(db, user, "1", "here")
    async with work() as running:
        await eventually(lambda: mirrored.descriptions(user), ["here"])
        db.execute(
            """alter table "CheckIn" enable row level security, force row level security;
            create policy own on "CheckIn" using ("userId" = current_setting('app.user', true))"""
        )
        db.execute("select set_config('app.user', %s, false)", user)
        db.execute("""update "CheckIn" set note = 'changed'""")
        assert "row-level security" in (await running.said("mirror.broken"))["cause"]
        await running.said("key.parked")
        assert mirrored.descriptions(user) == ["here"]
        db.execute("""alter table "CheckIn" no force row level security""")
        await eventually(lambda: mirrored.descriptions(user), ["changed"])
        await running.said("key.settled")


async def test_a_key_of_another_shape_than_before_is_no_obstacle(db: Database, work: Work, mirrored: Mirrored) -> None:
    # The documents under the old keys are in Convex, and so are their names in the log.
    name = f"shape-{uuid.uuid4().hex[:8]}"
    db.execute("create table t (id text, part text); insert into t values ('a', '1'), ('b', '2')")
    db.migrate([rows_of("t", name=name)])
    async with work([rows_of("t", name=name)]):
        await eventually(lambda: mirrored.keys(name), ["a", "b"])
    db.execute("insert into t values ('c', '3')")
    both = rows_of("t", name=name, key=("id", "part"))
    db.migrate([both])
    async with work([both]):
        await eventually(lambda: mirrored.keys(name), ['["a", "1"]', '["b", "2"]', '["c", "3"]'])


async def test_a_key_of_another_type_than_before_is_no_obstacle(db: Database, work: Work, mirrored: Mirrored) -> None:
    name = f"type-{uuid.uuid4().hex[:8]}"
    db.execute("create table t (id text, n int); insert into t values ('a', 1), ('b', 2)")
    db.migrate([rows_of("t", name=name)])
    async with work([rows_of("t", name=name)]):
        await eventually(lambda: mirrored.keys(name), ["a", "b"])
    changed = Mirror(
        name=name,
        target="activity",
        key=("n",),
        query="select n, 'u' as user_id, 'alert' as type, '' as description, now() as timestamp from t",
        sources=(Source(table="t", key=("n",)),),
    )
    db.migrate([changed])
    async with work([changed]):
        # A key that no row can have has no row: it is a delete.
        await eventually(lambda: mirrored.keys(name), ["1", "2"])


# Who reads, and what is left.


async def test_a_stopped_worker_lets_go_of_the_lease(db: Database, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    # A last word is cut short where the machine is slow.
    monkeypatch.setattr(shards, "_LAST_WORD_SECONDS", 10.0)
    async with work() as running:
        await running.said("session.open")
        assert db.one("select holder is not null from cdc.checkpoint") is True
        await running.stop()
        assert db.one("select holder is null from cdc.checkpoint") is True
        assert db.one("select count(*) from cdc.worker") == 0
        assert running.log.events[-2:] == ["session.drained", "worker.stopped"]


async def test_a_stop_while_convex_hangs_ends_with_the_drain_time(
    mirrors: Sequence[Mirror], db: Database, fresh_convex: convex.LocalConvex, user: str
) -> None:
    settings = quick_settings(db.dsn, fresh_convex, CDC_DRAIN_SECONDS=0.2, CDC_CONVEX_TIMEOUT_SECONDS=60)
    async with worker_at_work(settings, mirrors) as running:
        await running.said("session.open")
        fresh_convex.process.signal(signal.SIGSTOP)
        check_in(db, user, "1")
        while (await running.said("worker.heartbeat", times=running.log.events.count("worker.heartbeat") + 1))[
            "keys_under_way"
        ] == 0:
            pass
        await running.stop()
        assert running.log.of("session.drain_timed_out")[0]["keys_left"] == 1
        fresh_convex.process.signal(signal.SIGCONT)
    mirrored = Mirrored(fresh_convex.url, fresh_convex.admin_key)
    async with worker_at_work(quick_settings(db.dsn, fresh_convex), mirrors):
        await eventually(lambda: len(mirrored.activities(user)), 1)


async def test_a_stop_while_a_shard_is_opened_lets_it_be_opened(
    mirrors: Sequence[Mirror], db: Database, fresh_convex: convex.LocalConvex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise Convex would have given an epoch that Postgres does not know, and the next worker look at all rows."""
    for module, name in ((session, "_OPENING_SECONDS"), (shards, "_CUT_SHORT_SECONDS")):
        monkeypatch.setattr(module, name, 10.0)
    async with Interposed(fresh_convex) as between:
        settings = quick_settings(db.dsn, between.convex, CDC_CONVEX_TIMEOUT_SECONDS=60)
        async with worker_at_work(settings, mirrors) as running:
            await running.said("session.open")
        released = asyncio.Event()
        between.fault = held_until(released)
        async with worker_at_work(settings, mirrors) as running:
            await eventually(lambda: between.open, 1)
            stopping = asyncio.create_task(running.stop())
            await asyncio.sleep(0.1)
            released.set()
            await stopping
            assert "session.open" not in running.log.events
        between.fault = None
        async with worker_at_work(settings, mirrors) as running:
            await running.said("session.open")
            assert "session.rescan" not in running.log.events


async def test_a_backfill_command_is_noticed_soon(
    db: Database, work: Work, mirrored: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_LOOKOUT_SECONDS", 300.0)  # it does not look without being rung for
    mirror = rows_of("t", name=f"soon-{uuid.uuid4().hex[:8]}")
    db.execute("create table t (id text primary key)")
    db.migrate([mirror])
    async with work([mirror]) as running:
        await running.said("session.open")
        await eventually(db.gate_is_kept, expected=True)
        await asyncio.to_thread(
            db.execute,
            "alter table t disable trigger user; insert into t values ('unseen');"
            " alter table t enable always trigger cdc_insert",
        )
        env = environment(db.dsn, None, tmp_path / "cdc_worker.toml")
        with child(tmp_path, env, "backfill", mirrors=[mirror]) as command:
            assert await asyncio.to_thread(command.process.wait, 60) == 0
        await eventually(lambda: mirrored.keys(mirror.name), ["unseen"])
