"""The border to Postgres: how connections are made, and that every wait has a deadline.

Works through PgBouncer in transaction mode: no named prepared statements, no start-up options, `set local` only.
"""

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, LiteralString, Self

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor
from psycopg.abc import RV, PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from cdc_worker.liveness import Liveness

Row = tuple[Any, ...]

# How long to wait for a connection of the pool: a new one, or one that others give back.
_CONNECT_SECONDS = 10
# For each address of the host: one that is dead, before one that is well, must leave time for that.
_ADDRESS_SECONDS = 5
# What the connection string says goes before these. A dead peer is noticed within about 30 s even without a statement.
_DEFAULTS = {
    "application_name": "cdc_worker",
    # Whatever the role is set to: a key that another one lacks a character for could not be read.
    "client_encoding": "UTF8",
    "connect_timeout": str(_ADDRESS_SECONDS),
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
# Longer than any lock that the worker waits for in front of others; shorter than Postgres' `deadlock_timeout` (1 s): an
# application's migration that takes the tables of a page the other way round is not what Postgres ends.
_LOCK_TIMEOUT = "500ms"
# Of the role or the database, since this version: it would end whole pages, again and again.
_TRANSACTION_TIMEOUT_SINCE = 170000
# On top of the server's own statement timeout: only a dead link lets this one strike.
_GRACE_SECONDS = 5.0
_POSTGRES = "a statement in Postgres"
# Nothing is worth a longer wait for the pool's connections to say goodbye.
_CLOSE_SECONDS = 1.0

# Temporary tables that the application left there have the names of others, and are found first unless their place is
# said. Where there are none nothing is set, and hardly anything sent.
_TEMPORARY_LAST: LiteralString = (
    "select from"
    " set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), 'pg_temp'), true)"
    " where pg_my_temp_schema() <> 0"
)
_ONE_SNAPSHOT: LiteralString = "isolation level repeatable read read only"
_NOW: LiteralString = "select pg_current_snapshot()::text"

# The errors that say "this connection, or the whole database, is gone": the session starts anew.
GONE = (psycopg.OperationalError, psycopg.InterfaceError, TimeoutError, OSError)


@dataclass(frozen=True)
class _Limits:
    """For each wait of a connection: how long, and who watches it."""

    seconds: float
    liveness: Liveness


class Connection(AsyncConnection[Row]):
    """A connection that is given up with the task that waits for it."""

    # Set on the pool's connections. The limit is for each statement: a page may have as many as it needs.
    limits: _Limits | None = None

    async def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        """Every wait for the server comes by here: statements, commits and roll-backs, the pool's own too."""
        if self.limits is None:
            return await super().wait(gen, *args, **kwargs)
        with self.limits.liveness.waits_for(_POSTGRES), cut_after(self, self.limits.seconds):
            return await super().wait(gen, *args, **kwargs)

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109  # the driver's own
        """What the driver calls for a task that is cancelled in the middle of a statement, before it lets go.

        Its own way is to ask the server, over a new connection, and then to wait for the old one: 5 s for each, and
        on a link that went deaf in vain.
        """
        self.pgconn.finish()


def conninfo(dsn: str) -> str:
    return make_conninfo("", **{**_DEFAULTS, **conninfo_to_dict(dsn)})


async def connect(dsn: str) -> Connection:
    """A connection of one's own, in autocommit, with `$1` as the placeholder."""
    return await Connection.connect(
        conninfo(dsn), autocommit=True, prepare_threshold=None, cursor_factory=AsyncRawCursor
    )


class Database:
    """A small pool: two for each shard, reader and checkpoint, one for what can wait, and one to spare."""

    def __init__(
        self, dsn: str, *, statement_seconds: float, shards: int = 1, liveness: Liveness | None = None
    ) -> None:
        self._dsn = dsn
        self._statement_seconds = statement_seconds
        self._most_connections = 2 + 2 * shards
        # A command has none: one that is never started watches nothing.
        self._liveness = liveness if liveness is not None else Liveness(math.inf)
        self._pool = self._new_pool()

    def _new_pool(self) -> AsyncConnectionPool[Connection]:
        return AsyncConnectionPool(
            conninfo(self._dsn),
            connection_class=Connection,
            kwargs={"autocommit": True, "prepare_threshold": None, "cursor_factory": AsyncRawCursor},
            min_size=1,
            max_size=self._most_connections,
            timeout=_CONNECT_SECONDS,
            open=False,
            name="cdc_worker",
        )

    async def __aenter__(self) -> Self:
        await self._pool.open(wait=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close(timeout=_CLOSE_SECONDS)

    async def reopen(self) -> None:
        """A new pool, as a database that comes back wants it: the old one may be in a long pause between its own tries.

        Raises psycopg.OperationalError, with the driver's own words, if there is no database.
        """
        await (await connect(self._dsn)).close()
        old, self._pool = self._pool, self._new_pool()
        await self._pool.open(wait=False)
        await old.close(timeout=_CLOSE_SECONDS)

    async def execute(self, statement: LiteralString, *params: Any) -> list[Row]:
        """One statement in a transaction of its own; its rows, if it has any."""
        async with self._borrow() as connection:
            return await fetch(connection, statement, *params)

    @asynccontextmanager
    async def transaction(self, mode: LiteralString = "") -> AsyncIterator[Connection]:
        """A transaction in `mode`, for instance `read only`."""
        async with self._begun(mode) as (connection, _):
            yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[tuple[Connection, str]]:
        """A transaction that reads one snapshot; and that snapshot, as Postgres writes it."""
        async with self._begun(_ONE_SNAPSHOT, _NOW) as (connection, ((now,),)):
            yield connection, now

    @asynccontextmanager
    async def _begun(
        self, mode: LiteralString, first: LiteralString = ""
    ) -> AsyncIterator[tuple[Connection, list[Row]]]:
        async with self._borrow() as connection:
            rows = await begin(connection, mode, first, statement_seconds=self._statement_seconds)
            yield connection, rows
            await connection.commit()

    @asynccontextmanager
    async def _borrow(self) -> AsyncIterator[Connection]:
        try:
            with self._liveness.waits_for(_POSTGRES):
                connection = await self._pool.getconn()
        except PoolTimeout:
            raise PoolTimeout(
                f"no connection within {_CONNECT_SECONDS} s: all are in use, or Postgres (or its pooler) gives no more"
            ) from None
        try:
            # The pool waits with asyncio.wait_for, which loses a cancellation that comes together with its
            # result (Python 3.11): without this a stopped task would go on as if nobody had asked it to end.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError
            connection.limits = _Limits(self._statement_seconds + _GRACE_SECONDS, self._liveness)
            async with connection:
                yield connection
        finally:
            await self._pool.putconn(connection)


@contextmanager
def cut_after(connection: Connection, seconds: float) -> Iterator[None]:
    """A deadline that also ends waits on a link that went deaf: the socket is shut down under the driver."""

    def cut() -> None:
        with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as link:
            link.shutdown(socket.SHUT_RDWR)

    timer = asyncio.get_running_loop().call_later(seconds, cut)
    try:
        yield
    finally:
        timer.cancel()


async def begin(
    connection: Connection, mode: LiteralString, first: LiteralString = "", *, statement_seconds: float
) -> list[Row]:
    """Starts a transaction with its deadlines, and a `first` statement: its rows. All in one round trip.

    The last deadline is for a worker that vanishes with its machine: what it locked is not locked for hours. A policy
    that hides rows is an error (docs/decisions/0045-a-hidden-row-is-an-error.md). Behind a pooler the connection was
    the application's before, which may have set its search_path, or made temporary tables: a mirror's query would read
    those.
    """
    milliseconds = int(statement_seconds * 1000)
    since_17 = connection.info.server_version >= _TRANSACTION_TIMEOUT_SINCE
    unlimited = "set local transaction_timeout = 0; " if since_17 else ""
    cursor = await connection.execute(
        f"begin {mode}; {unlimited}set local statement_timeout = {milliseconds}; "
        f"set local lock_timeout = '{_LOCK_TIMEOUT}'; set local jit = off; set local row_security = off; "
        f"set local search_path to default; {_TEMPORARY_LAST}; "
        f"set local idle_in_transaction_session_timeout = {2 * milliseconds + int(_GRACE_SECONDS * 1000)}; {first}"
    )
    while cursor.nextset():
        pass
    return await cursor.fetchall() if cursor.description is not None else []


async def fetch(connection: Connection, statement: LiteralString, *params: Any) -> list[Row]:
    cursor = await connection.execute(statement, params or None)
    return await cursor.fetchall() if cursor.description is not None else []
