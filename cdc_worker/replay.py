"""Replay: what changed lately, as far as the log still has it, is marked once more, and so is delivered again.

For a Convex that was set back, or edited by hand, a while ago: a full comparison looks at every row and document, this
only at what changed since.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from cdc_worker.database import Database
from cdc_worker.outbox import ring

# Transactions from this one on are not replayed: what replay marks itself is among them. Times are numbers, which no
# DateStyle makes unreadable.
_BEGIN = """
select extract(epoch from clock_timestamp() - $1::float8 * interval '1 hour')::float8,
       pg_snapshot_xmax(pg_current_snapshot())::text,
       (select extract(epoch from at)::float8 from cdc.outbox order by xid, id limit 1)
"""
# A page of the log, by rows of up to 64 keys; each key of it once, in rows as capture writes them. A null among the
# keys stands for a rescan, and is one again.
_MARK_AGAIN = """
with page as (
    select xid, id, mirror, coalesce(keys, array[key]) as keys from cdc.outbox
    where (xid, id) > ($1::text::xid8, $2::int8) and xid < $3::text::xid8
      and at >= to_timestamp($4::float8) and mirror = any ($5::int2[])
    order by xid, id limit 1000
), once as (
    select mirror, key, row_number() over (partition by mirror) - 1 as place
    from (select distinct mirror, each.key from page cross join unnest(keys) as each (key)) as page_key
), marked as (
    insert into cdc.outbox (slot, mirror, keys)
    select cdc.written(), mirror, array_agg(key) from once group by mirror, place / 64
)
select xid::text, id, (select count(*) from once) from page order by page.xid desc, page.id desc limit 1
"""


@dataclass(frozen=True)
class Replayed:
    """What was marked."""

    # One that changed in several pages of the log counts once for each.
    keys: int
    since: datetime
    # The beginning of the oldest transaction in the log; None if it is empty.
    log_begins: datetime | None


async def replay(database: Database, mirror_ids: list[int], hours: float) -> Replayed:
    """Marks what was changed by transactions that began within the last `hours`. By Postgres' clock."""
    ((since, end, log_begins),) = await database.execute(_BEGIN, hours)
    total, xid, row_id = 0, "0", 0
    while rows := await database.execute(_MARK_AGAIN, xid, row_id, end, since, mirror_ids):
        ((xid, row_id, keys),) = rows
        total += keys
        await ring(database)
    begins = None if log_begins is None else datetime.fromtimestamp(log_begins, UTC)
    return Replayed(total, datetime.fromtimestamp(since, UTC), begins)
