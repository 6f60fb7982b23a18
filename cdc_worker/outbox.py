"""The log's cursor: which rows are new, by snapshots (PgQ's idea), and the page that is read next.

`id > last_id` would step over rows whose transaction commits late. Here a row is new if its transaction was
not visible in the snapshot that was acknowledged last, and is visible in the one that ends the window. A
window larger than a page is read page by page with its end fixed; then the next window starts where it ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cdc_worker.capture import CHANNEL
from cdc_worker.database import Connection, Database, fetch


@dataclass(frozen=True)
class Shard:
    """One of `of` parts of the log, by the keys (cdc.shard_of in migrations/)."""

    number: int
    of: int

    @property
    def name(self) -> str:
        """As cdc.checkpoint and Convex know it."""
        return str(self.number)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class Position:
    """How far: all of `snapshot`, and of the window up to `window_end` the rows up to (after_xid, after_id)."""

    snapshot: str
    window_end: str | None = None
    after_xid: int = 0
    after_id: int = 0

    @property
    def xmax(self) -> int:
        """The first transaction id that was not given out yet when its last snapshot was taken."""
        return int((self.window_end or self.snapshot).split(":")[1])


class LogRow(NamedTuple):
    mirror_id: int
    # None: rescan the mirror
    key: str | None
    xid: int
    id: int


@dataclass(frozen=True)
class Page:
    # The snapshot behind the window.
    start: str
    rows: Sequence[LogRow]
    # Where the reader is once this page is acknowledged.
    end: Position
    # Seconds between the oldest row's transaction and this reading; 0 for no rows.
    age_seconds: float

    def cut(self, count: int) -> "Page":
        """The page that ends behind its first `count` rows (at least one), within its window."""
        window_end = self.end.window_end or self.end.snapshot
        last = self.rows[count - 1]
        end = Position(self.start, window_end, last.xid, last.id)
        return Page(self.start, self.rows[:count], end, self.age_seconds)


# Two index ranges of (xid, id): neither a long transaction nor dead rows make them pass old ground. The second is one
# for each transaction that was open, so that a large one is paged, too. A row is also visible to the statement itself,
# which leaves out transactions that were rolled back. Each row that is taken has a key of the shard for the page, but
# for the one in which the page before ended: of rows with the same (xid, id), which name the same keys, one is taken.
# Rows are put in order before they are taken apart, so that no more of them are fetched than the page has room for.
_PAGE = """
select mirror, k.key, xid::text, id - cardinality(keys) + k.place as key_id,
       greatest(extract(epoch from clock_timestamp() - at), 0)::float8
from (
    (select distinct on (xid, id) xid, id, at, mirror, coalesce(keys, array[key]) as keys from cdc.outbox
     where xid >= pg_snapshot_xmax($1::pg_snapshot) and xid < pg_snapshot_xmax($2::pg_snapshot)
       and pg_visible_in_snapshot(xid, $2::pg_snapshot) and (xid, id) > ($3::text::xid8, $4::int8)
       and ($6::int = 1 or cdc.is_of_shard(key, keys, $6, $7::int))
     order by xid, id limit $5 + 1)
    union all
    (select late.* from pg_snapshot_xip($1::pg_snapshot) as was_open cross join lateral (
        select distinct on (id) xid, id, at, mirror, coalesce(keys, array[key]) as keys from cdc.outbox
        where xid = was_open and pg_visible_in_snapshot(xid, $2::pg_snapshot) and (xid, id) > ($3::text::xid8, $4::int8)
          and ($6 = 1 or cdc.is_of_shard(key, keys, $6, $7))
        order by id limit $5 + 1) as late
     order by xid, id limit $5 + 1)
) as log cross join lateral unnest(keys) with ordinality as k (key, place)
where (xid, id - cardinality(keys) + k.place) > ($3::text::xid8, $4::int8)
  and ($6 = 1 or cdc.shard_of(k.key, $6) = $7)
order by log.xid, log.id, k.place limit $5
"""
_LOOK = """
select pg_current_snapshot()::text,
       exists (select from cdc.outbox
               where xid >= pg_snapshot_xmax($1::pg_snapshot)
                 and pg_visible_in_snapshot(xid, pg_current_snapshot())
                 and ($2::int = 1 or cdc.is_of_shard(key, keys, $2, $3::int)))
    or exists (select from cdc.outbox
               where xid = any (array(select pg_snapshot_xip($1::pg_snapshot)))
                 and pg_visible_in_snapshot(xid, pg_current_snapshot())
                 and ($2::int = 1 or cdc.is_of_shard(key, keys, $2, $3::int)))
"""
_BACKLOG = """
select count(*) from (
    select from cdc.dirty_key
    where xid >= pg_snapshot_xmax($1::pg_snapshot)
      and (xid, row_id) > ($2::text::xid8, $3::int8) and (xid, id) > ($2::text::xid8, $3::int8)
      and ($5::int = 1 or cdc.shard_of(key, $5) = $6::int)
    limit $4) as counted
"""
_RING = "select pg_notify($1, '')"
# As many keys in a row as capture writes (capture.py).
_MARK = """
insert into cdc.outbox (slot, mirror, keys)
select cdc.written(), $1, array_agg(key) from unnest($2::text[]) with ordinality as new (key, place)
group by (place - 1) / 64
"""


async def look(database: Database, shard: Shard, position: Position) -> Position | None:
    """None if there is something new; otherwise the position moved on to now, which costs one statement."""
    if position.window_end is not None:
        return None
    ((now, something),) = await database.execute(_LOOK, position.snapshot, shard.of, shard.number)
    return None if something else Position(now)


async def backlog(database: Database, shard: Shard, position: Position, most: int) -> int:
    """About how many keys of the log are beyond `position`, counted up to `most`."""
    ((keys,),) = await database.execute(
        _BACKLOG, position.snapshot, str(position.after_xid), position.after_id, most, shard.of, shard.number
    )
    return int(keys)


async def read_page(connection: Connection, shard: Shard, now: str, position: Position, limit: int) -> Page:
    """The shard's next rows of the log. `connection` is in a repeatable-read transaction, whose snapshot is `now`."""
    end = position.window_end or now
    after = (str(position.after_xid), position.after_id)
    found = await fetch(connection, _PAGE, position.snapshot, end, *after, limit, shard.of, shard.number)
    rows = [LogRow(mirror, key, int(xid), row_id) for mirror, key, xid, row_id, _ in found]
    age = max((seconds for *_, seconds in found), default=0.0)
    page = Page(position.snapshot, rows, Position(end), age)
    return page.cut(limit) if len(rows) == limit else page


async def ring(database: Database) -> None:
    """Wakes whoever listens: for what is marked by another process than the worker, and for the bell's self-test."""
    await database.execute(_RING, CHANNEL)


async def mark(connection: Connection, mirror_id: int, keys: Sequence[str]) -> None:
    """Makes keys dirty: this is all that backfill, repair and retry do."""
    await connection.execute(_MARK, (mirror_id, list(keys)))
