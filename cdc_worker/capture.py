"""The triggers: what they do to a writer is decided here, and nowhere else.

Four statement triggers for each table, each with a function of its own. It appends keys to the log and reads nothing
but the statement's own rows. What it may never do is fail or stall the application's write:

- A column that was dropped or renamed is no error: its name then finds a stand-in, and the mirror is rescanned.
- The function runs with its owner's rights, and in the session's search_path: to set another one would cost as much as
  the insert. So everything that a path could lead elsewhere has its schema here: functions, types, and operators too
  (`in`, `between`, `nullif`, plpgsql's `case x when` hide an operator, and are not used).
- A transaction that has notified cannot be prepared (two-phase commit): where that is allowed at all, nobody rings.
- The doorbell never waits: `try` on a shared advisory lock, and NOTIFY only while the worker sleeps (listener.py).

And it is short for a statement of one row, which is what most are: a few keys are rows of the log, one each, written
to the partition itself by a plan that has no parameter; many keys are rows of 64 each. Each expression costs: plpgsql
prepares it anew in each transaction.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import LiteralString

from psycopg import sql

from cdc_worker.mirrors import Source

CHANNEL = "cdc_outbox"
# The idle gate, as the two halves of an advisory lock's key. Any numbers that nobody else uses.
GATE = (0x6364, 1)

EVENTS = ("insert", "update", "delete", "truncate")


@dataclass(frozen=True)
class Feed:
    """What a table's changes make dirty: keys of one mirror."""

    mirror_id: int
    source: Source

    @property
    def digest(self) -> str:
        """Stands in the function's body, so that `migrate` knows what was fed so far."""
        text = "\x00".join((str(self.mirror_id), *self.source.key, "", *self.source.watch))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def function_name(schema: str, table: str, event: str) -> str:
    return f"{shared_function_name(schema, table)}_{event}"


def shared_function_name(schema: str, table: str) -> str:
    """Of the one function for all events that a table had in 0.1.0."""
    return "capture_" + hashlib.sha256(f"{schema}\x00{table}".encode()).hexdigest()[:16]


def trigger_name(event: str) -> str:
    return f"cdc_{event}"


def function_body(feeds: Iterable[Feed], event: str) -> str:
    """The plpgsql body for one event at a table that feeds these mirrors."""
    feeds = tuple(feeds)
    match event:
        case "insert":
            written = _few_and_more(feeds, "cdc_new")
        case "delete":
            written = _few_and_more(feeds, "cdc_old")
        case "update":
            written = _one_or_more(feeds)
        case _:
            written = _all(feeds)
    body = sql.SQL(_BODY).format(
        written=written, gate=sql.SQL(", ").join(map(sql.Literal, GATE)), channel=sql.Literal(CHANNEL)
    )
    return "".join(f"-- feeds {feed.digest}\n" for feed in feeds) + body.as_string()


def digests(body: str) -> set[str]:
    """Of what a function's body feeds."""
    return set(re.findall("^-- feeds (.*)$", body, re.MULTILINE))


def create_function(name: str, body: str) -> sql.Composed:
    return sql.SQL(
        "create or replace function cdc.{}() returns trigger language plpgsql security definer as {}"
    ).format(sql.Identifier(name), sql.Literal(body))


def create_trigger(function: str, schema: str, table: str, event: str) -> sql.Composed:
    """`enable always`: a session that sets session_replication_role = replica is captured, too."""
    tables = {
        "insert": "referencing new table as cdc_new",
        "delete": "referencing old table as cdc_old",
        "update": "referencing old table as cdc_old new table as cdc_new",
        "truncate": "",
    }[event]
    name, target = sql.Identifier(trigger_name(event)), sql.Identifier(schema, table)
    return sql.SQL(
        "create trigger {name} after {event} on {target} {tables} for each statement execute function cdc.{function}();"
        " alter table {only} {target} enable always trigger {name}"
    ).format(
        name=name,
        event=sql.SQL(event),
        target=target,
        tables=sql.SQL(tables),
        function=sql.Identifier(function),
        only=sql.SQL("only"),
    )


def lock_out_writers(schema: str, table: str) -> sql.Composed:
    """Changes nothing, in the lock that `create_trigger` takes, too.

    LOCK TABLE wants rights that the owner of a table that only grows may have taken from itself.
    """
    return sql.SQL("alter table only {} enable always trigger {}").format(
        sql.Identifier(schema, table), sql.Identifier(trigger_name("insert"))
    )


# So many keys of an INSERT or DELETE become rows of their own, before it is worth to form arrays.
_FEW = 8
# The longest row of the log, in keys. The ids of rows are so far apart (cdc.row_id in migrations/).
_KEYS_IN_A_ROW = 64

# What each event writes, and whether it wrote anything.
_FEW_AND_MORE = """{few}
    get diagnostics written = row_count;
    if capture.written operator(pg_catalog.=) {few_are} then
        {more}
    end if;"""
_ONE_OR_MORE = """perform from cdc_old offset 1 limit 1;
    if found then
        {more}
    else
        {one}
    end if;
    get diagnostics written = row_count;"""
_ALL = """insert into cdc.outbox (id, slot, mirror) values {mirrors};
    get diagnostics written = row_count;"""
_BODY = """#variable_conflict use_column
<<capture>>
declare
    written pg_catalog.int8;
begin
    {written}
    if capture.written operator(pg_catalog.>) 0 and not pg_catalog.pg_try_advisory_xact_lock_shared({gate}) then
        if pg_catalog.current_setting('max_prepared_transactions') operator(pg_catalog.=) '0' then
            perform pg_catalog.pg_notify({channel}, '');
        end if;
    end if;
    return null;
end
"""
# Into the partition that is written: to name it is cheaper than to have each statement find it.
_APPEND = """if cdc.written() operator(pg_catalog.=) 0 then
            insert into cdc.outbox_0 ({columns})
            {rows};
        elsif cdc.written() operator(pg_catalog.=) 1 then
            insert into cdc.outbox_1 ({columns})
            {rows};
        else
            insert into cdc.outbox_2 ({columns})
            {rows};
        end if;"""
_APPEND_MANY = "insert into cdc.outbox (id, slot, mirror, keys) {rows};"

# A name is looked for in the statement's rows, then around them. There it always finds something: a null of a type that
# no column has. So a column that is gone is a fact that the plan knows, instead of an error.
_ROWS = """(
                select r.* from (values ({nulls})) as around ({names})
                cross join lateral (select {columns} from {table}) as r{where}
            )"""
# Of an equality that it has no figures for, the planner expects that one row in 200 fulfils it.
_FEWER_ROWS = " where r.place operator(pg_catalog.=) pg_catalog.abs(r.place)"

_KEYS = """select cdc.row_id(r.{key}, {mirror}) as id, {mirror}::pg_catalog.int2 as mirror, r.{key} as key
            from {rows} as r where r.{present} or r.{missing}"""
_MORE_KEYS = """
            select cdc.row_id(r.keys, r.mirror), cdc.written(), r.mirror, r.keys
            from (
                select {mirror} as mirror, pg_catalog.array_agg(k.key) as keys
                from (
                    select k.mirror, k.key, pg_catalog.row_number() over () as place from ({keys}) as k offset {few}
                ) as k
                group by {by_mirror} k.place operator(pg_catalog./) {keys_in_a_row}
            ) as r"""

# The old and the new rows of an UPDATE are paired by their place, since nothing else joins them when the key itself may
# change. Any pairing is safe: rows paired wrongly either differ, and both keys are marked, or are alike to the last
# byte. An old row may be alone: a trigger can swallow one that moves to another partition. A full join can only be
# hashed or merged, so that a plan made for few rows still serves a statement of a million. To hash is cheaper: a merge
# would sort both sides, which pass work_mem soon. So _FEWER_ROWS, which says nothing new, has the planner expect few.
# `offset 0` keeps it from carrying on whole rows where the keys are enough.
# A row of the log never has both, `key` and `keys`: workers of 0.1.0 know `key` alone, and would miss the others.
# Mirrors are numbered from 1, so that a key that stays does not cancel itself out in the id.
_ONE_PAIR = """select c.id, c.mirror, c.key, c.keys
            from {old} as o left join {new} as n on true
            cross join lateral ({feeds}) as c
            where c.present and c.changed or c.missing"""
_ONE_PAIR_KEYS = """select cdc.row_id(n.{key}, {mirror}) operator(pg_catalog.#) cdc.row_id(o.{key}, 0) as id,
                {mirror}::pg_catalog.int2 as mirror,
                case when (o.{key} operator(pg_catalog.<>) n.{key} collate pg_catalog."C") is not true
                    then coalesce(n.{key}, o.{key}) end as key,
                case when o.{key} operator(pg_catalog.<>) n.{key} collate pg_catalog."C"
                    then array[n.{key}, o.{key}] end as keys,
                o.{present} or n.{present} as present, {changed} as changed, o.{missing} as missing"""
_MORE_PAIRS = """
            select cdc.row_id(f.keys, f.mirror), cdc.written(), f.mirror, f.keys
            from (
                select {gathered}
                from (
                    select {compared}, coalesce(o.place, n.place) operator(pg_catalog./) {pairs_in_a_row} as chunk
                    from {old} as o full join {new} as n on o.place operator(pg_catalog.=) n.place
                    offset 0
                ) as p
                group by p.chunk
            ) as g cross join lateral ({feeds}) as f
            where f.keys is not null"""
_MORE_PAIRS_COMPARED = "n.{key}, o.{key} as {old_key}, o.{missing}, {changed} as {changed_as}"
_MORE_PAIRS_KEYS = """pg_catalog.array_agg(p.{key}) filter (where p.{changed_as} and p.{key} is not null or p.{missing})
                operator(pg_catalog.||)
                pg_catalog.array_agg(p.{old_key}) filter (
                    where p.{changed_as} and p.{old_key} is not null
                        and (p.{old_key} operator(pg_catalog.<>) p.{key} collate pg_catalog."C") is not false
                ) as {keys}"""
# `*<>` compares images, so that no column needs an equality operator (json has none). Unknown for a row that is alone.
_CHANGED = "(o.{seen} operator(pg_catalog.*<>) n.{seen}) is not false"


def _append(columns: LiteralString, rows: sql.Composed) -> sql.Composed:
    return sql.SQL(_APPEND).format(columns=sql.SQL(columns), rows=rows)


def _append_many(rows: sql.Composed) -> sql.Composed:
    return sql.SQL(_APPEND_MANY).format(rows=rows)


def _few_and_more(feeds: Sequence[Feed], table: str) -> sql.Composed:
    """For an INSERT or DELETE."""
    few, keys = sql.Literal(_FEW), _keys(feeds, table)
    # Where all are of one mirror, to group by it would only take time.
    one = len(feeds) == 1
    more = sql.SQL(_MORE_KEYS).format(
        mirror=sql.SQL("{}::pg_catalog.int2").format(sql.Literal(feeds[0].mirror_id))
        if one
        else sql.Identifier("k", "mirror"),
        by_mirror=sql.SQL("" if one else "k.mirror,"),
        keys=keys,
        few=few,
        keys_in_a_row=sql.Literal(_KEYS_IN_A_ROW),
    )
    return sql.SQL(_FEW_AND_MORE).format(
        few=_append("id, mirror, key", sql.SQL("{} limit {}").format(keys, few)), more=_append_many(more), few_are=few
    )


def _one_or_more(feeds: Sequence[Feed]) -> sql.Composed:
    """For an UPDATE."""
    return sql.SQL(_ONE_OR_MORE).format(
        one=_append("id, mirror, key, keys", _one_pair(feeds)), more=_append_many(_more_pairs(feeds))
    )


def _all(feeds: Sequence[Feed]) -> sql.Composed:
    """For a TRUNCATE: a row without a key for each mirror."""
    mirrors = dict.fromkeys(feed.mirror_id for feed in feeds)
    row = sql.SQL("(cdc.row_id(null::pg_catalog.text, {mirror}), cdc.written(), {mirror})")
    rows = (row.format(mirror=sql.Literal(mirror)) for mirror in mirrors)
    return sql.SQL(_ALL).format(mirrors=sql.SQL(", ").join(rows))


def _keys(feeds: Sequence[Feed], table: str) -> sql.Composed:
    # Each feed with rows of its own: in rows with the columns of all, the planner's work would grow with their square.
    return sql.SQL("\n            union all ").join(
        _each((feed,), _KEYS, "", rows=_rows((feed,), table)) for feed in feeds
    )


def _one_pair(feeds: Sequence[Feed]) -> sql.Composed:
    return sql.SQL(_ONE_PAIR).format(
        old=_rows(feeds, "cdc_old", seen=True),
        new=_rows(feeds, "cdc_new", seen=True),
        feeds=_each(feeds, _ONE_PAIR_KEYS, " union all "),
    )


def _more_pairs(feeds: Sequence[Feed]) -> sql.Composed:
    return sql.SQL(_MORE_PAIRS).format(
        gathered=_each(feeds, _MORE_PAIRS_KEYS, ", "),
        compared=_each(feeds, _MORE_PAIRS_COMPARED, ", "),
        old=_rows(feeds, "cdc_old", numbered=True, seen=True),
        new=_rows(feeds, "cdc_new", numbered=True, seen=True),
        # Each may have two keys.
        pairs_in_a_row=sql.Literal(_KEYS_IN_A_ROW // 2),
        feeds=_each(feeds, "select {mirror}::pg_catalog.int2 as mirror, g.{keys} as keys", " union all "),
    )


_NAMES = ("key", "old_key", "keys", "seen", "present", "missing", "changed_as")


def _each(feeds: Sequence[Feed], text: LiteralString, between: LiteralString, **more: sql.Composed) -> sql.Composed:
    """The text once for each feed, with the columns that _rows makes for it."""
    parts = []
    for n, feed in enumerate(feeds):
        names = {name: sql.Identifier(f"{name}_{n}") for name in _NAMES}
        changed = sql.SQL(_CHANGED).format(**names)
        parts.append(sql.SQL(text).format(mirror=sql.Literal(feed.mirror_id), changed=changed, **names, **more))
    return sql.SQL(between).join(parts)


def _rows(feeds: Sequence[Feed], table: str, *, numbered: bool = False, seen: bool = False) -> sql.Composed:
    """A transition table with each feed's key, whether there is one, whether a column is gone, and what is compared."""
    columns: list[sql.Composable] = [sql.SQL("pg_catalog.row_number() over () as place")] if numbered else []
    for n, feed in enumerate(feeds):
        source = feed.source
        columns.append(sql.SQL("{} as {}").format(_key(source), sql.Identifier(f"key_{n}")))
        columns.append(sql.SQL("{} as {}").format(_present(source), sql.Identifier(f"present_{n}")))
        columns.append(sql.SQL("{} as {}").format(_missing(source), sql.Identifier(f"missing_{n}")))
        if seen:
            watched = (
                sql.SQL("row({})").format(_names((*source.watch, *source.key)))
                if source.watch
                else sql.SQL("({}.*)::pg_catalog.record").format(sql.SQL(table))
            )
            columns.append(sql.SQL("{} as {}").format(watched, sql.Identifier(f"seen_{n}")))
    needed = list(dict.fromkeys(name for feed in feeds for name in _needed(feed.source)))
    return sql.SQL(_ROWS).format(
        nulls=sql.SQL(", ").join([sql.SQL("null::cdc.missing")] * len(needed)),
        names=_names(needed),
        columns=sql.SQL(", ").join(columns),
        table=sql.SQL(table),
        where=sql.SQL(_FEWER_ROWS if numbered else ""),
    )


def _needed(source: Source) -> tuple[str, ...]:
    return (*source.key, *source.watch)


def _names(columns: Iterable[str]) -> sql.Composed:
    # Bare: a qualified one could not be looked for further out.
    return sql.SQL(", ").join(map(sql.Identifier, columns))


def _missing(source: Source) -> sql.Composed:
    tests = (sql.SQL("cdc.is_missing({})").format(sql.Identifier(column)) for column in dict.fromkeys(_needed(source)))
    return sql.SQL("({})").format(sql.SQL(" or ").join(tests))


def _present(source: Source) -> sql.Composed:
    """No part of the key is null, since null finds no row."""
    tests = (sql.SQL("{} is not null").format(sql.Identifier(column)) for column in source.key)
    return sql.SQL("({})").format(sql.SQL(" and ").join(tests))


def _key(source: Source) -> sql.Composed:
    """The key's text, as keys.py reads it; null if there is none, or a column is gone."""
    parts = [sql.SQL("{}::pg_catalog.text").format(sql.Identifier(column)) for column in source.key]
    if len(parts) == 1:
        return sql.SQL("case when not {} then {} end").format(_missing(source), parts[0])
    return sql.SQL("case when {} and not {} then pg_catalog.json_build_array({})::pg_catalog.text end").format(
        _present(source), _missing(source), sql.SQL(", ").join(parts)
    )
