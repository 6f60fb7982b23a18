"""Which shards are this worker's: an even part of them, one row of cdc.checkpoint (the lease) each.

Postgres' clock alone decides when a lease has run out. Correctness does not rest on leases but on the epoch, which
Convex checks; they only keep two workers from doing the same work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psycopg

from cdc_worker.checkpoint import Held
from cdc_worker.database import Database, Row
from cdc_worker.errors import READ_ONLY, SchemaError
from cdc_worker.outbox import Position, Shard

# One statement, so that an idle worker costs next to nothing: it shows that this worker lives ($2: for how many
# seconds), renews what it holds ($3, $4) when a third of the time is over, or the clock was set back, and says how
# things stand. $1 is its name, which no other process ever has; $5 how many shards it knows of.
_LOOK = """
with seen as (
    insert into cdc.worker (name, shards, expires_at)
    values ($1, $5, clock_timestamp() + $2::float8 * interval '1 second')
    on conflict (name) do update set expires_at = excluded.expires_at
    where cdc.worker.expires_at not between clock_timestamp() + $2::float8 * interval '0.7 second'
                                        and clock_timestamp() + $2::float8 * interval '1 second'
), forgotten as (
    delete from cdc.worker where name <> $1
        and expires_at not between clock_timestamp() - interval '1 hour' and clock_timestamp() + interval '1 hour'
), renewed as (
    update cdc.checkpoint as c set expires_at = clock_timestamp() + $2::float8 * interval '1 second'
    from unnest($3::text[], $4::int8[]) as mine (shard, token)
    where c.shard = mine.shard and c.token = mine.token
      and c.expires_at not between clock_timestamp() + $2::float8 * interval '0.7 second'
                               and clock_timestamp() + $2::float8 * interval '1 second'
)
select c.shard::int, c.token, c.holder, c.holder = $1 or cdc.is_free(c.holder, c.expires_at, c.holder_pid),
       greatest(extract(epoch from c.expires_at - clock_timestamp()), 0)::float8,
       array(select w.name from cdc.worker w
             where not cdc.is_over(w.expires_at) and w.shards = $5 and not exists (
                 select from cdc.checkpoint c where c.holder = w.name and cdc.is_dead(c.holder_pid)))
from cdc.checkpoint c order by c.shard::int
"""
# A dead holder is forgotten as a worker, too: otherwise an even part would leave some of the shards to it. If only its
# listener died, it is back with its next look.
_ACQUIRE = """
with forgotten as (
    delete from cdc.worker as w using cdc.checkpoint as c
    where c.shard = $3 and w.name = c.holder and w.name <> $1 and cdc.is_free(c.holder, c.expires_at, c.holder_pid)
)
update cdc.checkpoint as c
set holder = $1, token = token + 1, holder_pid = null, expires_at = clock_timestamp() + $2::float8 * interval '1 second'
where shard = $3 and (holder = $1 or cdc.is_free(holder, expires_at, holder_pid))
returning token, position::text, window_end::text, after_xid::text::int8, after_id, epoch, epoch_floor, saves,
          told_saves, deployment, incarnation
"""
_LEAVE = """
with forgotten as (delete from cdc.worker where name = $1)
update cdc.checkpoint set holder = null, holder_pid = null where holder = $1
"""


@dataclass(frozen=True)
class Standing:
    """How the shards are spread at this moment."""

    # What may be taken.
    free: Sequence[Shard]
    # What was held, and is somebody else's now.
    lost: frozenset[Shard]
    # By the names of the workers that live, this one among them: how many shards each has.
    parts: Mapping[str, int]
    # Of a shard that is not free: who has it, and for how many seconds yet.
    elsewhere: tuple[Shard, str, float] | None


class Allotment:
    """The part of one worker, `name`."""

    def __init__(self, database: Database, name: str, *, shards: int, lease_seconds: float) -> None:
        self._database = database
        self._name = name
        self._shards = shards
        self._lease_seconds = lease_seconds

    async def look(self, held: Mapping[Shard, int]) -> Standing:
        """How things stand, with the leases of `held` (token by shard) renewed.

        Raises SchemaError for a database that cannot be worked on: not migrated, read-only, or of other shards.
        """
        names, tokens = [shard.name for shard in held], list(held.values())
        try:
            rows = await self._database.execute(_LOOK, self._name, self._lease_seconds, names, tokens, self._shards)
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedColumn):
            raise SchemaError("this database has no schema cdc of this version: run `cdc-worker migrate`") from None
        except psycopg.errors.ReadOnlySqlTransaction:
            raise SchemaError(READ_ONLY) from None
        if len(rows) != self._shards:
            raise SchemaError(
                f"the database has {len(rows)} shards, CDC_SHARDS is {self._shards}: run `cdc-worker migrate`"
            )
        return self._standing(rows, held)

    def _standing(self, rows: Sequence[Row], held: Mapping[Shard, int]) -> Standing:
        free, lost, elsewhere = [], set(), None
        parts: dict[str, int] = {self._name: len(held)}
        for number, token, holder, is_free, seconds, alive in rows:
            shard = Shard(number, self._shards)
            parts |= {name: parts.get(name, 0) for name in alive}
            if shard in held:
                if token != held[shard]:
                    lost.add(shard)
            elif is_free:
                free.append(shard)
            else:
                parts[holder] = parts.get(holder, 0) + 1
                elsewhere = elsewhere or (shard, holder, seconds)
        return Standing(free, frozenset(lost), parts, elsewhere)

    async def acquire(self, shard: Shard) -> Held | None:
        """The shard's lease, or None if somebody else was quicker."""
        rows = await self._database.execute(_ACQUIRE, self._name, self._lease_seconds, shard.name)
        if not rows:
            return None
        token, snapshot, window_end, after_xid, after_id, *rest = rows[0]
        return Held(token, Position(snapshot, window_end, after_xid, after_id), *rest)

    async def leave(self) -> None:
        """Lets go of everything; others need not reckon with this worker any more."""
        await self._database.execute(_LEAVE, self._name)


def fair_part(name: str, parts: Mapping[str, int], shards: int) -> int:
    """How many shards the worker `name` should have, given how many each has.

    An even part. If a remainder is left, one more for whoever comes first, but only when every other has its even part.
    """
    least, over = divmod(shards, len(parts))
    lacking = any(count < least for other, count in parts.items() if other != name)
    return least if lacking or not over else least + 1
