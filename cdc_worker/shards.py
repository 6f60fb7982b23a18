"""The shards of a worker: it takes its fair part of them, with a session for each, and gives up what is too much.

A session ends by an error or by a stop; what follows is decided here and nowhere else. Nothing that a session knew
outlives it: the next one starts from the checkpoint, and what was not acknowledged is read again.
"""

import asyncio
import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Sequence

import psycopg
import structlog

from cdc_worker.allotment import Allotment, Standing, fair_part
from cdc_worker.database import GONE, Database
from cdc_worker.deployment import Deployment
from cdc_worker.errors import ConfigError, Fenced, SchemaError
from cdc_worker.liveness import Liveness
from cdc_worker.mirrors import Mirror
from cdc_worker.opening import Known
from cdc_worker.outage import Outage
from cdc_worker.outbox import Shard
from cdc_worker.postgres_errors import cause
from cdc_worker.registry import known_mirrors
from cdc_worker.sender import Tally
from cdc_worker.session import Session
from cdc_worker.settings import Settings
from cdc_worker.troubles import Troubles

log = structlog.get_logger()

# If a session lasted so long, what ended it is a new trouble; if not, it is the old one still. With a larger number a
# link that is cut now and then (a firewall, a balancer) would get the pauses of one that hardly works.
_LASTING_SECONDS = 5.0
# A stop that finds no session open has nothing to drain; its opening may still end, and it lets go.
_CUT_SHORT_SECONDS = 3.0
# Between two looks while there may be a shard to take over: how soon a dead worker is replaced.
_STANDBY_SECONDS = 1.0
# A session that has drained still notes how far it got, and lets go: each has its own deadline within this.
_ENDING_SECONDS = 3.0
# For a last word to Postgres, and for a statement that is cut short to give its connection back.
_LAST_WORD_SECONDS = 0.25


class _RunningSession:
    """A session in a task of its own, and its stop."""

    def __init__(self, session: Session, token: int, *, known: Known, drain_seconds: float) -> None:
        self.session = session
        self.token = token
        self.stop = asyncio.Event()
        self._drain_seconds = drain_seconds
        self._lost = False
        self._running = asyncio.create_task(session.run(self.stop, known=known))
        self.task = asyncio.create_task(self._until_stopped())

    def lose(self) -> None:
        """The lease is somebody else's now."""
        self._lost = True
        self._running.cancel()

    async def _until_stopped(self) -> None:
        """Cut short if the stop finds the session waiting for something else than its own drain."""
        stopped = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait({self._running, stopped}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(
                {self._running},
                timeout=_CUT_SHORT_SECONDS if self.session.opened_at is None else self._drain_seconds + _ENDING_SECONDS,
            )
        finally:
            stopped.cancel()
            self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        if self._lost:
            raise Fenced("another worker has the lease")


class Shards:
    """The shards of one worker, `name`, each with a session at work on it."""

    def __init__(
        self,
        settings: Settings,
        mirrors: Sequence[Mirror],
        database: Database,
        deployment: Deployment,
        *,
        name: str,
        liveness: Liveness,
    ) -> None:
        self._settings = settings
        self._mirrors = mirrors
        self._database = database
        self._deployment = deployment
        self._name = name
        self._liveness = liveness
        self._outage = Outage(longest_pause_seconds=settings.backoff_seconds, liveness=liveness)
        self._allotment = Allotment(database, name, shards=settings.shards, lease_seconds=settings.lease_seconds)
        self._troubles = Troubles(settings.backoff_seconds)
        self._sessions: dict[Shard, _RunningSession] = {}
        # When a shard whose session failed is tried again (monotonic).
        self._rests_until: dict[Shard, float] = defaultdict(float)
        self._known: dict[Shard, Known] = defaultdict(Known)
        self._tallies: dict[Shard, Tally] = defaultdict(Tally)
        # Shards whose last session did not open: their lease is taken again at each try, but said only once.
        self._retried: set[Shard] = set()
        self._said_standby = False
        # The database is out of reach, or has not been asked yet.
        self._unreachable = True
        # It is not as this worker needs it, or has not been asked.
        self._not_ready = True

    async def serve(self, stop: asyncio.Event) -> None:
        """Until it is told to stop; then until what is under way is drained."""
        stopped = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                looking = asyncio.create_task(self._outcome(self._look()))
                await asyncio.wait({looking, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not looking.done():
                    await asyncio.wait({looking}, timeout=_LAST_WORD_SECONDS)
                    await _cut_short(looking)
                    break
                await self._wait(looking.result() or self._until_next_look(), stopped)
            await self._drain()
        finally:
            stopped.cancel()
            for running in self._sessions.values():
                running.task.cancel()
        with contextlib.suppress(*GONE, psycopg.Error):
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await self._allotment.leave()

    async def _drain(self) -> None:
        """Each session has a deadline of its own; meanwhile the leases are kept."""
        for running in self._sessions.values():
            running.stop.set()
        renewing = asyncio.create_task(self._keep_renewing())
        while self._sessions:
            await self._wait(self._settings.drain_seconds)
        await _cut_short(renewing)

    async def _keep_renewing(self) -> None:
        # A look that is cut off may still run in Postgres, behind the last word, and have it reckon with us again.
        while True:
            await asyncio.sleep(self._settings.lease_seconds / 3)
            await self._outcome(self._renew())

    def _until_next_look(self) -> float:
        """In seconds. A worker with all shards only renews its leases; others also look for one to take."""
        seconds = self._settings.lease_seconds / 3
        if len(self._sessions) < self._settings.shards:
            seconds = min(seconds, _STANDBY_SECONDS)
        now = time.monotonic()
        resting = [until - now for until in self._rests_until.values() if until > now]
        return min([seconds, *resting])

    async def _wait(self, seconds: float, *others: asyncio.Task[bool]) -> None:
        """Returns after `seconds`, with one of `others`, or when a session has ended; its end is looked at, then."""
        tasks = {*(running.task for running in self._sessions.values()), *others}
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for shard, running in list(self._sessions.items()):
            if running.task.done():
                del self._sessions[shard]
                await self._end(shard, running)

    async def _end(self, shard: Shard, running: _RunningSession) -> None:
        opened_at = running.session.opened_at
        if opened_at is not None and time.monotonic() - opened_at > _LASTING_SECONDS:
            self._troubles.over(opened_at)
        pause = await self._outcome(running.task)
        self._rests_until[shard] = time.monotonic() + pause
        if opened_at is None:
            self._retried.add(shard)
        else:
            self._retried.discard(shard)
            self._known[shard] = running.session.known

    async def _outcome(self, work: Awaitable[object]) -> float:
        """Awaits it, and says what went wrong; the pause in seconds that is due then, 0 if nothing did."""
        pause = 0.0
        try:
            await work
        except* Fenced as group:
            log.warning("session.fenced", cause=_cause(group), cure="asking for the lease again")
            pause = random.uniform(0.1, 1.0)  # noqa: S311  # spreads tries, hides nothing
        except* (SchemaError, ConfigError) as group:
            self._not_ready = True
            pause = self._troubles.note("database.not_ready", _cause(group))
        except* GONE as group:
            self._unreachable = True
            pause = self._troubles.note(
                "database.refuses" if _answered(group) else "database.unreachable", _cause(group)
            )
        except* psycopg.Error as group:
            pause = self._troubles.note("database.refuses", _cause(group))
        return pause

    async def _renew(self) -> Standing:
        held = {shard: running.token for shard, running in self._sessions.items()}
        standing = await self._allotment.look(held)
        for shard in standing.lost:
            self._sessions[shard].lose()
        return standing

    async def _look(self) -> None:
        """Renews, and brings what is held nearer to a fair part."""
        if self._unreachable and not self._sessions:
            await self._database.reopen()
            self._unreachable = False
        if self._not_ready and not self._sessions:
            await self._make_ready()
        standing = await self._renew()
        fair = fair_part(self._name, standing.parts, self._settings.shards)
        for running in list(self._sessions.values())[fair:]:
            running.stop.set()
        now = time.monotonic()
        for shard in standing.free:
            if len(self._sessions) < fair and self._rests_until[shard] <= now:
                await self._take(shard)
        if self._sessions:
            self._said_standby = False
        elif standing.elsewhere is not None and not self._said_standby:
            shard, holder, seconds = standing.elsewhere
            log.info("lease.standby", shard=str(shard), holder=holder, expires_in_seconds=round(seconds, 1))
            self._said_standby = True

    async def _make_ready(self) -> None:
        """Raises SchemaError if it could read nothing. Others do not reckon with it then, and leave no shard to it."""
        try:
            await known_mirrors(self._database, self._mirrors)
        except SchemaError:
            # What is too old, or a standby, does not reckon with this worker.
            with contextlib.suppress(psycopg.ProgrammingError, psycopg.errors.ReadOnlySqlTransaction):
                await self._allotment.leave()
            raise
        self._not_ready = False

    async def _take(self, shard: Shard) -> None:
        held = await self._allotment.acquire(shard)
        if held is None:
            return
        say = log.debug if shard in self._retried else log.info
        say("lease.acquired", shard=str(shard), token=held.token)
        session = Session(
            self._settings,
            self._mirrors,
            self._database,
            self._deployment,
            self._outage,
            shard=shard,
            held=held,
            tally=self._tallies[shard],
            liveness=self._liveness,
            on_open=self._troubles.say_recovered,
        )
        self._sessions[shard] = _RunningSession(
            session, held.token, known=self._known[shard], drain_seconds=self._settings.drain_seconds
        )


async def _cut_short(task: asyncio.Task[float] | asyncio.Task[None]) -> None:
    """A statement that is under way gives its connection back, if that does not take too long."""
    task.cancel()
    await asyncio.wait({task}, timeout=_LAST_WORD_SECONDS)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _answered(group: BaseExceptionGroup[BaseException]) -> bool:
    """Postgres is there, and says what it lacks (a disk, memory) or refuses, rather than that it goes away."""
    error = _first(group)
    return isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(("40", "53", "54", "58"))


def _cause(group: BaseExceptionGroup[BaseException]) -> str:
    error = _first(group)
    if isinstance(error, psycopg.Error):
        # Of a failed connection there is no diagnosis, and the text names host and role, not the password.
        return cause(error) if error.sqlstate else str(error).split("\n", 1)[0] or type(error).__name__
    return str(error) or type(error).__name__
