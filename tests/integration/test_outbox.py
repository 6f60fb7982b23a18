"""The log, page by page: rows of one key and of many, of transactions that end in any order."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from cdc_worker.database import Database as Pool
from cdc_worker.outbox import Page, Position, Shard, backlog, mark, read_page
from cdc_worker.parking import Parking, mark_parked
from dev import postgres
from tests.integration.application import Database

# What a transaction wrote: its id, the row's id, and the keys; in the order in which it is to be read.
LOG = (
    (99, 5, ["a"]),
    (99, 64, ["b", "c", "d"]),
    (99, 128, ["e"]),
    (100, 10, ["f", "g"]),
    (100, 11, ["h"]),
    (1000, 1, [None, "i"]),
    (1001, 1, ["j", "k", "l", "m", "n"]),
)
NOW = "2000:2000:"


@contextmanager
def written(dsn: str) -> Iterator[Database]:
    with Database(dsn, "", []) as made:
        made.execute("insert into cdc.mirror (name, definition) values ('rows', '')")
        for xid, row, keys in LOG:
            column, value = ("key", keys[0]) if len(keys) == 1 else ("keys", keys)
            made.execute(
                f"insert into cdc.outbox (slot, mirror, id, xid, {column}) values (%s, 1, %s, %s::text::xid8, %s)",
                *(xid % 3, row, str(xid), value),
            )
        yield made


@pytest.fixture
def db(database: str) -> Iterator[Database]:
    """The log, for a test that changes it."""
    with written(database) as made:
        yield made


@pytest.fixture(scope="module")
def log(postgres_server: postgres.Server) -> Iterator[Database]:
    """The log, which nobody changes."""
    with postgres.database(postgres_server) as dsn, written(dsn) as made:
        made.execute("set default_transaction_read_only = on")
        yield made


@pytest.fixture
async def pool(log: Database) -> AsyncIterator[Pool]:
    async with Pool(log.dsn, statement_seconds=5) as opened:
        yield opened


WHOLE = Shard(0, 1)


async def pages(pool: Pool, position: Position, limit: int, *, most: int = 100, shard: Shard = WHOLE) -> list[Page]:
    found: list[Page] = []
    while len(found) < most:
        async with pool.transaction("isolation level repeatable read read only") as connection:
            page = await read_page(connection, shard, NOW, position, limit)
        if not page.rows:
            break
        found.append(page)
        position = page.end
        if position.window_end is None:
            break
    return found


def keys(found: list[Page]) -> list[str | None]:
    return [row.key for page in found for row in page.rows]


ALL = [key for _, _, each in LOG for key in each]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    "start", ["50:50:", "50:2000:" + ",".join(str(xid) for xid in (50, 99, 100, 1000, 1001)), "50:1000:60,99,100"]
)
async def test_every_key_is_read_once_and_in_order(pool: Pool, start: str, limit: int) -> None:
    found = await pages(pool, Position(start), limit)
    assert keys(found) == ALL
    assert max(len(page.rows) for page in found) <= limit
    places = [(row.xid, row.id) for page in found for row in page.rows]
    assert places == sorted(set(places))


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize("shards", [2, 3, 7])
@pytest.mark.parametrize("start", ["50:50:", "50:2000:50,99,100,1000,1001"])
async def test_every_key_is_of_one_shard(pool: Pool, start: str, shards: int, limit: int) -> None:
    """A page may end within a row whose other keys are of other shards."""
    parts = [keys(await pages(pool, Position(start), limit, shard=Shard(n, shards))) for n in range(shards)]
    assert all(part == [key for key in ALL if key in part] for part in parts)
    assert sorted(str(key) for part in parts for key in part) == sorted(map(str, ALL))


@pytest.mark.parametrize("start", ["50:50:", "50:2000:50,99,100,1000,1001"])
@pytest.mark.parametrize("limit", [1, 2, 3, 100])
async def test_of_rows_with_the_same_id_one_is_read(db: Database, limit: int, start: str) -> None:
    """They name the same keys, and became visible together."""
    db.execute("insert into cdc.outbox select o.* from cdc.outbox o cross join generate_series(1, 4)")
    async with Pool(db.dsn, statement_seconds=5) as pool:
        assert keys(await pages(pool, Position(start), limit)) == ALL
        for shards in (2, 3, 7):
            parts = [keys(await pages(pool, Position(start), limit, shard=Shard(n, shards))) for n in range(shards)]
            assert sorted(str(key) for part in parts for key in part) == sorted(map(str, ALL))


async def test_what_was_visible_is_not_read_again(pool: Pool) -> None:
    found = await pages(pool, Position("50:1001:99,1000"), 2)
    assert keys(found) == ["a", "b", "c", "d", "e", None, "i", "j", "k", "l", "m", "n"]


async def test_a_page_may_be_cut_within_a_row(pool: Pool) -> None:
    (whole,) = await pages(pool, Position("50:50:"), 100)
    for count in range(1, len(ALL)):
        cut = whole.cut(count)
        assert [row.key for row in cut.rows] == ALL[:count]
        assert keys(await pages(pool, cut.end, 100)) == ALL[count:]


async def test_a_worker_before_this_format_reads_a_row_that_was_read_in_part_as_a_whole(
    log: Database, pool: Pool
) -> None:
    # Its condition is `(xid, id) > (after_xid, after_id)` of rows; what it does not know is a rescan to it.
    (page,) = await pages(pool, Position("50:50:"), 3, most=1)
    assert keys([page]) == ["a", "b", "c"]
    left = "select id from cdc.outbox where (xid, id) > (%s::text::xid8, %s) order by xid, id limit 1"
    assert log.one(left, str(page.end.after_xid), page.end.after_id) == 64


async def test_the_backlog_is_counted_in_keys(pool: Pool) -> None:
    assert await backlog(pool, WHOLE, Position("50:50:"), 100) == len(ALL)
    assert await backlog(pool, WHOLE, Position("50:50:"), 4) == 4
    assert await backlog(pool, WHOLE, Position("50:50:", NOW, 100, 9), 100) == 9


async def test_what_is_marked_is_rows_of_many_keys(db: Database) -> None:
    marked = [str(n) for n in range(1_000)]
    async with Pool(db.dsn, statement_seconds=5) as pool:
        db.execute("truncate cdc.outbox")
        async with pool.transaction() as connection:
            await mark(connection, 1, marked)
    assert sorted(map(int, filter(None, db.captured()))) == list(range(1_000))
    async with Pool(db.dsn, statement_seconds=5) as pool, pool.transaction() as connection:
        await mark(connection, 1, marked)
    assert db.one("select count(*) from cdc.outbox") == 16
    assert db.one("select max(cardinality(keys)) from cdc.outbox") == 64


async def test_parked_keys_are_marked_without_a_look_at_them(db: Database) -> None:
    """A mirror that was broken during a first fill may have a million."""
    db.execute("truncate cdc.outbox")
    db.execute("insert into cdc.parked_key (mirror, key, class, reason) values (1, 'unfit', 'row', '')")
    db.execute("insert into cdc.parked_key select 1, n::text, 'mirror', '' from generate_series(1, 1000) as n")
    marked = "select count(*), sum(cardinality(keys)), max(cardinality(keys)) from cdc.outbox"
    async with Pool(db.dsn, statement_seconds=5) as pool:
        await Parking(pool, WHOLE, 0).retry_mirror(1)
        assert db.execute(marked) == [(16, 1_000, 64)]
        db.execute("truncate cdc.outbox")
        async with pool.transaction() as connection:
            await mark_parked(connection, 1)
    assert db.execute(marked) == [(16, 1_001, 64)]
