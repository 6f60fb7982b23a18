"""A deploy: `migrate` has run with the new cdc_worker.toml, and the worker of the old one is still at work."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager

import pytest

from cdc_worker import care
from cdc_worker.mirrors import Mirror, Source
from dev import local_convex as convex
from tests.integration.application import CHECK_INS, TABLES, Database, renamed, rows_of
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import Running, quick_settings, worker_at_work

pytestmark = pytest.mark.one_postgres

Work = Callable[[Sequence[Mirror]], AbstractAsyncContextManager[Running]]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(care, "_MENDING_SECONDS", 0.1)
    monkeypatch.setattr(care, "_SELDOM_SECONDS", 0.1)
    monkeypatch.setattr(care, "_RESCAN_SECONDS", 0.05)


@pytest.fixture
def old() -> Mirror:
    return renamed(CHECK_INS)[0]


@pytest.fixture
def db(database: str, old: Mirror, user: str) -> Iterator[Database]:
    with Database(database, TABLES, [old]) as opened:
        opened.execute("""insert into "CheckIn" values (%s, %s, 'x', null, now())""", f"{user}-1", user)
        yield opened


@pytest.fixture
def work(database: str, local_convex: convex.LocalConvex) -> Work:
    return lambda mirrors: worker_at_work(quick_settings(database, local_convex), mirrors)


async def rounds_of_care(db: Database, rounds: int) -> None:
    """Waits until the old worker has looked so often whether there is something to be scanned."""
    for _ in range(rounds):
        db.execute("update cdc.mirror set tables = '{}'")  # each round notes them anew
        await eventually(lambda: db.one("select every (tables <> '{}') from cdc.mirror"), expected=True)


async def test_the_rescan_for_a_new_query_is_left_to_the_new_worker(
    db: Database, work: Work, mirrored: Mirrored, old: Mirror, user: str
) -> None:
    new = old.model_copy(update={"query": old.query.replace("coalesce(note, 'Checked in')", "note || ' anew'")})
    async with work([old]) as running:
        await eventually(lambda: mirrored.descriptions(user), ["x"])
        await running.said("backfill.done")
        await asyncio.to_thread(db.migrate, [new])
        await rounds_of_care(db, 3)
        assert db.one("select phase from cdc.backfill") == "rows"
    async with work([new]):
        await eventually(lambda: mirrored.descriptions(user), ["x anew"])


@pytest.mark.parametrize("key", [("id", "userId"), ("n",)], ids=["of more columns", "of another type"])
async def test_a_mirror_gets_another_key_in_the_middle_of_a_rescan(
    db: Database, work: Work, mirrored: Mirrored, old: Mirror, user: str, key: tuple[str, ...]
) -> None:
    db.execute("""alter table "CheckIn" add column n bigint default 7""")
    columns = ", ".join(f'"{name}"' for name in key)
    new = old.model_copy(
        update={
            "key": key,
            "query": f"""
                select {columns}, "userId" as user_id, 'alert' as type, 'anew' as description, now() as timestamp
                from "CheckIn"
            """,
            "sources": (Source(table='"CheckIn"', key=key),),
        }
    )
    async with work([old]) as running:
        await running.said("backfill.done")
    # As one is that was cut off.
    db.execute("update cdc.backfill set phase = 'rows', after = 'not a number'")
    await asyncio.to_thread(db.migrate, [new])
    async with work([new]) as running:
        await eventually(lambda: mirrored.descriptions(user), ["anew"])
        await eventually(lambda: db.one("select phase from cdc.backfill"), "done")
        assert "care.failed" not in running.log.events


async def test_a_mirror_that_the_old_worker_does_not_know_is_truncated(
    db: Database, work: Work, mirrored: Mirrored, old: Mirror, user: str
) -> None:
    db.execute("create table other (id text primary key)")
    new = rows_of("other", name=f"others-{user}")
    async with work([old]) as running:
        await eventually(lambda: mirrored.descriptions(user), ["x"])
        await asyncio.to_thread(db.migrate, [old, new])
        await asyncio.to_thread(db.execute, "truncate other")
        assert "restart it" in (await running.said("database.not_ready"))["cause"]
    db.execute("insert into other values ('1')")
    async with work([old, new]):
        await eventually(lambda: mirrored.keys(new.name), ["1"])


async def test_a_worker_without_a_mirror_of_the_database_passes_over_none_of_its_changes(
    db: Database, work: Work, mirrored: Mirrored, old: Mirror, user: str
) -> None:
    """The old worker takes over once more when the new mirror has been filled; or two workers have two files."""
    db.execute("create table other (id text primary key)")
    new = rows_of("other", name=f"others-{user}")
    await asyncio.to_thread(db.migrate, [old, new])
    async with work([old, new]) as running:
        await running.said("backfill.done", times=2)
    db.execute("insert into other values ('1')")
    async with work([old]) as running:
        assert new.name in (await running.said("database.not_ready"))["cause"]
    async with work([old, new]):
        await eventually(lambda: mirrored.keys(new.name), ["1"])
