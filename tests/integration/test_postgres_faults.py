"""A Postgres that is full, slow, old or read-only: what the worker says, and that it goes on by itself."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg
import pytest

from cdc_worker import care
from cdc_worker import database as border
from cdc_worker.mirrors import Mirror, Source
from dev import local_convex as convex
from dev import pgbouncer as bouncer
from dev import postgres
from dev.processes import unprivileged
from tests.conftest import missing
from tests.integration.application import CHECK_INS, TABLES, Database, check_in, renamed
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import quick_settings, worker_at_work

pytestmark = pytest.mark.one_postgres


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(care, "_MENDING_SECONDS", 0.2)
    monkeypatch.setattr(care, "_SELDOM_SECONDS", 0.4)
    monkeypatch.setattr(care, "_RESCAN_SECONDS", 0.05)


@pytest.fixture
def mirrors() -> tuple[Mirror, ...]:
    return renamed(CHECK_INS)


@pytest.fixture
def server(postgres_flavour: postgres.Flavour) -> Iterator[postgres.Server]:
    """For this test alone."""
    with postgres.start(postgres_flavour) as started:
        yield started


async def test_a_standby_is_refused_and_waited_for(
    mirrors: Sequence[Mirror], server: postgres.Server, local_convex: convex.LocalConvex, mirrored: Mirrored, user: str
) -> None:
    dsn = server.dsn(postgres.create_database(server))
    with Database(dsn, TABLES, mirrors) as db:
        check_in(db, user, "before")
    server.stop()
    signal_file = server.folder / "data/standby.signal"
    signal_file.touch()
    if (owner := unprivileged()) is not None:
        os.chown(signal_file, *owner)
    server.start()
    async with worker_at_work(quick_settings(dsn, local_convex), mirrors) as running:
        said = await running.said("database.not_ready")
        assert said["cause"] == "this database is read-only (a standby?): point DATABASE_URL at the primary"
        with server.admin() as connection:
            connection.execute("select pg_promote()")
        await eventually(lambda: mirrored.descriptions(user), ["before"])
        await running.said("database.recovered")


async def test_more_connections_than_it_takes(
    mirrors: Sequence[Mirror],
    server: postgres.Server,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(border, "_CONNECT_SECONDS", 1)
    dsn = server.dsn(postgres.create_database(server))
    with Database(dsn, TABLES, mirrors) as db, server.admin() as superuser:
        check_in(db, user, "before")
        # One for the application, and one that is too few for the worker.
        superuser.execute(f"alter role {postgres.APPLICATION} connection limit 2")
        async with worker_at_work(quick_settings(dsn, local_convex), mirrors) as running:
            cause = (await running.said("database.unreachable"))["cause"]
            # As the listener got the connection that is left, or the pool.
            assert "gives no more" in cause or "too many connections" in cause
            superuser.execute(f"alter role {postgres.APPLICATION} connection limit -1")
            await eventually(lambda: mirrored.descriptions(user), ["before"])
            await running.said("database.recovered")


async def test_a_restart_behind_a_pooler(
    mirrors: Sequence[Mirror], server: postgres.Server, local_convex: convex.LocalConvex, mirrored: Mirrored, user: str
) -> None:
    """The worker's own connections live on, and every statement on them fails, or waits in the pooler."""
    if bouncer.program() is None:
        missing("pgbouncer")
    dsn = server.dsn(postgres.create_database(server))
    with Database(dsn, TABLES, mirrors) as db, bouncer.start(dsn) as pooled:
        check_in(db, user, "before")
        async with worker_at_work(quick_settings(pooled, local_convex), mirrors) as running:
            await eventually(lambda: mirrored.descriptions(user), ["before"])
            expected = ["before"]
            modes: tuple[postgres.Mode, ...] = ("fast", "immediate")
            for mode in modes:
                await asyncio.to_thread(server.restart, mode)
                with Database(dsn) as again:
                    check_in(again, user, mode)
                expected.append(mode)
                await eventually(lambda: mirrored.descriptions(user), expected)
            await running.stop()
            # Nobody who compares transaction ids over a restart takes it for a restore.
            assert running.log.events.count("session.rescan") == 1


async def test_a_search_path_that_the_application_leaves_in_the_pooler(
    mirrors: Sequence[Mirror], database: str, local_convex: convex.LocalConvex, mirrored: Mirrored, user: str
) -> None:
    """PgBouncer hands on a connection as it is; there, a table of the same name is another one."""
    if bouncer.program() is None:
        missing("pgbouncer")
    with Database(database, TABLES, mirrors) as db, bouncer.start(database, pool_size=1) as pooled:
        db.execute("""create schema other; create table other."CheckIn" (like "CheckIn")""")
        check_in(db, user, "right")
        db.execute("""insert into other."CheckIn" select id, "userId", 'wrong', mood, "createdAt" from "CheckIn" """)
        with psycopg.connect(pooled) as application:
            application.execute("set search_path to other")
        async with worker_at_work(quick_settings(pooled, local_convex), mirrors) as running:
            await running.said("backfill.done")
            await eventually(lambda: db.one("select count(*) from cdc.mirror where tables is null"), 0)
            await running.stop()
            assert mirrored.descriptions(user) == ["right"]
            # Nor are those looked at for triggers, and whether they changed.
            assert "capture.missing" not in running.log.events
            noted = (
                "select every(tables @> array['public.\"CheckIn\"'::regclass::int8]) from cdc.mirror where name = %s"
            )
            assert db.one(noted, mirrors[0].name)


async def test_a_temporary_table_that_the_application_leaves_in_the_pooler(
    mirrors: Sequence[Mirror], database: str, local_convex: convex.LocalConvex, mirrored: Mirrored, user: str
) -> None:
    """Postgres looks among those first: the mirror's rows passed for deleted."""
    if bouncer.program() is None:
        missing("pgbouncer")
    with Database(database, TABLES, mirrors) as db, bouncer.start(database, pool_size=1) as pooled:
        check_in(db, user, "right")
        with psycopg.connect(pooled) as application:
            application.execute("""create temp table "CheckIn" (like "CheckIn")""")
        async with worker_at_work(quick_settings(pooled, local_convex), mirrors) as running:
            await running.said("backfill.done")
            check_in(db, user, "later")
            await eventually(lambda: mirrored.descriptions(user), ["later", "right"])
            await running.stop()
            assert "capture.missing" not in running.log.events


async def test_a_row_that_takes_too_long_is_parked_alone(
    database: str,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(border, "_GRACE_SECONDS", 1.0)
    slow = Mirror(
        name=f"slow-{user}",
        target="activity",
        key=("id",),
        query=f"""
            select id, '{user}' as user_id, 'alert' as type, now() as timestamp,
                   case when takes > 0 then pg_sleep(takes)::text || 'late' else 'fine' end as description
            from work
        """,
        sources=(Source(table="work", key=("id",)),),
    )
    with Database(database, "create table work (id int primary key, takes float8)", [slow]) as db:
        db.execute("insert into work select n, case when n in (17, 48) then 5 else 0 end from generate_series(1, 64) n")
        settings = quick_settings(database, local_convex, CDC_STATEMENT_SECONDS=0.5)
        async with worker_at_work(settings, [slow]) as running:
            await eventually(lambda: len(mirrored.keys(slow.name)), 62)
            await eventually(
                lambda: db.execute("select key, class from cdc.parked_key order by key"), [("17", "row"), ("48", "row")]
            )
            assert "QueryCanceled" in running.log.of("key.parked")[0]["reason"]
            db.execute("update work set takes = 0")
            await eventually(lambda: len(mirrored.keys(slow.name)), 64)
            await eventually(lambda: db.execute("select key from cdc.parked_key"), [])
            await running.stop()
            assert running.log.events.count("session.open") == 1


async def test_a_held_transaction_holds_up_nobody_else(
    mirrors: Sequence[Mirror], database: str, local_convex: convex.LocalConvex, mirrored: Mirrored, user: str
) -> None:
    """An hour of it in a few seconds: its row comes when it commits, all others as ever; the log turns meanwhile."""
    settings = quick_settings(
        database, local_convex, CDC_RETENTION_HOURS=0.01, CDC_PARTITION_BYTES=65_536, CDC_PAGE_ROWS=200
    )
    with Database(database, TABLES, mirrors) as db, psycopg.connect(database) as holder:
        async with worker_at_work(settings, mirrors) as running:
            await running.said("session.open")
            holder.execute("""insert into "CheckIn" values ('held', %s, 'held', null, now())""", (user,))
            for turn in range(4):
                db.execute(
                    """insert into "CheckIn" select %s || n, %s, %s, null, now() from generate_series(1, 1200) as n""",
                    f"{turn}-", f"other-{user}", str(turn),
                )  # fmt: skip
                check_in(db, user, str(turn))
                await eventually(lambda: mirrored.descriptions(user), [str(n) for n in range(turn + 1)])
            # It turned past the partition of the held row, to which it does not come again before that is read.
            await running.said("log.rotated")
            assert "held" not in mirrored.descriptions(user)
            await running.said("worker.heartbeat")
            assert running.log.of("worker.heartbeat")[-1]["lag_seconds"] < 5
            holder.commit()
            await eventually(lambda: mirrored.descriptions(user), ["0", "1", "2", "3", "held"])
            await running.stop()
            assert running.log.events.count("session.open") == 1


async def test_transaction_ids_beyond_32_bits(
    mirrors: Sequence[Mirror],
    postgres_flavour: postgres.Flavour,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
) -> None:
    """Postgres' own ids turn over every 4 thousand million transactions; the log's do not."""
    with postgres.start(postgres_flavour, settings={"autovacuum": "off"}) as server:
        dsn = server.dsn(postgres.create_database(server))
        with Database(dsn, TABLES, mirrors) as db:
            check_in(db, user, "before")
        async with worker_at_work(quick_settings(dsn, local_convex), mirrors):
            await eventually(lambda: mirrored.descriptions(user), ["before"])
        with Database(dsn) as db:
            check_in(db, user, "while away")
        set_next_transaction(server, 2**32 - 40)
        async with worker_at_work(quick_settings(dsn, local_convex), mirrors) as running:
            await eventually(lambda: mirrored.descriptions(user), ["before", "while away"])
            with Database(dsn) as db, psycopg.connect(dsn) as holder:
                holder.execute("""insert into "CheckIn" values ('held', %s, 'held', null, now())""", (user,))
                wanted = ["before", "while away"]
                for n in range(80):
                    check_in(db, user, f"{n:02}")
                    wanted.append(f"{n:02}")
                    if n % 8 == 0:
                        await eventually(lambda: mirrored.descriptions(user), sorted(wanted))
                assert int(db.one("select pg_current_xact_id()::text")) > 2**32
                await eventually(lambda: mirrored.descriptions(user), sorted(wanted))
                holder.commit()
                await eventually(lambda: mirrored.descriptions(user), sorted([*wanted, "held"]))
            await running.stop()
            assert running.log.events.count("session.open") == 1


def set_next_transaction(server: postgres.Server, number: int) -> None:
    """Stops the server, and starts it with this transaction id as the next one."""
    with server.admin() as connection:
        names = connection.execute("select datname from pg_database where datallowconn").fetchall()
    for (name,) in names:
        with server.admin(name) as connection:
            connection.execute("vacuum freeze")
    server.stop()
    data = server.folder / "data"
    # The page of the commit log that the id lies on, which a server that came there by itself would have made.
    segment = data / "pg_xact" / f"{number // (32 * 32_768):04X}"
    segment.write_bytes(bytes(32 * 8_192))
    uid, gid = unprivileged() or (None, None)
    if uid is not None and gid is not None:
        os.chown(segment, uid, gid)
    subprocess.run(
        [server.bin_dir / "pg_resetwal", "-f", "-x", str(number), "-D", data],
        check=True, timeout=30, capture_output=True, user=uid, group=gid, cwd=server.folder,
    )  # fmt: skip
    server.start()


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A file system of that size."""
    folder = Path(tempfile.mkdtemp(prefix="cdc-disk-"))
    options = f"size={megabytes}m,mode=0777"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False, capture_output=True)
    if mounted.returncode != 0:
        shutil.rmtree(folder)
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(8_192))
    return filler


async def test_a_full_disk(
    mirrors: Sequence[Mirror],
    postgres_flavour: postgres.Flavour,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
) -> None:
    with small_disk(64) as disk, postgres.start(postgres_flavour) as server:
        place = disk / "space"
        place.mkdir()
        if (owner := unprivileged()) is not None:
            os.chown(place, *owner)
        name = postgres.create_database(server)
        with server.admin() as superuser:
            superuser.execute(f"create tablespace small location '{place}'")
            superuser.execute(f"alter database {name} set tablespace small")
        dsn = server.dsn(name)
        with Database(dsn, TABLES, mirrors) as db:
            async with worker_at_work(quick_settings(dsn, local_convex), mirrors) as running:
                await running.said("backfill.done")
                insert = 'insert into "CheckIn" select %s || n, %s, n, null, now() from generate_series(1, %s) as n'
                db.execute(insert, "first-", f"{user}-other", 3000)
                await eventually(lambda: mirrored.count(mirrors[0].name), 3000)
                db.execute("update cdc.backfill set phase = 'rows', after = null")
                filler = fill(disk)
                with pytest.raises(psycopg.errors.DiskFull):
                    await asyncio.to_thread(db.execute, insert, "second-", f"{user}-other", 10_000)
                # The worker has something to write as well: the marks of a rescan, with which a session begins.
                db.execute("select pg_terminate_backend(holder_pid) from cdc.checkpoint")
                said = await running.said("database.refuses")
                assert "No space left on device" in said["cause"]
                filler.unlink()
                await running.said("database.recovered")
                check_in(db, user, "after")
                await eventually(lambda: "after" in mirrored.descriptions(user), expected=True)
                await eventually(lambda: db.one("select phase from cdc.backfill"), "done")
                await running.stop()
