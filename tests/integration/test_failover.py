"""A fail-over: the database's address leads to a standby now, which is promoted. Streaming replication, as it is."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Literal

import pytest

from cdc_worker import care, listener, reader
from cdc_worker import database as border
from cdc_worker.mirrors import Mirror
from dev import local_convex as convex
from dev import postgres
from dev.link import Link, link_to
from dev.processes import unprivileged
from tests.conftest import missing
from tests.integration.application import CHECK_INS, STATUS, TABLES, Database, renamed, through
from tests.integration.crowd import change_some, check_in_often, documents, rows
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import quick_settings, worker_at_work

pytestmark = [pytest.mark.one_postgres, pytest.mark.timeout(400)]

ROWS = 1_000
# What is well takes less on a busy machine.
DEADLINE_SECONDS = 1.5


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead link is noticed in seconds here."""
    monkeypatch.setattr(reader, "_LOOKOUT_SECONDS", 0.6)
    monkeypatch.setattr(listener, "_DEADLINE_SECONDS", DEADLINE_SECONDS)
    monkeypatch.setattr(border, "_GRACE_SECONDS", DEADLINE_SECONDS)
    monkeypatch.setattr(border, "_CONNECT_SECONDS", 3)
    monkeypatch.setattr(care, "_RESCAN_SECONDS", 0.05)


@pytest.fixture
def mirrors() -> tuple[Mirror, ...]:
    return renamed(CHECK_INS, STATUS)


@pytest.fixture
def primary(postgres_flavour: postgres.Flavour) -> Iterator[postgres.Server]:
    with postgres.start(postgres_flavour) as started:
        if not (started.bin_dir / "pg_basebackup").exists():
            missing("pg_basebackup of this Postgres")
        yield started


@pytest.fixture
def standby(postgres_flavour: postgres.Flavour, primary: postgres.Server) -> Iterator[postgres.Server]:
    """Streams from the primary."""
    with postgres.start(postgres_flavour) as server:
        server.stop()
        shutil.rmtree(server.folder / "data")
        uid, gid = unprivileged() or (None, None)
        subprocess.run(
            [
                *(server.bin_dir / "pg_basebackup", "--pgdata", server.folder / "data", "--checkpoint=fast"),
                *("--write-recovery-conf", "--no-sync", "--dbname"),
                primary.dsn(postgres.SUPERUSER, user=postgres.SUPERUSER, tcp=False),
            ],
            user=uid, group=gid, extra_groups=None if uid is None else [], cwd=server.folder,
            check=True, timeout=30, capture_output=True,
        )  # fmt: skip
        server.start()
        yield server


def keep_in_step(primary: postgres.Server) -> None:
    """From now on nobody is told of a commit that the standby does not have as well."""
    with primary.admin() as superuser:
        superuser.execute("alter system set synchronous_standby_names = '*'")
        superuser.execute("select pg_reload_conf()")


def keep_in_step_no_more(server: postgres.Server) -> None:
    with server.admin() as superuser:
        superuser.execute("alter system reset synchronous_standby_names")
        superuser.execute("select pg_reload_conf()")


def promote(standby: postgres.Server) -> None:
    with standby.admin() as superuser:
        superuser.execute("select pg_promote()")


@pytest.fixture
async def address(primary: postgres.Server) -> AsyncIterator[Link]:
    async with link_to("127.0.0.1", primary.port) as opened:
        yield opened


@pytest.mark.parametrize("old_connections", ["reset", "half-open"])
async def test_the_address_leads_to_a_promoted_standby(
    mirrors: Sequence[Mirror],
    primary: postgres.Server,
    standby: postgres.Server,
    address: Link,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
    old_connections: Literal["reset", "half-open"],
) -> None:
    dsn = primary.dsn(postgres.create_database(primary))
    settings = quick_settings(
        through(address.port, dsn), local_convex, CDC_STATEMENT_SECONDS=2, CDC_BATCH_KEYS=25, CDC_PAGE_ROWS=200
    )
    keep_in_step(primary)
    with Database(dsn, TABLES, mirrors) as db:
        async with worker_at_work(settings, mirrors) as running:
            await running.said("session.open")
            check_in_often(db, user, ROWS)
            await running.delivered(100)
            change_some(db, user)
            if old_connections == "half-open":
                address.forget()  # the old machine vanishes without a word
            await asyncio.to_thread(primary.stop, "immediate")
            # Whoever asks meanwhile gets a connection that ends at once.
            await running.said("database.unreachable")
            address.lead_to("127.0.0.1", standby.port)
            assert "read-only" in (await running.said("database.not_ready"))["cause"]
            await asyncio.to_thread(promote, standby)
            await running.said("database.recovered")
            assert "failed over" in (await running.said("session.rescan", times=2))["cause"]
            with Database(through(standby.port, dsn)) as after:
                after.execute("""update "CheckIn" set note = 'after' where id like %s || '%%1'""", user)
                assert len(rows(after)) > ROWS / 2
                await eventually(lambda: documents(mirrored, user, ROWS), rows(after), seconds=60)
                await eventually(lambda: after.one("select count(*) from cdc.backfill where phase <> 'done'"), 0)
                assert after.one("select count(*) from cdc.parked_key") == 0
                assert documents(mirrored, user, ROWS) == rows(after)
            await running.stop()
            # One outage, said once for each way in which it showed.
            troubles = [line for line in running.log.lines if line["event"].startswith("database.")]
            events = [line["event"] for line in troubles]
            if "database.refuses" in events:
                # A session that is still at work has met the standby before it was ended.
                events.remove("database.refuses")
            assert events == ["database.unreachable", "database.not_ready", "database.recovered"], troubles


async def test_a_standby_that_lagged_is_what_counts(
    mirrors: Sequence[Mirror],
    primary: postgres.Server,
    standby: postgres.Server,
    address: Link,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
) -> None:
    """What the old primary had told nobody but the worker is undone in Convex; another worker finds it out as well."""
    dsn = primary.dsn(postgres.create_database(primary))
    settings = quick_settings(through(address.port, dsn), local_convex, CDC_STATEMENT_SECONDS=2)
    keep_in_step(primary)
    with Database(dsn, TABLES, mirrors) as db:
        check_in_often(db, user, ROWS)
        async with worker_at_work(settings, mirrors):
            await eventually(lambda: documents(mirrored, user, ROWS), rows(db), seconds=60)
            await asyncio.to_thread(keep_in_step_no_more, primary)
            await asyncio.to_thread(standby.stop)
            change_some(db, user)
            await eventually(lambda: documents(mirrored, user, ROWS), rows(db), seconds=60)
    await asyncio.to_thread(primary.stop, "immediate")
    await asyncio.to_thread(standby.start)
    await asyncio.to_thread(promote, standby)
    address.lead_to("127.0.0.1", standby.port)
    with Database(through(standby.port, dsn)) as after:
        assert len(rows(after)) == ROWS
        async with worker_at_work(settings, mirrors):
            await eventually(lambda: documents(mirrored, user, ROWS), rows(after), seconds=60)
