"""`migrate`: the SQL in migrations/, then the triggers as cdc_worker.toml wants them. Safe to run twice, and
at once.
"""

import hashlib
import itertools
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

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
from cdc_worker.catalog import check, check_owners, find_table
from cdc_worker.database import Connection, begin, connect, fetch
from cdc_worker.errors import READ_ONLY, ConfigError, SchemaError
from cdc_worker.locks import when_free
from cdc_worker.mirrors import Mirror
from cdc_worker.postgres_errors import first_lines
from cdc_worker.resharding import divide

log = structlog.get_logger()
T = TypeVar("T")

# Serialises migrators against each other. A connection of its own holds it, in one transaction to the end: a pooler
# may lend each transaction of the other connection another session.
_LOCK = "select pg_advisory_xact_lock(hashtextextended('cdc_worker.migrate', 0))"
# A trigger's DDL waits for the table's writers, and new writers wait behind it: never for longer than this.
_TABLE_LOCK_TIMEOUT = "set local lock_timeout = '300ms'"
_TABLE_SECONDS = 60.0
# But for once: an autovacuum gives way to who has waited for `deadlock_timeout`, and that of a large table may last.
_PATIENT_TRY = 10
_PAST_AUTOVACUUM = """
select set_config('lock_timeout', (s.setting::int + 300)::text, true) from pg_settings s
where s.name = 'deadlock_timeout' and s.setting::int <= 1000 and exists (
    select from pg_locks l join pg_stat_activity a on a.pid = l.pid
    where l.relation = $1 and l.granted and l.mode = 'ShareUpdateExclusiveLock' and a.usesysid is null
      and a.datname = current_database()
)
"""
_STATEMENT_SECONDS = 60.0
_LOCK_SECONDS = 600.0

_READ_ONLY = "select pg_is_in_recovery() or current_setting('transaction_read_only')::bool"
_WITHOUT_ENCODING = "select getdatabaseencoding() = 'SQL_ASCII'"
# What capture calls, and an administrator may have taken from plain roles: each write would fail for it.
_NOT_ALLOWED = """
select string_agg(name, ', ')
from unnest(array['pg_notify(text, text)', 'pg_try_advisory_xact_lock_shared(integer, integer)']) as called (name)
where not has_function_privilege(name, 'execute')
"""
_PREPARE = """
create schema if not exists cdc;
create table if not exists cdc.migration (
    number     integer primary key,
    name       text not null,
    checksum   text not null,
    applied_at timestamptz not null default now()
)
"""
_TAKEN = (
    "{}: this database has a schema cdc that is not the worker's, and the worker needs that name for its own:"
    " rename the other one (`alter schema cdc rename to ...`)"
)
_APPLIED = "select number, checksum from cdc.migration order by number"
# Each holds the schema cdc, too.
_PUBLICATIONS = "select pubname from pg_publication where puballtables order by pubname"
_NOTE = "insert into cdc.migration (number, name, checksum) values ($1, $2, $3)"
# Not by the column's own sequence: a row that is there already would use up a number of it.
_REGISTER = """
insert into cdc.mirror (id, name, definition) overriding system value
select coalesce(max(id), 0) + 1, $1, '' from cdc.mirror having count(*) filter (where name = $1) = 0
"""
_REGISTERED = "select id, name, definition from cdc.mirror"
_CONFIGURE = "update cdc.mirror set definition = $2, target = $3, configured = true where id = $1"
# Also of a schema cdc from before there was such a column, and of one that is not the worker's.
_TARGETS = "select to_jsonb(m) ->> 'name', to_jsonb(m) ->> 'target' from cdc.mirror m"
# One that comes back later is new: what changed meanwhile was captured by nobody.
_RETIRE = "update cdc.mirror set configured = false, definition = '' where id = $1 and configured returning name"
_UNCAPTURED = "a source had no triggers"
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
_HEIRS = """
with recursive heir (oid) as (
    select $1::oid union select i.inhrelid from pg_inherits i join heir on i.inhparent = heir.oid
)
select c.oid, n.nspname, c.relname from heir
join pg_class c on c.oid = heir.oid join pg_namespace n on n.oid = c.relnamespace where c.relkind in ('r', 'p')
"""


@dataclass(frozen=True)
class Migration:
    number: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_migrations() -> list[Migration]:
    """The SQL that came with this worker: inside the package when installed, beside it in a checkout."""
    here = Path(__file__).parent
    folder = next(path for path in (here / "migrations", here.parent / "migrations") if path.is_dir())
    return [
        Migration(int(path.name.split("_", 1)[0]), path.stem, path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("[0-9]*.sql"))
    ]


async def migrate(dsn: str, mirrors: Sequence[Mirror], *, shards: int = 1) -> None:
    """Brings the schema cdc, the shards and all triggers up to date.

    Raises ConfigError, before anything is changed, if a mirror does not fit the database, or what it was before, and
    SchemaError if the database cannot be migrated (a standby, a changed migration, no right to create, a lock of
    somebody else).
    """
    async with await connect(dsn) as connection, await connect(dsn) as guard:
        await _when_free(connection, "the mirrors' tables", lambda: _check_all(connection, mirrors))
        await begin(guard, "read only", statement_seconds=_LOCK_SECONDS)
        await guard.execute(f"set local lock_timeout = {int(_LOCK_SECONDS * 1000)}")
        await guard.execute(_LOCK)
        try:
            await _when_free(connection, "the mirrors", lambda: _check_targets(connection, mirrors))
            await _between_writers(connection, "the log", lambda: _apply(connection))
            await _when_free(connection, "the shards", lambda: divide(connection, shards))
            ids = await _when_free(connection, "the mirrors", lambda: _register(connection, mirrors))
            uncaptured = await _bring_triggers(connection, mirrors, ids)
            await _when_free(connection, "the mirrors", lambda: _finish(connection, mirrors, uncaptured))
        except psycopg.errors.InsufficientPrivilege as error:
            raise SchemaError(
                f"{first_lines(error)}: the role in DATABASE_URL must be allowed to create a schema in this database,"
                " and must own the tables that are mirrored, and the schema cdc where it is there already"
            ) from None
    log.info("migrate.done", mirrors=len(mirrors))


async def _transaction(connection: Connection, work: Callable[[], Awaitable[T]]) -> T:
    await begin(connection, "", statement_seconds=_STATEMENT_SECONDS)
    try:
        result = await work()
    except BaseException:
        await connection.rollback()
        raise
    await connection.commit()
    return result


async def _when_free(connection: Connection, what: str, work: Callable[[], Awaitable[T]]) -> T:
    return await when_free(what, partial(_transaction, connection, work), partial(fetch, connection))


async def _check_all(connection: Connection, mirrors: Sequence[Mirror]) -> None:
    if (await fetch(connection, _READ_ONLY))[0][0]:
        raise SchemaError(READ_ONLY)
    if (await fetch(connection, _WITHOUT_ENCODING))[0][0]:
        raise SchemaError(
            "this database has the encoding SQL_ASCII, which does not say what bytes mean, and Convex holds Unicode:"
            " dump it, and restore it into one with the encoding UTF8"
        )
    if not_allowed := (await fetch(connection, _NOT_ALLOWED))[0][0]:
        raise SchemaError(
            f"the role in DATABASE_URL may not call {not_allowed}, and so each write to a mirrored table would fail:"
            f" `grant execute on function {not_allowed} to ...`"
        )
    problems = []
    for mirror in mirrors:
        try:
            await check(connection, mirror)
            await check_owners(connection, mirror)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


async def _check_targets(connection: Connection, mirrors: Sequence[Mirror]) -> None:
    """Of a mirror that was taken out, too: its documents stayed."""
    if not (await fetch(connection, "select to_regclass('cdc.mirror') is not null"))[0][0]:
        return
    targets: dict[str, str | None] = dict(await fetch(connection, _TARGETS))
    problems = [
        f'mirror "{mirror.name}": its target was "{before}", and documents of that kind would stay in Convex for ever:'
        f' give what is to be "{mirror.target}" another name; how to remove the documents of "{mirror.name}":'
        " docs/operating.md, Mirrors come and go"
        for mirror in mirrors
        if (before := targets.get(mirror.name)) not in {None, mirror.target}
    ]
    if problems:
        raise ConfigError("\n".join(problems))


async def _apply(connection: Connection) -> None:
    await connection.execute(_PREPARE)
    try:
        applied: dict[int, str] = dict(await fetch(connection, _APPLIED))
    except psycopg.errors.UndefinedColumn as error:
        raise SchemaError(_TAKEN.format(first_lines(error))) from None
    known = load_migrations()
    if applied and max(applied) > known[-1].number:
        raise SchemaError(
            f"the database has migration {max(applied)}, this worker knows {known[-1].number}: deploy the newer worker"
        )
    for migration in known:
        if migration.number in applied:
            if applied[migration.number] != migration.checksum:
                raise SchemaError(
                    f"migration {migration.name} was changed after it was applied: restore it, and add a new one"
                )
            continue
        try:
            await connection.execute(migration.text)
        except (
            psycopg.errors.DuplicateTable,
            psycopg.errors.DuplicateObject,
            psycopg.errors.DuplicateFunction,
        ) as error:
            raise SchemaError(_TAKEN.format(first_lines(error))) from None
        await connection.execute(_NOTE, (migration.number, migration.name, migration.checksum))
        log.info("migrate.applied", migration=migration.name)
    if len(applied) < len(known) and (published := await fetch(connection, _PUBLICATIONS)):
        log.warning(
            "migrate.published",
            publications=[name for (name,) in published],
            cure="a subscriber stops at a table that it lacks: docs/operating.md, Logical replication",
        )


async def _register(connection: Connection, mirrors: Sequence[Mirror]) -> dict[str, int]:
    for mirror in mirrors:
        await connection.execute(_REGISTER, (mirror.name,))
    return {name: number for number, name, _ in await fetch(connection, _REGISTERED)}


async def _bring_triggers(connection: Connection, mirrors: Sequence[Mirror], ids: dict[str, int]) -> set[int]:
    """Table by table, each in a transaction of its own, so that no table is locked while another is waited for.

    Returns the mirrors of which not all changes were captured until now.
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
            # A source that is missing is said as ever; a partition that is, or a table that was made anew, is not.
            await _when_free(connection, "the mirrors' tables", lambda: _check_all(connection, mirrors))
            raise SchemaError(
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
        # Writers that called the functions as they were commit first: a rescan does not see their rows before. Of
        # functions that feed what they fed nothing is missed.
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
            for heir, schema, table in await fetch(connection, _HEIRS, oid):
                feeds.setdefault(heir, []).append(Feed(ids[mirror.name], source))
                tables[heir] = (schema, table)
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
            await connection.execute(RESCAN, (mirror_id, True, _UNCAPTURED))
        for statement in statements:
            await connection.execute(statement)

    try:
        await _between_writers(connection, f"table {table}", change, oid)
    except psycopg.errors.DuplicateObject as error:
        raise SchemaError(
            f"{first_lines(error)}: the worker needs that name for its own trigger; rename yours"
        ) from None


async def _between_writers(
    connection: Connection, what: str, work: Callable[[], Awaitable[None]], oid: int = 0
) -> None:
    """Runs `work`, on the table `oid`, in a transaction, as often as it takes until its locks are free for the asking.

    Raises SchemaError if they never are.
    """
    tries = itertools.count(1)

    async def impatient() -> None:
        await connection.execute(_TABLE_LOCK_TIMEOUT)
        if next(tries) == _PATIENT_TRY:
            await connection.execute(_PAST_AUTOVACUUM, (oid,))
        await work()

    await when_free(what, partial(_transaction, connection, impatient), partial(fetch, connection), _TABLE_SECONDS)


async def _finish(connection: Connection, mirrors: Sequence[Mirror], uncaptured: set[int]) -> None:
    """Last, with all triggers in place: from here on a rescan misses nothing."""
    registered = {name: (number, definition) for number, name, definition in await fetch(connection, _REGISTERED)}
    for mirror in mirrors:
        number, definition = registered.pop(mirror.name)
        await connection.execute(_CONFIGURE, (number, mirror.definition, mirror.target))
        if definition != mirror.definition or number in uncaptured:
            reason = (
                "new mirror"
                if definition == ""
                else "definition changed"
                if definition != mirror.definition
                else _UNCAPTURED
            )
            await connection.execute(RESCAN, (number, True, reason))
            log.info("backfill.requested", mirror=mirror.name, reason=reason)
    for number, _ in registered.values():
        for (name,) in await fetch(connection, _RETIRE, number):
            log.warning(
                "mirror.retired",
                mirror=name,
                cure="its documents stay in Convex as they are; remove them there if nobody needs them",
            )
