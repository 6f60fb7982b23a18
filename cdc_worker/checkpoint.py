"""A shard's one row: who reads it (the lease) and how far it got (the checkpoint), fenced by a token.

Postgres' clock alone decides when a lease has run out. Correctness does not rest on the lease but on the epoch, which
Convex checks; the lease only keeps two workers from doing the same work.
"""

from dataclasses import dataclass

from cdc_worker.database import Database
from cdc_worker.errors import Fenced
from cdc_worker.outbox import Position

# A holder is replaced if it let go, fell silent, or its listener's backend is gone (it was killed, or its machine was).
_ACQUIRE = """
update cdc.checkpoint as c
set holder = $2, token = token + 1, holder_pid = $4::int4, expires_at = clock_timestamp() + $3::float8 *
interval '1 second' where shard = $1 and (
    holder is null or expires_at < clock_timestamp()
    or (holder_pid is not null and not exists (
            select from pg_stat_activity a where a.pid = c.holder_pid and a.datname = current_database())))
returning token, position::text, window_end::text, after_xid::text::int8, after_id, epoch, deployment, incarnation
"""
_HOLDER = """
select holder, greatest(extract(epoch from expires_at - clock_timestamp()), 0)::float8
from cdc.checkpoint where shard = $1
"""
_SAVE = """
update cdc.checkpoint
set position = $3::pg_snapshot, window_end = $4::pg_snapshot, after_xid = $5::text::xid8, after_id = $6,
    saved_at = clock_timestamp(), expires_at = clock_timestamp() + $7::float8 * interval '1 second'
where shard = $1 and token = $2 returning 1
"""
_RENEW = """
update cdc.checkpoint set expires_at = clock_timestamp() + $3::float8 * interval '1 second'
where shard = $1 and token = $2 returning 1
"""
_NOTE_LISTENER = "update cdc.checkpoint set holder_pid = $3::int4 where shard = $1 and token = $2 returning 1"
_NOTE_EPOCH = """
update cdc.checkpoint set epoch = $3, deployment = $4, incarnation = $5 where shard = $1 and token = $2 returning 1
"""
_RELEASE = "update cdc.checkpoint set holder = null, holder_pid = null where shard = $1 and token = $2"
# Cluster, timeline, database and outbox: a restore, a fail-over and a copy each change at least one. The first two may
# have been taken from plain roles by a managed service.
_INCARNATION = """
select concat_ws('/',
    case when has_function_privilege('pg_control_system()', 'execute')
         then (select system_identifier::text from pg_control_system()) end,
    case when has_function_privilege('pg_control_checkpoint()', 'execute')
         then (select timeline_id::text from pg_control_checkpoint()) end,
    (select oid::text from pg_database where datname = current_database()),
    'cdc.outbox'::regclass::oid::text)
"""


@dataclass(frozen=True)
class Held:
    """What the row said when the lease was taken."""

    token: int
    position: Position
    epoch: int
    deployment: str | None
    incarnation: str | None


class Checkpoint:
    """The row of one shard, for one holder."""

    def __init__(self, database: Database, shard: str, holder: str, *, lease_seconds: float) -> None:
        self._database = database
        self._shard = shard
        self._holder = holder
        self._lease_seconds = lease_seconds
        self._token = 0

    async def acquire(self, listener_pid: int | None) -> Held | None:
        """The lease, or None while somebody else has it."""
        rows = await self._database.execute(_ACQUIRE, self._shard, self._holder, self._lease_seconds, listener_pid)
        if not rows:
            return None
        token, snapshot, window_end, after_xid, after_id, epoch, deployment, incarnation = rows[0]
        self._token = token
        return Held(token, Position(snapshot, window_end, after_xid, after_id), epoch, deployment, incarnation)

    async def holder(self) -> tuple[str | None, float]:
        """Who has the lease, and for how many seconds yet."""
        ((holder, seconds),) = await self._database.execute(_HOLDER, self._shard)
        return holder, seconds

    async def save(self, position: Position) -> None:
        """Notes that everything up to `position` is acknowledged, and renews. Raises Fenced if the lease is lost."""
        self._fence(
            await self._database.execute(
                _SAVE,
                self._shard,
                self._token,
                position.snapshot,
                position.window_end,
                str(position.after_xid),
                position.after_id,
                self._lease_seconds,
            )
        )

    async def renew(self) -> None:
        self._fence(await self._database.execute(_RENEW, self._shard, self._token, self._lease_seconds))

    async def note_listener(self, pid: int) -> None:
        """There is a listener now, whose end says that the holder is gone."""
        self._fence(await self._database.execute(_NOTE_LISTENER, self._shard, self._token, pid))

    async def note_epoch(self, epoch: int, deployment: str, incarnation: str) -> None:
        self._fence(await self._database.execute(_NOTE_EPOCH, self._shard, self._token, epoch, deployment, incarnation))

    async def release(self) -> None:
        await self._database.execute(_RELEASE, self._shard, self._token)

    async def incarnation(self) -> str:
        """Which Postgres this is."""
        ((text,),) = await self._database.execute(_INCARNATION)
        return str(text)

    def _fence(self, rows: list[tuple[object, ...]]) -> None:
        if not rows:
            raise Fenced(f"shard {self._shard} has another reader now")
