"""The reader: pages of the log, the rows of their keys in the same snapshot, numbered, into the lanes."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
import structlog

from cdc_worker.catalog import Plan
from cdc_worker.database import GONE, Connection, Database, fetch, first_lines
from cdc_worker.documents import Event, Problem, UnfitRow, document, event
from cdc_worker.errors import SchemaError
from cdc_worker.keys import join_key, split_key
from cdc_worker.lanes import Lanes
from cdc_worker.listener import Bell
from cdc_worker.liveness import Liveness
from cdc_worker.outbox import Page, Position, look, read_page

log = structlog.get_logger()

_READER = "the log in Postgres"
SNAPSHOT = "isolation level repeatable read read only"

# After a busy time: so soon is the next change likely. Then the bell is armed, or the pauses grow.
_SHORT_PAUSES_SECONDS = (0.002, 0.004, 0.008, 0.016)
# The bell is trusted for so long; then one look, which also moves the position on.
_LOOKOUT_SECONDS = 30.0
# What may wait in memory. Bytes are the bound that matters; keys keep the lanes' own bookkeeping small.
MOST_WAITING_BYTES = 8 * 1024 * 1024
MOST_WAITING_KEYS = 5_000


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


class Reader:
    """One shard's reader under one epoch. `run` returns when stopped; otherwise it only raises."""

    def __init__(
        self,
        database: Database,
        bell: Bell | None,
        mirrors: Mapping[int, MirrorState],
        lanes: Lanes,
        position: Position,
        *,
        page_rows: int,
        poll_seconds: float,
        rescan: Callable[[set[int]], Any],
        added: Callable[[], None],
        liveness: Liveness,
    ) -> None:
        self._liveness = liveness
        self._database = database
        self._bell = bell
        self._mirrors = mirrors
        self._lanes = lanes
        self.position = position
        self._page_rows = page_rows
        self._poll_seconds = poll_seconds
        self._rescan = rescan
        self._added = added
        self._number = 0
        self._stopping = False
        # Something happened in this process: keys were marked, or it stops.
        self._wake = asyncio.Event()
        # The lanes have given something up.
        self._freed = asyncio.Event()
        # The last look found nothing: whoever has time may add work of his own.
        self.caught_up = asyncio.Event()
        # Age of the oldest change read and perhaps not acknowledged, as of `monotonic`.
        self.oldest_since: float | None = None

    def wake(self) -> None:
        self._wake.set()

    def freed(self) -> None:
        self._freed.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._freed.set()

    async def run(self) -> None:
        try:
            while await self._room():
                if not await self._step():
                    self.caught_up.set()
                    await self._rest()
        finally:
            self._liveness.rests(_READER)

    async def _room(self) -> bool:
        """Waits until the lanes can take a page; False if stopped."""
        while not self._stopping and (self._lanes.keys >= MOST_WAITING_KEYS or self._lanes.bytes >= MOST_WAITING_BYTES):
            self._liveness.rests(_READER)
            self._freed.clear()
            await self._freed.wait()
        self._liveness.moved(_READER)
        return not self._stopping

    async def _step(self) -> bool:
        """Reads one page; False if there was none."""
        try:
            readings = await self._read(careful=False)
        except psycopg.Error as error:
            if isinstance(error, GONE) and not isinstance(error, psycopg.errors.QueryCanceled):
                raise
            readings = await self._read(careful=True)
        page = readings.page
        if readings.rescans:
            await self._rescan(readings.rescans)
        self.position = page.end
        if not page.rows:
            return False
        if page.end.window_end is not None:
            self.caught_up.clear()
        if self.oldest_since is None or self._lanes.idle:
            self.oldest_since = time.monotonic() - page.age_seconds
        self._lanes.add(page.end, readings.events)
        self._added()
        return True

    async def _read(self, *, careful: bool) -> Readings:
        """A page and the rows of its keys in one snapshot. Careful: one mirror's error is its own, and found
        by halving.
        """
        async with self._database.transaction(SNAPSHOT) as connection:
            page = await read_page(connection, self.position, self._page_rows)
            readings = Readings(page)
            keys: dict[int, dict[str, None]] = {}
            for row in page.rows:
                if row.mirror_id not in self._mirrors:
                    raise SchemaError(
                        f"the log names mirror {row.mirror_id}, which is not in cdc_worker.toml: run migrate"
                    )
                if row.key is None:
                    readings.rescans.add(row.mirror_id)
                else:
                    keys.setdefault(row.mirror_id, {})[row.key] = None
            self._number += 1
            for mirror_id, dirty in keys.items():
                state = self._mirrors[mirror_id]
                readings.events += await self._documents(connection, state, list(dirty), careful=careful)
        return readings

    async def _documents(
        self, connection: Connection, state: MirrorState, keys: Sequence[str], *, careful: bool
    ) -> list[Event]:
        if state.retired:
            return []
        if state.plan is None:
            return [_unfit(state, key, ("mirror", state.broken)) for key in keys]
        if not careful:
            return await self._query(connection, state, state.plan, keys)
        try:
            async with connection.transaction():
                return await self._query(connection, state, state.plan, keys)
        except psycopg.Error as error:
            if isinstance(error, GONE) and not isinstance(error, psycopg.errors.QueryCanceled):
                raise
            said = first_lines(error) if (error.sqlstate or "").startswith("42") else _name(error)
            if (error.sqlstate or "").startswith("42"):
                # The query as a whole: an unknown column or table, a right taken away.
                state.plan, state.broken = None, said
                log.error(
                    "mirror.broken",
                    mirror=state.name,
                    cause=said,
                    cure="mend the query in cdc_worker.toml and run migrate",
                )
                return [_unfit(state, key, ("mirror", said)) for key in keys]
        if len(keys) == 1:
            return [_unfit(state, keys[0], ("row", said))]
        middle = len(keys) // 2
        return [
            *await self._documents(connection, state, keys[:middle], careful=True),
            *await self._documents(connection, state, keys[middle:], careful=True),
        ]

    async def _query(self, connection: Connection, state: MirrorState, plan: Plan, keys: Sequence[str]) -> list[Event]:
        width = state.width
        parts = [split_key(key, width) for key in keys]
        found: dict[str, list[tuple[Any, ...]]] = {}
        for row in await fetch(connection, plan.documents, *(list(column) for column in zip(*parts, strict=True))):
            found.setdefault(join_key(row[:width]), []).append(row[width:])
        return [self._event(state, plan, key, found.get(key, ())) for key in keys]

    def _event(self, state: MirrorState, plan: Plan, key: str, rows: Sequence[tuple[Any, ...]]) -> Event:
        try:
            if len(rows) > 1:
                raise UnfitRow("the query yields several rows for this key")
            return event(plan, state.id, key, self._number, document(plan, rows[0]) if rows else None)
        except UnfitRow as error:
            return _unfit(state, key, ("row", str(error)))

    async def _rest(self) -> None:
        """Returns when there may be something to read: rung, polled, or woken."""
        for seconds in _SHORT_PAUSES_SECONDS:
            if await self._pause(seconds) or await self._something():
                return
        if self._bell is not None and await self._bell.arm():
            try:
                # A writer that found the gate open is seen by this look; one that comes later rings.
                while not await self._something():
                    if await self._bell.wait(self._wake, _LOOKOUT_SECONDS):
                        return
            finally:
                await self._bell.disarm()
            return
        seconds = _SHORT_PAUSES_SECONDS[-1]
        while not await self._pause(seconds) and not await self._something():
            seconds = min(seconds * 1.5, self._poll_seconds)

    async def _pause(self, seconds: float) -> bool:
        """True if woken."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        return True

    async def _something(self) -> bool:
        moved = await look(self._database, self.position)
        self._liveness.moved(_READER)
        if moved is None:
            return True
        self.position = moved
        return self._stopping


def _unfit(state: MirrorState, key: str, problem: Problem) -> Event:
    return Event(state.id, key, b"", problem)


def _name(error: psycopg.Error) -> str:
    """What kind of error: the message itself can quote a value (`invalid input syntax for type integer: "..."`)."""
    return f"the query fails on this row: {type(error).__name__} ({error.sqlstate})"
