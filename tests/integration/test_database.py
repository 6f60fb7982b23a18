"""The border to Postgres: whoever gives up, or is given up, leaves no connection behind that is not as good as new."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from cdc_worker import database as border
from cdc_worker.database import Database
from cdc_worker.postgres_errors import is_gone
from dev.link import Link, link_to

pytestmark = pytest.mark.one_postgres


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Database]:
    async with Database(database, statement_seconds=5) as opened:
        yield opened


@pytest.fixture
async def link(database: str) -> AsyncIterator[Link]:
    to = conninfo_to_dict(database)
    async with link_to(str(to["host"]), int(str(to["port"]))) as opened:
        yield opened


async def cancelled(task: asyncio.Task[object], *, after_turns: int) -> None:
    """Cancels it after so many turns of the event loop."""
    for _ in range(after_turns):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_statement_that_is_cancelled_at_any_moment_spoils_no_other(pool: Database) -> None:
    # Also when its answer is there already: then the driver finds nothing to complain of.
    for turns in range(60):
        await cancelled(asyncio.create_task(pool.execute("select 1")), after_turns=turns)
        assert await pool.execute("select 2") == [(2,)]


async def test_a_statement_that_is_cancelled_lets_its_task_go_at_once(pool: Database) -> None:
    await pool.execute("select 1")
    sleeping = asyncio.create_task(pool.execute("select pg_sleep(8)"))
    await asyncio.sleep(0.1)
    # The driver's own way waits for the end of the statement, or for 5 s.
    async with asyncio.timeout(4):
        await cancelled(sleeping, after_turns=0)


async def test_a_pool_that_is_used_up_is_said_in_words(pool: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(pool.transaction())
        monkeypatch.setattr(pool._pool, "timeout", 0.2)
        with pytest.raises(psycopg.OperationalError, match="all are in use, or Postgres"):
            await pool.execute("select 1")


async def test_a_roll_back_over_a_deaf_link_has_a_deadline(
    database: str, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(border, "_GRACE_SECONDS", 0.2)
    to = conninfo_to_dict(database)
    dsn = f"postgresql://{to['user']}:{to['password']}@127.0.0.1:{link.port}/{to['dbname']}"

    async def fail(pool: Database) -> None:
        async with pool.transaction() as connection:
            await connection.execute("select 1")
            link.deaf()
            raise RuntimeError("of the caller's own")

    async with asyncio.timeout(30), Database(dsn, statement_seconds=2) as pool:
        with pytest.raises(RuntimeError, match="of the caller's own"):
            await fail(pool)


async def test_what_a_worker_locked_that_vanished_is_free_again(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # With its machine, without a word: the server would keep its transaction for two hours.
    monkeypatch.setattr(border, "_GRACE_SECONDS", 0.1)

    async def vanish(pool: Database) -> None:
        async with pool.transaction() as connection:
            await connection.execute("lock table mirrored in access exclusive mode")
            # This loop stands still meanwhile, and sends nothing.
            other.execute("set lock_timeout = '20s'; lock table mirrored in access share mode")

    with psycopg.connect(database) as other:
        other.execute("create table mirrored (id int)")
        other.commit()
        async with Database(database, statement_seconds=0.2) as pool:
            with pytest.raises(psycopg.Error) as ended:
                await vanish(pool)
    assert not isinstance(ended.value, psycopg.errors.LockNotAvailable)


# By what a mirror's query, or a function in it, may fail with.
OF_THE_STATEMENT = [
    "08001",
    "08006",
    "22012",
    "2F003",
    "38000",
    "39000",
    "42703",
    "53400",
    "54001",
    "55000",
    "55P03",
    "57014",
]
OF_THE_SERVER = ["40P01", "53100", "53200", "57P03", "58030"]


@pytest.mark.parametrize("code", [*OF_THE_STATEMENT, "58P01", "HV000", "P0001", "XX000", *OF_THE_SERVER])
async def test_a_statement_s_own_error_is_told_from_the_database_s(pool: Database, code: str) -> None:
    with pytest.raises(psycopg.Error) as said:
        async with pool.transaction() as connection:
            await connection.execute(f"do $$ begin raise exception using errcode = '{code}'; end $$")
    assert said.value.sqlstate == code
    assert is_gone(said.value) is (code in OF_THE_SERVER)


async def test_a_connection_that_is_ended_is_the_database_s_error(pool: Database) -> None:
    with pytest.raises(psycopg.Error) as said:
        await pool.execute("select pg_terminate_backend(pg_backend_pid())")
    assert is_gone(said.value)


async def test_a_transaction_that_was_idle_too_long_is_the_database_s_error(pool: Database) -> None:
    # Of a class that the driver does not count among those of a broken connection.
    async def idle() -> None:
        async with pool.transaction() as connection:
            await connection.execute("set local idle_in_transaction_session_timeout = 20")
            await asyncio.sleep(1)
            await connection.execute("select 1")

    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout) as said:
        await idle()
    assert is_gone(said.value)


async def test_a_host_whose_first_address_is_dead_is_reached_at_the_next(database: str, link: Link) -> None:
    """As of a name with several addresses; the dead one is silent, and each connection of the pool begins with it."""
    link.deaf()
    to = conninfo_to_dict(database)
    hosts = f"127.0.0.1:{link.port},{to['host']}:{to['port']}"
    async with Database(
        f"postgresql://{to['user']}:{to['password']}@{hosts}/{to['dbname']}", statement_seconds=5
    ) as opened:
        assert await opened.execute("select 1") == [(1,)]
