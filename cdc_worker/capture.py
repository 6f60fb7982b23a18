"""The triggers: what they do to a writer is decided here, and nowhere else.

One function for each table, four statement triggers that call it. It appends keys to cdc.outbox and reads
nothing but the statement's own rows. What it may never do is fail or stall the application's write:

- If a column it needs was dropped or renamed, it asks for a rescan of the mirror instead. It finds out by planning a
  query that reads no row, inside a block of its own: a subtransaction that writes nothing takes no transaction id.
  (A block around the insert itself would take one for each statement, and 64 of those in one transaction slow
  down every reader of the database.)
- A transaction that has notified cannot be prepared (two-phase commit): where that is allowed at all, nobody rings.
- The doorbell never waits: `try` on a shared advisory lock, and NOTIFY only while the worker sleeps (listener.py).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

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


def function_name(schema: str, table: str) -> str:
    return "capture_" + hashlib.sha256(f"{schema}\x00{table}".encode()).hexdigest()[:16]


def trigger_name(event: str) -> str:
    return f"cdc_{event}"


def function_body(feeds: Iterable[Feed]) -> str:
    """The plpgsql body for a table that feeds these mirrors."""
    feeds = tuple(feeds)
    mirrors = sql.SQL(", ").join(
        sql.SQL("(capture.here, {})").format(sql.Literal(mirror))
        for mirror in dict.fromkeys(feed.mirror_id for feed in feeds)
    )
    return (
        sql.SQL(_BODY)
        .format(
            old_columns=_columns(feeds, "cdc_old"),
            new_columns=_columns(feeds, "cdc_new"),
            inserted=_keys(feeds, "cdc_new"),
            deleted=_keys(feeds, "cdc_old"),
            old_rows=_numbered(feeds, "cdc_old"),
            new_rows=_numbered(feeds, "cdc_new"),
            candidates=sql.SQL(",\n            ").join(_candidates(n, feed) for n, feed in enumerate(feeds)),
            mirrors=mirrors,
            gate=sql.SQL(", ").join(map(sql.Literal, GATE)),
            channel=sql.Literal(CHANNEL),
        )
        .as_string()
    )


def create_function(name: str, body: str) -> sql.Composed:
    return sql.SQL(
        "create or replace function cdc.{}() returns trigger language plpgsql security definer"
        " set search_path = pg_catalog, pg_temp as {}"
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


# The old and the new rows of an UPDATE are paired by their place, since nothing else joins them when the key itself may
# change. Any pairing is safe: rows paired wrongly either differ, and both keys are marked, or are alike to the
# last byte. A full join can only be hashed or merged, so that a plan made for one row still serves a statement
# of a million. `*<>` compares images, so that no column needs an equality operator (json has none).
_BODY = """
#variable_conflict use_column
<<capture>>
declare
    here constant smallint := coalesce(pg_sequence_last_value('cdc.slot'::regclass), 0);
begin
    begin
        case tg_op
            when 'INSERT' then perform {new_columns} from cdc_new limit 0;
            when 'UPDATE' then perform {old_columns}, {new_columns} from cdc_old, cdc_new limit 0;
            when 'DELETE' then perform {old_columns} from cdc_old limit 0;
            else raise 'truncated';
        end case;
    exception when others then
        insert into cdc.outbox (slot, mirror) values {mirrors};
        if not pg_try_advisory_xact_lock_shared({gate}) and current_setting('max_prepared_transactions') = '0' then
            perform pg_notify({channel}, '');
        end if;
        return null;
    end;
    case tg_op
        when 'INSERT' then
            insert into cdc.outbox (slot, mirror, key)
            {inserted};
        when 'DELETE' then
            insert into cdc.outbox (slot, mirror, key)
            {deleted};
        else
            insert into cdc.outbox (slot, mirror, key)
            select capture.here, candidate.mirror, candidate.key
            from {old_rows} as o
            full join {new_rows} as n on o.place = n.place
            cross join lateral (values
            {candidates}) as candidate (mirror, key, changed)
            where candidate.key is not null and candidate.changed is not false;
    end case;
    if found and not pg_try_advisory_xact_lock_shared({gate})
            and current_setting('max_prepared_transactions') = '0' then
        perform pg_notify({channel}, '');
    end if;
    return null;
end
"""


def _qualified(rows: str, columns: Iterable[str]) -> list[sql.Composed]:
    return [sql.SQL("{}.{}").format(sql.SQL(rows), sql.Identifier(name)) for name in columns]


def _columns(feeds: Iterable[Feed], rows: str) -> sql.Composed:
    names = dict.fromkeys(name for feed in feeds for name in (*feed.source.key, *feed.source.watch))
    return sql.SQL(", ").join(_qualified(rows, names))


def _key(source: Source, rows: str) -> sql.Composed:
    """The key's text, as keys.py reads it; null if any part is null, since null finds no row."""
    columns = _qualified(rows, source.key)
    if len(columns) == 1:
        return sql.SQL("{}::text").format(columns[0])
    present = sql.SQL(" and ").join(sql.SQL("{} is not null").format(column) for column in columns)
    parts = sql.SQL(", ").join(sql.SQL("{}::text").format(column) for column in columns)
    return sql.SQL("case when {} then json_build_array({})::text end").format(present, parts)


def _keys(feeds: Iterable[Feed], rows: str) -> sql.Composed:
    selects = [
        sql.SQL("select capture.here, {}, {} from {} where {}").format(
            sql.Literal(feed.mirror_id),
            _key(feed.source, rows),
            sql.SQL(rows),
            sql.SQL(" and ").join(
                sql.SQL("{} is not null").format(column) for column in _qualified(rows, feed.source.key)
            ),
        )
        for feed in feeds
    ]
    return sql.SQL("\n            union all\n            ").join(selects)


def _numbered(feeds: Iterable[Feed], rows: str) -> sql.Composed:
    name = sql.SQL(rows)
    columns = []
    for n, feed in enumerate(feeds):
        watched = (
            sql.SQL("row({})").format(sql.SQL(", ").join(_qualified(rows, (*feed.source.watch, *feed.source.key))))
            if feed.source.watch
            else sql.SQL("row({}.*)").format(name)
        )
        columns.append(sql.SQL(f"{{}} as key_{n}, {{}} as seen_{n}").format(_key(feed.source, rows), watched))
    return sql.SQL("(select row_number() over () as place, {} from {})").format(sql.SQL(", ").join(columns), name)


def _candidates(n: int, feed: Feed) -> sql.Composed:
    """The new key if anything watched differs, and the old one if the key moved."""
    text = f"({{0}}, n.key_{n}, o.seen_{n} *<> n.seen_{n}), ({{0}}, nullif(o.key_{n}, n.key_{n}), true)"
    return sql.SQL(text).format(sql.Literal(feed.mirror_id))
