"""The late read: a page of the log, and what its keys' rows are now, in one snapshot.

Memory is bounded: a mirror's query first gives only the sizes of large rows, the page is cut where its documents
would pass the bound, and only what is left of the large ones is then fetched whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
import structlog

from cdc_worker.catalog import Plan
from cdc_worker.database import Connection, Database, fetch, first_lines, is_gone
from cdc_worker.documents import Event, Problem, UnfitRow, document, event
from cdc_worker.errors import SchemaError
from cdc_worker.keys import join_key, key_parts
from cdc_worker.outbox import LogRow, Page, Position, read_page

log = structlog.get_logger()

_SNAPSHOT = "isolation level repeatable read read only"

# A larger row is only measured at first. A page of 1,000 rows that are not large has at most 16 MiB.
_LARGE_ROW_BYTES = 16_384
# All documents of a page together, unless a single one is larger.
_PAGE_BYTES = 8 * 1024 * 1024
_NO_LIMIT = 2_147_483_647
# A page whose query passed the time limit is read again with one row in so many.
_SLOW_SHARE = 8


@dataclass
class MirrorState:
    """A mirror at work: its plan, or why there is none."""

    id: int
    name: str
    width: int
    plan: Plan | None
    # What is wrong with the query; "" while there is a plan.
    broken: str = ""
    # No longer in cdc_worker.toml: what the log still says of it is passed over (`migrate` said so).
    retired: bool = False


@dataclass
class Readings:
    """What a page became: one event for each key, and the mirrors to be scanned anew."""

    page: Page
    events: list[Event] = field(default_factory=list)
    rescans: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Row:
    """A key's row: its size in bytes, and its values unless it is large; or what is wrong with it."""

    size: int = 0
    values: tuple[Any, ...] | None = None
    problem: Problem | None = None


# No row: a delete.
_Found = dict[str, _Row | None]


class LateReader:
    """Reads pages for one reader."""

    def __init__(self, database: Database, mirrors: Mapping[int, MirrorState], *, page_rows: int) -> None:
        self._database = database
        self._mirrors = mirrors
        self._most_rows = page_rows
        self._page_rows = page_rows

    async def read(self, position: Position, number: int) -> Readings:
        """The next page behind `position`, its readings numbered `number`."""
        while True:
            try:
                readings = await self._read_well_or_carefully(position, number)
            except psycopg.errors.QueryCanceled:
                if self._page_rows == 1:
                    raise
                # Smaller pages, not halves of this one: what is quick is acknowledged while the slow is searched for.
                self._page_rows = max(self._page_rows // _SLOW_SHARE, 1)
            else:
                self._page_rows = min(self._page_rows * 2, self._most_rows)
                return readings

    async def _read_well_or_carefully(self, position: Position, number: int) -> Readings:
        try:
            return await self._read(position, number, careful=False)
        except psycopg.Error as error:
            if is_gone(error) or (isinstance(error, psycopg.errors.QueryCanceled) and self._page_rows > 1):
                raise
            return await self._read(position, number, careful=True)

    async def _read(self, position: Position, number: int, *, careful: bool) -> Readings:
        """Careful: behind savepoints, so that one mirror's error is its own, and a row's is found by halving."""
        async with self._database.transaction(_SNAPSHOT) as connection:
            page = await read_page(connection, position, self._page_rows)
            found = {
                mirror_id: await self._rows(connection, self._mirror(mirror_id), keys, careful=careful)
                for mirror_id, keys in _distinct_keys(page.rows).items()
            }
            count = _rows_that_fit(page.rows, found)
            if count < len(page.rows):
                page = page.cut(count)
            readings = Readings(page)
            readings.rescans = {row.mirror_id for row in page.rows if row.key is None}
            for mirror_id, keys in _distinct_keys(page.rows).items():
                state = self._mirror(mirror_id)
                if not state.retired:
                    rows = found[mirror_id]
                    await self._complete(connection, state, rows, keys)
                    readings.events += [_event(state, key, rows[key], number) for key in keys]
        return readings

    def _mirror(self, mirror_id: int) -> MirrorState:
        try:
            return self._mirrors[mirror_id]
        except KeyError:
            raise SchemaError(
                f"the log names mirror {mirror_id}, which this worker does not know: restart it"
            ) from None

    async def _rows(self, connection: Connection, state: MirrorState, keys: Sequence[str], *, careful: bool) -> _Found:
        if state.retired:
            return dict.fromkeys(keys)
        if state.plan is None:
            return _all(keys, ("mirror", state.broken))
        if not careful:
            return await _query(connection, state.plan, keys, _LARGE_ROW_BYTES)
        try:
            async with connection.transaction():
                return await _query(connection, state.plan, keys, _LARGE_ROW_BYTES)
        except psycopg.Error as error:
            if is_gone(error) or (isinstance(error, psycopg.errors.QueryCanceled) and len(keys) > 1):
                raise
            if (error.sqlstate or "").startswith(("42", "55")):
                # The query as a whole: an unknown column or table, a right taken away, a table that is locked.
                state.plan, state.broken = None, first_lines(error)
                log.error(
                    "mirror.broken",
                    mirror=state.name,
                    cause=state.broken,
                    cure="its keys are parked until the query runs again: mend it in cdc_worker.toml and run migrate",
                )
                return _all(keys, ("mirror", state.broken))
            if len(keys) == 1:
                # The message itself can quote a value (`invalid input syntax for type integer: "..."`).
                said = f"the query fails on this row: {type(error).__name__} ({error.sqlstate})"
                return _all(keys, ("row", said))
        middle = len(keys) // 2
        first = await self._rows(connection, state, keys[:middle], careful=True)
        return first | await self._rows(connection, state, keys[middle:], careful=True)

    async def _complete(self, connection: Connection, state: MirrorState, rows: _Found, keys: Sequence[str]) -> None:
        """Fetches the large rows among `keys` whole; they were seen in this very snapshot."""
        large = [key for key in keys if (row := rows[key]) is not None and row.size > _LARGE_ROW_BYTES]
        if large and state.plan is not None:
            rows.update(await _query(connection, state.plan, large, _NO_LIMIT))


def _distinct_keys(rows: Sequence[LogRow]) -> dict[int, list[str]]:
    keys: dict[int, dict[str, None]] = {}
    for row in rows:
        if row.key is not None:
            keys.setdefault(row.mirror_id, {})[row.key] = None
    return {mirror_id: list(distinct) for mirror_id, distinct in keys.items()}


def _rows_that_fit(rows: Sequence[LogRow], found: Mapping[int, _Found]) -> int:
    """How many of the page's rows have documents that are within the bound together; at least one."""
    size = 0
    counted = set()
    for count, row in enumerate(rows):
        if row.key is None or (row.mirror_id, row.key) in counted:
            continue
        counted.add((row.mirror_id, row.key))
        current = found[row.mirror_id][row.key]
        size += current.size if current is not None else 0
        if size > _PAGE_BYTES and count:
            return count
    return len(rows)


async def _query(connection: Connection, plan: Plan, keys: Sequence[str], most_bytes: int) -> _Found:
    width = len(plan.mirror.key)
    found: _Found = dict.fromkeys(keys)
    possible = [parts for key in keys if (parts := key_parts(key, plan.key_types)) is not None]
    if not possible:
        return found
    columns = [list(column) for column in zip(*possible, strict=True)]
    for row in await fetch(connection, plan.documents, *columns, most_bytes):
        key = join_key(row[:width])
        # A collation may find spellings of a key that nobody asked for: they have log rows of their own.
        if key in found:
            several = found[key] is not None
            found[key] = (
                _Row(problem=("row", "the query yields several rows for this key"))
                if several
                else _Row(row[width], row[width + 1 :])
            )
    return found


def _all(keys: Sequence[str], problem: Problem) -> _Found:
    return {key: _Row(problem=problem) for key in keys}


def _event(state: MirrorState, key: str, row: _Row | None, number: int) -> Event:
    if row is not None and row.problem is not None:
        return Event(state.id, key, b"", row.problem)
    if state.plan is None:  # found broken by a later key of this very page
        return Event(state.id, key, b"", ("mirror", state.broken))
    try:
        fields = document(state.plan, row.values) if row is not None and row.values is not None else None
        return event(state.plan, state.id, key, number, fields)
    except UnfitRow as error:
        return Event(state.id, key, b"", ("row", str(error)))
