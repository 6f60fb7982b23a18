"""Opening a shard: Convex hands out the epoch, and both sides say who they are, so that a swap or a restore is
noticed.
"""

import uuid
from dataclasses import dataclass

import structlog

from cdc_worker.backfill import request_all
from cdc_worker.checkpoint import Checkpoint, Held
from cdc_worker.database import Database
from cdc_worker.functions import Epoch, Functions
from cdc_worker.outage import Outage
from cdc_worker.outbox import Position

log = structlog.get_logger()

# Rows whose transaction id this Postgres has not reached: written before a restore. Their keys are rescanned
# with all others.
_FORGET_FUTURE = "delete from cdc.outbox where xid >= pg_snapshot_xmax(pg_current_snapshot())"
_NOW = "select pg_current_snapshot()::text"
_XID = "select pg_snapshot_xmax(pg_current_snapshot())::text::int8"


@dataclass(frozen=True)
class Known:
    """What this process remembers of the shard: Postgres must be no less far, unless it was set back."""

    # How often the checkpoint was saved.
    saves: int = 0
    # A transaction id that was not given out yet; for what was delivered after the last save.
    xid: int = 0


@dataclass(frozen=True)
class Opened:
    """A shard that is ours to write."""

    epoch: int
    position: Position


async def open_shard(
    database: Database, checkpoint: Checkpoint, functions: Functions, outage: Outage, *, held: Held, known: Known
) -> Opened:
    """Waits until Convex hands out an epoch. Raises Fenced if the lease was lost meanwhile."""
    reader, at_least = str(uuid.uuid4()), max(held.epoch, held.epoch_floor)
    answer = await outage.insist(lambda: functions.open(reader, at_least=at_least, saves=held.saves))
    incarnation = await checkpoint.incarnation()
    ((xid,),) = await database.execute(_XID)
    position, reason = held.position, _doubt(held, answer, known, xid)
    if held.incarnation is not None and held.incarnation != incarnation:
        reason = "this is another Postgres than before (restored, failed over, or copied)"
        # Transaction ids may have started again: the old position says nothing about this one.
        await database.execute(_FORGET_FUTURE)
        ((now,),) = await database.execute(_NOW)
        position = Position(now)
    if reason:
        say = log.info if held.deployment is None else log.warning
        say("session.rescan", cause=reason, cure="none needed: every row and document is looked at again")
        await request_all(database, reason)
    await checkpoint.note_epoch(answer.epoch, answer.deployment, incarnation)
    if position != held.position:
        await checkpoint.save(position)
    return Opened(answer.epoch, position)


def _doubt(held: Held, answer: Epoch, known: Known, xid: int) -> str:
    """Why Postgres and Convex may not be what they were to each other; "" if nothing says so."""
    if held.deployment is None:
        return "first time at this deployment"
    if answer.deployment != held.deployment:
        return "CONVEX_URL leads to another deployment than before"
    # A shard that `migrate` has just made has no epoch, neither here nor there.
    previous = answer.previous or 0
    # The epoch may be in the backup, if that was made while the reader was at work.
    if (previous, answer.previousSaves) < (held.epoch, held.told_saves):
        return "the deployment was set back to an older state"
    if previous > held.epoch:
        return "Postgres was set back to an older state, or a worker died while it opened"
    # The same of Postgres.
    if max(known.saves, answer.previousSaves) > held.saves or known.xid > xid:
        return "Postgres was set back to an older state"
    return ""
