"""The application of these tests: its tables, the mirrors over them, and a database in which both are at home."""

import asyncio
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString, Self, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict

from cdc_worker.capture import GATE
from cdc_worker.migrate import migrate
from cdc_worker.mirrors import Mirror, Source

# A user's check-ins, and what the status is made of. Names as Prisma makes them.
TABLES: LiteralString = """
create table "User" (
    id text primary key, name text, "lastCheckInAt" timestamp(3), "nextCheckInDue" timestamptz
);
create table "CheckIn" (
    id text primary key, "userId" text not null, note text, mood jsonb, "createdAt" timestamp(3) not null
);
create type alert_level as enum ('L1', 'L2', 'L3', 'L4');
create table "Alert" (
    id text primary key, "userId" text not null, level alert_level not null,
    "triggeredAt" timestamptz not null, "resolvedAt" timestamptz
);
"""

CHECK_INS = Mirror(
    name="check-ins",
    target="activity",
    key=("id",),
    query="""
        select id, "userId" as user_id, 'check-in' as type, coalesce(note, 'Checked in') as description,
               "createdAt" as timestamp, mood as metadata
        from "CheckIn"
    """,
    sources=(Source(table='"CheckIn"', key=("id",)),),
)
STATUS = Mirror(
    name="status",
    target="status",
    key=("user_id",),
    query="""
        select u.id as user_id, u."lastCheckInAt" as last_check_in, u."nextCheckInDue" as next_due,
               a.level as alert_level, a."triggeredAt" as alert_triggered_at
        from "User" u
        left join lateral (select level, "triggeredAt" from "Alert"
                           where "userId" = u.id and "resolvedAt" is null order by level desc limit 1) a on true
    """,
    sources=(Source(table='"User"', key=("id",)), Source(table='"Alert"', key=("userId",))),
)
MIRRORS = (CHECK_INS, STATUS)


def renamed(*mirrors: Mirror) -> tuple[Mirror, ...]:
    """The same mirrors under names of the test's own: the local Convex is shared, and a rescan lists documents."""
    run = uuid.uuid4().hex[:8]
    return tuple(mirror.model_copy(update={"name": f"{mirror.name}-{run}"}) for mirror in mirrors)


def toml(mirrors: Sequence[Mirror]) -> str:
    """The same mirrors as text, for a worker in a process of its own."""

    def words(names: Sequence[str]) -> str:
        return "[" + ", ".join(f"'{name}'" for name in names) + "]"

    parts = []
    for mirror in mirrors:
        sources = ", ".join(
            f"{{ table = '{source.table}', key = {words(source.key)}, watch = {words(source.watch)} }}"
            for source in mirror.sources
        )
        parts.append(
            f"[[mirror]]\nname = '{mirror.name}'\ntarget = '{mirror.target}'\nkey = {words(mirror.key)}\n"
            f"query = '''\n{mirror.query}\n'''\nsources = [{sources}]\n"
        )
    return "\n".join(parts)


def rows_of(table: str, *, name: str = "rows", key: Sequence[str] = ("id",), watch: Sequence[str] = ()) -> Mirror:
    """An activity for each row of a table that has the key's columns, and needs no other."""
    columns = ", ".join(f'"{column}"' for column in key)
    return Mirror(
        name=name,
        target="activity",
        key=tuple(key),
        query=f"""
            select {columns}, 'someone' as user_id, 'check-in' as type, 'row' as description, now() as timestamp
            from {table}
        """,
        sources=(Source(table=table, key=tuple(key), watch=tuple(watch)),),
    )


def migrate_now(dsn: str, mirrors: Sequence[Mirror], *, shards: int = 1) -> None:
    """In a thread with a loop of its own, so that any test may call it."""

    async def work() -> None:
        async with asyncio.timeout(120):
            await migrate(dsn, mirrors, shards=shards)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(work())).result()


def check_in(db: "Database", user: str, key: str, note: str | None = None) -> None:
    """Writes a user's check-in, or writes it anew; the note is the key unless it is given."""
    db.execute(
        """
        insert into "CheckIn" values (%s, %s, %s, null, now()) on conflict (id) do update set note = excluded.note
        """,
        f"{user}-{key}", user, note or key,
    )  # fmt: skip


def through(port: int, dsn: str) -> str:
    """The same database behind another port. An attempt to connect ends after the least that libpq takes."""
    to = conninfo_to_dict(dsn)
    return f"postgresql://{to['user']}:{to['password']}@127.0.0.1:{port}/{to['dbname']}?connect_timeout=2"


class Database:
    """A database as the application uses it: a connection in autocommit, and a look at what capture wrote."""

    def __init__(self, dsn: str, ddl: str = "", mirrors: Sequence[Mirror] | None = None) -> None:
        self.dsn = dsn
        self.connection = psycopg.connect(dsn, autocommit=True, options="-c statement_timeout=20s")
        try:
            self.execute(ddl)
            if mirrors is not None:
                self.migrate(mirrors)
        except BaseException:
            # Left open, it would be the error of another test.
            self.connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def execute(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        """One or several statements; the rows of the last."""
        cursor = self.connection.execute(statement, params or None)
        return cursor.fetchall() if cursor.description is not None else []

    def one(self, statement: str, *params: Any) -> Any:
        """The only value of the only row."""
        ((value,),) = self.execute(statement, *params)
        return value

    def migrate(self, mirrors: Sequence[Mirror], *, shards: int = 1) -> None:
        migrate_now(self.dsn, mirrors, shards=shards)

    def gate_is_kept(self) -> bool:
        """Whether a worker has gone to rest, and is to be rung for."""
        kept = self.one(
            "select exists (select from pg_locks l join pg_database d on d.oid = l.database"
            " where d.datname = current_database() and l.locktype = 'advisory' and l.classid = %s"
            " and l.mode = 'ExclusiveLock' and l.granted)",
            GATE[0],
        )
        return bool(kept)

    def captured(self) -> list[str | None]:
        """The keys that were captured since the last call, in order; None asks for a rescan."""
        taken = self.execute(
            "with taken as (delete from cdc.outbox returning tableoid, ctid as tid, coalesce(keys, array[key]) as keys)"
            " select k.key from taken, unnest(keys) with ordinality as k (key, place) order by tableoid, tid, place"
        )
        return [key for (key,) in taken]

    def captured_by_mirror(self) -> list[tuple[str, str | None]]:
        taken = self.execute(
            "with taken as (delete from cdc.outbox returning mirror, coalesce(keys, array[key]) as keys)"
            " select m.name, k.key from taken join cdc.mirror m on m.id = mirror, unnest(keys) as k (key)"
            " order by m.name, k.key"
        )
        return cast("list[tuple[str, str | None]]", taken)
