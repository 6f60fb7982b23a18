"""Case 4b: what each part of capture costs: processor time of one backend, without client, network and disk."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg

from cdc_worker.capture import GATE
from dev.bench.results import Bench, Results, Row
from dev.bench.stage import ROWS, Stage, altered, stage
from dev.bench.triggers import EVENTS, NOTHING, add_triggers, captured, only_the_key

# Statements of one row in a loop in the server, together in one transaction or each in its own.
_LOOP: Final = """
create procedure {table}_loop(what text, first bigint, count int, each boolean) language plpgsql as $$
begin
    for i in first + 1 .. first + count loop
        if what = 'insert' then
            insert into {table} values
                (i, 'user-' || mod(i, 2000), 'check-in', 'Feeling well', '{{"score": 7}}', now());
        else
            update {table} set note = 'Note ' || i || first where id = i;
        end if;
        if each then commit; end if;
    end loop;
end $$
"""
_SEARCH_PATH: Final = """
alter function {insert} set search_path = pg_catalog, pg_temp;
alter function {update} set search_path = pg_catalog, pg_temp;
alter function {delete} set search_path = pg_catalog, pg_temp;
"""
_GUARD: Final = """
begin
    begin
        perform {rows}.id from {rows} limit 0;
    exception when others then return null;
    end;
"""
# Instead of statement triggers with their transition tables.
_ROW: Final = """
begin
    insert into cdc.outbox_0 (id, mirror, key) values (cdc.row_id({row}.id::text, 1), 1, {row}.id::text);
    if not pg_try_advisory_xact_lock_shared({gate}) then perform pg_notify('cdc_outbox', ''); end if;
    return null;
end
"""
_ROW_TRIGGERS: Final = """
drop trigger cdc_insert on {table}; drop trigger cdc_update on {table}; drop trigger cdc_delete on {table};
create trigger cdc_insert after insert on {table} for each row execute function {insert};
create trigger cdc_update after update on {table} for each row when (old.* *<> new.*) execute function {update};
create trigger cdc_delete after delete on {table} for each row execute function {delete};
"""


class Misfit(Exception):
    """Capture has no such part any more."""


@dataclass(frozen=True)
class Part:
    """A table whose triggers are as capture makes them, but for one thing."""

    what: str
    # The body of an event's function, from the event and capture's body; None: no triggers at all.
    body: Callable[[str, str], str] | None
    # Beforehand; and afterwards, where `{insert}` is that event's function, and `{table}` the table.
    before: str = ""
    after: str = ""


def _as_it_is(event: str, body: str) -> str:
    del event
    return body


def _put(pattern: str, instead: str) -> Callable[[str, str], str]:
    return lambda event, body: re.sub(pattern, instead.replace("{rows}", _rows(event)), body, flags=re.DOTALL)


def _rows(event: str) -> str:
    return "cdc_old" if event == "delete" else "cdc_new"


def _row(event: str, body: str) -> str:
    del body
    return _ROW.format(row="old" if event == "delete" else "new", gate=", ".join(map(str, GATE)))


_PARTS: Final = (
    Part("the table without triggers", None),
    Part("a trigger that does nothing", lambda *_: NOTHING),
    Part("a trigger that only writes the key", lambda event, _: only_the_key(event)),
    Part("**capture as it is**", _as_it_is),
    Part("without the doorbell", _put(r"and not pg_catalog\.pg_try_advisory_xact_lock_shared\([^)]*\)", "and false")),
    Part(
        "without asking which partition is written",
        _put(r"if cdc\.written\(\) operator\(pg_catalog\.=\) 0 then(.*?)elsif cdc\.written.*?end if;", r"\1"),
    ),
    Part(
        "without comparing what an update changed",
        _put(r'\(o\."seen_0" operator\(pg_catalog\.\*<>\) n\."seen_0"\) is not false', "true"),
    ),
    Part(
        "without the index on the log",
        _put(r"cdc\.outbox_0", "cdc.part_bare"),
        "create table cdc.part_bare (like cdc.outbox_0 including defaults)",
    ),
    Part(
        "without the column `at`",
        _put(r"cdc\.outbox_0", "cdc.part_timeless"),
        "create table cdc.part_timeless (like cdc.outbox_0 including defaults including indexes);"
        " alter table cdc.part_timeless drop column at",
    ),
    Part(
        "with narrow columns first in the log",
        _put(r"cdc\.outbox_0", "cdc.part_narrow"),
        "create table cdc.part_narrow (mirror smallint not null, key text, keys text[],"
        " slot smallint not null default 0, at timestamptz not null default now(),"
        " xid xid8 not null default pg_current_xact_id(), id bigint not null);"
        " create index on cdc.part_narrow (xid, id)",
    ),
    Part(
        "with a log that has no partitions",
        _put(r"cdc\.outbox_0", "cdc.part_whole"),
        "create table cdc.part_whole (like cdc.outbox_0 including defaults including indexes)",
    ),
    Part(
        "with a partition that Postgres finds",
        _put(r"cdc\.outbox_0", "cdc.outbox"),
        "alter table cdc.outbox alter slot set default 0",
    ),
    Part("as row triggers", _row, after=_ROW_TRIGGERS),
    Part("with `set search_path`", _as_it_is, after=_SEARCH_PATH),
    Part("with a block that finds columns gone", _put(r"\nbegin\n", _GUARD)),
)


def parts(bench: Bench, results: Results) -> list[Row]:
    del results
    # Where much is written but not flushed, each commit wakes the WAL writer: a signal is dearer than what is measured.
    flushed = altered(bench.server, {"wal_writer_flush_after": 0})
    with stage(bench.server) as on, flushed, _connect(on) as backend:
        tables = {part: f"bench_part_{number}" for number, part in enumerate(_PARTS)}
        for part, table in tables.items():
            _make(on, part, table)
        took: dict[Part, dict[str, list[float]]] = {part: {} for part in tables}
        single, bulk = bench.size(5_000, 100), bench.size(10_000, 300)
        on.execute("create unlogged table bench_stock (like bench_plain)")
        on.execute(f"insert into bench_stock {ROWS} from generate_series(1, {bulk}) as i")
        for number in range(bench.size(8, 1)):
            first = number * 10 * bulk
            for part, table in tables.items():
                for column, statement, count in _work(table, first, single, bulk):
                    took[part].setdefault(column, []).append(_cpu_microseconds(backend, statement) / count)
                with _connect(on) as fresh:
                    statement = f"update {table} set note = 'first' where id = {first + 1}"  # noqa: S608  # our own text
                    took[part].setdefault("first_update_us", []).append(_cpu_microseconds(fresh, statement))
        # The least: whatever else the machine does only adds to it.
        return [
            {"what": part.what} | {column: min(each) for column, each in columns.items()}
            for part, columns in took.items()
        ]


def _work(table: str, first: int, single: int, bulk: int) -> list[tuple[str, str, int]]:
    """By column: a statement, and how many rows it concerns."""
    many = first + 5 * bulk
    place = f"id > {many} and id <= {many + bulk}"
    columns = "user_id, kind, note, details, created_at"
    return [
        ("insert_together_us", f"call {table}_loop('insert', {first}, {single}, false)", single),
        ("insert_each_us", f"call {table}_loop('insert', {first + single}, {single}, true)", single),
        ("update_each_us", f"call {table}_loop('update', {first}, {single}, true)", single),
        ("bulk_insert_us", f"insert into {table} select {many} + id, {columns} from bench_stock", bulk),  # noqa: S608  # our own text
        ("bulk_update_us", f"update {table} set note = note || '.' where {place}", bulk),  # noqa: S608  # our own text
        ("bulk_delete_us", f"delete from {table} where {place}", bulk),  # noqa: S608  # our own text
    ]


def _make(on: Stage, part: Part, table: str) -> None:
    on.execute(f"create table {table} (like bench_plain including all)")
    on.execute(_LOOP.format(table=table))
    if part.body is None:
        return
    if part.before:
        on.execute(part.before)
    ours = {event: captured(table, event) for event in EVENTS}
    bodies = {event: part.body(event, body) for event, body in ours.items()}
    if bodies == ours and part.body is not _as_it_is:
        raise Misfit(part.what)
    functions = add_triggers(on, table, bodies)
    if part.after:
        on.execute(part.after.format(table=table, **functions))


def _connect(on: Stage) -> psycopg.Connection:
    """With the commits' own work, but not the wait for the disk."""
    return psycopg.connect(on.socket_dsn, autocommit=True, options="-c synchronous_commit=off")


def _cpu_microseconds(backend: psycopg.Connection, statement: str) -> float:
    """What a statement takes of its backend. Finer than the clock ticks of meter.py: these are milliseconds."""
    counter = Path(f"/proc/{backend.info.backend_pid}/schedstat")
    began = int(counter.read_text().split()[0])
    backend.execute(statement.encode())
    return (int(counter.read_text().split()[0]) - began) / 1e3
