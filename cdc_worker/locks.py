"""Locks of others in a command's way: they are waited for, and then it is said who holds them."""

import itertools
from collections.abc import Awaitable, Callable
from functools import partial
from typing import LiteralString, TypeVar

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_random

from cdc_worker.database import Connection, Row, begin, fetch
from cdc_worker.errors import SchemaError
from cdc_worker.postgres_errors import LOCKED, first_lines

log = structlog.get_logger()
T = TypeVar("T")

# An ALTER TABLE that rewrites may take longer: whoever migrates should hear of it while it lasts.
_PATIENCE_SECONDS = 30.0
# A trigger's DDL waits for the table's writers, and new writers wait behind it: never for longer than this.
_TABLE_LOCK_TIMEOUT = "set local lock_timeout = '300ms'"
_TABLE_SECONDS = 60.0
# Except once: an autovacuum, which may last on a large table, gives way to whoever has waited for `deadlock_timeout`.
_PATIENT_TRY = 10
_PAST_AUTOVACUUM = """
select set_config('lock_timeout', (s.setting::int + 300)::text, true) from pg_settings s
where s.name = 'deadlock_timeout' and s.setting::int <= 1000 and exists (
    select from pg_locks l join pg_stat_activity a on a.pid = l.pid
    where l.relation = $1 and l.granted and l.mode = 'ShareUpdateExclusiveLock' and a.usesysid is null
      and a.datname = current_database()
)
"""
_STATEMENT_SECONDS = 60.0

# Those in front of whom all others wait come first. What they are at is not asked for: it can quote rows.
_HOLDERS = """
select format('%s holds %s on %s', case
                  when p.gid is not null then format('prepared transaction %L (role %s)', p.gid, p.owner)
                  when a.usesysid is null then format('process %s (autovacuum)', a.pid)
                  else format('process %s (%s, role %s)', a.pid, coalesce(nullif(a.application_name, ''), 'no name'),
                              a.usename) end,
              l.mode, l.relation::regclass)
from pg_locks l join pg_class c on c.oid = l.relation left join pg_stat_activity a on a.pid = l.pid
-- A prepared transaction has no process; it locks its own number.
left join (pg_prepared_xacts p join pg_locks own on own.transactionid = p.transaction and own.pid is null)
    on l.pid is null and l.virtualtransaction = own.virtualtransaction
where l.locktype = 'relation' and l.granted
  -- Readers hinder a `drop trigger` only, and those that soon end are not worth a word.
  and (l.mode not in ('AccessShareLock', 'RowShareLock') or (a.xact_start < now() - interval '2 seconds') is not false)
  and coalesce(a.pid::text, p.gid) is not null
  and l.database = (select oid from pg_database where datname = current_database())
  and l.pid is distinct from pg_backend_pid() and c.relkind in ('r', 'p', 'm')
  and c.relnamespace <> 'pg_catalog'::regnamespace
order by l.mode = 'AccessExclusiveLock' desc, l.mode in ('AccessShareLock', 'RowShareLock'), a.xact_start, a.pid limit 3
"""


async def when_free(
    what: str,
    work: Callable[[], Awaitable[T]],
    execute: Callable[[LiteralString], Awaitable[list[Row]]],
    seconds: float | None = None,
) -> T:
    """The outcome of `work` on `what`, tried again while a lock is in its way. `execute` asks who holds it.

    Raises SchemaError that names the holders after `seconds` (half a minute, unless told otherwise).
    """

    async def once() -> T:
        return await work()

    def waits(state: RetryCallState) -> None:
        if state.attempt_number % 10 == 1:
            log.info("capture.waiting_for_table", table=what, attempt=state.attempt_number)

    try:
        value: T = await AsyncRetrying(
            wait=wait_random(0.1, 0.5),
            retry=retry_if_exception_type(LOCKED),
            stop=stop_after_delay(_PATIENCE_SECONDS if seconds is None else seconds),
            before_sleep=waits,
            reraise=True,
        )(once)
    except LOCKED as error:
        held = ", ".join(text for (text,) in await execute(_HOLDERS))
        said = f"wait for its end, or end it: {held}" if held else "nobody holds a lock any more"
        raise SchemaError(f"{what}: {first_lines(error)}; {said}: run it again then") from None
    return value


async def commit_when_free(
    connection: Connection, what: str, work: Callable[[], Awaitable[T]], seconds: float | None = None
) -> T:
    """`when_free`, with `work` in a transaction of its own each time."""
    return await when_free(what, partial(_transaction, connection, work), partial(fetch, connection), seconds)


async def _transaction(connection: Connection, work: Callable[[], Awaitable[T]]) -> T:
    await begin(connection, "", statement_seconds=_STATEMENT_SECONDS)
    try:
        result = await work()
    except BaseException:
        await connection.rollback()
        raise
    await connection.commit()
    return result


async def between_writers(connection: Connection, what: str, work: Callable[[], Awaitable[None]], oid: int = 0) -> None:
    """Runs `work`, on the table `oid`, in a transaction, as often as it takes until its locks are free for the asking.

    Raises SchemaError if they never are.
    """
    tries = itertools.count(1)

    async def impatient() -> None:
        await connection.execute(_TABLE_LOCK_TIMEOUT)
        if next(tries) == _PATIENT_TRY:
            await connection.execute(_PAST_AUTOVACUUM, (oid,))
        await work()

    await commit_when_free(connection, what, impatient, _TABLE_SECONDS)
