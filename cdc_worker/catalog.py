"""What the database says to a mirror: does its query run, has it the columns, do the tables give its key?

`check` is asked by `migrate`, before it changes anything, and by `run`, at the start of each session; `check_owners`
by `migrate` alone.
"""

from collections.abc import Sequence
from typing import LiteralString

import psycopg
from psycopg import sql

from cdc_worker.database import Connection, fetch
from cdc_worker.errors import ConfigError
from cdc_worker.mirrors import Mirror, Source
from cdc_worker.plan import JSON_COLUMNS, OPTIONAL, REQUIRED, TIME_COLUMNS, Plan, make_plan
from cdc_worker.postgres_errors import LOCKED, first_lines, is_gone

# Postgres' own type numbers (pg_type.dat), and the name under which a key of that type is cast.
_KEY_TYPES: dict[int, LiteralString] = {
    25: "text",
    1043: "text",
    2950: "uuid",
    21: "bigint",
    23: "bigint",
    20: "bigint",
}
_TIMES = {1114, 1184, 1082}  # timestamp, timestamptz, date
_JSON = {114, 3802}

_RELATION = """
select c.oid, c.relkind, n.nspname, c.relname,
       (select string_agg(inhparent::regclass::text, ', ') from pg_inherits where inhrelid = c.oid and c.relispartition)
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.oid = to_regclass($1)
"""
# A domain counts as the type that it is made of in the end, as in a query's own columns.
_COLUMNS = """
select a.attname, (
    with recursive made_of (oid, base) as (
        select oid, typbasetype from pg_type where oid = a.atttypid
        union all select t.oid, t.typbasetype from made_of join pg_type t on t.oid = made_of.base
    ) select oid::int8 from made_of where base = 0
), a.attgenerated = 'v'
from pg_attribute a where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped order by a.attnum
"""
# With a trigger that looks at rows on the table, Postgres refuses each write that comes to one of these through it.
_FOREIGN = """
with recursive family (oid) as (
    select $1::oid union select i.inhrelid from pg_inherits i join family on i.inhparent = family.oid
)
select string_agg(oid::regclass::text, ', ') from family join pg_class c using (oid) where c.relkind = 'f'
"""
# TRIGGER would do for `create trigger`, but `enable always` wants the owner, or a member of that role. Tables that have
# all of their triggers are left as they are.
_NOT_OURS = """
with recursive family (oid) as (
    select $1::oid union select i.inhrelid from pg_inherits i join family on i.inhparent = family.oid
)
select c.oid::regclass::text, quote_ident(pg_get_userbyid(c.relowner)), quote_ident(current_user)
from family join pg_class c using (oid)
where c.relkind in ('r', 'p') and not pg_has_role(c.relowner, 'usage') and 4 > (
    select count(*) from pg_trigger t join pg_proc p on p.oid = t.tgfoid
    where t.tgrelid = c.oid and t.tgenabled = 'A' and p.pronamespace = to_regnamespace('cdc')
)
order by oid <> $1, 1
"""
# What a query reads is what it has locked, through views as well; but not where the role may not even look by name.
_READ = """
select format('%I.%I', n.nspname, c.relname)
from pg_locks l join pg_class c on c.oid = l.relation join pg_namespace n on n.oid = c.relnamespace
where l.pid = pg_backend_pid() and c.relkind in ('r', 'p') and n.nspname not in ('pg_catalog', 'information_schema')
  and has_schema_privilege(n.oid, 'usage')
"""
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence", "i": "an index"}


async def check(connection: Connection, mirror: Mirror) -> Plan:
    """The plan for a mirror.

    Raises ConfigError naming the mirror, what is wrong and what to do; and LOCKED, which says nothing of the mirror.
    """
    types = await _describe(connection, mirror)
    tables = tuple(name for (name,) in await fetch(connection, _READ))
    missing = [name for name in (*mirror.key, *REQUIRED[mirror.target]) if name not in types]
    if missing:
        raise _wrong(mirror, f"its query has no column {', '.join(dict.fromkeys(missing))} (it has {', '.join(types)})")
    for name in mirror.key:
        if types[name] not in _KEY_TYPES:
            raise _wrong(mirror, f"key column {name} must be text, uuid, int or bigint: docs/mirrors.md, Keys")
    for name in TIME_COLUMNS & set(types):
        if types[name] not in _TIMES:
            raise _wrong(mirror, f"column {name} must be a timestamp or a date: for a number, use to_timestamp()")
    for name in JSON_COLUMNS & set(types):
        if types[name] not in _JSON:
            raise _wrong(mirror, f"column {name} must be json or jsonb: wrap it in to_jsonb() or jsonb_build_object()")
    known = (*REQUIRED[mirror.target], *OPTIONAL[mirror.target])
    unknown = [name for name in types if name not in {*mirror.key, *known}]
    if unknown:
        raise _wrong(
            mirror, f"column {', '.join(unknown)} has no place in a document: take it out, or put it in metadata"
        )
    key_types = tuple(_KEY_TYPES[types[name]] for name in mirror.key)
    for source in mirror.sources:
        await _check_source(connection, mirror, source, key_types)
    plan = make_plan(mirror, key_types, frozenset(types), tables)
    await _try_order(connection, plan)
    return plan


async def check_owners(connection: Connection, mirror: Mirror) -> None:
    """Raises ConfigError if the mirror's tables need triggers, and this role may not bring them."""
    for source in mirror.sources:
        oid, _, _ = await find_table(connection, mirror, source)
        for table, owner, role in await fetch(connection, _NOT_OURS, oid):
            raise _wrong(
                mirror,
                f"table {table} belongs to the role {owner}, and only its owner may bring its triggers: run migrate as"
                f" {owner} or a member of that role (`grant {owner} to {role}`), or"
                f" `alter table {table} owner to {role}`",
            )


def _wrong(mirror: Mirror, what: str) -> ConfigError:
    return ConfigError(f'mirror "{mirror.name}": {what}')


async def _describe(connection: Connection, mirror: Mirror) -> dict[str, int]:
    """The query's columns and their types. No row is read."""
    statement = sql.SQL("select * from (\n{}\n) as q limit 0").format(sql.SQL(mirror.query))
    try:
        async with connection.transaction():
            # As the worker reads, where a `for update` fails. Behind the savepoint `migrate` goes on writing.
            await connection.execute("set transaction read only")
            # Binary, for the protocol that takes one statement at a time.
            description = (await connection.execute(statement, binary=True)).description or []
    except psycopg.errors.ProtocolViolation:
        raise _wrong(mirror, "its query fails: it has a parameter ($1), and there is nothing to give") from None
    except psycopg.Error as error:
        raise _failure(mirror, "its query fails", error) from None
    names = [column.name for column in description]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise _wrong(mirror, f"its query has two columns called {', '.join(sorted(doubled))}")
    return {column.name: column.type_code for column in description}


async def _try_order(connection: Connection, plan: Plan) -> None:
    """Rescans go by it. Postgres finds out only when it runs: columns of two collations give a key of none."""
    try:
        async with connection.transaction():
            await connection.execute(plan.no_keys)
    except psycopg.Error as error:
        raise _failure(plan.mirror, "its keys cannot be put in order", error) from None


def _failure(mirror: Mirror, what: str, error: psycopg.Error) -> ConfigError:
    """The mirror's fault, in words. Raises the error if it is the database's, or a lock's."""
    if is_gone(error) or isinstance(error, LOCKED):
        raise error
    hint = error.diag.message_hint
    return _wrong(mirror, f"{what}: {first_lines(error)}{f' ({hint})' if hint else ''}")


async def find_table(connection: Connection, mirror: Mirror, source: Source) -> tuple[int, str, str]:
    """A source's table: oid, schema, name. Raises ConfigError if there is none, or if it is no table."""
    try:
        async with connection.transaction():
            found = await fetch(connection, _RELATION, source.table)
    except psycopg.Error as error:
        if is_gone(error) or isinstance(error, LOCKED):
            raise
        found = []  # it is no table's name
    if not found:
        raise _wrong(
            mirror,
            f"there is no table {source.table} (write it as in SQL: '\"CheckIn\"' or 'app.orders';"
            " capital letters need the double quotes)",
        )
    oid, kind, schema, name, parent = found[0]
    if kind not in {"r", "p"}:
        raise _wrong(
            mirror, f"source {source.table} is {_KINDS.get(kind, 'no table')}: name the tables it is made from"
        )
    if parent:  # a statement fires the triggers of the table that it names
        raise _wrong(
            mirror,
            f"source {source.table} is a partition of {parent}, and what is written to that passes by a partition's"
            f" triggers: name {parent}",
        )
    if schema == "cdc":
        raise _wrong(mirror, f"source {source.table} belongs to the worker itself")
    return oid, schema, name


async def _check_source(connection: Connection, mirror: Mirror, source: Source, key_types: Sequence[str]) -> None:
    oid, _, _ = await find_table(connection, mirror, source)
    found = await fetch(connection, _COLUMNS, oid)
    columns: dict[str, int] = {name: kind for name, kind, _ in found}
    missing = [name for name in (*source.key, *source.watch) if name not in columns]
    if missing:
        quoted = "; write it without double quotes" if any('"' in name for name in missing) else ""
        raise _wrong(
            mirror, f"table {source.table} has no column {', '.join(missing)} (it has {', '.join(columns)}){quoted}"
        )
    virtual = [name for name, _, is_virtual in found if is_virtual and name in {*source.key, *source.watch}]
    if virtual:  # Postgres lets no trigger read one: each write of the application would fail
        raise _wrong(
            mirror,
            f"column {', '.join(virtual)} of {source.table} is a virtual generated column, which no trigger can see:"
            " make it `stored`, or name the columns that it is made from",
        )
    ((foreign,),) = await fetch(connection, _FOREIGN, oid)
    if foreign:
        raise _wrong(
            mirror,
            f"{source.table} has foreign tables among its partitions or heirs ({foreign}), and where rows are captured"
            " Postgres refuses to write to those through it: detach them, or name a table without them",
        )
    for name, wanted in zip(source.key, key_types, strict=True):
        if _KEY_TYPES.get(columns[name]) != wanted:
            raise _wrong(
                mirror,
                f"column {name} of {source.table} has another type than the key it gives ({wanted}):"
                " docs/mirrors.md, Keys",
            )
