"""`migrate`: the schema cdc, the shards, and the triggers that cdc_worker.toml asks for. Safe to run twice, and at
once.
"""

from collections.abc import Sequence

import psycopg
import structlog

from cdc_worker.backfill import RESCAN
from cdc_worker.catalog import check, check_owners
from cdc_worker.database import Connection, begin, connect, fetch
from cdc_worker.errors import READ_ONLY, ConfigError, SchemaError
from cdc_worker.locks import between_writers, commit_when_free
from cdc_worker.mirrors import Mirror
from cdc_worker.postgres_errors import first_lines
from cdc_worker.resharding import divide
from cdc_worker.schema import apply_migrations
from cdc_worker.triggers import UNCAPTURED, TableGone, bring_triggers

log = structlog.get_logger()

# Serialises migrators against each other. A connection of its own holds it, in one transaction to the end: a pooler
# may lend each transaction of the other connection another session.
_LOCK = "select pg_advisory_xact_lock(hashtextextended('cdc_worker.migrate', 0))"
_LOCK_SECONDS = 600.0

_READ_ONLY = "select pg_is_in_recovery() or current_setting('transaction_read_only')::bool"
_WITHOUT_ENCODING = "select getdatabaseencoding() = 'SQL_ASCII'"
# What capture calls, and an administrator may have taken from plain roles: each write would fail for it.
_NOT_ALLOWED = """
select string_agg(name, ', ')
from unnest(array['pg_notify(text, text)', 'pg_try_advisory_xact_lock_shared(integer, integer)']) as called (name)
where not has_function_privilege(name, 'execute')
"""
# Not `on conflict`, which uses up a number for a row that is there already: they are smallints.
_REGISTER = """
insert into cdc.mirror (name, definition) select $1, '' where not exists (select from cdc.mirror where name = $1)
"""
# Logical replication, by which a database is moved to another server, takes the rows along, and no sequence.
_CATCH_UP = """
select setval('cdc.mirror_id_seq', max(id)) from cdc.mirror having max(id) >= (select last_value from cdc.mirror_id_seq)
"""
_REGISTERED = "select id, name, definition from cdc.mirror"
_CONFIGURE = "update cdc.mirror set definition = $2, target = $3, configured = true where id = $1"
_HAS_MIRRORS = "select to_regclass('cdc.mirror') is not null"
# Also of a schema cdc from before there was such a column, and of one that is not the worker's.
_TARGETS = "select to_jsonb(m) ->> 'name', to_jsonb(m) ->> 'target' from cdc.mirror m"
# One that comes back later is new: what changed meanwhile was captured by nobody.
_RETIRE = "update cdc.mirror set configured = false, definition = '' where id = $1 and configured returning name"


async def migrate(dsn: str, mirrors: Sequence[Mirror], *, shards: int = 1) -> None:
    """Brings the schema cdc, the shards and all triggers up to date.

    Raises ConfigError, before anything is changed, if a mirror does not fit the database, or what it was before, and
    SchemaError if the database cannot be migrated (a standby, a changed migration, no right to create, a lock of
    somebody else).
    """
    async with await connect(dsn) as connection, await connect(dsn) as guard:
        await commit_when_free(connection, "the mirrors' tables", lambda: _check_all(connection, mirrors))
        await begin(guard, "read only", statement_seconds=_LOCK_SECONDS)
        await guard.execute(f"set local lock_timeout = {int(_LOCK_SECONDS * 1000)}")
        await guard.execute(_LOCK)
        try:
            await commit_when_free(connection, "the mirrors", lambda: _check_targets(connection, mirrors))
            await between_writers(connection, "the log", lambda: apply_migrations(connection))
            await commit_when_free(connection, "the shards", lambda: divide(connection, shards))
            ids = await commit_when_free(connection, "the mirrors", lambda: _register(connection, mirrors))
            uncaptured = await bring_triggers(connection, mirrors, ids)
            await commit_when_free(connection, "the mirrors", lambda: _finish(connection, mirrors, uncaptured))
        except TableGone:
            # A source that is missing is said as ever; a partition that is, or a table that was made anew, is not.
            await commit_when_free(connection, "the mirrors' tables", lambda: _check_all(connection, mirrors))
            raise
        except psycopg.errors.InsufficientPrivilege as error:
            raise SchemaError(
                f"{first_lines(error)}: the role in DATABASE_URL must be allowed to create a schema in this database,"
                " and must own the tables that are mirrored, and the schema cdc where it is there already"
            ) from None
    log.info("migrate.done", mirrors=len(mirrors))


async def _check_all(connection: Connection, mirrors: Sequence[Mirror]) -> None:
    ((read_only,),) = await fetch(connection, _READ_ONLY)
    if read_only:
        raise SchemaError(READ_ONLY)
    ((without_encoding,),) = await fetch(connection, _WITHOUT_ENCODING)
    if without_encoding:
        raise SchemaError(
            "this database has the encoding SQL_ASCII, which does not say what bytes mean, and Convex holds Unicode:"
            " dump it, and restore it into one with the encoding UTF8"
        )
    ((not_allowed,),) = await fetch(connection, _NOT_ALLOWED)
    if not_allowed:
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
    """Also those of mirrors that were taken out: their documents stayed."""
    ((exists,),) = await fetch(connection, _HAS_MIRRORS)
    if not exists:
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


async def _register(connection: Connection, mirrors: Sequence[Mirror]) -> dict[str, int]:
    await connection.execute(_CATCH_UP)
    for mirror in mirrors:
        await connection.execute(_REGISTER, (mirror.name,))
    return {name: number for number, name, _ in await fetch(connection, _REGISTERED)}


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
                else UNCAPTURED
            )
            await connection.execute(RESCAN, (number, reason))
            log.info("backfill.requested", mirror=mirror.name, reason=reason)
    for number, _ in registered.values():
        for (name,) in await fetch(connection, _RETIRE, number):
            log.warning(
                "mirror.retired",
                mirror=name,
                cure="its documents stay in Convex as they are; remove them there if nobody needs them",
            )
