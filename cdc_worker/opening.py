"""Opening a shard: Convex hands out the epoch, and both sides say who they are, so that a swap or a restore is
noticed.
"""

import uuid
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from cdc_worker.backfill import request_all
from cdc_worker.checkpoint import Checkpoint, Held
from cdc_worker.database import Database
from cdc_worker.deployment import Deployment
from cdc_worker.errors import FunctionFailed, Misconfigured
from cdc_worker.outage import Outage
from cdc_worker.outbox import Position, Shard
from convex import ConvexError

log = structlog.get_logger()
T = TypeVar("T")

# Rows whose transaction id this Postgres has not reached: written before a restore. Their keys are rescanned
# with all others.
_FORGET_FUTURE = "delete from cdc.outbox where xid >= pg_snapshot_xmax(pg_current_snapshot())"
_NOW = "select pg_current_snapshot()::text"
_XID = "select pg_snapshot_xmax(pg_current_snapshot())::text::int8"


class _Answer(BaseModel):
    deployment: str
    epoch: int = Field(gt=0, le=2**53)
    previous: int | None
    # Under `previous`: as far as Convex was told.
    previousSaves: int  # noqa: N815  # as Convex says it


_ANSWER = TypeAdapter(_Answer)
_SAVES: TypeAdapter[int | None] = TypeAdapter(int | None)


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
    database: Database,
    checkpoint: Checkpoint,
    deployment: Deployment,
    outage: Outage,
    *,
    shard: Shard,
    held: Held,
    known: Known,
) -> Opened:
    """Waits until Convex hands out an epoch. Raises Fenced if the lease was lost meanwhile."""
    args = {
        "shard": shard.name,
        "shards": shard.of,
        "reader": str(uuid.uuid4()),
        "atLeast": max(held.epoch, held.epoch_floor),
        "saves": held.saves,
    }
    answer = await _ask(deployment, outage, "cdc:open", args, _ANSWER)
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


def _doubt(held: Held, answer: _Answer, known: Known, xid: int) -> str:
    """Why Postgres and Convex may not be what they were to each other; "" if nothing says so."""
    if held.deployment is None:
        return "first time at this deployment"
    if answer.deployment != held.deployment:
        return "CONVEX_URL leads to another deployment than before"
    # A shard that `migrate` has just made has no epoch, neither here nor there.
    previous = answer.previous or 0
    if previous < held.epoch:
        return "the deployment was set back to an older state"
    if previous > held.epoch:
        return "Postgres was set back to an older state, or a worker died while it opened"
    # The epoch may be in the backup, if that was made while the reader was at work.
    if max(known.saves, answer.previousSaves) > held.saves or known.xid > xid:
        return "Postgres was set back to an older state"
    return ""


async def note_saves(deployment: Deployment, outage: Outage, shard: Shard, epoch: int, saves: int) -> int | None:
    """Tells Convex how often the checkpoint was saved: never more than Postgres knows, unless that is set back.

    Returns what Convex was told before; None if the shard has another epoch now.
    """
    args = {"shard": shard.name, "epoch": epoch, "saves": saves}
    return await _ask(deployment, outage, "cdc:noteSaves", args, _SAVES)


async def _ask(deployment: Deployment, outage: Outage, path: str, args: dict[str, Any], form: TypeAdapter[T]) -> T:
    """What the mutation at `path` answers, in its form. It refuses nothing, so whatever is amiss concerns all of it."""

    async def attempt() -> T:
        try:
            return form.validate_python(await deployment.call("mutation", path, args))
        except (FunctionFailed, ConvexError) as error:
            raise Misconfigured(
                f"{error}: is the deployment running, and has it the functions of this worker's convex/ folder?"
            ) from None
        except ValidationError:
            raise Misconfigured(f"{path} gave an answer of another form: deploy this worker's convex/ folder") from None

    return await outage.insist(attempt)
