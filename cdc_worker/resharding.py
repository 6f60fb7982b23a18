"""How many shards there are: made anew by `migrate` when CDC_SHARDS has changed.

Positions of one Postgres are snapshots of it, and of two snapshots the later one sees all that the earlier one
does. So the shards that come begin where the one of the old ones stands that got least far: what others had
acknowledged beyond it is read again, and found unchanged. Convex shuts the old shards when the first of the new
ones is opened (convex/cdc.ts), so that no late request of theirs comes after a newer reading of the same key.
"""

import structlog

from cdc_worker.database import Connection, fetch

log = structlog.get_logger()

# Nobody saves meanwhile. Short, as every lock in front of others.
_LOCK = "lock table cdc.checkpoint in exclusive mode"
_COUNT = "select count(*) from cdc.checkpoint"
# Of two snapshots with the same end, the earlier one has more transactions open. Shards that know different deployments
# or Postgres servers were not all opened since a swap or a restore: then nothing is known, and the first shard that
# is opened has everything looked at again.
_DIVIDE = """
with old as (
    delete from cdc.checkpoint returning *
), known as (
    select coalesce(max(token), 0) + 1 as token, coalesce(max(greatest(epoch, epoch_floor)), 0) as epoch_floor,
           max(deployment) as deployment, max(incarnation) as incarnation,
           count(distinct (deployment, incarnation)) = 1 as agree
    from old
), earliest as (
    select position from old
    order by pg_snapshot_xmax(position), (select count(*) from pg_snapshot_xip(position)) desc limit 1
)
insert into cdc.checkpoint (shard, position, token, epoch_floor, deployment, incarnation)
select number::text, case when agree then (select position from earliest) else pg_current_snapshot() end,
       token, epoch_floor, case when agree then deployment end, case when agree then incarnation end
from known, generate_series(0, $1::int - 1) as number
"""


async def divide(connection: Connection, shards: int) -> None:
    """Makes `shards` of them, if their number is another one. Readers of the old ones are fenced."""
    await connection.execute(_LOCK)
    ((before,),) = await fetch(connection, _COUNT)
    if before != shards:
        await connection.execute(_DIVIDE, (shards,))
        log.info("shards.changed", before=before, shards=shards)
