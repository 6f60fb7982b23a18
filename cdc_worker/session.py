"""A session: from the lease to its release. Nothing that it knows outlives it."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import psycopg
import structlog

from cdc_worker.care import Care, heartbeat
from cdc_worker.checkpoint import Checkpoint, Held
from cdc_worker.database import GONE, Database
from cdc_worker.deployment import Deployment
from cdc_worker.errors import SchemaError
from cdc_worker.lanes import Lanes
from cdc_worker.listener import Bell, NoBell
from cdc_worker.liveness import Liveness
from cdc_worker.mirrors import Mirror
from cdc_worker.opening import Opened, open_shard
from cdc_worker.outage import Outage
from cdc_worker.outbox import Position, ring
from cdc_worker.pace import Pace
from cdc_worker.parking import Parking
from cdc_worker.reader import Reader
from cdc_worker.registry import Registry
from cdc_worker.sender import KEYS, Sender, Tally
from cdc_worker.settings import Settings

log = structlog.get_logger()

SHARD = "0"
# While another worker has the lease, one look in so many seconds: how soon a dead one is replaced.
_STANDBY_SECONDS = 1.0
# How often a direct connection is tried anew that was out of reach when the session began.
_BELL_SECONDS = 60.0
# A checkpoint for each batch would cost a commit each; what is acknowledged and not yet noted is only delivered twice.
_CHECKPOINT_SECONDS = 0.1
# What a stop does behind its drain, for a platform that kills 30 s after its signal: noting how far it got, letting go.
_LAST_SAVE_SECONDS = 2.0
_RELEASE_SECONDS = 1.0
# Where the size of a batch starts from; the deployment's answers decide what it becomes.
_FIRST_BATCH_KEYS = 250
_READ_ONLY = "this database is read-only (a standby?): point DATABASE_URL at the primary"
_CHECKPOINT = "a checkpoint in Postgres"


class Session:
    """One reader of one shard."""

    def __init__(
        self,
        settings: Settings,
        mirrors: Sequence[Mirror],
        database: Database,
        deployment: Deployment,
        *,
        holder: str,
        tally: Tally,
        liveness: Liveness,
        on_open: Callable[[], None],
    ) -> None:
        self._on_open = on_open
        self._settings = settings
        self._database = database
        self._deployment = deployment
        self._checkpoint = Checkpoint(database, SHARD, holder, lease_seconds=settings.lease_seconds)
        self._outage = Outage(longest_pause_seconds=settings.backoff_seconds, liveness=liveness)
        self._liveness = liveness
        self._parking = Parking(database)
        self._registry = Registry(database, mirrors, self._parking)
        self._care = Care(settings, database, deployment, self._outage, self._registry, config=mirrors)
        self._lanes = Lanes()
        self._tally = tally
        self._settled = asyncio.Event()
        self._saved: Position | None = None
        self._renewed_at = 0.0
        self._bell: Bell | None = None
        # LISTEN_DATABASE_URL may come back; a pooler stays a pooler.
        self._bell_may_come = False
        # When it opened its shard (monotonic): a stop then drains it, rather than to cut it short.
        self.opened_at: float | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Returns when stopped. Raises (in groups) what ended the session."""
        self._bell = await self._open_bell()
        try:
            held = await self._lease(stop)
            if held is not None:
                await self._registry.load()
                await self._parking.load()
                log.info("lease.acquired", shard=SHARD, token=held.token)
                await self._hold(held, stop)
        finally:
            self._liveness.rests(_CHECKPOINT)
            self._liveness.rests(KEYS)
            with contextlib.suppress(*GONE, psycopg.Error):
                async with asyncio.timeout(_RELEASE_SECONDS):
                    await self._checkpoint.release()
                    if self._bell is not None:
                        await self._bell.end_backend(self._database)
            if self._bell is not None:
                await self._bell.close()

    async def _open_bell(self) -> Bell | None:
        try:
            return await self._make_bell()
        except psycopg.errors.ReadOnlySqlTransaction:
            raise SchemaError(_READ_ONLY) from None
        except NoBell as error:
            cause = str(error)
        except GONE:
            if self._settings.listen_database_url is None:
                raise
            cause = "LISTEN_DATABASE_URL is out of reach"
            self._bell_may_come = True
        log.warning(
            "listen.unavailable",
            cause=cause,
            poll_seconds=self._settings.poll_seconds,
            cure="polling meanwhile; a direct connection in LISTEN_DATABASE_URL makes it quicker",
        )
        return None

    async def _make_bell(self) -> Bell:
        direct = self._settings.listen_database_url or self._settings.database_url
        with self._liveness.waits_for("a connection that listens"):
            return await Bell.open(direct.get_secret_value(), lambda: ring(self._database))

    async def _wait_for_bell(self, reader: Reader) -> None:
        """Goes from polling to listening as soon as LISTEN_DATABASE_URL is within reach."""
        while self._bell_may_come and self._bell is None:
            await asyncio.sleep(_BELL_SECONDS)
            with contextlib.suppress(NoBell, *GONE):
                self._bell = await self._make_bell()
        if self._bell_may_come and self._bell is not None:
            reader.listen(self._bell)
            await self._checkpoint.note_listener(self._bell.pid)
            log.info("listen.recovered", cure="none needed: changes ring again")

    async def _lease(self, stop: asyncio.Event) -> Held | None:
        said = False
        while not stop.is_set():
            try:
                held = await self._checkpoint.acquire(self._bell.pid if self._bell is not None else None)
            except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
                raise SchemaError("this database has no schema cdc: run `cdc-worker migrate`") from None
            except psycopg.errors.ReadOnlySqlTransaction:
                raise SchemaError(_READ_ONLY) from None
            if held is not None:
                return held
            if not said:
                holder, seconds = await self._checkpoint.holder()
                log.info("lease.standby", shard=SHARD, holder=holder, expires_in_seconds=round(seconds, 1))
                said = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STANDBY_SECONDS):
                    await stop.wait()
        return None

    async def _hold(self, held: Held, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            renewing = tasks.create_task(self._renew())
            opening = tasks.create_task(
                open_shard(self._database, self._checkpoint, self._deployment, self._outage, shard=SHARD, held=held)
            )
            stopped = tasks.create_task(stop.wait())
            await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
            renewing.cancel()
            if opening.done() and not stop.is_set():
                await self._work(await opening, stop)
            opening.cancel()
            stopped.cancel()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_seconds / 3)
            await self._checkpoint.renew()

    async def _work(self, opened: Opened, stop: asyncio.Event) -> None:
        settings = self._settings
        pace = Pace(keys=_FIRST_BATCH_KEYS, most_keys=settings.batch_keys, most_in_flight=settings.in_flight)
        sender = Sender(
            self._deployment,
            self._lanes,
            self._parking,
            self._outage,
            shard=SHARD,
            epoch=opened.epoch,
            pace=pace,
            batch_bytes=settings.batch_bytes,
            settled=self._settled.set,
            tally=self._tally,
            liveness=self._liveness,
        )

        def added() -> None:
            sender.wake()
            if not self._lanes.keys:
                self._settled.set()  # a page without keys is acknowledged as it is

        reader = Reader(
            self._database,
            self._bell,
            self._registry.states,
            self._lanes,
            opened.position,
            page_rows=settings.page_rows,
            poll_seconds=settings.poll_seconds,
            rescan=self._care.note_rescans,
            added=added,
            liveness=self._liveness,
        )
        self._on_open()
        log.info("session.open", shard=SHARD, epoch=opened.epoch, listen=self._bell is not None)
        self.opened_at = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(reader.run())
            sending = tasks.create_task(sender.run())
            others = [
                tasks.create_task(self._keep_checkpoint(reader)),
                tasks.create_task(self._care.run(reader)),
                tasks.create_task(self._wait_for_bell(reader)),
                tasks.create_task(
                    heartbeat(
                        self._database,
                        reader,
                        self._lanes,
                        parking=self._parking,
                        pace=pace,
                        tally=self._tally,
                        seconds=settings.heartbeat_seconds,
                    )
                ),
            ]
            await stop.wait()
            self._liveness.rests(_CHECKPOINT)
            started = time.monotonic()
            log.info("worker.stopping", drain_seconds=settings.drain_seconds, keys_under_way=self._lanes.keys)
            reader.stop()
            sender.stop()
            await asyncio.wait({reading, sending}, timeout=settings.drain_seconds)
            drained = reading.done() and sending.done()
            for task in (reading, sending, *others):
                task.cancel()
        async with asyncio.timeout(_LAST_SAVE_SECONDS):
            await self._save(reader)
        say = log.info if drained else log.warning
        say(
            "worker.drained" if drained else "worker.drain_timed_out",
            took_seconds=round(time.monotonic() - started, 2),
            keys_left=self._lanes.keys,
        )

    async def _keep_checkpoint(self, reader: Reader) -> None:
        """After the verdicts, at a measured pace; and often enough to keep the lease."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.lease_seconds / 3):
                    await self._settled.wait()
            self._settled.clear()
            reader.freed()
            if not await self._save(reader) and time.monotonic() - self._renewed_at > self._settings.lease_seconds / 4:
                await self._checkpoint.renew()
                self._renewed_at = time.monotonic()
            self._liveness.moved(_CHECKPOINT)
            await asyncio.sleep(_CHECKPOINT_SECONDS)

    async def _save(self, reader: Reader) -> bool:
        """Notes how far everything is acknowledged; False if that is no further than before."""
        position: Position | None = self._lanes.acknowledged()
        if self._lanes.idle:
            position = reader.position
        if position is None or position == self._saved:
            return False
        await self._checkpoint.save(position)
        self._saved, self._renewed_at = position, time.monotonic()
        return True
