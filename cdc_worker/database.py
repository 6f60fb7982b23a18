"""The border to Postgres: how connections are made, and that every wait has a deadline.

Works through PgBouncer in transaction mode: no named prepared statements, no start-up options, `set local` only.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, LiteralString, Self

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool

Row = tuple[Any, ...]
Connection = AsyncConnection[Row]

# What the connection string says goes before these. A dead peer is noticed within about 30 s even without a statement.
_DEFAULTS = {
    "application_name": "cdc_worker",
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
# Longer than any lock that the worker waits for in front of others.
_LOCK_TIMEOUT = "1s"
# On top of the server's own statement timeout: only a dead link lets this one strike.
_GRACE_SECONDS = 5.0

_ONE_SNAPSHOT: LiteralString = "isolation level repeatable read read only"
_NOW: LiteralString = "select pg_current_snapshot()::text"

# The errors that say "this connection, or the whole database, is gone": the session starts anew.
GONE = (psycopg.OperationalError, psycopg.InterfaceError, TimeoutError, OSError)


def conninfo(dsn: str) -> str:
    return make_conninfo("", **{**_DEFAULTS, **conninfo_to_dict(dsn)})


async def connect(dsn: str) -> Connection:
    """A connection of one's own, in autocommit, with `$1` as the placeholder."""
    return await AsyncConnection.connect(
        conninfo(dsn), autocommit=True, prepare_threshold=None, cursor_factory=AsyncRawCursor
    )


class Database:
    """A small pool. Three are in use at once at the most: reader, checkpoint, backfill; one is to spare."""

    def __init__(self, dsn: str, *, statement_seconds: float) -> None:
        self._statement_seconds = statement_seconds
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            conninfo(dsn),
            connection_class=AsyncConnection,
            kwargs={"autocommit": True, "prepare_threshold": None, "cursor_factory": AsyncRawCursor},
            min_size=1,
            max_size=4,
            timeout=10.0,
            open=False,
            name="cdc_worker",
        )

    async def __aenter__(self) -> Self:
        await self._pool.open(wait=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close(timeout=2.0)

    async def execute(self, statement: LiteralString, *params: Any) -> list[Row]:
        """One statement in a transaction of its own; its rows, if it has any."""
        async with self._borrow() as connection:
            with cut_after(connection, self._statement_seconds + _GRACE_SECONDS):
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
            with cut_after(connection, self._statement_seconds * 2 + _GRACE_SECONDS):
                rows = await begin(connection, mode, first, statement_seconds=self._statement_seconds)
                yield connection, rows
                await connection.commit()  # otherwise the pool rolls back

    @asynccontextmanager
    async def _borrow(self) -> AsyncIterator[Connection]:
        async with self._pool.connection() as connection:
            # The pool waits with asyncio.wait_for, which loses a cancellation that comes together with its
            # result (Python 3.11): without this a stopped task would go on as if nobody had asked it to end.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError
            yield connection


@contextmanager
def cut_after(connection: Connection, seconds: float) -> Iterator[None]:
    """A deadline that also ends waits on a link that went deaf: the socket is shut down under the driver.

    Cancelling would not do: the driver then asks the server to cancel, and waits for it to say so.
    """

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
    """Starts a transaction with its deadlines, and a `first` statement: its rows. All in one round trip."""
    milliseconds = int(statement_seconds * 1000)
    cursor = await connection.execute(
        f"begin {mode}; set local statement_timeout = {milliseconds}; "
        f"set local lock_timeout = '{_LOCK_TIMEOUT}'; set local jit = off; {first}"
    )
    while cursor.nextset():
        pass
    return await cursor.fetchall() if cursor.description is not None else []


async def fetch(connection: Connection, statement: LiteralString, *params: Any) -> list[Row]:
    cursor = await connection.execute(statement, params or None)
    return await cursor.fetchall() if cursor.description is not None else []


async def fetch_one(connection: Connection, statement: LiteralString, *params: Any) -> Row:
    (row,) = await fetch(connection, statement, *params)
    return row


def is_gone(error: psycopg.Error) -> bool:
    """It is the database, rather than the statement: one that was cut off, or waited for a lock, is not."""
    return isinstance(error, GONE) and not isinstance(
        error, psycopg.errors.QueryCanceled | psycopg.errors.LockNotAvailable
    )


def first_lines(error: psycopg.Error) -> str:
    """What Postgres says, without DETAIL and CONTEXT: those can quote rows."""
    return error.diag.message_primary or type(error).__name__
