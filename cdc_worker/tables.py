"""The tables behind each mirror: with a partition that is dropped, detached or attached, rows go and come past every
trigger. So it is noted which there were, and a mirror for which that is no longer true is looked at anew.
"""

from collections.abc import Mapping

import structlog

from cdc_worker import backfill
from cdc_worker.database import Database
from cdc_worker.mirrors import Mirror

log = structlog.get_logger()

# By mirror, where it is not as noted: whether a table is gone, and whether one came that is not empty (partitions are
# mostly made before there is anything to put into them).
_CHANGED = """
with recursive family (mirror, oid) as (
    select given.mirror, to_regclass(given.name)::oid from unnest($1::int2[], $2::text[]) as given (mirror, name)
    where to_regclass(given.name) is not null
    union select family.mirror, i.inhrelid from pg_inherits i join family on i.inhparent = family.oid
), now_there as (
    select mirror, coalesce(array_agg(c.oid::int8 order by c.oid) filter (where c.relkind = 'r'), '{}') as tables
    from family join pg_class c on c.oid = family.oid group by mirror
)
select m.id, n.tables, not m.tables <@ n.tables,
       exists (select from unnest(n.tables) as came (oid)
               where came.oid <> all (m.tables) and pg_relation_size(came.oid::oid::regclass) > 0)
from cdc.mirror m join now_there n on n.mirror = m.id where m.tables is distinct from n.tables
"""
_NOTE = "update cdc.mirror set tables = $2::int8[] where id = $1"


async def look_at_tables(database: Database, mirrors: Mapping[int, Mirror]) -> None:
    """Asks for a rescan of each mirror whose rows have gone or come with their table."""
    sources = [(number, source.table) for number, mirror in mirrors.items() for source in mirror.sources]
    changed = await database.execute(_CHANGED, [number for number, _ in sources], [table for _, table in sources])
    for number, tables, gone, came in changed:
        if gone or came:
            log.warning(
                "capture.tables_changed",
                mirror=mirrors[number].name,
                cause="a table with rows was dropped or detached" if gone else "a table with rows was attached",
                cure="none needed: every row and document is looked at again",
            )
            await backfill.request(database, number, with_documents=True, reason="tables came or went")
        # Last: who dies before it asks once more.
        await database.execute(_NOTE, number, tables)
