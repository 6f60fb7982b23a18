"""Links that are cut, deaf or slow, and a Postgres that is restarted, in the middle of work: nothing is lost."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from cdc_worker import database as worker_database
from cdc_worker import listener, reader, shards
from cdc_worker.mirrors import Mirror
from cdc_worker.settings import Settings
from dev import local_convex as convex
from dev import postgres
from dev.link import Link, link_to
from tests.integration.application import CHECK_INS, STATUS, TABLES, Database, check_in, renamed, through
from tests.integration.crowd import change_some, check_in_often, documents, rows
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import quick_settings, worker_at_work

pytestmark = pytest.mark.one_postgres

ROWS = 2_000
LOOKOUT_SECONDS = 0.6
# What is well takes less on a busy machine.
DEADLINE_SECONDS = 1.5
STATEMENT_SECONDS = 1.5
# Many small batches, so that there is time to get in between.
PIECEMEAL: dict[str, Any] = {"CDC_BATCH_KEYS": 25, "CDC_IN_FLIGHT": 2, "CDC_PAGE_ROWS": 200}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead link is noticed in seconds here."""
    monkeypatch.setattr(reader, "_LOOKOUT_SECONDS", LOOKOUT_SECONDS)
    monkeypatch.setattr(listener, "_DEADLINE_SECONDS", DEADLINE_SECONDS)
    monkeypatch.setattr(listener, "_ECHO_SECONDS", DEADLINE_SECONDS)
    monkeypatch.setattr(worker_database, "_GRACE_SECONDS", DEADLINE_SECONDS)


@pytest.fixture
def mirrors() -> tuple[Mirror, ...]:
    return (*renamed(CHECK_INS), STATUS)


@pytest.fixture
async def link(database: str) -> AsyncIterator[Link]:
    to = conninfo_to_dict(database)
    async with link_to(str(to["host"]), int(str(to["port"]))) as opened:
        yield opened


def settings_over(link: Link, db: Database, convex: convex.LocalConvex, **given: Any) -> Settings:
    """Everything goes over the link."""
    return quick_settings(through(link.port, db.dsn), convex, CDC_STATEMENT_SECONDS=STATEMENT_SECONDS, **given)


async def equal(mirrored: Mirrored, db: Database, user: str) -> None:
    await eventually(lambda: documents(mirrored, user, ROWS), rows(db), seconds=60)


# The listener's link.


async def test_a_listener_whose_connection_was_forgotten_is_replaced(
    mirrors: Sequence[Mirror], db: Database, local_convex: convex.LocalConvex, link: Link, mirrored: Mirrored, user: str
) -> None:
    settings = quick_settings(db.dsn, local_convex, listen_database_url=through(link.port, db.dsn), CDC_POLL_SECONDS=60)
    async with worker_at_work(settings, mirrors) as running:
        assert (await running.said("session.open"))["listen"] is True
        # A rescan wakes the reader without the bell.
        await running.said("backfill.done", times=len(mirrors))
        await eventually(db.gate_is_kept, expected=True)
        link.forget()
        check_in(db, user, "1")
        # The lookout finds it, and giving the gate back that the connection is dead: before TCP does, in 30 s.
        await eventually(lambda: mirrored.descriptions(user), ["1"])
        assert (await running.said("session.open", times=2))["listen"] is True
        check_in(db, user, "2")
        await eventually(lambda: mirrored.descriptions(user), ["1", "2"])
        await running.stop()
        assert running.log.events.count("database.unreachable") == 1


async def test_the_gate_of_a_forgotten_listener_is_free_again(
    mirrors: Sequence[Mirror], db: Database, local_convex: convex.LocalConvex, link: Link, user: str
) -> None:
    settings = quick_settings(db.dsn, local_convex, listen_database_url=through(link.port, db.dsn))
    async with worker_at_work(settings, mirrors) as running:
        await running.said("session.open")
        # A rescan wakes the reader without the bell.
        await running.said("backfill.done", times=len(mirrors))
        await eventually(db.gate_is_kept, expected=True)
        link.forget()
        check_in(db, user, "1")
        await running.said("session.open", times=2)
        # The listener that holds the lease is the one that sleeps behind the gate. By itself the server would learn of
        # the old one's end in 30 s.
        await eventually(lambda: db.one(_SLEEPS), expected=True)


_SLEEPS = """
select exists (select from pg_locks l join cdc.checkpoint c on c.holder_pid = l.pid
               where l.locktype = 'advisory' and l.classid = 25444 and l.mode = 'ExclusiveLock' and l.granted)
"""


async def test_a_listener_that_cannot_be_replaced_is_done_without(
    mirrors: Sequence[Mirror], db: Database, local_convex: convex.LocalConvex, link: Link, mirrored: Mirrored, user: str
) -> None:
    settings = quick_settings(db.dsn, local_convex, listen_database_url=through(link.port, db.dsn))
    async with worker_at_work(settings, mirrors) as running:
        await running.said("session.open")
        # A rescan wakes the reader without the bell.
        await running.said("backfill.done", times=len(mirrors))
        await eventually(db.gate_is_kept, expected=True)
        link.deaf()
        check_in(db, user, "1")
        assert (await running.said("listen.unavailable"))["cause"] == "LISTEN_DATABASE_URL is out of reach"
        await eventually(lambda: mirrored.descriptions(user), ["1"])
        assert (await running.said("session.open", times=2))["listen"] is False
        check_in(db, user, "2")
        await eventually(lambda: mirrored.descriptions(user), ["1", "2"])
        await running.stop()


async def test_a_listener_s_link_that_comes_later_is_taken(
    mirrors: Sequence[Mirror],
    db: Database,
    local_convex: convex.LocalConvex,
    link: Link,
    mirrored: Mirrored,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "_RECOVERY_SECONDS", 0.1)
    link.deaf()
    settings = quick_settings(db.dsn, local_convex, listen_database_url=through(link.port, db.dsn))
    async with worker_at_work(settings, mirrors) as running:
        assert (await running.said("session.open"))["listen"] is False
        check_in(db, user, "polled")
        await eventually(lambda: mirrored.descriptions(user), ["polled"])
        link.normal()
        await running.said("listen.recovered")
        # It rests behind the gate, and its end would be noticed at once.
        await eventually(lambda: db.one(_SLEEPS), expected=True)
        check_in(db, user, "rung for")
        await eventually(lambda: mirrored.descriptions(user), ["polled", "rung for"])
        await running.stop()
        assert running.log.events.count("session.open") == 1
        assert running.log.events.count("listen.unavailable") == 1


# Both links.


async def test_a_short_deafness_is_waited_out(
    mirrors: Sequence[Mirror], db: Database, local_convex: convex.LocalConvex, link: Link, mirrored: Mirrored, user: str
) -> None:
    async with worker_at_work(settings_over(link, db, local_convex, **PIECEMEAL), mirrors) as running:
        await running.said("session.open")
        check_in_often(db, user, ROWS)
        await running.delivered(100)
        link.deaf()
        await asyncio.sleep(0.5)
        change_some(db, user)
        link.normal()
        await equal(mirrored, db, user)
        await running.stop()
        assert running.log.events.count("session.open") == 1


async def test_a_long_deafness_ends_the_session_and_loses_nothing(
    mirrors: Sequence[Mirror], db: Database, local_convex: convex.LocalConvex, link: Link, mirrored: Mirrored, user: str
) -> None:
    async with worker_at_work(settings_over(link, db, local_convex, **PIECEMEAL), mirrors) as running:
        await running.said("session.open")
        check_in_often(db, user, ROWS)
        await running.delivered(100)
        link.deaf()
        # Longer than a statement may take by the worker's own clock.
        await asyncio.sleep(2 * STATEMENT_SECONDS + 2 * DEADLINE_SECONDS)
        change_some(db, user)
        link.normal()
        await running.said("session.open", times=2)
        await equal(mirrored, db, user)
        await running.stop()
        assert running.log.events.count("database.unreachable") == 1


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_a_stop_over_a_deaf_link_ends_in_time(
    mirrors: Sequence[Mirror],
    db: Database,
    local_convex: convex.LocalConvex,
    link: Link,
    mirrored: Mirrored,
    user: str,
    busy: bool,
) -> None:
    settings = settings_over(link, db, local_convex, **PIECEMEAL)
    async with worker_at_work(settings, mirrors) as running:
        await running.said("session.open")
        if busy:
            check_in_often(db, user, ROWS)
            await running.delivered(100)
        else:
            await eventually(db.gate_is_kept, expected=True)
        link.deaf()
        # The drain time (1 s), a vain attempt to note how far it got (2 s), to let go (1 s), to close the pool (1 s).
        await running.stop(seconds=15)
        if not busy:
            check_in_often(db, user, ROWS)
        change_some(db, user)
        link.normal()
    async with worker_at_work(quick_settings(db.dsn, local_convex), mirrors):
        await equal(mirrored, db, user)


async def test_a_link_that_is_cut_in_the_middle_of_a_drain(
    mirrors: Sequence[Mirror], db: Database, local_convex: convex.LocalConvex, link: Link, mirrored: Mirrored, user: str
) -> None:
    async with worker_at_work(settings_over(link, db, local_convex, **PIECEMEAL), mirrors) as running:
        await running.said("session.open")
        check_in_often(db, user, ROWS)
        for cuts in range(1, 4):
            await running.delivered(100)
            link.cut()
            if cuts == 1:
                change_some(db, user)
            await running.said("session.open", times=cuts + 1)
        await equal(mirrored, db, user)
        await running.stop()


async def test_a_slow_link_is_only_slow(
    mirrors: Sequence[Mirror], db: Database, local_convex: convex.LocalConvex, link: Link, mirrored: Mirrored, user: str
) -> None:
    async with worker_at_work(settings_over(link, db, local_convex), mirrors) as running:
        await running.said("session.open")
        link.slow(0.02)
        check_in_often(db, user, ROWS)
        change_some(db, user)
        await equal(mirrored, db, user)
        await running.stop()
        assert running.log.events.count("session.open") == 1


# Postgres itself.


async def test_postgres_is_restarted_in_the_middle_of_a_drain(
    mirrors: Sequence[Mirror],
    postgres_flavour: postgres.Flavour,
    local_convex: convex.LocalConvex,
    mirrored: Mirrored,
    user: str,
) -> None:
    modes: tuple[postgres.Mode, ...] = ("fast", "immediate")
    with postgres.start(postgres_flavour) as server:
        dsn = server.dsn(postgres.create_database(server))
        with Database(dsn, TABLES, mirrors) as db:
            check_in_often(db, user, ROWS)
        async with worker_at_work(quick_settings(dsn, local_convex, **PIECEMEAL), mirrors) as running:
            for restarts, mode in enumerate(modes, 1):
                await running.said("session.open", times=restarts)
                await running.delivered(100)
                await asyncio.to_thread(server.restart, mode)
                with Database(dsn) as db:
                    change_some(db, user)
                    db.execute("""update "CheckIn" set note = %s where id like '%%1'""", mode)
            with Database(dsn) as db:
                await equal(mirrored, db, user)
            await running.stop()
            assert "session.rescan" not in running.log.events[running.log.events.index("database.unreachable") :]


# Convex.


@pytest.mark.parametrize("patience", [0.3, 60.0])
async def test_a_convex_that_takes_connections_and_never_answers(
    mirrors: Sequence[Mirror], db: Database, local_convex: convex.LocalConvex, link: Link, user: str, patience: float
) -> None:
    link.deaf()
    silent = convex.LocalConvex(f"http://127.0.0.1:{link.port}", local_convex.admin_key, local_convex.process)
    check_in(db, user, "1")
    settings = quick_settings(db.dsn, silent, CDC_CONVEX_TIMEOUT_SECONDS=patience)
    async with worker_at_work(settings, mirrors) as running:
        if patience < 1:
            assert (await running.said("convex.unreachable"))["cause"] == "no answer in time"
        else:
            await running.said("lease.acquired")
            await eventually(lambda: link.connections, 1)
        await running.stop(seconds=15)
    assert db.one("select holder is null from cdc.checkpoint") is True


@pytest.mark.parametrize("lasted", [10.0, 60.0])
async def test_a_link_that_is_cut_now_and_then_costs_no_long_pauses(
    link: Link,
    db: Database,
    mirrors: Sequence[Mirror],
    local_convex: convex.LocalConvex,
    monkeypatch: pytest.MonkeyPatch,
    lasted: float,
) -> None:
    """A firewall that ends connections now and then: each session was well, and Postgres is there at once."""
    async with worker_at_work(settings_over(link, db, local_convex), mirrors) as running:
        for cuts in range(1, 4):
            await running.said("session.open", times=cuts)
            monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + lasted))
            link.cut()
            assert (await running.said("database.recovered", times=cuts))["tries"] == 1
            monkeypatch.setattr(shards, "time", time)
