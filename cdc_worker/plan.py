"""A mirror's query, wrapped for what the worker does with it: its rows as events for Convex, and its keys in order.

Postgres makes the JSON: a row comes as the text that Convex gets, and not as columns that Python would have to put
together for each key (docs/decisions/0025-postgres-makes-the-json.md). The form is docs/protocol.md's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, LiteralString

from psycopg import sql

from cdc_worker.mirrors import Mirror
from cdc_worker.safe_json import MANY_BRACKETS, PLAIN_BYTES, UNPLAIN

REQUIRED: Final = {
    "activity": ("user_id", "type", "description", "timestamp"),
    "status": ("user_id",),
}
OPTIONAL: Final = {
    "activity": ("metadata",),
    "status": ("last_check_in", "next_due", "alert_level", "alert_triggered_at"),
}
TIME_COLUMNS: Final = {"timestamp", "last_check_in", "next_due", "alert_triggered_at"}
JSON_COLUMNS: Final = {"metadata"}

_FIELDS: Final[Mapping[str, LiteralString]] = {
    "user_id": "userId",
    "type": "type",
    "description": "description",
    "timestamp": "timestamp",
    "metadata": "metadata",
    "last_check_in": "lastCheckIn",
    "next_due": "nextDue",
    "alert_level": "alertLevel",
    "alert_triggered_at": "alertTriggeredAt",
}

# From the inside: the rows of these keys; what is wrong with each, and metadata that needs a closer look than SQL can
# give (safe_json); the event, all but its number; its bytes. Each `offset 0` keeps the planner from writing out a value
# once for each place that it is used at.
_DOCUMENTS: Final = """
select key, bytes, problem, case when bytes <= {limit} then event end, case when bytes <= {limit} then unplain end
from (
    select *, octet_length(event) + coalesce(octet_length(unplain), 0) as bytes from (
        select key, problem, unplain, convert_to(concat(
            '"key":', to_json({prefix} || key), {target}, ',"document":{{', {fields}, '}}}}'
        ), 'UTF8') as event from (
            select *, {unplain} as unplain, {problem} as problem from (
                select {key} as key, {values} from (
{query}
                ) as q where {narrowed} offset 0
            ) as chosen offset 0
        ) as judged offset 0
    ) as made offset 0
) as measured
"""
_UNPLAIN: Final = "case when octet_length(metadata) > {} or metadata ~ {} or metadata ~ {} then metadata end"
_FIRST_KEYS: Final = (
    "select distinct on ({keys}) {texts} from ({query}\n) as q where {present} order by {keys} limit $1"
)
_NEXT_KEYS: Final = (
    "select distinct on ({keys}) {texts} from ({query}\n) as q where {present} and ({keys}) > ({after})"
    " order by {keys} limit $1"
)
# No row passes what the planner cannot know to be false, so none is read; but the sort begins, which `limit 0` would
# keep from it. The pages behind the first are in the same order.
_NO_KEYS: Final = (
    "select distinct on ({keys}) {texts} from ({query}\n) as q where {present} and pg_backend_pid() = 0"
    " order by {keys} limit 1"
)


@dataclass(frozen=True)
class Plan:
    """The statements of one mirror."""

    mirror: Mirror
    # Of the key's columns: text, uuid or bigint.
    key_types: tuple[str, ...]
    # All that the query reads, sources or not, but what only a function sees.
    tables: tuple[str, ...]
    # $1..$n: the key's parts, one array literal for each key column; then a number of bytes: of a larger row only the
    # size comes. A row is documents.Row, in binary.
    documents: LiteralString
    # $1: how many keys; $2..: the last key's parts, as texts.
    first_keys: LiteralString
    next_keys: LiteralString
    # Reads nothing, and fails where the keys have no order.
    no_keys: LiteralString


def make_plan(
    mirror: Mirror, key_types: tuple[LiteralString, ...], columns: frozenset[str], tables: tuple[str, ...] = ()
) -> Plan:
    """The plan of a mirror whose query has been checked; `columns` are those that it yields, of these `tables`."""
    keys = [sql.SQL("q.{}").format(sql.Identifier(name)) for name in mirror.key]
    query = sql.SQL(mirror.query)
    in_order = {
        "keys": _listed(keys),
        "texts": _listed([sql.SQL("{}::text").format(key) for key in keys]),
        "query": query,
        "present": sql.SQL(" and ").join(sql.SQL("{} is not null").format(key) for key in keys),
        "after": _listed([sql.SQL("{}::{}").format(_parameter(n), sql.SQL(k)) for n, k in enumerate(key_types, 2)]),
    }
    used = [name for name in (*REQUIRED[mirror.target], *OPTIONAL[mirror.target]) if name in columns]
    return Plan(
        mirror=mirror,
        key_types=key_types,
        tables=tables,
        documents=sql.SQL(_DOCUMENTS)
        .format(
            limit=_parameter(len(keys) + 1),
            prefix=sql.Literal(f"{mirror.name}:"),
            target=sql.Literal(f',"target":"{mirror.target}"'),
            fields=_listed([_field(name) for name in used]),
            unplain=_unplain("metadata" in columns),
            problem=_problem(mirror.target, used),
            key=_spelled(keys),
            values=_listed([sql.SQL("{} as {}").format(_value(name), sql.Identifier(name)) for name in used]),
            query=query,
            narrowed=_narrowed(keys, key_types),
        )
        .as_string(),
        first_keys=sql.SQL(_FIRST_KEYS).format(**in_order).as_string(),
        next_keys=sql.SQL(_NEXT_KEYS).format(**in_order).as_string(),
        no_keys=sql.SQL(_NO_KEYS).format(**in_order).as_string(),
    )


def _parameter(number: int) -> sql.SQL:
    return sql.SQL(f"${number}")


def _listed(parts: list[sql.Composed]) -> sql.Composed:
    return sql.SQL(", ").join(parts)


def _spelled(keys: list[sql.Composed]) -> sql.Composed:
    """The key as capture spells it in the log."""
    texts = [sql.SQL("{}::text").format(key) for key in keys]
    return texts[0] if len(texts) == 1 else sql.SQL("json_build_array({})::text").format(_listed(texts))


def _narrowed(keys: list[sql.Composed], types: tuple[LiteralString, ...]) -> sql.Composed:
    """Each column is narrowed by itself, so that an index of the table serves; several are then matched as tuples."""
    arrays = [sql.SQL("{}::{}[]").format(_parameter(n), sql.SQL(kind)) for n, kind in enumerate(types, 1)]
    narrowed = [sql.SQL("{} = any({})").format(key, array) for key, array in zip(keys, arrays, strict=True)]
    if len(keys) > 1:
        narrowed.append(sql.SQL("({}) in (select * from unnest({}))").format(_listed(keys), _listed(arrays)))
    return sql.SQL(" and ").join(narrowed)


def _value(name: str) -> sql.Composed:
    """A time as it is, all else as text."""
    return sql.SQL("q.{}" if name in TIME_COLUMNS else "q.{}::text").format(sql.Identifier(name))


def _field(name: str) -> sql.Composed:
    """The text of a field, the comma before it included; null without a value, which `concat` leaves out."""
    start = sql.Literal(f'{"" if name == "user_id" else ","}"{_FIELDS[name]}":')
    column = sql.Identifier(name)
    if name in JSON_COLUMNS:
        return sql.SQL("case when unplain is null then {} || {} end").format(start, column)
    if name in TIME_COLUMNS:
        # Whole milliseconds; `timestamp` is taken as UTC.
        return sql.SQL("{} || case when isfinite({}) then floor(extract(epoch from {}) * 1000)::int8 end").format(
            start, column, column
        )
    return sql.SQL("{} || to_json({})").format(start, column)


def _unplain(has_metadata: bool) -> sql.Composed:
    """Metadata that is not certain to be its own safe JSON."""
    if not has_metadata:
        return sql.SQL("null::text").format()
    return sql.SQL(_UNPLAIN).format(*map(sql.Literal, (PLAIN_BYTES, UNPLAIN, MANY_BRACKETS)))


def _problem(target: str, columns: list[str]) -> sql.Composed:
    """Why a row can be no document, in words that quote nothing of it; null for a good one."""
    rules = [
        sql.SQL("when {} is null then {}").format(
            sql.Identifier(name),
            sql.Literal(f"{name} is null: let the query leave such rows out, or give a value with coalesce()"),
        )
        for name in REQUIRED[target]
    ] + [
        sql.SQL("when not isfinite({}) then {}").format(sql.Identifier(name), sql.Literal(f"{name} is infinite"))
        for name in columns
        if name in TIME_COLUMNS
    ]
    return sql.SQL("case {} end").format(sql.SQL(" ").join(rules))
