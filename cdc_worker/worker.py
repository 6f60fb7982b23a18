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

from cdc_worker.database import GONE, Database
from cdc_worker.deployment import Deployment
from cdc_worker.errors import ConfigError, Fenced, SchemaError
from cdc_worker.liveness import Liveness
from cdc_worker.mirrors import Mirror
from cdc_worker.sender import Tally
from cdc_worker.session import Session
from cdc_worker.settings import Settings

log = structlog.get_logger()

# A session that lasted so long was well: what ended it is a new trouble. One that did not is the old one.
_LASTING_SECONDS = 20.0
_STOP = "the end of what is under way"
# A stop that finds no session open has nothing to drain; a statement on its way may still end.
_CUT_SHORT_SECONDS = 2.0
# A session that has drained still notes how far it got, and lets go: each has its own deadline within this.
_ENDING_SECONDS = 3.0


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
        self._liveness.moved(_STOP)
        self._stop.set()

    async def run(self) -> None:
        settings = self._settings
        self._liveness.start()
        turning = asyncio.create_task(self._liveness.run())
        await asyncio.sleep(0)  # it has begun
        log.info("worker.started", mirrors=len(self._mirrors), holder=self._name)
        async with Database(
            settings.database_url.get_secret_value(),
            statement_seconds=settings.statement_seconds,
            liveness=self._liveness,
        ) as database:
            missing = settings.missing_for_convex
            if settings.convex_url is None or missing:
                await self._wait_unconfigured(database, missing)
            else:
                async with Deployment(
                    settings.convex_url, settings.convex_deploy_key, timeout_seconds=settings.convex_timeout_seconds
                ) as deployment:
                    await self._sessions(database, deployment)
        turning.cancel()
        self._liveness.end()
        log.info("worker.stopped")

    async def _run_or_stop(self, session: Session) -> None:
        """The session, cut short if the stop finds it waiting for something else than its own drain."""
        running = asyncio.create_task(session.run(self._stop))
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
            drain_seconds = self._settings.drain_seconds + _ENDING_SECONDS
            await asyncio.wait({running}, timeout=_CUT_SHORT_SECONDS if session.opened_at is None else drain_seconds)
        finally:
            stopped.cancel()
            if not running.done():
                running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    async def _wait_unconfigured(self, database: Database, missing: Sequence[str]) -> None:
        """Capture goes on; what it notes waits in Postgres until the settings arrive, with a restart."""
        while not self._stop.is_set():
            backlog = None
            with contextlib.suppress(psycopg.Error, TimeoutError, OSError):
                ((backlog,),) = await database.execute(
                    "select count(*) from (select from cdc.outbox limit 100000) as counted"
                )
            log.warning(
                "convex.not_configured",
                missing=list(missing),
                log_rows=backlog,
                cure="set it and start again; changes are kept until then",
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
                on_open=troubles.say_recovered,
            )
            try:
                await self._run_or_stop(session)
            except* Fenced as group:
                log.warning("session.fenced", cause=_cause(group), cure="asking for the lease again")
                pause = random.uniform(0.1, 1.0)  # noqa: S311  # spreads tries, hides nothing
            except* (SchemaError, ConfigError) as group:
                pause = troubles.note("database.not_ready", _cause(group))
            except* GONE as group:
                pause = troubles.note("database.refuses" if _answered(group) else "database.unreachable", _cause(group))
            except* psycopg.Error as group:
                pause = troubles.note("database.refuses", _cause(group))
            else:
                pause = 0.0
            if session.opened_at is not None and time.monotonic() - session.opened_at > _LASTING_SECONDS:
                troubles.over()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _answered(group: BaseExceptionGroup[BaseException]) -> bool:
    """Postgres is there, and says what it lacks (a disk, memory), rather than that it goes away."""
    error = _first(group)
    return isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(("53", "54", "58"))


def _cause(group: BaseExceptionGroup[BaseException]) -> str:
    error = _first(group)
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

    def say_recovered(self) -> None:
        if self._tries:
            log.info("database.recovered", tries=self._tries, after_seconds=round(time.monotonic() - self._since, 1))
            self._said = None

    def over(self) -> None:
        self._said, self._tries = None, 0
