"""The triggers of the mirrored tables: `migrate` brings them, the worker looks whether they are there."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import psycopg
import structlog
from psycopg import sql

from cdc_worker.backfill import RESCAN
from cdc_worker.capture import (
    EVENTS,
    Feed,
    create_function,
    create_trigger,
    digests,
    function_body,
    function_name,
    lock_out_writers,
    shared_function_name,
    trigger_name,
)
from cdc_worker.catalog import find_table
from cdc_worker.database import Connection, Database, fetch
from cdc_worker.errors import SchemaError
from cdc_worker.locks import between_writers
from cdc_worker.mirrors import Mirror
from cdc_worker.postgres_errors import first_lines

log = structlog.get_logger()

UNCAPTURED = "a source had no triggers"
_CAPTURED = """
select t.tgrelid, n.nspname, c.relname, t.tgname, case when t.tgenabled = 'A' then p.proname else '' end
from pg_trigger t
join pg_proc p on p.oid = t.tgfoid join pg_namespace pn on pn.oid = p.pronamespace
join pg_class c on c.oid = t.tgrelid join pg_namespace n on n.oid = c.relnamespace
where pn.nspname = 'cdc' and not t.tgisinternal
"""
_FUNCTIONS = """
select p.proname, p.prosrc from pg_proc p join pg_namespace n on n.oid = p.pronamespace
where n.nspname = 'cdc' and p.proname like 'capture\\_%'
"""
# A statement fires the triggers of the table that it names, and of no other: partitions and heirs need their own.
_FAMILY = """
with recursive family (oid) as (
    select $1::oid union select i.inhrelid from pg_inherits i join family on i.inhparent = family.oid
)
select c.oid, n.nspname, c.relname from family
join pg_class c using (oid) join pg_namespace n on n.oid = c.relnamespace where c.relkind in ('r', 'p')
"""
_GAPS = """
with recursive family (oid) as (
    select to_regclass(name)::oid from unnest($1::text[]) as given (name) where to_regclass(name) is not null
    union select i.inhrelid from pg_inherits i join family on i.inhparent = family.oid
)
select family.oid::regclass::text, count(*) filter (where t.tgenabled in ('A', 'O')) < 4
from family join pg_class c on c.oid = family.oid and c.relkind in ('r', 'p')
left join (pg_trigger t join pg_proc p on p.oid = t.tgfoid and p.pronamespace = to_regnamespace('cdc'))
    on t.tgrelid = family.oid
group by family.oid having count(*) filter (where t.tgenabled = 'A') < 4
order by 1
"""


class TableGone(SchemaError):
    """A table was dropped or renamed between the look at it and the change of its triggers."""


async def bring_triggers(connection: Connection, mirrors: Sequence[Mirror], ids: dict[str, int]) -> set[int]:
    """Table by table, each in a transaction of its own, so that no table is locked while another is waited for.

    Returns the mirrors of which not all changes were captured until now. Raises TableGone.
    """
    uncaptured: set[int] = set()
    wanted = await _wanted(connection, mirrors, ids)
    functions: dict[str, str] = dict(await fetch(connection, _FUNCTIONS))
    existing: dict[int, dict[str, str]] = {}
    places: dict[int, tuple[str, str]] = {}
    for oid, schema, table, trigger, function in await fetch(connection, _CAPTURED):
        existing.setdefault(oid, {})[trigger] = function
        places[oid] = (schema, table)

    for oid, (schema, table, feeds) in wanted.items():
        statements, unfed = _changes(schema, table, feeds, existing.get(oid, {}), functions)
        if not statements:
            continue
        try:
            await _change_table(connection, oid, f"{schema}.{table}", statements, unfed)
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            raise TableGone(
                f"table {schema}.{table} was dropped or renamed meanwhile: run `cdc-worker migrate` again"
            ) from None
        uncaptured |= unfed
        log.info("capture.installed", table=f"{schema}.{table}")
    for oid, have in existing.items():
        if oid not in wanted:
            await _change_table(connection, oid, ".".join(places[oid]), _drops(*places[oid], have))
            log.info("capture.removed", table=".".join(places[oid]))
    kept = {function_name(schema, table, event) for schema, table, _ in wanted.values() for event in EVENTS}
    for name in sorted(functions.keys() - kept):
        await connection.execute(sql.SQL("drop function if exists cdc.{}()").format(sql.Identifier(name)))
    return uncaptured


def _changes(
    schema: str, table: str, feeds: Sequence[Feed], have: dict[str, str], functions: dict[str, str]
) -> tuple[list[sql.Composed], set[int]]:
    """What is to be done to a table that has these triggers, and the mirrors that not all of its changes went to."""
    bodies = {function_name(schema, table, event): function_body(feeds, event) for event in EVENTS}
    right = {trigger_name(event): function_name(schema, table, event) for event in EVENTS}
    missing = [event for event in EVENTS if have.get(trigger_name(event)) != right[trigger_name(event)]]
    changed = {name: body for name, body in bodies.items() if functions.get(name) != body}
    if not missing and not changed:
        return [], set()
    unfed = _unfed(feeds, [have.get(trigger) for trigger in right], functions, shared_function_name(schema, table))
    return [
        # Writers that called the old functions must commit first: the rescan does not see their rows before. Where the
        # new functions feed all that the old ones fed, nothing is missed.
        *([lock_out_writers(schema, table)] if unfed and not missing else []),
        *(create_function(name, body) for name, body in changed.items()),
        *_drops(schema, table, [trigger for trigger in have if have[trigger] != right.get(trigger)]),
        *(create_trigger(right[trigger_name(event)], schema, table, event) for event in missing),
    ], unfed


def _unfed(feeds: Sequence[Feed], called: Sequence[str | None], functions: dict[str, str], shared: str) -> set[int]:
    """The mirrors that not all of a table's triggers have fed, by the functions that they call."""
    if all(name == shared for name in called):
        return set()  # 0.1.0 wrote down nowhere what it fed: that is as cdc.mirror says
    fed = set.intersection(*(digests(functions.get(name or "", "")) for name in called))
    return {feed.mirror_id for feed in feeds if feed.digest not in fed}


async def _wanted(
    connection: Connection, mirrors: Sequence[Mirror], ids: dict[str, int]
) -> dict[int, tuple[str, str, tuple[Feed, ...]]]:
    """By table: schema, name, and what it feeds."""
    feeds: dict[int, list[Feed]] = {}
    tables: dict[int, tuple[str, str]] = {}
    for mirror in mirrors:
        for source in mirror.sources:
            oid, _, _ = await find_table(connection, mirror, source)
            for member, schema, table in await fetch(connection, _FAMILY, oid):
                feeds.setdefault(member, []).append(Feed(ids[mirror.name], source))
                tables[member] = (schema, table)
    return {oid: (*tables[oid], tuple(found)) for oid, found in feeds.items()}


def _drops(schema: str, table: str, triggers: Sequence[str] | dict[str, str]) -> list[sql.Composed]:
    return [
        sql.SQL("drop trigger if exists {} on {}").format(sql.Identifier(trigger), sql.Identifier(schema, table))
        for trigger in triggers
    ]


async def _change_table(
    connection: Connection, oid: int, table: str, statements: Sequence[sql.Composed], uncaptured: Collection[int] = ()
) -> None:
    async def change() -> None:
        # Asked for once more at the end. But if this is the end, the next `migrate` sees nothing amiss.
        for mirror_id in uncaptured:
            await connection.execute(RESCAN, (mirror_id, UNCAPTURED))
        for statement in statements:
            await connection.execute(statement)

    try:
        await between_writers(connection, f"table {table}", change, oid)
    except psycopg.errors.DuplicateObject as error:
        raise SchemaError(
            f"{first_lines(error)}: the worker needs that name for its own trigger; rename yours"
        ) from None


@dataclass(frozen=True)
class Gaps:
    """Source tables (and their partitions and heirs) whose changes are not seen, or were not for a while."""

    # Triggers are missing or disabled.
    bare: list[str]
    # They were disabled, and somebody enabled them again: other than `migrate` does, which leaves a trace.
    reenabled: list[str]


async def find_gaps(database: Database, mirrors: Sequence[Mirror]) -> Gaps:
    tables = list(dict.fromkeys(source.table for mirror in mirrors for source in mirror.sources))
    async with database.transaction("read only") as connection:  # in the role's own search_path
        found = await fetch(connection, _GAPS, tables)
    return Gaps([name for name, is_bare in found if is_bare], [name for name, is_bare in found if not is_bare])
