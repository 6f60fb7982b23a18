"""Two workers at one shard, as processes: one is stopped, killed or stalled, and the effects of both never mix."""

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc_worker.database import Database as Pool
from cdc_worker.documents import Problem
from cdc_worker.errors import Fenced
from cdc_worker.mirrors import Mirror
from cdc_worker.outbox import Shard
from cdc_worker.parking import Parking
from dev import local_convex as convex
from dev.processes import stands_still
from tests.integration.application import CHECK_INS, TABLES, Database, check_in, renamed
from tests.integration.interposed import Interposed, held_until
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import SECONDS, Child, child, environment

pytestmark = pytest.mark.one_postgres

LEASE_SECONDS = 3


@pytest.fixture
def mirror() -> Mirror:
    return renamed(CHECK_INS)[0]


@pytest.fixture
def db(database: str, mirror: Mirror) -> Iterator[Database]:
    with Database(database, TABLES, [mirror]) as opened:
        yield opened


async def said(worker: Child, event: str, *, times: int = 1) -> None:
    await asyncio.to_thread(worker.said, event, times=times)


def stop(worker: Child) -> None:
    """Until SIGCONT. Returns when it stands still: the signal takes its way."""
    worker.process.signal(signal.SIGSTOP)
    pid = worker.said("worker.started")["holder"].split(":")[1]
    deadline = time.monotonic() + SECONDS
    while not stands_still(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_one_that_stalled_with_a_batch_under_way_does_no_harm_when_it_wakes(
    db: Database, local_convex: convex.LocalConvex, mirror: Mirror, mirrored: Mirrored, tmp_path: Path, user: str
) -> None:
    async with Interposed(local_convex) as between:
        released = asyncio.Event()
        env = environment(db.dsn, between.convex, tmp_path / "toml", CDC_LEASE_SECONDS=LEASE_SECONDS)
        with child(tmp_path, env, mirrors=[mirror], name="first") as first:
            await said(first, "backfill.done")
            # It keeps its lease, once it has it, however busy the machine is.
            with child(tmp_path, env | {"CDC_LEASE_SECONDS": "60"}, name="second") as second:
                await said(second, "lease.standby")
                between.fault = held_until(released)
                check_in(db, user, "1", "what the first one read")
                await eventually(lambda: between.open, 1)
                await asyncio.to_thread(stop, first)
                between.fault = None
                check_in(db, user, "1", "what came after")
                check_in(db, user, "2", "new")
                await said(second, "session.open")
                await eventually(lambda: mirrored.descriptions(user), ["new", "what came after"])
                # Its batch is carried out now, and then it goes on where it stood.
                released.set()
                await eventually(lambda: between.open, 0)
                first.process.signal(signal.SIGCONT)
                check_in(db, user, "3", "newest")
                await said(first, "session.fenced")
                await said(first, "lease.standby")
                await eventually(lambda: mirrored.descriptions(user), ["new", "newest", "what came after"])
                assert [line["event"] for line in second.lines].count("session.open") == 1
                # The spare is as good as new.
                second.term()
                await said(first, "session.open", times=2)
                check_in(db, user, "3", "by the first one again")
                await eventually(
                    lambda: mirrored.descriptions(user), ["by the first one again", "new", "what came after"]
                )


async def test_one_that_is_killed_behind_a_pooler_is_replaced_with_its_lease(
    db: Database,
    pooled_database: str,
    local_convex: convex.LocalConvex,
    mirror: Mirror,
    mirrored: Mirrored,
    tmp_path: Path,
    user: str,
) -> None:
    # With a direct connection it is at once, and so it is after a SIGTERM: test_worker_process.py.
    env = environment(pooled_database, local_convex, tmp_path / "toml", CDC_LEASE_SECONDS=LEASE_SECONDS)
    with child(tmp_path, env, mirrors=[mirror], name="first") as first:
        await said(first, "session.open")
        with child(tmp_path, env, name="second") as second:
            await said(second, "lease.standby")
            first.process.signal(signal.SIGKILL)
            check_in(db, user, "1", "after")
            await said(second, "lease.acquired")
            await eventually(lambda: mirrored.descriptions(user), ["after"])


async def test_who_was_replaced_parks_and_settles_nothing(db: Database) -> None:
    (mirror_id,) = db.execute("select id from cdc.mirror")[0]
    key = (mirror_id, "1")
    problem: Problem = ("rejected", "no")
    db.execute("update cdc.checkpoint set token = 7")
    async with Pool(db.dsn, statement_seconds=5) as pool:
        before, now = (Parking(pool, Shard(0, 1), token) for token in (6, 7))
        with pytest.raises(Fenced):
            await before.park({key: problem})
        assert db.one("select count(*) from cdc.parked_key") == 0
        await now.park({key: problem})
        await before.load()
        await before.settle([key])
        assert db.one("select count(*) from cdc.parked_key") == 1
        await now.settle([key])
        assert db.one("select count(*) from cdc.parked_key") == 0
