"""Opening a shard: Convex hands out the epoch, and both sides say who they are, so that a swap or a restore is
noticed.
"""

import uuid
from dataclasses import dataclass
from typing import Any, LiteralString

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cdc_worker.backfill import request_all
from cdc_worker.checkpoint import Checkpoint, Held
from cdc_worker.database import Database
from cdc_worker.deployment import Deployment
from cdc_worker.errors import FunctionFailed, Misconfigured
from cdc_worker.outage import Outage
from cdc_worker.outbox import Position

log = structlog.get_logger()

# Rows whose transaction id this Postgres has not reached: written before a restore. Their keys are rescanned
# with all others.
_FORGET_FUTURE: LiteralString = "delete from cdc.outbox where xid >= pg_snapshot_xmax(pg_current_snapshot())"
_NOW: LiteralString = "select pg_current_snapshot()::text"


class _Answer(BaseModel):
    model_config = ConfigDict(strict=False)

    deployment: str
    epoch: int = Field(gt=0)
    previous: int | None


@dataclass(frozen=True)
class Opened:
    """A shard that is ours to write."""

    epoch: int
    position: Position


async def open_shard(
    database: Database, checkpoint: Checkpoint, deployment: Deployment, outage: Outage, *, shard: str, held: Held
) -> Opened:
    """Waits until Convex hands out an epoch. Raises Fenced if the lease was lost meanwhile."""
    args = {"shard": shard, "reader": str(uuid.uuid4()), "atLeast": held.epoch}

    async def attempt() -> _Answer:
        try:
            value: Any = await deployment.call("mutation", "cdc:open", args)
            return _Answer.model_validate(value)
        except FunctionFailed as error:
            raise Misconfigured(
                f"{error}: is the deployment running, and has it the functions of this worker's convex/ folder?"
            ) from None
        except ValidationError:
            raise Misconfigured(
                "cdc:open gave an answer of another form: deploy this worker's convex/ folder"
            ) from None

    answer = await outage.insist(attempt)
    incarnation = await checkpoint.incarnation()
    position, reason = held.position, ""
    if held.deployment is None:
        reason = "first time at this deployment"
    elif answer.deployment != held.deployment:
        reason = "CONVEX_URL leads to another deployment than before"
    elif answer.previous is None or answer.previous < held.epoch:
        reason = "the deployment was set back to an older state"
    elif answer.previous > held.epoch:
        reason = "Postgres was set back to an older state, or a worker died while it opened"
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
