"""The application's writers: processes of their own, driven step by step, that can be killed in a transaction."""

import asyncio
import contextlib
from multiprocessing.connection import Connection
from typing import Any, Final, Literal

import psycopg
from psycopg.pq import TransactionStatus

from dev.chaos import application
from dev.chaos.forks import Fork
from dev.chaos.schedule import Commit, Do, Rollback, RollbackTo, Savepoint

Outcome = Literal["done", "nothing", "gave up", "gone"]
"""It was done; there was nothing to do it to; the statement failed, and was rolled back; Postgres is gone, and with it
the transaction."""

_ANSWER_SECONDS = 20.0
# A writer that waits for another gives up soon: it may wait for one that the schedule holds.
_LOCK_TIMEOUT = "15ms"
_GIVES_UP: Final = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.UniqueViolation,
    psycopg.errors.CardinalityViolation,
)


class Writer:
    """One writing process, replaced by another when it is killed."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._fork = Fork(_write, dsn)

    async def do(self, step: Do | Savepoint | RollbackTo | Commit | Rollback) -> Outcome:
        self._fork.pipe.send(step)
        loop = asyncio.get_running_loop()
        answered = asyncio.Event()
        loop.add_reader(self._fork.pipe.fileno(), answered.set)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await answered.wait()
        finally:
            loop.remove_reader(self._fork.pipe.fileno())
        outcome: Outcome = self._fork.pipe.recv()
        return outcome

    def kill(self) -> None:
        """SIGKILL, and another one."""
        self._fork.kill()
        self._fork = Fork(_write, self._dsn)

    def close(self) -> None:
        self._fork.kill()


def _write(orders: Connection, dsn: str) -> None:
    """In the child: does as told, until nobody can tell it any more."""
    session = _Session(dsn)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            step = orders.recv()
            try:
                outcome = session.do(step)
            except psycopg.OperationalError:
                session.forget()
                outcome = "gone"
            orders.send(outcome)


class _Session:
    """A connection, made when it is needed, and how deep its savepoints are."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: psycopg.Connection | None = None
        self._depth = 0

    def forget(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._depth = None, 0

    def do(self, step: Do | Savepoint | RollbackTo | Commit | Rollback) -> Outcome:
        """Raises psycopg.OperationalError if the connection is gone."""
        connection = self._connected()
        idle = connection.info.transaction_status == TransactionStatus.IDLE
        if not isinstance(step, Do) and (idle or (isinstance(step, RollbackTo) and not self._depth)):
            return "nothing"
        try:
            self._step(connection, step)
        except _GIVES_UP:
            if self._depth:
                connection.execute("rollback to here")
            else:
                connection.rollback()
            return "gave up"
        finally:
            if connection.info.transaction_status == TransactionStatus.IDLE:
                self._depth = 0
        return "done"

    def _connected(self) -> psycopg.Connection:
        if self._connection is None:
            self._connection = psycopg.connect(self._dsn, options=f"-c lock_timeout={_LOCK_TIMEOUT}")
        return self._connection

    def _step(self, connection: psycopg.Connection, step: Do | Savepoint | RollbackTo | Commit | Rollback) -> None:
        match step:
            case Do(_, statement, values) if statement in application.COPIES:
                _copy(connection, statement, values)
            case Do(_, statement, values):
                connection.execute(application.STATEMENTS[statement], values)
            case Savepoint():
                connection.execute("savepoint here")
                self._depth += 1
            case RollbackTo():
                connection.execute("rollback to here")
            case Commit():
                connection.commit()
            case Rollback():
                connection.rollback()


def _copy(connection: psycopg.Connection, statement: str, rows: tuple[Any, ...]) -> None:
    with connection.cursor().copy(application.COPIES[statement]) as copy:
        for row in rows:
            copy.write_row(row)
