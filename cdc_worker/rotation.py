"""Rotation: the log is three partitions; one is written, and what nobody needs is truncated whole (PgQ's idea).

Nothing is deleted row by row, so there are no dead rows to step over, whatever snapshot somebody holds. A partition is
truncated only under its exclusive lock, when no row of it is beyond any shard's checkpoint: a writer that
still has rows to commit there holds a lock of its own, and is waited for 0.3 s at the most. New writers never
wait: they are at another one.
"""

import psycopg
import structlog

from cdc_worker.database import Connection, Database, fetch

log = structlog.get_logger()

_PARTITIONS = 3

# The written partition, and whether its time is over. A fresh partition with nothing in it stays: idle costs nothing.
_DUE = """
with now_written as (select cdc.written() as slot)
select slot,
       pg_relation_size(format('cdc.outbox_%s', slot)::regclass) > $2::int8
       or (clock_timestamp() - rotated_at > $1::float8 * interval '1 hour'
           and pg_relation_size(format('cdc.outbox_%s', slot)::regclass) > 0)
from now_written, cdc.rotation
"""
_TRY = "select pg_try_advisory_xact_lock(hashtextextended('cdc_worker.rotation', 0))"
LOCK_TIMEOUT_MS = 300
_LOCK_TIMEOUT = f"set local lock_timeout = '{LOCK_TIMEOUT_MS}ms'"
_LOCK = "lock table cdc.outbox_{slot} in access exclusive mode"
# Rows that are not visible in some shard's checkpoint: two index probes for each shard.
_NEEDED = """
select exists (
    select from cdc.checkpoint c where
        exists (select from cdc.outbox_{slot} where xid >= pg_snapshot_xmax(c.position))
        or exists (select from cdc.outbox_{slot} where xid = any (array(select pg_snapshot_xip(c.position)))))
"""
_TRUNCATE = "truncate cdc.outbox_{slot}"
_TURN = "create or replace function cdc.written() returns smallint language sql stable return {slot}::smallint"
_NOTE = "update cdc.rotation set rotated_at = clock_timestamp()"


async def rotate(database: Database, *, retention_hours: float, partition_bytes: int) -> bool:
    """Turns capture to the next partition if it is time and that one can be emptied. True if it was done."""
    # What was written in one period is kept through the next one, so half of the retention is enough for each.
    ((slot, due),) = await database.execute(_DUE, retention_hours / 2, partition_bytes)
    if not due:
        return False
    following = (slot + 1) % _PARTITIONS
    try:
        async with database.transaction() as connection:
            done = await _turn(connection, following)
    except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
        log.info("log.rotation_waits", cause="a transaction has rows to commit in the partition that comes next")
        return False
    if done:
        log.info("log.rotated", slot=following)
    return done


async def _turn(connection: Connection, slot: int) -> bool:
    ((is_free,),) = await fetch(connection, _TRY)
    if not is_free:
        return False
    await connection.execute(_LOCK_TIMEOUT)
    await connection.execute(_LOCK.format(slot=slot))
    ((needed,),) = await fetch(connection, _NEEDED.format(slot=slot))
    if needed:
        return False
    await connection.execute(_TRUNCATE.format(slot=slot))
    await connection.execute(_TURN.format(slot=slot))
    await connection.execute(_NOTE)
    return True
