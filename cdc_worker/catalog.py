"""What the database says to a mirror: does its query run, has it the columns, do the tables give its key?

`check` is asked by `migrate`, before it changes anything, and by `run`, at the start of each session.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString

import psycopg
from psycopg import sql

from cdc_worker.database import Connection, Database, fetch, first_lines, is_gone
from cdc_worker.errors import ConfigError
from cdc_worker.mirrors import Mirror, Source

# Postgres' own type numbers (pg_type.dat), and the name under which a key of that type is cast.
_KEY_TYPES = {25: "text", 1043: "text", 2950: "uuid", 21: "bigint", 23: "bigint", 20: "bigint"}
_TIMES = {1114, 1184, 1082}  # timestamp, timestamptz, date
_JSON = {114, 3802}

_REQUIRED = {
    "activity": ("user_id", "type", "description", "timestamp"),
    "status": ("user_id",),
}
_OPTIONAL = {
    "activity": ("metadata",),
    "status": ("last_check_in", "next_due", "alert_level", "alert_triggered_at"),
}
_TIME_COLUMNS = {"timestamp", "last_check_in", "next_due", "alert_triggered_at"}
_JSON_COLUMNS = {"metadata"}


@dataclass(frozen=True)
class Plan:
    """A mirror's query, wrapped for what the worker does with it. The key's parts go in as arrays of text."""

    mirror: Mirror
    # Of the key's columns: text, uuid or bigint.
    key_types: tuple[str, ...]
    # The document's columns in a row of `documents`, behind the key's texts and the row's bytes.
    columns: tuple[str, ...]
    # $1..$n: the key's parts, one array for each key column; then a number of bytes: of a larger row only the
    # size comes.
    documents: LiteralString
    # $1: how many keys; $2..: the last key's parts.
    first_keys: LiteralString
    next_keys: LiteralString


_RELATION = """
select c.oid, c.relkind, n.nspname, c.relname
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.oid = to_regclass($1)
"""
_COLUMNS = "select attname, atttypid::int8 from pg_attribute where attrelid = $1 and attnum > 0 and not attisdropped"
_UNCAPTURED = """
with recursive family (oid) as (
    select to_regclass(name)::oid from unnest($1::text[]) as given (name) where to_regclass(name) is not null
    union select i.inhrelid from pg_inherits i join family on i.inhparent = family.oid
)
select family.oid::regclass::text from family
join pg_class c on c.oid = family.oid and c.relkind in ('r', 'p')
where 4 > (select count(*) from pg_trigger t join pg_proc p on p.oid = t.tgfoid
           where t.tgrelid = family.oid and t.tgenabled in ('A', 'O') and p.pronamespace = to_regnamespace('cdc'))
order by 1
"""
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence", "i": "an index"}


async def check(connection: Connection, mirror: Mirror) -> Plan:
    """The plan for a mirror. Raises ConfigError naming the mirror, what is wrong and what to do."""
    types = await _describe(connection, mirror)
    missing = [name for name in (*mirror.key, *_REQUIRED[mirror.target]) if name not in types]
    if missing:
        raise _wrong(mirror, f"its query has no column {', '.join(dict.fromkeys(missing))} (it has {', '.join(types)})")
    for name in mirror.key:
        if types[name] not in _KEY_TYPES:
            raise _wrong(mirror, f"key column {name} must be text, uuid, int or bigint: cast it in the query")
    for name in _TIME_COLUMNS & set(types):
        if types[name] not in _TIMES:
            raise _wrong(mirror, f"column {name} must be a timestamp or a date: for a number, use to_timestamp()")
    for name in _JSON_COLUMNS & set(types):
        if types[name] not in _JSON:
            raise _wrong(mirror, f"column {name} must be json or jsonb: wrap it in to_jsonb() or jsonb_build_object()")
    known = (*_REQUIRED[mirror.target], *_OPTIONAL[mirror.target])
    unknown = [name for name in types if name not in {*mirror.key, *known}]
    if unknown:
        raise _wrong(
            mirror, f"column {', '.join(unknown)} has no place in a document: take it out, or put it in metadata"
        )
    for source in mirror.sources:
        await _check_source(connection, mirror, source, [_KEY_TYPES[types[name]] for name in mirror.key])
    return _plan(mirror, types)


def _wrong(mirror: Mirror, what: str) -> ConfigError:
    return ConfigError(f'mirror "{mirror.name}": {what}')


async def _describe(connection: Connection, mirror: Mirror) -> dict[str, int]:
    """The query's columns and their types. No row is read."""
    statement = sql.SQL("select * from (\n{}\n) as q limit 0").format(sql.SQL(mirror.query))
    try:
        async with connection.transaction():
            # Binary, for the protocol that takes one statement at a time.
            description = (await connection.execute(statement, binary=True)).description or []
    except psycopg.errors.ProtocolViolation:
        raise _wrong(mirror, "its query fails: it has a parameter ($1), and there is nothing to give") from None
    except psycopg.Error as error:
        if is_gone(error):
            raise
        raise _wrong(mirror, f"its query fails: {first_lines(error)}") from None
    names = [column.name for column in description]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise _wrong(mirror, f"its query has two columns called {', '.join(sorted(doubled))}")
    return {column.name: column.type_code for column in description}


async def find_table(connection: Connection, mirror: Mirror, source: Source) -> tuple[int, str, str]:
    """A source's table: oid, schema, name. Raises ConfigError if there is none, or if it is no table."""
    try:
        async with connection.transaction():
            found = await fetch(connection, _RELATION, source.table)
    except psycopg.Error as error:
        if is_gone(error):
            raise
        found = []  # it is no table's name
    if not found:
        raise _wrong(
            mirror,
            f"there is no table {source.table} (write it as in SQL: '\"CheckIn\"' or 'app.orders';"
            " capital letters need the double quotes)",
        )
    oid, kind, schema, name = found[0]
    if kind not in {"r", "p"}:
        raise _wrong(
            mirror, f"source {source.table} is {_KINDS.get(kind, 'no table')}: name the tables it is made from"
        )
    if schema == "cdc":
        raise _wrong(mirror, f"source {source.table} belongs to the worker itself")
    return oid, schema, name


async def uncaptured(database: Database, mirrors: Sequence[Mirror]) -> list[str]:
    """Source tables (and their partitions and heirs) that lack triggers, or whose triggers are disabled."""
    tables = list(dict.fromkeys(source.table for mirror in mirrors for source in mirror.sources))
    return [name for (name,) in await database.execute(_UNCAPTURED, tables)]


async def _check_source(connection: Connection, mirror: Mirror, source: Source, key_types: list[str]) -> None:
    oid, _, _ = await find_table(connection, mirror, source)
    columns: dict[str, int] = dict(await fetch(connection, _COLUMNS, oid))
    missing = [name for name in (*source.key, *source.watch) if name not in columns]
    if missing:
        raise _wrong(mirror, f"table {source.table} has no column {', '.join(missing)} (it has {', '.join(columns)})")
    for name, wanted in zip(source.key, key_types, strict=True):
        if _KEY_TYPES.get(columns[name]) != wanted:
            raise _wrong(mirror, f"column {name} of {source.table} has another type than the key it gives ({wanted})")


def _plan(mirror: Mirror, types: dict[str, int]) -> Plan:
    keys = [sql.SQL("q.{}").format(sql.Identifier(name)) for name in mirror.key]
    casts = [sql.SQL(_KEY_TYPES[types[name]]) for name in mirror.key]
    columns = tuple(name for name in (*_REQUIRED[mirror.target], *_OPTIONAL[mirror.target]) if name in types)
    key_texts = sql.SQL(", ").join(sql.SQL("{}::text").format(key) for key in keys)
    query = sql.SQL("(\n{}\n) as q").format(sql.SQL(mirror.query))
    # Each column is narrowed by itself, so that an index of the table serves; several are then matched as tuples.
    narrowed = [
        sql.SQL("{} = any({}::{}[])").format(key, _parameter(n), kind)
        for n, (key, kind) in enumerate(zip(keys, casts, strict=True), 1)
    ]
    if len(keys) > 1:
        arrays = sql.SQL(", ").join(sql.SQL("{}::{}[]").format(_parameter(n), kind) for n, kind in enumerate(casts, 1))
        narrowed.append(sql.SQL("({}) in (select * from unnest({}))").format(sql.SQL(", ").join(keys), arrays))
    after = sql.SQL("({}) > ({})").format(
        sql.SQL(", ").join(keys),
        sql.SQL(", ").join(sql.SQL("{}::{}").format(_parameter(n), kind) for n, kind in enumerate(casts, 2)),
    )
    limit = _parameter(len(keys) + 1)
    order = sql.SQL(", ").join(keys)
    present = sql.SQL(" and ").join(sql.SQL("{} is not null").format(key) for key in keys)

    def text(statement: sql.Composed) -> LiteralString:
        return statement.as_string()

    return Plan(
        mirror=mirror,
        key_types=tuple(_KEY_TYPES[types[name]] for name in mirror.key),
        columns=columns,
        documents=text(
            sql.SQL("select {}, v.bytes, {} from {} cross join lateral ({}) as v where {}").format(
                key_texts,
                sql.SQL(", ").join(
                    sql.SQL("case when v.bytes <= {} then v.{} end").format(limit, sql.Identifier(name))
                    for name in columns
                ),
                query,
                _measured(columns),
                sql.SQL(" and ").join(narrowed),
            )
        ),
        first_keys=text(
            sql.SQL("select distinct on ({}) {} from {} where {} order by {} limit $1").format(
                order, key_texts, query, present, order
            )
        ),
        next_keys=text(
            sql.SQL("select distinct on ({}) {} from {} where {} and {} order by {} limit $1").format(
                order, key_texts, query, present, after, order
            )
        ),
    )


def _parameter(number: int) -> sql.SQL:
    return sql.SQL(f"${number}")


def _measured(columns: Sequence[str]) -> sql.Composed:
    """The columns and their bytes. `offset 0` keeps the planner from writing out each value twice, once to
    measure it.
    """
    values = sql.SQL(", ").join(sql.SQL("{} as {}").format(_value(name), sql.Identifier(name)) for name in columns)
    sizes = sql.SQL(" + ").join(
        sql.SQL("coalesce(octet_length({}), 0)").format(sql.Identifier(name))
        for name in columns
        if name not in _TIME_COLUMNS
    )
    return sql.SQL("select *, {} as bytes from (select {} offset 0) as t").format(sizes, values)


def _value(name: str) -> sql.Composed:
    """A column as the worker wants it: times as whole milliseconds (`timestamp` is taken as UTC), all else as text."""
    if name in _TIME_COLUMNS:
        return sql.SQL("floor(extract(epoch from q.{}) * 1000)::float8").format(sql.Identifier(name))
    return sql.SQL("q.{}::text").format(sql.Identifier(name))
