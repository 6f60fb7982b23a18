"""The schema cdc: the SQL in migrations/, each file once and in its order."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import psycopg
import structlog

from cdc_worker.database import Connection, fetch
from cdc_worker.errors import SchemaError
from cdc_worker.postgres_errors import first_lines

log = structlog.get_logger()

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
# To rename that one, or to take its tables away singly, would make each write fail whose trigger looks for them.
_WITHOUT_ROWS = (
    "this database has the worker's schema cdc without its rows, as a dump of the schema alone leaves it: drop it"
    " (`drop schema cdc cascade`, which takes the triggers with it), and run `cdc-worker migrate` again"
)
_HAS_LOG = "select to_regclass('cdc.migration') is not null and to_regclass('cdc.dirty_key') is not null"
_APPLIED = "select number, checksum from cdc.migration order by number"
# Each holds the schema cdc, too.
_PUBLICATIONS = "select pubname from pg_publication where puballtables order by pubname"
_NOTE = "insert into cdc.migration (number, name, checksum) values ($1, $2, $3)"


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


async def apply_migrations(connection: Connection) -> None:
    """Raises SchemaError for a database that is ahead of this worker, or has other migrations or another schema cdc, or
    one without rows.
    """
    ((has_log,),) = await fetch(connection, _HAS_LOG)
    await connection.execute(_PREPARE)
    try:
        applied: dict[int, str] = dict(await fetch(connection, _APPLIED))
    except psycopg.errors.UndefinedColumn as error:
        raise SchemaError(_TAKEN.format(first_lines(error))) from None
    if has_log and not applied:
        raise SchemaError(_WITHOUT_ROWS)
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
