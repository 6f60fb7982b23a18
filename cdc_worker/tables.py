"""The tables behind each mirror, as they were: what changes past every trigger is found by comparing.

With a partition that is dropped, detached or attached, rows go and come; with a column that changes its type every
value may be another one; with one that comes, so does a field of whatever shows whole rows (`to_jsonb(t)`). And an
ALTER TABLE that rewrites a table empties it for older snapshots (Postgres' documentation, "Caveats" of MVCC): a joined
query that waited for it has read the rows of its other tables only. Then the mirror is looked at anew.
"""

from collections.abc import Mapping

import psycopg
import structlog
from psycopg import sql

from cdc_worker import backfill
from cdc_worker.database import Database, fetch
from cdc_worker.mirrors import Mirror
from cdc_worker.postgres_errors import is_gone

log = structlog.get_logger()

# By mirror, where it is not as noted: whether a table is gone; whether one came that is not empty (partitions are
# mostly made before there is anything to put into them); whether one has another file; whether a column is gone or has
# another name or type; whether one came.
_CHANGED = """
with recursive source (mirror, oid) as (
    select distinct given.mirror, to_regclass(given.name)::oid
    from unnest($1::int2[], $2::text[]) as given (mirror, name) where to_regclass(given.name) is not null
), family (mirror, oid) as (
    select mirror, oid from source
    -- One that is being detached is shown no more, and may stay so for days: a `detach concurrently` that was cut off.
    union select family.mirror, i.inhrelid from pg_inherits i join family on i.inhparent = family.oid
          where not i.inhdetachpending
), now_there as (
    select mirror, coalesce(array_agg(c.oid::int8 order by c.oid) filter (where c.relkind = 'r'), '{}') as tables,
           coalesce(array_agg(c.relfilenode::int8 order by c.oid) filter (where c.relkind = 'r'), '{}') as files
    from family join pg_class c on c.oid = family.oid group by mirror
), shape as (
    select mirror, array_agg(format('%s.%s %s %s %s', a.attrelid, a.attnum, a.atttypid, a.atttypmod, a.attname)
                             order by a.attrelid, a.attnum) as columns
    from source join pg_attribute a on a.attrelid = source.oid where a.attnum > 0 and not a.attisdropped group by mirror
)
select m.id, n.tables, n.files, s.columns, not m.tables <@ n.tables,
       exists (select from unnest(n.tables) as came (oid)
               where came.oid <> all (m.tables) and pg_relation_size(came.oid::oid::regclass) > 0),
       exists (select from unnest(m.tables, m.files) as was (oid, file)
               join unnest(n.tables, n.files) as is_now (oid, file) using (oid) where was.file <> is_now.file),
       not m.columns <@ s.columns, not s.columns <@ m.columns
from cdc.mirror m join now_there n on n.mirror = m.id join shape s on s.mirror = m.id
where (m.tables, m.files, m.columns) is distinct from (n.tables, n.files, s.columns)
"""
# The planner writes a whole row as `t.*` or, of a subquery, as `ROW(...)`, views included.
_EXPLAIN = "explain (verbose, costs off) select * from (\n{}\n) as q"
_NOTE = "update cdc.mirror set tables = $2::int8[], files = $3::int8[], columns = $4::text[] where id = $1"


async def look_at_tables(database: Database, mirrors: Mapping[int, Mirror]) -> None:
    """Asks for a rescan of each mirror whose rows have changed with their tables."""
    sources = [(number, source.table) for number, mirror in mirrors.items() for source in mirror.sources]
    async with database.transaction("read only") as connection:  # in the role's own search_path
        changed = await fetch(connection, _CHANGED, [number for number, _ in sources], [table for _, table in sources])
    for number, tables, files, columns, gone, came, rewritten, altered, added in changed:
        causes = {
            "a table with rows was dropped or detached": gone,
            "a table with rows was attached": came,
            "a table was rewritten": rewritten,
            "a column was dropped or renamed, or has another type": altered,
            "a column was added, and the query shows whole rows": added
            and not altered
            and await _shows_whole_rows(database, mirrors[number]),
        }
        if any(causes.values()):
            log.warning(
                "capture.tables_changed",
                mirror=mirrors[number].name,
                cause="; ".join(cause for cause, true in causes.items() if true),
                cure="none needed: every row and document is looked at again",
            )
            await backfill.request(database, number, "tables changed")
        # Last: a worker that dies before it asks for the rescan once more.
        await database.execute(_NOTE, number, tables, files, columns)


async def _shows_whole_rows(database: Database, mirror: Mirror) -> bool:
    try:
        async with database.transaction("read only") as connection:
            plan = await fetch(connection, sql.SQL(_EXPLAIN).format(sql.SQL(mirror.query)).as_string())
    except psycopg.Error as error:
        if is_gone(error):
            raise
        return True  # it does not run now; who knows
    return any(".*" in line or "ROW(" in line for (line,) in plan)
