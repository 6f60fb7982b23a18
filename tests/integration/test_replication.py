"""Logical replication beside the worker: a publication of all tables, its own among them."""

import asyncio
import uuid
from collections.abc import Iterator

import pytest

from cdc_worker.database import Database as Pool
from cdc_worker.rotation import rotate
from dev import local_convex as convex
from dev import postgres
from tests.integration.application import Database, rows_of
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import quick_settings, worker_at_work

# Tables of the worker's whose rows Postgres could not tell a subscriber of: only the parent of the log, which has none.
UNTOLD = """
select c.relname from pg_class c
where c.relnamespace = 'cdc'::regnamespace and c.relkind in ('r', 'p') and c.relreplident <> 'f'
  and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary)
order by 1
"""


@pytest.fixture
def db(postgres_server: postgres.Server, database: str) -> Iterator[Database]:
    with Database(database, "create table item (id int primary key, described text)") as made:
        with postgres_server.admin(database.rpartition("/")[2]) as superuser:
            superuser.execute("create publication everything for all tables")
        yield made


async def test_a_publication_of_all_tables_hinders_nothing(
    db: Database, local_convex: convex.LocalConvex, mirrored: Mirrored, user: str
) -> None:
    """Postgres refuses to update or delete what it could not tell a subscriber of."""
    columns = f"id, '{user}' as user_id, 'alert' as type, described as description, now() as timestamp"
    items = rows_of("item", name=f"items-{uuid.uuid4().hex[:8]}").model_copy(
        update={"query": f"select {columns} from item"}
    )
    await asyncio.to_thread(db.migrate, [items])
    async with worker_at_work(quick_settings(db.dsn, local_convex), [items]) as running:
        db.execute("insert into item values (1, 'one'), (2, null)")
        await running.said("key.parked")
        db.execute("update item set described = null")
        await running.said("key.parked", times=2)
        db.execute("update item set described = 'mended'")
        await running.said("key.settled")
        await eventually(lambda: mirrored.descriptions(user), ["mended", "mended"])
        async with Pool(db.dsn, statement_seconds=5) as pool:
            assert await rotate(pool, retention_hours=0.0, partition_bytes=1)
        db.execute("delete from item")
        await eventually(lambda: mirrored.descriptions(user), [])
        await running.stop()
        assert running.log.events.count("session.open") == 1
        assert "care.failed" not in running.log.events
    assert [name for (name,) in db.execute(UNTOLD)] == ["outbox"]


async def test_a_publication_of_all_tables_does_not_keep_a_restored_database_from_opening(
    db: Database, local_convex: convex.LocalConvex
) -> None:
    """After a restore or a fail-over the log may hold rows of transactions that are still to come."""
    items = rows_of("item", name=f"items-{uuid.uuid4().hex[:8]}")
    await asyncio.to_thread(db.migrate, [items])
    async with worker_at_work(quick_settings(db.dsn, local_convex), [items]) as running:
        await running.said("session.open")
    db.execute("insert into cdc.outbox (slot, mirror, key, xid) select 0, id, 'x', '1000000000' from cdc.mirror")
    db.execute("update cdc.checkpoint set incarnation = 'another one'")
    async with worker_at_work(quick_settings(db.dsn, local_convex), [items]) as running:
        await running.said("session.open")
        assert "another Postgres" in running.log.of("session.rescan")[0]["cause"]
    assert db.one("select count(*) from cdc.outbox where xid = '1000000000'") == 0
