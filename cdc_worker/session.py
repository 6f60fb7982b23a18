"""A session: from the lease to its release. Nothing that it knows outlives it."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import psycopg
import structlog

from cdc_worker import heartbeat
from cdc_worker.care import Care
from cdc_worker.checkpoint import Checkpoint, Held
from cdc_worker.database import GONE, Database
from cdc_worker.deployment import Deployment
from cdc_worker.functions import Functions
from cdc_worker.lanes import Lanes
from cdc_worker.listener import Listener
from cdc_worker.liveness import Liveness
from cdc_worker.mirrors import Mirror
from cdc_worker.opening import Known, Opened, open_shard
from cdc_worker.outage import Outage
from cdc_worker.outbox import Position, Shard, ring
from cdc_worker.pace import Pace
from cdc_worker.parking import Parking
from cdc_worker.reader import Reader
from cdc_worker.registry import Registry
from cdc_worker.sender import KEYS, Sender, Tally
from cdc_worker.settings import Settings

log = structlog.get_logger()

# A checkpoint for each batch would cost a commit each; what is acknowledged and not yet noted is only delivered twice.
_CHECKPOINT_SECONDS = 0.1
# Between two there is this many times what the last one took, within bounds. A snapshot that somebody holds for hours
# keeps every version of the checkpoint's row, and each further one has to pass them all.
_CHECKPOINT_SHARE = 20
_LONGEST_PAUSE_SECONDS = 2.0
# The position of an idle shard moves on with each look. For rotation's sake it is saved now and then, too: once in this
# number of heartbeats.
_UNMOVED_HEARTBEATS = 2
# A stop waits so long for an answer that Convex may just give: an epoch that Postgres does not know of has every row
# looked at again.
_OPENING_SECONDS = 1.0
# What a stop does behind its drain, for a platform that kills 30 s after its signal: noting how far it got, letting go.
_LAST_SAVE_SECONDS = 2.0
_RELEASE_SECONDS = 1.0
# Where the size of a batch starts from; the deployment's answers decide what it becomes.
_FIRST_BATCH_KEYS = 250
_CHECKPOINT = "a checkpoint in Postgres"


class Session:
    """One reader of one shard, whose lease is held."""

    def __init__(
        self,
        settings: Settings,
        mirrors: Sequence[Mirror],
        database: Database,
        deployment: Deployment,
        outage: Outage,
        *,
        shard: Shard,
        held: Held,
        tally: Tally,
        liveness: Liveness,
        on_open: Callable[[], None],
    ) -> None:
        self._on_open = on_open
        self._settings = settings
        self._database = database
        self._functions = Functions(deployment, shard)
        self._shard = shard
        self._held = held
        self._checkpoint = Checkpoint(database, shard, held, lease_seconds=settings.lease_seconds)
        self._outage = outage
        self._liveness = liveness.within(f"shard {shard}")
        self._parking = Parking(database, shard, held.token)
        self._registry = Registry(database, mirrors, self._parking)
        self._mirrors = mirrors
        self._lanes = Lanes()
        self._tally = tally
        self._settled = asyncio.Event()
        self._saved: Position | None = None
        self._listener = Listener(settings, database, self._checkpoint, self._liveness, alone=shard.of == 1)
        self._reader: Reader | None = None
        # When it opened its shard (monotonic): a stop then drains it, rather than to cut it short.
        self.opened_at: float | None = None

    @property
    def known(self) -> Known:
        """What is known of the shard in Postgres; for the next session."""
        return Known(self._checkpoint.saves, self._reader.position.xmax if self._reader is not None else 0)

    async def run(self, stop: asyncio.Event, *, known: Known) -> None:
        """Returns when stopped. Raises (in groups) what ended the session.

        `known`: by the sessions of this process before.
        """
        try:
            await self._listener.open()
            await self._registry.load()
            await self._parking.load()
            opened = await self._open(stop, known)
            if opened is not None:
                await self._work(opened, stop)
        finally:
            self._liveness.rests(_CHECKPOINT)
            self._liveness.rests(KEYS)
            await self._let_go()

    async def _let_go(self) -> None:
        try:
            with contextlib.suppress(*GONE, psycopg.Error):
                async with asyncio.timeout(_RELEASE_SECONDS):
                    await self._checkpoint.release()
                    await self._listener.end_backend()
        finally:
            await self._listener.close()

    async def _open(self, stop: asyncio.Event, known: Known) -> Opened | None:
        """The opened shard, or None if a stop came first: Convex may be away for hours."""
        if stop.is_set():
            return None
        opening = asyncio.create_task(
            open_shard(self._database, self._checkpoint, self._functions, self._outage, held=self._held, known=known)
        )
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                return await opening
            await asyncio.wait({opening}, timeout=_OPENING_SECONDS)
            return None
        finally:
            opening.cancel()
            stopped.cancel()
            await asyncio.gather(opening, stopped, return_exceptions=True)

    async def _work(self, opened: Opened, stop: asyncio.Event) -> None:
        pace = Pace(
            keys=_FIRST_BATCH_KEYS,
            most_keys=self._settings.batch_keys,
            most_in_flight=max(self._settings.in_flight // self._settings.shards, 1),
        )
        sender = self._new_sender(opened.epoch, pace)
        care = self._new_care(opened.epoch)
        reader = self._reader = self._new_reader(opened.position, sender, care)
        self._on_open()
        log.info("session.open", shard=str(self._shard), epoch=opened.epoch, listen=self._listener.bell is not None)
        self.opened_at = time.monotonic()
        if self._shard.of > 1:
            await ring(self._database)  # the reader before may have died at the gate, with others asleep behind it
        async with asyncio.TaskGroup() as tasks:
            delivering = {tasks.create_task(reader.run()), tasks.create_task(sender.run())}
            others = {
                tasks.create_task(self._keep_checkpoint(reader)),
                tasks.create_task(care.run(reader)),
                tasks.create_task(self._listener.recover()),
                tasks.create_task(self._heartbeat(reader, pace)),
            }
            await stop.wait()
            started = time.monotonic()
            drained = await self._drain(reader, sender, delivering)
            for task in delivering | others:
                task.cancel()
        async with asyncio.timeout(_LAST_SAVE_SECONDS):
            await self._save(reader)
        say = log.info if drained else log.warning
        say(
            "session.drained" if drained else "session.drain_timed_out",
            shard=str(self._shard),
            took_seconds=round(time.monotonic() - started, 2),
            keys_left=self._lanes.keys,
        )

    def _new_sender(self, epoch: int, pace: Pace) -> Sender:
        return Sender(
            self._functions,
            self._lanes,
            self._parking,
            self._outage,
            note_parked=self._registry.note_parked,
            epoch=epoch,
            pace=pace,
            batch_bytes=self._settings.batch_bytes,
            settled=self._settled.set,
            tally=self._tally,
            liveness=self._liveness,
        )

    def _new_care(self, epoch: int) -> Care:
        return Care(
            self._settings,
            self._database,
            self._functions,
            self._outage,
            self._registry,
            checkpoint=self._checkpoint,
            shard=self._shard,
            epoch=epoch,
            config=self._mirrors,
        )

    def _new_reader(self, position: Position, sender: Sender, care: Care) -> Reader:
        def added() -> None:
            sender.wake()
            if not self._lanes.keys:
                self._settled.set()  # a page without keys is acknowledged as it is

        return Reader(
            self._database,
            self._listener,
            self._registry.states,
            self._lanes,
            position,
            shard=self._shard,
            page_rows=self._settings.page_rows,
            poll_seconds=self._settings.poll_seconds,
            rescan=care.note_rescans,
            added=added,
            liveness=self._liveness,
        )

    async def _heartbeat(self, reader: Reader, pace: Pace) -> None:
        await heartbeat.beat(
            self._database,
            self._shard,
            reader,
            self._lanes,
            parking=self._parking,
            pace=pace,
            tally=self._tally,
            seconds=self._settings.heartbeat_seconds,
        )

    async def _drain(self, reader: Reader, sender: Sender, delivering: set[asyncio.Task[None]]) -> bool:
        """Reads no more, and waits for what is under way; False if that took too long."""
        self._liveness.rests(_CHECKPOINT)
        log.info(
            "session.stopping",
            shard=str(self._shard),
            drain_seconds=self._settings.drain_seconds,
            keys_under_way=self._lanes.keys,
        )
        reader.stop()
        sender.stop()
        _, late = await asyncio.wait(delivering, timeout=self._settings.drain_seconds)
        return not late

    async def _keep_checkpoint(self, reader: Reader) -> None:
        """After the verdicts, at a measured pace; and now and then of a position that moved on with nothing in it."""
        due = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.heartbeat_seconds * _UNMOVED_HEARTBEATS):
                    await self._settled.wait()
            self._settled.clear()
            reader.freed()
            if (started := time.monotonic()) >= due:
                self._liveness.works(_CHECKPOINT)
                await self._save(reader)
                self._liveness.rests(_CHECKPOINT)
                ended = time.monotonic()
                due = ended + min(_CHECKPOINT_SHARE * (ended - started), _LONGEST_PAUSE_SECONDS)
            else:
                self._settled.set()  # not noted yet
            await asyncio.sleep(_CHECKPOINT_SECONDS)

    async def _save(self, reader: Reader) -> None:
        """Notes how far everything is acknowledged, if that is further than before."""
        position: Position | None = self._lanes.acknowledged()
        if self._lanes.idle:
            position = reader.position
        if position is not None and position != self._saved:
            await self._checkpoint.save(position)
            self._saved = position
