"""Queries that are slow, each within its time limit: however many of them one page has, it is read to its end."""

import asyncio
import uuid
from collections.abc import Sequence

import psycopg
import pytest

from cdc_worker import database as border
from cdc_worker import late_read, liveness, worker
from cdc_worker.database import Database as Border
from cdc_worker.liveness import Liveness
from cdc_worker.mirrors import Mirror, Source
from dev import local_convex as convex
from dev import postgres
from tests.integration.application import Database, rows_of
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import quick_settings, worker_at_work

pytestmark = pytest.mark.one_postgres

MIRRORS = 8
LIMIT_SECONDS = 2.0
GRACE_SECONDS = 0.5
# All of them together take far longer than any one wait may, and twice as much; each takes far less.
TAKES_SECONDS = 0.8
STALL_SECONDS = 4.5


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(border, "_GRACE_SECONDS", GRACE_SECONDS)


@pytest.fixture
def mirrors() -> Sequence[Mirror]:
    """Each statement takes its time once, however many rows it yields."""
    run = uuid.uuid4().hex[:8]
    return [
        Mirror(
            name=f"slow-{number}-{run}",
            target="activity",
            key=("id",),
            query=f"""
                with pause as materialized (select pg_sleep({TAKES_SECONDS}))
                select id, 'u' as user_id, 'alert' as type, 'x' as description, now() as timestamp from work, pause
            """,
            sources=(Source(table="work", key=("id",)),),
        )
        for number in range(MIRRORS)
    ]


async def test_a_page_of_many_slow_mirrors_is_read_to_its_end(
    database: str, local_convex: convex.LocalConvex, mirrors: Sequence[Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    stalls: list[None] = []
    monkeypatch.setattr(worker, "Liveness", lambda _: Liveness(STALL_SECONDS, give_up=lambda: stalls.append(None)))
    mirrored = Mirrored(local_convex.url, local_convex.admin_key)
    with Database(database, "create table work (id int primary key)", mirrors) as db:
        # Nothing to scan, so that the row is read from one page of the log.
        db.execute("update cdc.backfill set phase = 'done'")
        settings = quick_settings(database, local_convex, CDC_STATEMENT_SECONDS=LIMIT_SECONDS)
        async with worker_at_work(settings, mirrors) as running:
            await running.said("session.open")
            db.execute("insert into work values (1)")
            await eventually(lambda: [mirrored.keys(mirror.name) for mirror in mirrors], [["1"]] * MIRRORS)
            await running.stop()
            assert running.log.events.count("session.open") == 1
            assert "key.parked" not in running.log.events
    assert not stalls


async def test_a_migration_that_takes_a_page_s_tables_the_other_way_round_is_not_ended(
    database: str, local_convex: convex.LocalConvex, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It has the second table and waits for the first; the reader has the first, and comes to wait for the second.
    # Postgres ends who has waited for a second: the reader must have given way before.
    monkeypatch.setattr(late_read, "_GIVES_WAY", 1_000)
    run = uuid.uuid4().hex[:8]
    first, second = rows_of("one", name=f"one-{run}"), rows_of("two", name=f"two-{run}")
    # Until the gate is open.
    pause = "with pause as materialized (select pg_advisory_xact_lock_shared(7))"
    slow = first.model_copy(update={"query": f"{pause} {first.query}, pause"})
    mirrored = Mirrored(local_convex.url, local_convex.admin_key)
    with (
        Database(database, "create table one (id int); create table two (id int)", [slow, second]) as db,
        psycopg.connect(database) as gate,
        psycopg.connect(database) as migration,
    ):
        db.execute("update cdc.backfill set phase = 'done'")
        at_gate = "select exists (select from pg_locks where not granted and locktype = 'advisory' and objid = 7)"
        for_one = "select exists (select from pg_locks where not granted and relation = 'one'::regclass)"
        async with worker_at_work(quick_settings(database, local_convex), [slow, second]) as running:
            await running.said("session.open")
            gate.execute("select pg_advisory_xact_lock(7)")
            db.execute("begin; insert into one values (1); insert into two values (1); commit")
            await eventually(lambda: db.one(at_gate), True)
            await asyncio.to_thread(migration.execute, "alter table two add note text")
            altering = asyncio.create_task(asyncio.to_thread(migration.execute, "alter table one add note text"))
            # Unless the reader has given way already, tired of the gate.
            await eventually(lambda: altering.done() or db.one(for_one), True)
            gate.commit()
            await altering
            migration.commit()
            await eventually(lambda: (mirrored.keys(slow.name), mirrored.keys(second.name)), (["1"], ["1"]))
        assert not {"mirror.broken", "key.parked", "database.refuses"} & set(running.log.events)


async def test_a_table_that_is_locked_for_a_while_breaks_no_mirror(
    database: str, local_convex: convex.LocalConvex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(border, "_LOCK_TIMEOUT", "100ms")
    monkeypatch.setattr(late_read, "_GIVES_WAY", 1_000)
    mirror = rows_of("work", name=f"locked-{uuid.uuid4().hex[:8]}")
    mirrored = Mirrored(local_convex.url, local_convex.admin_key)
    with Database(database, "create table work (id int)", [mirror]) as db, psycopg.connect(db.dsn) as migration:
        db.execute("update cdc.backfill set phase = 'done'")
        async with worker_at_work(quick_settings(database, local_convex), [mirror]) as running:
            await running.said("session.open")
            migration.execute("lock table work in access exclusive mode; insert into work values (1)")
            db.execute("insert into cdc.outbox (slot, mirror, key) select cdc.written(), id, '1' from cdc.mirror")
            db.execute("notify cdc_outbox")
            waits = "select exists (select from pg_locks where not granted and relation = 'work'::regclass)"
            await eventually(lambda: db.one(waits), expected=True)
            await asyncio.sleep(0.5)
            migration.commit()
            await eventually(lambda: mirrored.keys(mirror.name), ["1"])
        assert not {"mirror.broken", "key.parked", "database.refuses"} & set(running.log.events)


async def test_each_statement_of_a_transaction_has_the_limit_to_itself(database: str) -> None:
    stalls: list[None] = []
    watch = liveness.Liveness(STALL_SECONDS, give_up=lambda: stalls.append(None))
    watch.start()
    async with Border(database, statement_seconds=LIMIT_SECONDS, liveness=watch) as pool:
        async with pool.transaction() as connection:
            for _ in range(MIRRORS):
                await connection.execute(f"select pg_sleep({TAKES_SECONDS})")
        with pytest.raises(psycopg.errors.QueryCanceled, match="statement timeout"):
            async with pool.transaction() as connection:
                await connection.execute(f"select pg_sleep({2 * LIMIT_SECONDS})")
    watch.end()
    assert not stalls


async def test_a_limit_that_the_role_has_for_whole_transactions_ends_none_of_ours() -> None:
    """A page takes as long as its statements; a migrator holds its lock to the end. (Postgres 17 and later.)"""
    with postgres.start("wheel") as server, postgres.database(server) as dsn, Database(dsn) as db:
        db.execute(f"alter role current_user in database {dsn.rsplit('/', 1)[1]} set transaction_timeout = '500ms'")
        async with Border(dsn, statement_seconds=5) as pool:
            for transaction in (pool.transaction, pool.snapshot):
                async with transaction() as opened:
                    connection = opened[0] if isinstance(opened, tuple) else opened
                    for _ in range(3):
                        await connection.execute("select pg_sleep(0.3)")
