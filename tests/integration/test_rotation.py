"""The log turns to its next partition, and empties only what no shard needs."""

from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest

from cdc_worker.database import Database as Pool
from cdc_worker.rotation import rotate
from tests.integration.application import Database, rows_of

TABLE = "create table item (id text primary key)"


@pytest.fixture
def db(database: str) -> Iterator[Database]:
    with Database(database, TABLE, [rows_of("item")]) as made:
        yield made


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with Pool(database, statement_seconds=5) as made:
        yield made


async def turn(pool: Pool) -> bool:
    return await rotate(pool, retention_hours=0.0, partition_bytes=1)


def slot(db: Database) -> int:
    return int(db.one("select cdc.written()"))


def written(db: Database) -> list[int]:
    return [count for (count,) in db.execute("select count(*) from cdc.outbox group by slot order by slot")]


async def test_what_is_not_acknowledged_is_kept_and_what_is_goes(db: Database, pool: Pool) -> None:
    for number in range(3):
        db.execute(f"insert into item values ('{number}')")
        assert await turn(pool) == (number < 2), "the third turn would empty a partition that is still needed"
    assert (slot(db), written(db)) == (2, [1, 1, 1])

    db.execute("update cdc.checkpoint set position = pg_current_snapshot()")
    assert await turn(pool)
    assert (slot(db), written(db)) == (0, [1, 1])
    db.execute("insert into item values ('later')")
    assert written(db) == [1, 1, 1]
    assert db.one("select count(*) from cdc.outbox_0 where key = 'later'") == 1


async def test_nothing_turns_before_its_time_and_an_empty_partition_never_does(db: Database, pool: Pool) -> None:
    assert not await turn(pool)
    db.execute("insert into item values ('a')")
    assert not await rotate(pool, retention_hours=1.0, partition_bytes=1_000_000)
    db.execute("update cdc.rotation set rotated_at = now() - interval '31 minutes'")
    assert await rotate(pool, retention_hours=1.0, partition_bytes=1_000_000)


async def test_a_writer_that_holds_the_next_partition_is_neither_lost_nor_made_to_wait(
    db: Database, pool: Pool, database: str
) -> None:
    db.execute("insert into item values ('a')")
    assert await turn(pool)
    assert slot(db) == 1
    with psycopg.connect(database) as writer:
        # Uncommitted in partition 1, while capture goes on to 2 and then round to 1 again.
        writer.execute("insert into item values ('held')")
        assert await turn(pool)
        db.execute("insert into item values ('b')")
        db.execute("update cdc.checkpoint set position = pg_current_snapshot()")
        assert await turn(pool)
        db.execute("insert into item values ('c')")
        assert slot(db) == 0
        assert not await turn(pool), "the partition has a row that nobody has read"
        writer.commit()
    assert not await turn(pool), "the row is committed, and beyond the checkpoint"
    assert db.one("select count(*) from cdc.outbox where key = 'held'") == 1


async def test_a_held_snapshot_does_not_keep_a_partition(db: Database, pool: Pool, database: str) -> None:
    with psycopg.connect(database) as reader:
        reader.execute("begin isolation level repeatable read")
        reader.execute("select 1")
        for number in range(6):
            db.execute(f"insert into item values ('{number}')")
            db.execute("update cdc.checkpoint set position = pg_current_snapshot()")
            assert await turn(pool)
        assert sum(written(db)) <= 2
