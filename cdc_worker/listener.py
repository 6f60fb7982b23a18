"""The doorbell: a connection of its own that listens, and the idle gate that makes writers ring only when
somebody sleeps.

NOTIFY takes a lock of the whole cluster at commit, so writers must not ring while the worker is awake. The gate is an
advisory lock. Capture tries it shared, and rings only if that fails; the worker takes it exclusively when it
has nothing to do, looks once more, and then waits. A writer that got the lock is seen by that last look, or
keeps the worker from the gate as long as its transaction is open: then the worker polls.

Of several readers one keeps the gate, and the others sleep behind it: a writer's ring wakes all. The one that opens the
gate rings, too, so that one of the others, which go on sleeping, closes it again.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import psycopg
import structlog

from cdc_worker.capture import CHANNEL, GATE
from cdc_worker.checkpoint import Checkpoint
from cdc_worker.database import GONE, Connection, Database, connect, cut_after, fetch
from cdc_worker.errors import READ_ONLY, CdcError, SchemaError
from cdc_worker.liveness import Liveness
from cdc_worker.outbox import ring
from cdc_worker.settings import Settings

log = structlog.get_logger()

# The self-test's NOTIFY comes back at once, or it never will (a pooler in between).
_ECHO_SECONDS = 2.0
# Every statement on this connection: trivial, so a slow answer means a dead link.
_DEADLINE_SECONDS = 5.0
# How often a direct connection is tried anew that was out of reach when the session began.
_RECOVERY_SECONDS = 60.0

_LISTEN = f"listen {CHANNEL}"
_TWO_PHASE = "select current_setting('max_prepared_transactions') <> '0'"
_SELF = "select pid, backend_start::text from pg_stat_activity where pid = pg_backend_pid()"
# The server's side of a link that nobody cut, and that leads nowhere: it lets go within 30 s, not after two hours.
_NOTICE = """
set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3;
set tcp_user_timeout = '30s'
"""
# Numbers of processes come again: it is the same backend only if it began at the same time.
_END = "select pg_terminate_backend(pid) from pg_stat_activity where pid = $1 and backend_start = $2::timestamptz"
_ARM = f"select pg_try_advisory_lock({GATE[0]}, {GATE[1]})"
_DISARM = f"select pg_advisory_unlock({GATE[0]}, {GATE[1]})"
# Whether another reader keeps the gate: writers take it shared.
_KEPT = """
select exists (select from pg_locks where locktype = 'advisory' and classid = $1 and objid = $2 and objsubid = 2
               and mode = 'ExclusiveLock' and granted
               and database = (select oid from pg_database where datname = current_database()))
"""
_DISARM_AND_RING = f"select pg_advisory_unlock({GATE[0]}, {GATE[1]}), pg_notify('{CHANNEL}', '')"


class NoBell(CdcError):
    """LISTEN does not work here. Reaction: poll, and say so once."""


class Bell:
    """A connection that listens. Never repaired: any error ends the session, and the next one builds a new bell."""

    def __init__(self, connection: Connection, pid: int, started_at: str, *, alone: bool) -> None:
        self._connection = connection
        self.pid = pid
        self._started_at = started_at
        # There is no other reader.
        self._alone = alone
        # The gate is ours to open; otherwise it may be opened, with a ring, whenever its keeper likes.
        self.keeps_gate = False

    @classmethod
    async def open(cls, dsn: str, ring: Callable[[], Awaitable[object]], *, alone: bool = True) -> Self:
        """A bell that rings when `ring` notifies from another connection; `alone`: no other reader sleeps beside it.

        Raises NoBell where LISTEN does not work, and psycopg.OperationalError if there is no database.
        """
        connection = await connect(dsn)
        try:
            with cut_after(connection, _DEADLINE_SECONDS + _ECHO_SECONDS):
                ((prepared,),) = await fetch(connection, _TWO_PHASE)
                if prepared:
                    raise NoBell("max_prepared_transactions is not 0, and what has notified cannot be prepared")
                await connection.execute(_LISTEN)
                ((pid, started_at),) = await fetch(connection, _SELF)
                bell = cls(connection, pid, started_at, alone=alone)
                await ring()
                # Only listening from here: a pooler would hand a notification to a statement, but never to a wait.
                if not await bell._ring(_ECHO_SECONDS):
                    raise NoBell("LISTEN gets no answer: a pooler in between?")
                await connection.execute(_NOTICE)
        except BaseException:
            await connection.close()
            raise
        return bell

    async def close(self) -> None:
        await self._connection.close()

    async def end_backend(self, database: Database) -> None:
        """If the link went deaf, the server does not know it yet, and keeps the gate for a listener that is gone."""
        if self._connection.broken:
            await database.execute(_END, self.pid, self._started_at)

    async def arm(self) -> bool:
        """True if the gate is closed: by us, or by another reader. False while a writer is at it."""
        (self.keeps_gate,) = await self._ask(_ARM)
        if self.keeps_gate or self._alone:
            return self.keeps_gate
        (kept,) = await self._ask(_KEPT, *GATE)
        return bool(kept)

    async def disarm(self) -> None:
        """Opens the gate, if we keep it."""
        if self.keeps_gate:
            await self._ask(_DISARM if self._alone else _DISARM_AND_RING)
            self.keeps_gate = False

    async def wait(self, wake: asyncio.Event, seconds: float) -> bool:
        """True if it rang, or `wake` was set (and is cleared); False after `seconds`."""
        ring = asyncio.create_task(self._ring(seconds))
        woken = asyncio.create_task(wake.wait())
        try:
            await asyncio.wait({ring, woken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (ring, woken):
                task.cancel()
            await asyncio.gather(ring, woken, return_exceptions=True)
        if woken.done() and not woken.cancelled():
            wake.clear()
            return True
        return not ring.cancelled() and ring.result()

    async def _ring(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            # To its end: the generator holds the connection's lock for as long as it lives.
            rings = [ring async for ring in self._connection.notifies(timeout=left, stop_after=1)]
            if any(ring.pid != self.pid for ring in rings):
                return True
        return False

    async def _ask(self, statement: Any, *params: int) -> tuple[Any, ...]:
        with cut_after(self._connection, _DEADLINE_SECONDS):
            (row,) = await fetch(self._connection, statement, *params)
        return row


class Listener:
    """The bell of one session: opened where LISTEN works, done without elsewhere, and taken when it comes later."""

    def __init__(
        self, settings: Settings, database: Database, checkpoint: Checkpoint, liveness: Liveness, *, alone: bool
    ) -> None:
        self._settings = settings
        self._database = database
        self._checkpoint = checkpoint
        self._liveness = liveness
        self._alone = alone
        # None: the reader polls.
        self.bell: Bell | None = None
        # LISTEN_DATABASE_URL may come back; a pooler stays a pooler.
        self._may_come = False

    async def open(self) -> None:
        """Opens the bell, or says why there is none. Raises SchemaError for a standby."""
        try:
            self.bell = await self._new_bell()
        except psycopg.errors.ReadOnlySqlTransaction:
            raise SchemaError(READ_ONLY) from None
        except NoBell as error:
            cause = str(error)
        except GONE:
            if self._settings.listen_database_url is None:
                raise
            cause = "LISTEN_DATABASE_URL is out of reach"
            self._may_come = True
        else:
            await self._checkpoint.note_listener(self.bell.pid)
            return
        log.warning(
            "listen.unavailable",
            cause=cause,
            poll_seconds=self._settings.poll_seconds,
            cure="polling meanwhile; a direct connection in LISTEN_DATABASE_URL makes it quicker",
        )

    async def _new_bell(self) -> Bell:
        direct = self._settings.listen_database_url or self._settings.database_url
        with self._liveness.waits_for("a connection that listens"):
            return await Bell.open(direct.get_secret_value(), lambda: ring(self._database), alone=self._alone)

    async def recover(self) -> None:
        """Goes from polling to listening as soon as LISTEN_DATABASE_URL is within reach."""
        while self._may_come and self.bell is None:
            await asyncio.sleep(_RECOVERY_SECONDS)
            with contextlib.suppress(NoBell, *GONE):
                self.bell = await self._new_bell()
        if self._may_come and self.bell is not None:
            await self._checkpoint.note_listener(self.bell.pid)
            log.info("listen.recovered", cure="none needed: changes ring again")

    async def end_backend(self) -> None:
        if self.bell is not None:
            await self.bell.end_backend(self._database)

    async def close(self) -> None:
        if self.bell is not None:
            await self.bell.close()
