"""Parked keys: what is refused for a reason of its own, kept with the reason until a good reading settles it."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg
import structlog

from cdc_worker.database import Connection, Database
from cdc_worker.documents import Problem
from cdc_worker.errors import ConfigError, Fenced
from cdc_worker.outbox import Shard, ring

log = structlog.get_logger()

_CURE = "`cdc-worker parked list` names them; what to do: docs/operating.md, Parked keys"

# Both are fenced by the token of the lease ($1, $2), whose row is locked meanwhile: a worker that was replaced, and
# wakes up with a verdict in hand, must not write over what the one after it has found.
_PARK = """
with held as (select from cdc.checkpoint where shard = $1 and token = $2 for share)
insert into cdc.parked_key (mirror, key, class, reason)
select m, k, c, r from held cross join unnest($3::int2[], $4::text[], $5::text[], $6::text[]) as new (m, k, c, r)
on conflict (mirror, cdc.digest(key)) do update set
    class = excluded.class, reason = excluded.reason,
    attempts = cdc.parked_key.attempts + 1, last_at = clock_timestamp()
returning mirror, (select name from cdc.mirror m where m.id = parked_key.mirror), xmax = 0  -- it was not there before
"""
_SETTLE = """
with held as (select from cdc.checkpoint where shard = $1 and token = $2 for share)
delete from cdc.parked_key p using held cross join unnest($3::int2[], $4::text[]) as good (m, k)
where p.mirror = m and cdc.digest(p.key) = cdc.digest(k) and p.key = k returning 1
"""
_COUNT = "select count(*) from cdc.parked_key"
# There may be a million: they stay in Postgres. As many keys in a row as capture writes (capture.py).
_MARK = """
with wanted as (
    select mirror, key from cdc.parked_key
    where ($1::int2 is null or mirror = $1) and ($2::text is null or class = $2) and ($3::text is null or key = $3)
), marked as (
    insert into cdc.outbox (slot, mirror, keys)
    select cdc.written(), mirror, array_agg(key)
    from (select *, row_number() over (partition by mirror) - 1 as place from wanted) as numbered
    group by mirror, place / 64
)
select count(*) from wanted
"""
_ONE = "select key from cdc.parked_key where mirror = $1 and class = 'mirror' limit 1"

# Times as numbers: the driver reads no text of a DateStyle other than ISO.
_LIST = """
select m.name, p.key, p.class, p.reason, p.attempts,
       extract(epoch from p.first_at)::float8, extract(epoch from p.last_at)::float8
from cdc.parked_key p join cdc.mirror m on m.id = p.mirror
where $1::int2 is null or m.id = $1 order by m.name, p.last_at desc, p.key limit $2
"""
_COUNTS = """
select m.name, count(*) from cdc.parked_key p join cdc.mirror m on m.id = p.mirror
where $1::int2 is null or m.id = $1 group by m.name order by m.name
"""
_NAMES = "select name, id from cdc.mirror order by name"
_DROP = """
with gone as (
    delete from cdc.parked_key where ($1::int2 is null or mirror = $1) and ($2::text is null or key = $2) returning 1
)
select count(*) from gone
"""

# Of one batch.
_REASONS_SAID = 5
# Keys that come one after the other for one cause are said once in this time: those of a broken mirror, which
# `mirror.broken` has named, and those that Convex refuses one by one: its functions may refuse every key there is.
_SAID_SELDOM = {"mirror", "refused"}
_REMINDER_SECONDS = 60.0


class Parking:
    """The parked keys of the database, and how many there are, so that the usual case costs no statement.

    For the holder of a shard's lease, with its `token`.
    """

    def __init__(self, database: Database, shard: Shard, token: int) -> None:
        self._database = database
        self._shard = shard
        self._lease = (shard.name, token)
        self.count = 0
        # By mirror and kind (a reason is worded anew, or names its request): when some keys were said last (monotonic),
        # and how many have come since.
        self._seldom_said: dict[tuple[str, str], tuple[float, int]] = {}

    async def load(self) -> None:
        ((self.count,),) = await self._database.execute(_COUNT)

    async def in_database(self) -> int:
        """How many there are now: `parked drop`, and the readers of other shards, do not tell this one.

        `count` stays as it is: verdicts that are under way add to it, and it must not become too low.
        """
        if self.count == 0:
            return 0
        try:
            ((count,),) = await self._database.execute(_COUNT)
        except psycopg.errors.QueryCanceled:  # there are that many, or somebody has locked the table
            return self.count
        return int(count)

    async def park(self, reasons: Mapping[tuple[int, str], Problem]) -> None:
        """Parks keys, or notes one more try of those that are. Said once for a reason, not once for a key, and for the
        most frequent ones: a reason can have a number in it.

        Raises Fenced if the lease is lost.
        """
        if not reasons:
            return
        mirrors = [mirror for mirror, _ in reasons]
        keys = [key for _, key in reasons]
        classes = [kind for kind, _ in reasons.values()]
        texts = [reason.replace("\x00", "") for _, reason in reasons.values()]
        try:
            parked = await self._database.execute(_PARK, *self._lease, mirrors, keys, classes, texts)
        except psycopg.errors.UntranslatableCharacter:
            # Convex' words may have what the database's encoding (LATIN1) lacks; keys are from the database itself.
            texts = [text.encode("ascii", "backslashreplace").decode() for text in texts]
            parked = await self._database.execute(_PARK, *self._lease, mirrors, keys, classes, texts)
        if not parked:
            raise Fenced(f"shard {self._shard} has another reader now")
        names: dict[int, str] = {mirror: name for mirror, name, _ in parked}
        self.count += sum(new for _, _, new in parked)
        each = Counter((names[mirror], *problem) for (mirror, _), problem in reasons.items()).most_common()
        for (name, kind, reason), keys_hit in each[:_REASONS_SAID]:
            if to_say := self._unsaid((name, kind), keys_hit) if kind in _SAID_SELDOM else keys_hit:
                log.error(
                    "key.parked",
                    mirror=name,
                    kind=kind,
                    reason=reason,
                    keys=to_say,
                    parked_keys=self.count,
                    cure=_CURE,
                )
        if others := each[_REASONS_SAID:]:
            log.error(
                "key.parked",
                mirrors=sorted({name for (name, _, _), _ in others}),
                kind="several",
                reason=f"{len(others)} reasons more",
                keys=sum(keys_hit for _, keys_hit in others),
                parked_keys=self.count,
                cure=_CURE,
            )

    def _unsaid(self, cause: tuple[str, str], keys: int) -> int:
        """How many keys are to be said now, with those that have not been; 0 if it is too soon."""
        said, before = self._seldom_said.get(cause, (-math.inf, 0))
        now = time.monotonic()
        is_due = now - said > _REMINDER_SECONDS
        self._seldom_said[cause] = (now, 0) if is_due else (said, before + keys)
        return before + keys if is_due else 0

    async def settle(self, good: Iterable[tuple[int, str]]) -> None:
        """These keys are as Postgres has them: whatever was held against them is over."""
        if self.count == 0:
            return
        pairs = list(good)
        gone = await self._database.execute(
            _SETTLE, *self._lease, [mirror for mirror, _ in pairs], [key for _, key in pairs]
        )
        if gone:
            self.count -= len(gone)
            log.info("key.settled", keys=len(gone), parked_keys=self.count)

    async def one_of_mirror(self, mirror_id: int) -> str | None:
        """A key that is parked for its mirror's query, if there is one."""
        found = await self._database.execute(_ONE, mirror_id)
        return str(found[0][0]) if found else None

    async def retry_mirror(self, mirror_id: int) -> None:
        """The mirror's query runs again: its keys are read anew."""
        ((keys,),) = await self._database.execute(_MARK, mirror_id, "mirror", None)
        if keys:
            await ring(self._database)  # the reader may be asleep


async def mark_parked(connection: Connection, mirror_id: int) -> None:
    """Marks all parked keys of a mirror dirty, whatever is held against them."""
    await connection.execute(_MARK, (mirror_id, None, None))


@dataclass(frozen=True)
class ParkedKey:
    mirror: str
    key: str
    kind: str
    reason: str
    attempts: int
    first_at: datetime
    last_at: datetime


async def list_parked(database: Database, mirror: str | None, limit: int) -> list[ParkedKey]:
    """The latest parked keys of a mirror, or of all."""
    rows = await database.execute(_LIST, await _id_of(database, mirror), limit)
    return [ParkedKey(*row[:5], *(datetime.fromtimestamp(seconds, UTC) for seconds in row[5:])) for row in rows]


async def count_parked(database: Database, mirror: str | None) -> dict[str, int]:
    """How many keys are parked of a mirror, or of each that has any."""
    return dict(await database.execute(_COUNTS, await _id_of(database, mirror)))


async def retry_parked(database: Database, mirror: str | None, key: str | None) -> int:
    """Marks parked keys dirty: they are read and delivered anew, and settled if that goes well. How many they are.

    Raises ConfigError if it is one key, and that is not parked.
    """
    ((marked,),) = await database.execute(_MARK, await _id_of(database, mirror), None, key)
    if key is not None and not marked:
        raise await _not_parked(database, mirror, key)
    await ring(database)
    return int(marked)


async def drop_parked(database: Database, mirror: str | None, key: str | None) -> int:
    """Forgets what is held against these keys; the next change of a row is delivered as ever. How many they are.

    Raises ConfigError if it is one key, and that is not parked.
    """
    ((dropped,),) = await database.execute(_DROP, await _id_of(database, mirror), key)
    if key is not None and not dropped:
        raise await _not_parked(database, mirror, key)
    return int(dropped)


async def _not_parked(database: Database, mirror: str | None, key: str) -> ConfigError:
    if mirror is not None:
        return ConfigError(f'no key "{key}" of mirror "{mirror}" is parked: `cdc-worker parked list`')
    # A mirror's name without its --mirror reads like a key.
    names = ", ".join(name for name, _ in await database.execute(_NAMES))
    return ConfigError(f'no key "{key}" is parked (a mirror is named with --mirror; there are: {names})')


async def _id_of(database: Database, mirror: str | None) -> int | None:
    """Raises ConfigError for a mirror that this database never had."""
    if mirror is None:
        return None
    ids: dict[str, int] = dict(await database.execute(_NAMES))
    if mirror not in ids:
        raise ConfigError(f'there is no mirror "{mirror}" (there are: {", ".join(ids)})')
    return ids[mirror]
