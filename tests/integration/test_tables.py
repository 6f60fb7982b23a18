"""Tables that come and go behind a mirror: the documents end equal to the rows, though no trigger tells of it."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager

import psycopg
import pytest

from cdc_worker import care
from cdc_worker.mirrors import Mirror
from dev import local_convex as convex
from dev import postgres
from tests.integration.application import Database, rows_of
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import Running, quick_settings, worker_at_work

pytestmark = pytest.mark.one_postgres

Work = Callable[..., AbstractAsyncContextManager[Running]]
PARTITIONS = """
create table visit (id int, part int, note text, primary key (id, part)) partition by list (part);
create table visit_1 partition of visit for values in (1);
create table visit_2 partition of visit for values in (2);
"""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(care, "_MENDING_SECONDS", 0.1)
    monkeypatch.setattr(care, "_SELDOM_SECONDS", 0.2)
    monkeypatch.setattr(care, "_RESCAN_SECONDS", 0.05)


@pytest.fixture
def mirror() -> Mirror:
    return rows_of("visit", name=f"visits-{uuid.uuid4().hex[:8]}", key=("id", "part"))


@pytest.fixture
def db(database: str, mirror: Mirror) -> Iterator[Database]:
    with Database(database, PARTITIONS, [mirror]) as opened:
        opened.execute("insert into visit select n, 1 + n % 2 from generate_series(1, 6) as n")
        yield opened


@pytest.fixture
def work(database: str, local_convex: convex.LocalConvex, mirror: Mirror) -> Work:
    return lambda mirror=mirror: worker_at_work(quick_settings(database, local_convex), [mirror])


async def equal(mirrored: Mirrored, mirror: Mirror, db: Database) -> None:
    rows = sorted(f'["{row}", "{part}"]' for row, part in db.execute("select id, part from visit"))
    await eventually(lambda: sorted(mirrored.keys(mirror.name)), rows)


async def noted(db: Database) -> None:
    """The worker knows what there is."""
    await eventually(
        lambda: db.one(
            "select tables = (select array_agg(inhrelid::int8 order by inhrelid) from pg_inherits"
            " where inhparent = 'visit'::regclass) from cdc.mirror where configured"
        ),
        expected=True,
    )


GONE = {
    "dropped": "drop table visit_1",
    "detached": "alter table visit detach partition visit_1",
    "moved to another": "alter table visit detach partition visit_1; alter table visit_1 rename to archive",
}


@pytest.mark.parametrize("at_work", [True, False], ids=["at work", "away"])
@pytest.mark.parametrize("how", GONE)
async def test_rows_that_go_with_their_partition(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror, how: str, at_work: bool
) -> None:
    async with work() as running:
        await equal(mirrored, mirror, db)
        await noted(db)
        if at_work:
            await asyncio.to_thread(db.execute, GONE[how])
            said = await running.said("capture.tables_changed")
            assert (said["mirror"], said["cause"]) == (mirror.name, "a table with rows was dropped or detached")
            await equal(mirrored, mirror, db)
    if not at_work:
        db.execute(GONE[how])
        async with work() as running:
            await running.said("capture.tables_changed")
            await equal(mirrored, mirror, db)
    assert len(mirrored.keys(mirror.name)) == 3


async def test_rows_go_with_a_partition_whose_detaching_was_cut_off(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror
) -> None:
    """Until somebody says `finalize`, it is neither shown by its parent nor a table of its own."""
    async with work() as running:
        await equal(mirrored, mirror, db)
        await noted(db)
        with psycopg.connect(db.dsn) as reader:
            reader.execute("select from visit")
            db.execute("set statement_timeout = '3s'")
            with pytest.raises(psycopg.errors.QueryCanceled):
                db.execute("alter table visit detach partition visit_1 concurrently")
            db.execute("reset statement_timeout")
        assert db.one("select count(*) from pg_inherits where inhdetachpending") == 1
        await running.said("capture.tables_changed")
        await equal(mirrored, mirror, db)
        assert len(mirrored.keys(mirror.name)) == 3


async def test_values_that_change_with_the_type_of_their_column(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror
) -> None:
    """No trigger fires for what ALTER TABLE rewrites."""
    user = f"user-{uuid.uuid4().hex[:8]}"
    query = f"select id, part, '{user}' as user_id, 'alert' as type, note::text as description, now() as timestamp"
    notes = mirror.model_copy(update={"name": f"{mirror.name}-notes", "query": f"{query} from visit where id < 3"})
    db.execute("update visit set note = id")
    await asyncio.to_thread(db.migrate, [notes])
    async with work(notes) as running:
        await eventually(lambda: mirrored.descriptions(user), ["1", "2"])
        await running.said("backfill.done")
        await noted(db)
        # A new column has nothing to do with it.
        await asyncio.to_thread(db.execute, "alter table visit add column more int default 7")
        await asyncio.to_thread(db.execute, "alter table visit alter column note type int using note::int * 10")
        assert "another type" in (await running.said("capture.tables_changed"))["cause"]
        await eventually(lambda: mirrored.descriptions(user), ["10", "20"])
        await running.stop()
        assert running.log.events.count("capture.tables_changed") == 1


async def test_a_key_column_that_changes_its_type_deletes_nothing(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror
) -> None:
    """The rows are found by the keys that they had, and have others: `1.00` is no text of a bigint."""
    async with work() as running:
        await running.said("backfill.done")
        await noted(db)
        await running.at_rest(db)
        before = sorted(mirrored.keys(mirror.name))
        await asyncio.to_thread(db.execute, "alter table visit alter id type numeric(10, 2)")
        db.execute("update visit set note = 'x'")
        assert (await running.said("mirror.broken"))["mirror"] == mirror.name
        assert "another type" in (await running.said("database.not_ready"))["cause"]
        assert sorted(mirrored.keys(mirror.name)) == before
        db.execute("insert into visit values (7, 1); delete from visit where id = 1")
        await asyncio.to_thread(db.execute, "alter table visit alter id type int")
        await running.said("mirror.mended")
        await equal(mirrored, mirror, db)


@pytest.mark.parametrize("kind", ["text", "uuid"])
async def test_a_key_column_that_is_replaced_by_one_of_another_type(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror, kind: str
) -> None:
    """As Prisma's migrations do it. No old key looked like a new one, which does not mean that it has no row."""
    replaced = f"""
        alter table visit drop column id, add column id {kind} default gen_random_uuid();
        alter table visit add primary key (id, part)
    """
    async with work() as running:
        await running.said("backfill.done")
        await noted(db)
        await running.at_rest(db)
        await asyncio.to_thread(db.execute, replaced)
        await asyncio.to_thread(db.execute, "insert into visit (part) values (1)")
        await running.said("mirror.broken")
        await running.said("mirror.mended")
        await equal(mirrored, mirror, db)


REWRITTEN = {
    "altered": "alter table visit add column more uuid default gen_random_uuid()",
    "filled anew": "create temp table kept as table visit; truncate visit; insert into visit table kept",
}


def mark_anew(db: Database) -> None:
    """All that the log has, as a replay does it."""
    db.execute(
        "insert into cdc.outbox (slot, mirror, keys) select cdc.written(), mirror, array_agg(key)"
        " from cdc.dirty_key where key is not null group by mirror; notify cdc_outbox"
    )


async def read_while(db: Database, running: Running, altering: str) -> None:
    """The page that waits for the table has its snapshot from before the change."""
    await running.said("backfill.done")
    await noted(db)
    await running.at_rest(db)
    with psycopg.connect(db.dsn) as application:
        application.execute(altering)
        mark_anew(db)
        waits = "select count(*) > 0 from pg_locks where not granted and locktype = 'relation'"
        await eventually(lambda: db.one(waits), expected=True)
        application.commit()


@pytest.mark.parametrize("how", REWRITTEN)
async def test_rows_that_are_read_while_their_table_is_rewritten(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror, how: str
) -> None:
    """To a snapshot from before then, the table is empty."""
    async with work() as running:
        await read_while(db, running, REWRITTEN[how])
        # What else such a page may have read wrongly is looked at again.
        assert "rewritten" in (await running.said("capture.tables_changed"))["cause"]
        await running.at_rest(db)
        await equal(mirrored, mirror, db)
        assert [line for line in running.log.of("batch.applied") if "deleted" in line] == []


async def test_rows_that_are_read_while_a_table_that_is_no_source_is_filled_anew(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror
) -> None:
    """A table of names has no key of the mirror's, and so cannot be one. To a snapshot from before, it is empty."""
    db.execute("create table kind (part int primary key, name text); insert into kind values (1, 'a'), (2, 'b')")
    db.execute("create view named as select visit.*, name from visit join kind using (part)")
    joined = mirror.model_copy(update={"query": mirror.query.replace("from visit", "from named")})
    db.migrate([joined])
    async with work(joined) as running:
        await running.said("backfill.done")
        await running.at_rest(db)
        with psycopg.connect(db.dsn) as altering:
            altering.execute("truncate kind; insert into kind values (1, 'c'), (2, 'd')")
            mark_anew(db)
            waits = "select count(*) > 0 from pg_locks where not granted and relation = 'kind'::regclass"
            await eventually(lambda: db.one(waits), expected=True)
            altering.commit()
        await running.at_rest(db)
        await equal(mirrored, mirror, db)
        assert [line for line in running.log.of("batch.applied") if "deleted" in line] == []


async def test_rows_go_where_a_view_reads_what_the_role_may_not_name(
    postgres_server: postgres.Server, db: Database, work: Work, mirrored: Mirrored, mirror: Mirror
) -> None:
    """As a public view over a table of logins: it is read with its owner's rights."""
    with postgres_server.admin(db.dsn.rpartition("/")[2]) as superuser:
        superuser.execute("create schema hidden; create table hidden.kind (part int primary key, name text)")
        superuser.execute("create view named as select visit.*, name from visit left join hidden.kind using (part)")
        superuser.execute("grant select on named to application")
    seen = mirror.model_copy(update={"query": mirror.query.replace("from visit", "from named")})
    db.migrate([seen])
    async with work(seen) as running:
        await running.said("backfill.done")
        db.execute("delete from visit where id = (select min(id) from visit)")
        await running.at_rest(db)
        await equal(mirrored, mirror, db)
        assert running.log.of("key.parked") == []


SWAPPED = {
    "under its name": "create table copy as table visit; drop table visit; alter table copy rename to visit",
    "that was there before": "insert into spare table visit; drop table visit; alter table spare rename to visit",
    "from another schema": """
        insert into other.visit table visit; drop table visit; alter table other.visit set schema public
    """,
    "as a partition": """
        create table copy (like visit_1); insert into copy table visit_1;
        alter table visit detach partition visit_1; alter table visit attach partition copy for values in (1)
    """,
    "as a partition, for one that is dropped": """
        insert into spare select * from visit_2;
        drop table visit_2; alter table visit attach partition spare for values in (2)
    """,
}


@pytest.mark.parametrize("how", SWAPPED)
async def test_rows_that_are_read_while_another_table_takes_the_place_of_theirs(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror, how: str
) -> None:
    """A snapshot from before does not see what the new one was filled with."""
    db.execute("create table spare (like visit); create schema other; create table other.visit (like visit)")
    async with work() as running:
        await read_while(db, running, SWAPPED[how])
        await running.said("capture.tables_changed")
        await running.at_rest(db)
        await equal(mirrored, mirror, db)
        assert [line for line in running.log.of("batch.applied") if "deleted" in line] == []


WHOLE_ROWS = {
    "as it is": "to_jsonb(v) as metadata from visit v",
    "spelled out": "to_jsonb(q) as metadata from (select * from visit) q",
    "in a view": "whole as metadata from seen",
}


@pytest.mark.parametrize("how", WHOLE_ROWS)
async def test_columns_of_a_query_that_shows_whole_rows(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror, user: str, how: str
) -> None:
    """A column that comes, or gets another name, is in each document, and no trigger fires."""
    db.execute("create view seen as select v.id, v.part, to_jsonb(v) as whole from visit v")
    query = f"select id, part, '{user}' as user_id, 'alert' as type, '' as description, now() as timestamp,"
    whole = mirror.model_copy(
        update={"name": f"{mirror.name}-whole", "query": f"{query} {WHOLE_ROWS[how]} where id = 1"}
    )
    await asyncio.to_thread(db.migrate, [whole])

    def shown() -> list[dict[str, object]]:
        return [each["metadata"] for each in mirrored.activities(user)]

    async with work(whole) as running:
        await running.said("backfill.done")
        await noted(db)
        await asyncio.to_thread(db.execute, "alter table visit add column more int default 7")
        await eventually(shown, [{"id": 1, "part": 2, "note": None, "more": 7}])
        # The first start's rescan may have shown it before the change was noticed.
        await running.said("capture.tables_changed")
        await asyncio.to_thread(db.execute, "alter table visit rename column more to most")
        await eventually(shown, [{"id": 1, "part": 2, "note": None, "most": 7}])
        assert "renamed" in (await running.said("capture.tables_changed", times=2))["cause"]


async def test_rows_that_come_with_their_partition(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror
) -> None:
    async with work() as running:
        await equal(mirrored, mirror, db)
        await noted(db)
        # One that is made empty, as they mostly are, is worth no look at all others.
        await asyncio.to_thread(db.execute, "create table visit_3 partition of visit for values in (3)")
        await noted(db)
        db.execute("insert into visit values (7, 3)")
        await equal(mirrored, mirror, db)
        assert "capture.tables_changed" not in running.log.events
        db.execute(
            "create table filled (id int not null, part int not null, note text); insert into filled values (8, 4)"
        )
        await asyncio.to_thread(db.execute, "alter table visit attach partition filled for values in (4)")
        assert "attached" in (await running.said("capture.tables_changed"))["cause"]
        await equal(mirrored, mirror, db)
        # It has no triggers of its own yet.
        assert "filled" in (await running.said("capture.missing", times=2))["tables"]


async def test_a_row_that_moves_to_another_partition(
    db: Database, work: Work, mirrored: Mirrored, mirror: Mirror
) -> None:
    async with work() as running:
        await equal(mirrored, mirror, db)
        db.execute("update visit set part = 2 where id = 2; update visit set part = 3 - part where id = 3")
        await equal(mirrored, mirror, db)
        db.execute("delete from visit_2 where id = 2")
        await equal(mirrored, mirror, db)
        await running.stop()
        assert "capture.tables_changed" not in running.log.events
