"""A shard's one row: how far it got (the checkpoint), fenced by the token of the lease (allotment.py)."""

import contextlib
from dataclasses import dataclass

import psycopg

from cdc_worker.database import Database
from cdc_worker.errors import Fenced
from cdc_worker.outbox import Position, Shard

_SAVE = """
update cdc.checkpoint
set position = $3::pg_snapshot, window_end = $4::pg_snapshot, after_xid = $5::text::xid8, after_id = $6,
    saves = saves + 1, saved_at = clock_timestamp(),
    expires_at = clock_timestamp() + $7::float8 * interval '1 second'
where shard = $1 and token = $2 returning saves
"""
_NOTE_LISTENER = "update cdc.checkpoint set holder_pid = $3::int4 where shard = $1 and token = $2 returning 1"
_NOTE_EPOCH = """
update cdc.checkpoint set epoch = $3, deployment = $4, incarnation = $5, told_saves = saves
where shard = $1 and token = $2 returning 1
"""
_NOTE_TOLD = "update cdc.checkpoint set told_saves = $3 where shard = $1 and token = $2 returning 1"
_RELEASE = "update cdc.checkpoint set holder = null, holder_pid = null where shard = $1 and token = $2"
# Of the log that is written now. What pg_control_checkpoint() says is minutes old after a fail-over: it is the timeline
# of the last checkpoint.
_TIMELINE = "select ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int8"
# Cluster, timeline ($1), database and outbox: a restore, a fail-over and a copy each change at least one. The cluster's
# may have been taken from plain roles by a managed service.
_INCARNATION = """
select concat_ws('/',
    case when has_function_privilege('pg_control_system()', 'execute')
         then (select system_identifier::text from pg_control_system()) end,
    $1::int8,
    (select oid::text from pg_database where datname = current_database()),
    'cdc.outbox'::regclass::oid::text)
"""


@dataclass(frozen=True)
class Held:
    """What the row said when the lease was taken."""

    token: int
    position: Position
    # 0: no reader has opened the shard yet.
    epoch: int
    epoch_floor: int
    saves: int
    # As far as Convex was told.
    told_saves: int
    deployment: str | None
    incarnation: str | None


class Checkpoint:
    """The row of one shard, for the holder of its lease."""

    def __init__(self, database: Database, shard: Shard, held: Held, *, lease_seconds: float) -> None:
        self._database = database
        self._shard = shard
        self._token = held.token
        self._lease_seconds = lease_seconds
        # How often it was saved, by whomever.
        self.saves = held.saves
        # What Convex was told of that.
        self.told_saves = held.told_saves

    async def save(self, position: Position) -> None:
        """Notes that everything up to `position` is acknowledged, and renews. Raises Fenced if the lease is lost."""
        ((self.saves,),) = self._fence(
            await self._database.execute(
                _SAVE,
                self._shard.name,
                self._token,
                position.snapshot,
                position.window_end,
                str(position.after_xid),
                position.after_id,
                self._lease_seconds,
            )
        )

    async def note_listener(self, pid: int) -> None:
        """The backend whose end shows that this holder is dead."""
        self._fence(await self._database.execute(_NOTE_LISTENER, self._shard.name, self._token, pid))

    async def note_epoch(self, epoch: int, deployment: str, incarnation: str) -> None:
        """What `cdc:open` was told and answered, and which Postgres this is. Before the first save."""
        self._fence(
            await self._database.execute(_NOTE_EPOCH, self._shard.name, self._token, epoch, deployment, incarnation)
        )
        self.told_saves = self.saves

    async def note_told(self, saves: int) -> None:
        """What `cdc:noteSaves` was told: afterwards, so that Convex has never heard less."""
        self._fence(await self._database.execute(_NOTE_TOLD, self._shard.name, self._token, saves))
        self.told_saves = saves

    async def release(self) -> None:
        await self._database.execute(_RELEASE, self._shard.name, self._token)

    async def incarnation(self) -> str:
        """Which Postgres this is."""
        timeline = None
        # A service whose storage has no such log (Aurora) has no timelines, either.
        with contextlib.suppress(psycopg.errors.FeatureNotSupported, psycopg.errors.InsufficientPrivilege):
            ((timeline,),) = await self._database.execute(_TIMELINE)
        ((text,),) = await self._database.execute(_INCARNATION, timeline)
        return str(text)

    def _fence(self, rows: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        if not rows:
            raise Fenced(f"shard {self._shard} has another reader now")
        return rows
