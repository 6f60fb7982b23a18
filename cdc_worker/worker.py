"""The worker's life, from its start to its end: with Convex, or without."""

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import Sequence

import psycopg
import structlog

from cdc_worker.database import Database
from cdc_worker.deployment import Deployment
from cdc_worker.liveness import Liveness
from cdc_worker.mirrors import Mirror
from cdc_worker.settings import Settings
from cdc_worker.shards import Shards

log = structlog.get_logger()

_STOP = "the end of what is under way"
# Openings, probes, listings of documents: beside the batches in flight.
_OTHER_CALLS = 4
_LOG_ROWS = "select count(*) from (select from cdc.outbox limit 100000) as counted"


class Worker:
    """One process. `run` returns after `stop`; it never raises for what can pass."""

    def __init__(self, settings: Settings, mirrors: Sequence[Mirror]) -> None:
        self._settings = settings
        self._mirrors = mirrors
        self._stop = asyncio.Event()
        self._name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
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
            shards=settings.shards,
            liveness=self._liveness,
        ) as database:
            missing = settings.missing_for_convex
            if settings.convex_url is None or missing:
                await self._wait_unconfigured(database, missing)
            else:
                async with Deployment(
                    settings.convex_url,
                    settings.convex_deploy_key,
                    timeout_seconds=settings.convex_timeout_seconds,
                    connections=settings.in_flight + _OTHER_CALLS,
                ) as deployment:
                    shards = Shards(
                        settings, self._mirrors, database, deployment, name=self._name, liveness=self._liveness
                    )
                    await shards.serve(self._stop)
        turning.cancel()
        self._liveness.end()
        log.info("worker.stopped")

    async def _wait_unconfigured(self, database: Database, missing: Sequence[str]) -> None:
        """Capture goes on; what it notes waits in Postgres until the settings arrive, with a restart."""
        while not self._stop.is_set():
            log_rows = None
            with contextlib.suppress(psycopg.Error, TimeoutError, OSError):
                ((log_rows,),) = await database.execute(_LOG_ROWS)
            log.warning(
                "convex.not_configured",
                missing=list(missing),
                log_rows=log_rows,
                cure="set it and start again; changes are kept until then",
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(self._settings.heartbeat_seconds, 300.0)):
                    await self._stop.wait()
