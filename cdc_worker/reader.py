"""The reader: page after page of the log, read late and numbered, into the lanes; and how it rests in between."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from cdc_worker.database import Database
from cdc_worker.lanes import Lanes
from cdc_worker.late_read import LateReader
from cdc_worker.listener import Bell, Listener
from cdc_worker.liveness import Liveness
from cdc_worker.outbox import Position, Shard, look
from cdc_worker.registry import MirrorState

_READER = "the log in Postgres"
# In a busy time the next change is likely soon: short pauses that double, and the bell is not worth its statements, nor
# its NOTIFY to writers. It is a busy time when the bell rings within so long after a page was read.
_FIRST_PAUSE_SECONDS = 0.002
_LIKELY_SECONDS = 0.003
# For how long the bell is trusted; then comes one look, which also moves the position on.
_LOOKOUT_SECONDS = 30.0
# What may wait in memory. Bytes are the bound that matters; keys keep the lanes' own bookkeeping small.
_MOST_WAITING_BYTES = 8 * 1024 * 1024
_MOST_WAITING_KEYS = 10_000


class Reader:
    """The shard's reader under one epoch. `run` returns when stopped; otherwise it only raises."""

    def __init__(
        self,
        database: Database,
        listener: Listener,
        mirrors: Mapping[int, MirrorState],
        lanes: Lanes,
        position: Position,
        *,
        shard: Shard,
        page_rows: int,
        poll_seconds: float,
        rescan: Callable[[set[int]], Awaitable[None]],
        added: Callable[[], None],
        liveness: Liveness,
    ) -> None:
        self._liveness = liveness
        self._database = database
        self._listener = listener
        self._shard = shard
        # The gate is closed: whatever was committed since, and is not read, has rung or will ring.
        self._armed = False
        self._late = LateReader(database, shard, mirrors, page_rows=page_rows, moved=self._moved)
        self._lanes = lanes
        self.position = position
        self._poll_seconds = poll_seconds
        self._rescan = rescan
        self._added = added
        self._number = 0
        self._stopping = False
        # Something happened in this process: keys were marked, or it stops.
        self._wake = asyncio.Event()
        # The lanes have given something up.
        self._freed = asyncio.Event()
        # The last look found nothing: there is time for a rescan.
        self.caught_up = asyncio.Event()

    def _moved(self) -> None:
        self._liveness.moved(_READER)

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
                if await self._step():
                    await self._disarm()
                else:
                    self.caught_up.set()
                    await self._rest()
        finally:
            self._liveness.rests(_READER)

    async def _room(self) -> bool:
        """Waits until the lanes can take a page; False if stopped."""
        while self._is_full() and not self._stopping:
            self._liveness.rests(_READER)
            await self._disarm()
            self._freed.clear()
            await self._freed.wait()
        self._moved()
        return not self._stopping

    def _is_full(self) -> bool:
        return self._lanes.keys >= _MOST_WAITING_KEYS or self._lanes.bytes >= _MOST_WAITING_BYTES

    async def _step(self) -> bool:
        """Reads one page; False if it seems to be the last, so that it is time to rest."""
        self._number += 1
        readings = await self._late.read(self.position, self._number)
        page = readings.page
        if readings.rescans:
            await self._rescan(readings.rescans)
        self.position = page.end
        if not page.rows:
            return False
        if page.end.window_end is not None:
            self.caught_up.clear()
        self._lanes.add(page.end, readings.events, since=time.monotonic() - page.age_seconds)
        self._added()
        return page.end.window_end is not None

    async def _rest(self) -> None:
        """Returns when there may be something to read: rung, polled, or woken."""
        if self._armed and self._listener.bell is not None:
            return await self._listen(self._listener.bell)
        seconds = _FIRST_PAUSE_SECONDS
        while not await self._pause(seconds) and not await self._something():
            if seconds > _LIKELY_SECONDS and self._listener.bell is not None and await self._listener.bell.arm():
                self._armed = True
                # A writer that found the gate open is seen by this look; one that comes later rings.
                return None if await self._something() else await self._listen(self._listener.bell)
            seconds = min(seconds * 2, self._poll_seconds)
        return None

    async def _listen(self, bell: Bell) -> None:
        """Sleeps behind the closed gate until there is something to read.

        The gate then stays closed while that is read; not in a busy time, and not if another reader keeps it, which may
        have opened it with this very ring.
        """
        began = time.monotonic()
        while not await bell.wait(self._wake, _LOOKOUT_SECONDS):
            if await self._something():
                # It should have rung: this asks it whether it is still there.
                return await self._disarm()
        if time.monotonic() - began < _LIKELY_SECONDS or not bell.keeps_gate:
            await self._disarm()
        return None

    async def _disarm(self) -> None:
        if self._armed and self._listener.bell is not None:
            self._armed = False
            await self._listener.bell.disarm()

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
        moved = await look(self._database, self._shard, self.position)
        self._moved()
        if moved is None:
            return True
        self.position = moved
        return self._stopping
