"""The worker's life: one session after the other, each from lease to release, until it is told to stop.

A session ends by an error or by the stop; the loop around it is the only place that reconnects. Nothing that a
session knew outlives it: the next one starts from the checkpoint, and what was not acknowledged is read again.
"""

import asyncio
import contextlib
import os
import random
import socket
import time
import uuid
from collections.abc import Sequence

import psycopg
import structlog

from cdc_worker import backfill
from cdc_worker.catalog import Plan, check, uncaptured
from cdc_worker.checkpoint import Checkpoint, Held
from cdc_worker.database import GONE, Database
from cdc_worker.deployment import Deployment
from cdc_worker.errors import ConfigError, Fenced, FunctionFailed, Misconfigured, SchemaError
from cdc_worker.lanes import Lanes
from cdc_worker.late_read import MirrorState
from cdc_worker.listener import Bell
from cdc_worker.liveness import Liveness
from cdc_worker.migrate import load_migrations
from cdc_worker.mirrors import Mirror
from cdc_worker.opening import Opened, open_shard
from cdc_worker.outage import Outage
from cdc_worker.outbox import Position
from cdc_worker.pace import Pace
from cdc_worker.parking import Parking
from cdc_worker.reader import Reader
from cdc_worker.rotation import rotate
from cdc_worker.sender import Sender, Tally
from cdc_worker.settings import Settings

log = structlog.get_logger()

SHARD = "0"
# Where the size of a batch starts from; the deployment's answers decide what it becomes.
_FIRST_BATCH_KEYS = 250
# While another worker has the lease, one look in so many seconds: how soon a dead one is replaced.
_STANDBY_SECONDS = 1.0
# What can wait is looked at so often; sooner while a mirror is broken.
_CARE_SECONDS = 120.0
_MENDING_SECONDS = 15.0
_CHECKPOINT = "a checkpoint in Postgres"
# A checkpoint for each batch would cost a commit each; what is acknowledged and not yet noted is only delivered twice.
_CHECKPOINT_SECONDS = 0.1
_RELEASE_SECONDS = 3.0

_MIRRORS = "select name, id, definition from cdc.mirror where configured"
_ALL_MIRRORS = "select id, name from cdc.mirror where not configured"
_VERSION = "select max(number) from cdc.migration"
_BACKLOG = (
    "select count(*) from (select from cdc.outbox where xid >= pg_snapshot_xmax($1::pg_snapshot) limit 100000) as some"
)


class Worker:
    """One process. `run` returns after `stop`; it never raises for what can pass."""

    def __init__(self, settings: Settings, mirrors: Sequence[Mirror]) -> None:
        self._settings = settings
        self._mirrors = mirrors
        self._stop = asyncio.Event()
        self._name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
        self._tally = Tally()
        self._liveness = Liveness(settings.stall_seconds)

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        settings = self._settings
        self._liveness.start()
        log.info("worker.started", mirrors=len(self._mirrors), holder=self._name)
        async with Database(
            settings.database_url.get_secret_value(), statement_seconds=settings.statement_seconds
        ) as database:
            missing = settings.missing_for_convex
            if settings.convex_url is None or missing:
                await self._wait_unconfigured(database, missing)
            else:
                async with Deployment(
                    settings.convex_url, settings.convex_deploy_key, timeout_seconds=settings.convex_timeout_seconds
                ) as deployment:
                    await self._sessions(database, deployment)
        self._liveness.end()
        log.info("worker.stopped")

    async def _wait_unconfigured(self, database: Database, missing: Sequence[str]) -> None:
        """Capture goes on; what it notes waits in Postgres until the settings arrive, with a restart."""
        while not self._stop.is_set():
            backlog = None
            with contextlib.suppress(psycopg.Error, TimeoutError, OSError):
                ((backlog,),) = await database.execute(
                    "select count(*) from (select from cdc.outbox limit 100000) as some"
                )
            log.warning(
                "convex.not_configured",
                missing=list(missing),
                log_rows=backlog,
                cure="set it; changes are kept until then",
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(self._settings.heartbeat_seconds, 300.0)):
                    await self._stop.wait()

    async def _sessions(self, database: Database, deployment: Deployment) -> None:
        troubles = _Troubles(self._settings.backoff_seconds)
        while not self._stop.is_set():
            session = Session(
                self._settings,
                self._mirrors,
                database,
                deployment,
                holder=self._name,
                tally=self._tally,
                liveness=self._liveness,
            )
            try:
                await session.run(self._stop)
            except* Fenced as group:
                log.warning("session.fenced", cause=_cause(group), cure="asking for the lease again")
                pause = random.uniform(0.1, 1.0)  # noqa: S311  # spreads tries, hides nothing
            except* (SchemaError, ConfigError) as group:
                pause = troubles.note("database.not_ready", _cause(group))
            except* GONE as group:
                pause = troubles.note("database.unreachable", _cause(group))
            except* psycopg.Error as group:
                pause = troubles.note("database.refuses", _cause(group))
            else:
                pause = 0.0
            if session.worked:
                troubles.over()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()


def _cause(group: BaseExceptionGroup[BaseException]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, psycopg.Error):
        # Of a failed connection there is no diagnosis, and the text names host and role, not the password.
        text = error.diag.message_primary or str(error).split("\n", 1)[0]
        return text or type(error).__name__
    return str(error) or type(error).__name__


class _Troubles:
    """Backoff between sessions; each trouble is said once when it begins, then once in five minutes."""

    def __init__(self, longest_seconds: float) -> None:
        self._longest = longest_seconds
        self._said: tuple[str, float] | None = None
        self._since = 0.0
        self._tries = 0

    def note(self, name: str, cause: str) -> float:
        """Says it if it is new; returns the pause in seconds, with full jitter."""
        now = time.monotonic()
        if self._tries == 0:
            self._since = now
        self._tries += 1
        if self._said is None or self._said[0] != name or now - self._said[1] > 300.0:
            self._said = (name, now)
            log.error(
                name,
                cause=cause,
                tries=self._tries,
                since_seconds=round(now - self._since),
                cure="nothing is lost; trying on",
            )
        return random.uniform(0.05, min(self._longest, 0.2 * 2.0 ** min(self._tries, 16)))  # noqa: S311

    def over(self) -> None:
        if self._tries:
            log.info("database.recovered", tries=self._tries, after_seconds=round(time.monotonic() - self._since, 1))
        self._said, self._tries = None, 0


class Session:
    """From the lease to its release."""

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
    ) -> None:
        self._settings = settings
        self._config = mirrors
        self._database = database
        self._deployment = deployment
        self._checkpoint = Checkpoint(database, SHARD, holder, lease_seconds=settings.lease_seconds)
        self._outage = Outage(longest_pause_seconds=settings.backoff_seconds, liveness=liveness)
        self._liveness = liveness
        self._parking = Parking(database)
        self._lanes = Lanes()
        self._tally = tally
        self._settled = asyncio.Event()
        self._care_soon = asyncio.Event()
        # Tables last seen without triggers.
        self._bare: list[str] = []
        self._mirrors: dict[int, MirrorState] = {}
        # The database was fine: what comes next is a new trouble.
        self.worked = False

    async def run(self, stop: asyncio.Event) -> None:
        """Returns when stopped. Raises (in groups) what ended the session."""
        await self._load_mirrors()
        direct = self._settings.listen_database_url or self._settings.database_url
        bell = await Bell.open(direct.get_secret_value())
        if bell is None:
            log.warning(
                "listen.unavailable",
                poll_seconds=self._settings.poll_seconds,
                cure="polling; set LISTEN_DATABASE_URL to a direct connection (not through a pooler)",
            )
        try:
            held = await self._lease(bell, stop)
            if held is not None:
                await self._hold(held, bell, stop)
        finally:
            self._liveness.rests(_CHECKPOINT)
            with contextlib.suppress(*GONE, psycopg.Error):
                async with asyncio.timeout(_RELEASE_SECONDS):
                    await self._checkpoint.release()
            if bell is not None:
                await bell.close()

    async def _load_mirrors(self) -> None:
        try:
            ((version,),) = await self._database.execute(_VERSION)
            known = {name: (number, definition) for name, number, definition in await self._database.execute(_MIRRORS)}
            retired = await self._database.execute(_ALL_MIRRORS)
        except psycopg.errors.UndefinedTable:
            raise SchemaError("this database has no schema cdc: run `cdc-worker migrate`") from None
        if version != load_migrations()[-1].number:
            raise SchemaError(
                f"the database has migration {version}: run `cdc-worker migrate` of this worker's version"
            )
        for mirror in self._config:
            if known.get(mirror.name, (0, ""))[1] != mirror.definition:
                raise SchemaError(f'mirror "{mirror.name}" is not as the database knows it: run `cdc-worker migrate`')
        for number, name in retired:
            self._mirrors[number] = MirrorState(number, name, 1, None, retired=True)
        for mirror in self._config:
            number = known[mirror.name][0]
            self._mirrors[number] = MirrorState(number, mirror.name, len(mirror.key), None)
            await self._try_plan(self._mirrors[number], mirror)
        await self._parking.load()

    async def _try_plan(self, state: MirrorState, mirror: Mirror) -> None:
        """Gives the mirror its plan if its query runs, and its parked keys a new try; else says what is wrong, once."""
        try:
            async with self._database.transaction("read only") as connection:
                plan = await check(connection, mirror)
        except ConfigError as error:
            if state.broken != str(error):
                state.broken = str(error)
                log.error(
                    "mirror.broken", mirror=mirror.name, cause=str(error), cure="its keys are parked until it is mended"
                )
            return
        was_broken = state.broken
        state.plan, state.broken = plan, ""
        await self._parking.retry_mirror(state.id)
        if was_broken:
            log.info("mirror.mended", mirror=mirror.name)

    async def _lease(self, bell: Bell | None, stop: asyncio.Event) -> Held | None:
        said = False
        while not stop.is_set():
            held = await self._checkpoint.acquire(bell.pid if bell is not None else None)
            if held is not None:
                log.info("lease.acquired", shard=SHARD, token=held.token)
                return held
            if not said:
                holder, seconds = await self._checkpoint.holder()
                log.info("lease.standby", shard=SHARD, holder=holder, expires_in_seconds=round(seconds, 1))
                said = True
                self.worked = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STANDBY_SECONDS):
                    await stop.wait()
        return None

    async def _hold(self, held: Held, bell: Bell | None, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            renewing = tasks.create_task(self._renew())
            opening = tasks.create_task(
                open_shard(self._database, self._checkpoint, self._deployment, self._outage, shard=SHARD, held=held)
            )
            stopped = tasks.create_task(stop.wait())
            await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
            renewing.cancel()
            if opening.done() and not stop.is_set():
                await self._work(await opening, bell, stop)
            opening.cancel()
            stopped.cancel()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_seconds / 3)
            await self._checkpoint.renew()

    async def _work(self, opened: Opened, bell: Bell | None, stop: asyncio.Event) -> None:
        settings = self._settings
        reader = Reader(
            self._database,
            bell,
            self._mirrors,
            self._lanes,
            opened.position,
            page_rows=settings.page_rows,
            poll_seconds=settings.poll_seconds,
            rescan=self._rescan,
            added=lambda: sender.wake(),  # noqa: PLW0108  # made below
            liveness=self._liveness,
        )

        pace = Pace(keys=_FIRST_BATCH_KEYS, most_keys=settings.batch_keys, most_in_flight=settings.in_flight)

        def settled() -> None:
            self._settled.set()
            reader.freed()

        sender = Sender(
            self._deployment,
            self._lanes,
            self._parking,
            self._outage,
            shard=SHARD,
            epoch=opened.epoch,
            pace=pace,
            batch_bytes=settings.batch_bytes,
            settled=settled,
            tally=self._tally,
        )
        log.info("session.open", shard=SHARD, epoch=opened.epoch, listen=bell is not None)
        self.worked = True
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(reader.run())
            sending = tasks.create_task(sender.run())
            others = [
                tasks.create_task(self._keep_checkpoint(reader)),
                tasks.create_task(self._care(reader)),
                tasks.create_task(self._heartbeat(reader, pace)),
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
        await self._save(reader)
        log.info(
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
            if not await self._save(reader):
                await self._checkpoint.renew()
            self._liveness.moved(_CHECKPOINT)
            await asyncio.sleep(_CHECKPOINT_SECONDS)

    async def _save(self, reader: Reader) -> bool:
        """Notes how far everything is acknowledged; False if that is no further than before."""
        position: Position | None = self._lanes.acknowledged()
        if self._lanes.idle:
            reader.oldest_since = None
            position = reader.position
        if position is None:
            return False
        await self._checkpoint.save(position)
        return True

    async def _rescan(self, mirror_ids: set[int]) -> None:
        for mirror_id in mirror_ids:
            state = self._mirrors[mirror_id]
            if not state.retired:
                log.warning(
                    "capture.rescan",
                    mirror=state.name,
                    cause="a source was truncated, or lost a column that capture needs",
                )
                await backfill.request(
                    self._database, mirror_id, with_documents=True, reason="source truncated or changed"
                )
        self._care_soon.set()

    async def _care(self, reader: Reader) -> None:
        """What can wait: rotation, broken mirrors that may run again, rescans page by page when all is read."""
        config = {mirror.name: mirror for mirror in self._config}
        while True:
            await rotate(
                self._database,
                retention_hours=self._settings.retention_hours,
                partition_bytes=self._settings.partition_bytes,
            )
            for state in self._mirrors.values():
                if state.plan is None and not state.retired:
                    await self._try_plan(state, config[state.name])
            await self._look_at_triggers()
            plans = {state.id: state.plan for state in self._mirrors.values() if state.plan is not None}
            while (step := await backfill.step(self._database, plans, self._list_documents)) is not None:
                reader.caught_up.clear()
                reader.wake()
                if step.finished:
                    log.info(
                        "backfill.marked",
                        mirror=self._mirrors[step.mirror_id].name,
                        phase=step.phase,
                        keys=step.total_marked,
                    )
                await reader.caught_up.wait()
            self._care_soon.clear()
            with contextlib.suppress(TimeoutError):
                broken = any(state.broken for state in self._mirrors.values())
                async with asyncio.timeout(_MENDING_SECONDS if broken else _CARE_SECONDS):
                    await self._care_soon.wait()

    async def _look_at_triggers(self) -> None:
        """A table that was made anew, or a new partition, has none: said when it is seen, and again when it changes."""
        bare = await uncaptured(self._database, self._config)
        if bare and bare != self._bare:
            log.error("capture.missing", tables=bare, cure="run `cdc-worker migrate`, then `backfill`")
        self._bare = bare

    async def _list_documents(self, plan: Plan, after: str | None, limit: int) -> Sequence[str]:
        async def attempt() -> list[str]:
            most = limit
            while True:
                args = {"mirror": plan.mirror.name, "target": plan.mirror.target, "after": after, "limit": most}
                try:
                    keys = await self._deployment.call("query", "cdc:keys", args)
                except FunctionFailed as failure:
                    if most == 1:
                        raise Misconfigured(f"{failure}: is the deployment running?") from None
                    # Whole documents are read to list their keys, and large ones pass the limit of a query.
                    most = max(most // 4, 1)
                    continue
                if not isinstance(keys, list):
                    raise Misconfigured("cdc:keys gave no list: deploy the convex/ folder of this worker's version")
                return [str(key) for key in keys]

        return await self._outage.insist(attempt)

    async def _heartbeat(self, reader: Reader, pace: Pace) -> None:
        while True:
            await asyncio.sleep(self._settings.heartbeat_seconds)
            since = reader.oldest_since
            log.info(
                "worker.heartbeat",
                lag_seconds=round(time.monotonic() - since, 1) if since is not None else 0.0,
                keys_under_way=self._lanes.keys,
                parked_keys=self._parking.count,
                batch_keys=pace.keys,
                batches_in_flight=pace.in_flight,
                **self._tally.take(),
            )
