"""The late read: a page of the log, and what its keys' rows are now, in one snapshot.

Memory is bounded: a mirror's query first gives only the sizes of large rows, the page is cut where its documents
would pass the bound, and only what is left of the large ones is then fetched whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psycopg

from cdc_worker.database import Connection, Database, fetch
from cdc_worker.documents import Event, EventMaker, Problem, Row
from cdc_worker.errors import SchemaError
from cdc_worker.keys import key_arrays, key_parts
from cdc_worker.outbox import LogRow, Page, Position, Shard, read_page
from cdc_worker.plan import Plan
from cdc_worker.postgres_errors import cause, is_of_the_database, is_of_the_query, is_surely_gone
from cdc_worker.registry import MirrorState

# A larger row is only measured at first. A page of 1,000 rows that are not large has at most 16 MiB.
_LARGE_ROW_BYTES = 16_384
# All documents of a page together, unless a single one is larger.
_PAGE_BYTES = 8 * 1024 * 1024
_NO_LIMIT = 2_147_483_647
# A page whose query passed the time limit is read again with its rows divided by this.
_SLOW_SHARE = 8

# How often a page lets go of all its tables, before one that is still locked (for half a second each time) breaks the
# mirror that reads it.
_GIVES_WAY = 3

# Whether one of these tables ($1), or of what is behind them, has another file than in this snapshot, to which it is
# empty now; or whether another one stands in its place, which may have been filled in the same transaction. What
# functions say is of now; a partition that has left has no root.
_REWRITTEN = """
with recursive family (oid) as (
    select to_regclass(name)::oid from unnest($1::text[]) as given (name) where to_regclass(name) is not null
    union select i.inhrelid from pg_inherits i join family on i.inhparent = family.oid
)
select exists (
    select from family left join pg_class c using (oid)
    where c.oid is null
       or c.relkind = 'r' and c.relfilenode <> pg_relation_filenode(c.oid)
       or c.relispartition and pg_partition_root(c.oid) is null
       or c.relpersistence <> 't' and (pg_identify_object('pg_class'::regclass, c.oid, 0)).identity
            is distinct from concat(c.relnamespace::regnamespace, '.', quote_ident(c.relname)))
"""


@dataclass
class Readings:
    """What a page became: one event for each key, and the mirrors to be scanned anew."""

    page: Page
    events: list[Event] = field(default_factory=list)
    rescans: set[int] = field(default_factory=set)


# By key: what became of its row, or the bytes of a large one that was only measured.
_Found = dict[str, Event | int]


class _Rewritten(Exception):
    """TRUNCATE, ALTER TABLE, or another table in its place has taken rows away that this snapshot should see."""


class LateReader:
    """Reads pages for one reader. `moved` is told of each statement: a page of many slow mirrors may take its time."""

    def __init__(
        self,
        database: Database,
        shard: Shard,
        mirrors: Mapping[int, MirrorState],
        *,
        page_rows: int,
        moved: Callable[[], None],
    ) -> None:
        self._database = database
        self._shard = shard
        self._mirrors = mirrors
        self._most_rows = page_rows
        self._page_rows = page_rows
        self._moved = moved

    async def read(self, position: Position, number: int) -> Readings:
        """The next page behind `position`, its readings numbered `number`."""
        while True:
            try:
                readings = await self._read_well_or_carefully(position, number)
            except _Rewritten:
                continue
            except psycopg.errors.QueryCanceled:
                if self._page_rows == 1:
                    raise
                # Smaller pages, not halves of this one: what is quick is acknowledged while the slow is searched for.
                self._page_rows = max(self._page_rows // _SLOW_SHARE, 1)
            else:
                self._page_rows = min(self._page_rows * 2, self._most_rows)
                return readings

    async def _read_well_or_carefully(self, position: Position, number: int) -> Readings:
        for _ in range(_GIVES_WAY):
            try:
                return await self._read(position, number, careful=False)
            except psycopg.errors.LockNotAvailable:
                continue
            except psycopg.Error as error:
                if is_surely_gone(error) or (isinstance(error, psycopg.errors.QueryCanceled) and self._page_rows > 1):
                    raise
                break
        return await self._read(position, number, careful=True)

    async def _read(self, position: Position, number: int, *, careful: bool) -> Readings:
        """Careful: behind savepoints, so that one mirror's error is its own, and a row's is found by halving."""
        async with self._database.snapshot() as (connection, now):
            page = await read_page(connection, self._shard, now, position, self._page_rows)
            keys = _distinct_keys(page.rows)
            states = [state for mirror_id in keys if not (state := self._mirror(mirror_id)).retired]
            found = {
                state.id: await self._rows(connection, state, keys[state.id], number, careful=careful)
                for state in states
            }
            count = _rows_that_fit(page.rows, found)
            if count < len(page.rows):
                page = page.cut(count)
                keys = _distinct_keys(page.rows)
            readings = Readings(page, rescans={self._mirror(row.mirror_id).id for row in page.rows if row.key is None})
            for state in states:
                wanted = keys.get(state.id, [])
                readings.events += await self._complete(connection, state, found[state.id], wanted, number)
        return readings

    def _mirror(self, mirror_id: int) -> MirrorState:
        try:
            return self._mirrors[mirror_id]
        except KeyError:
            raise SchemaError(
                f"the log names mirror {mirror_id}, which this worker does not know: restart it"
            ) from None

    async def _rows(
        self, connection: Connection, state: MirrorState, keys: Sequence[str], number: int, *, careful: bool
    ) -> _Found:
        self._moved()
        if state.plan is None:
            return _all(state, keys, ("mirror", state.broken))
        maker = EventMaker(state.plan, state.id, number)
        if not careful:
            return await _query(connection, state.plan, maker, keys, _LARGE_ROW_BYTES)
        try:
            async with connection.transaction():
                return await _query(connection, state.plan, maker, keys, _LARGE_ROW_BYTES)
        except psycopg.Error as error:
            others = [other.plan for other in self._mirrors.values() if other.plan is not None and other is not state]
            is_over = await is_of_the_database(error, connection, others)
            if is_over or (isinstance(error, psycopg.errors.QueryCanceled) and len(keys) > 1):
                raise
            if await is_of_the_query(error, connection, state.plan, keys):
                state.breaks(cause(error))
                return _all(state, keys, ("mirror", state.broken))
            if len(keys) == 1:
                # The message itself can quote a value (`invalid input syntax for type integer: "..."`).
                said = f"the query fails on this row: {type(error).__name__} ({error.sqlstate})"
                return _all(state, keys, ("row", said))
        middle = len(keys) // 2
        first = await self._rows(connection, state, keys[:middle], number, careful=True)
        return first | await self._rows(connection, state, keys[middle:], number, careful=True)

    async def _complete(
        self, connection: Connection, state: MirrorState, found: _Found, keys: Sequence[str], number: int
    ) -> list[Event]:
        """The events of `keys`. Large rows are fetched whole; they were seen in this very snapshot."""
        self._moved()
        large = [key for key in keys if isinstance(found[key], int)]
        if large and state.plan is None:  # found broken by a later key of this very page
            found |= _all(state, large, ("mirror", state.broken))
        elif large and state.plan is not None:
            maker = EventMaker(state.plan, state.id, number)
            found |= await _query(connection, state.plan, maker, large, _NO_LIMIT)
        return [event for key in keys if isinstance(event := found[key], Event)]


def _distinct_keys(rows: Sequence[LogRow]) -> dict[int, list[str]]:
    keys: dict[int, dict[str, None]] = {}
    for row in rows:
        if row.key is not None:
            keys.setdefault(row.mirror_id, {})[row.key] = None
    return {mirror_id: list(distinct) for mirror_id, distinct in keys.items()}


def _rows_that_fit(rows: Sequence[LogRow], found: Mapping[int, _Found]) -> int:
    """How many of the page's rows have documents that are within the bound together; at least one."""
    sizes = {
        (mirror_id, key): reading if isinstance(reading, int) else len(reading.text)
        for mirror_id, readings in found.items()
        for key, reading in readings.items()
    }
    if sum(sizes.values()) <= _PAGE_BYTES:
        return len(rows)
    size = 0
    for count, row in enumerate(rows):
        if row.key is not None:  # counted once
            size += sizes.pop((row.mirror_id, row.key), 0)
        if size > _PAGE_BYTES and count:
            return count
    return len(rows)


async def _query(connection: Connection, plan: Plan, maker: EventMaker, keys: Sequence[str], most_bytes: int) -> _Found:
    """What the keys' rows are now; of those that are larger than `most_bytes`, only how large."""
    # Also where no key is left to ask for: if the column has another type now, they are keys after all, and this fails.
    arrays = key_arrays(keys, plan.key_types)
    cursor = await connection.execute(plan.documents, (*arrays, most_bytes), binary=True)
    rows: dict[str, Row | None] = {}
    for row in await cursor.fetchall():
        rows[row[0]] = row if row[0] not in rows else None
    # A collation may find spellings of a key that nobody asked for: they have log rows of their own.
    for key in rows.keys() - keys:
        if key_parts(key, plan.key_types) is None:
            raise SchemaError(
                f'the key of mirror "{plan.mirror.name}" has another type than it had: docs/mirrors.md, Keys'
            )
    gone = [key for key in keys if key not in rows]
    if gone and await _is_rewritten(connection, plan):
        raise _Rewritten
    return {key: _reading(maker, key, rows[key]) if key in rows else maker.delete(key) for key in keys}


async def _is_rewritten(connection: Connection, plan: Plan) -> bool:
    tables = [*plan.tables, *(source.table for source in plan.mirror.sources)]
    ((rewritten,),) = await fetch(connection, _REWRITTEN, tables)
    return bool(rewritten)


def _reading(maker: EventMaker, key: str, row: Row | None) -> Event | int:
    if row is None:
        return maker.unfit(key, "the query yields several rows for this key")
    _, size, problem, event, _ = row
    if event is not None or problem is not None:
        return maker.put(row)
    # What safe JSON leaves out of a text (spaces, escapes) makes no document of one that is larger than all of a page.
    return size if size <= _PAGE_BYTES else maker.too_large(key, size)


def _all(state: MirrorState, keys: Sequence[str], problem: Problem) -> _Found:
    return {key: Event(state.id, key, b"", problem) for key in keys}
