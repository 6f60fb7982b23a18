"""What Convex, or whoever is between, may do to a request and its answer: nothing is lost, or parked without cause."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
from aiohttp import web
from convex.http_client import ConvexHttpClient

from cdc_worker import parking
from cdc_worker.database import Database as Pool
from cdc_worker.deployment import Deployment
from cdc_worker.errors import Transient
from cdc_worker.mirrors import Mirror
from cdc_worker.replay import replay
from dev import local_convex as convex
from dev import postgres
from tests.integration.application import CHECK_INS, STATUS, TABLES, Database, check_in, renamed
from tests.integration.interposed import (
    Fault,
    Interposed,
    Run,
    answers,
    answers_after,
    drips,
    floods,
    hangs_after,
    resets,
    resets_after,
    twice,
)
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import quick_settings, worker_at_work

pytestmark = pytest.mark.one_postgres

# Longer than an answer takes on a busy machine: a refusal after an answer that did not come is a new epoch.
PATIENCE_SECONDS = 1.5


@pytest.fixture
def mirrors() -> tuple[Mirror, ...]:
    return renamed(CHECK_INS)


@pytest.fixture
async def between(local_convex: convex.LocalConvex) -> AsyncIterator[Interposed]:
    async with Interposed(local_convex) as opened:
        yield opened


PAUSED = '{"status": "error", "errorMessage": "[Request ID: 1] Server Error"}'
GONE = '{"status": "error", "errorMessage": "Could not find public function for \'cdc:apply\'."}'
OTHER_FORM = '{"status": "success", "value": {"outcome": "other"}}'
FEWER = '{"status": "success", "value": {"outcome": "applied", "verdicts": []}}'
HTML = "<html><body>Bad gateway</body></html>"

FAULTS: dict[str, Fault] = {
    "too many at once": answers(429, '{"code": "TooManyConcurrentRequests", "message": "wait"}'),
    "a conflict": answers(503, '{"code": "OptimisticConcurrencyControlFailure", "message": "again"}'),
    "an error of the server's own": answers_after(500, '{"code": "InternalServerError", "message": "sorry"}'),
    "a proxy's page": answers(502, HTML),
    "a proxy's page instead of the answer": answers_after(200, HTML),
    "half of an answer": answers_after(200, '{"status": "success", "value": {'),
    "an answer of another form": answers_after(200, OTHER_FORM),
    "too few verdicts": answers_after(200, FEWER),
    "a deployment that is not there": answers(404, ""),
    "a key that is not taken": answers(401, '{"code": "BadAdminKey", "message": "no"}'),
    "a malformed key": answers(400, '{"code": "InvalidAdminKey", "message": "no"}'),
    "a malformed request": answers(400, '{"code": "BadJsonBody", "message": "no"}'),
    "a paused deployment": answers(200, PAUSED),
    "functions that are gone": answers(200, GONE),
    "a reset before": resets,
    "a reset after": resets_after,
    "a slow drip": drips,
    "no answer at all": hangs_after,
    "two runs": twice,
}


async def test_whatever_becomes_of_a_request(  # fixtures
    mirrors: Sequence[Mirror], db: Database, between: Interposed, mirrored: Mirrored, user: str
) -> None:
    settings = quick_settings(db.dsn, between.convex, CDC_CONVEX_TIMEOUT_SECONDS=PATIENCE_SECONDS)
    async with worker_at_work(settings, mirrors) as running:
        await running.said("backfill.done")
        notes = {}
        for what, fault in FAULTS.items():
            before, between.fault = between.met, fault
            for key in ("of all of them", what):
                check_in(db, user, key, what)
                notes[key] = what
            # Both changes may be one request, and only a fault that refuses it meets it again.
            await met(between, before + (1 if fault is twice else 2))
            between.fault = None
            await eventually(lambda: mirrored.descriptions(user), sorted(notes.values()))
        await running.stop()
        assert running.log.of("key.parked") == []
        assert db.one("select count(*) from cdc.parked_key") == 0
        # Each was waited out where it stood.
        assert running.log.events.count("session.open") == 1


async def test_an_answer_without_end_is_not_kept(between: Interposed) -> None:
    between.fault = floods
    async with Deployment(between.convex.url, None, timeout_seconds=30) as deployment:
        with pytest.raises(Transient, match="whose body does not end"):
            await deployment.call("query", "cdc:keys", {})


async def met(between: Interposed, requests: int) -> None:
    await eventually(lambda: between.met >= requests, expected=True)


def refuses(word: bytes, status: int = 200, said: str = PAUSED) -> Fault:
    """Convex fails on a batch with this word in it, or who is in between takes it for an attack."""

    async def fault(request: web.Request, body: bytes, run: Run) -> web.StreamResponse:
        if word in body:
            return web.Response(status=status, text=said)
        answered, answer = await run()
        return web.Response(status=answered, body=answer)

    return fault


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (refuses(b"poison"), "[Request ID: 1] Server Error"),
        (
            refuses(b"poison", 403, "<html>blocked</html>"),
            "HTTP 403: something in front of CONVEX_URL (a firewall?) forbids this request",
        ),
    ],
    ids=["Convex", "a firewall"],
)
async def test_a_key_that_convex_alone_refuses_is_found_and_parked(  # fixtures
    mirrors: Sequence[Mirror],
    db: Database,
    between: Interposed,
    mirrored: Mirrored,
    user: str,
    fault: Fault,
    reason: str,
) -> None:
    between.fault = fault
    async with worker_at_work(quick_settings(db.dsn, between.convex), mirrors) as running:
        await running.said("session.open")
        with db.connection.transaction():
            for n in range(20):
                check_in(db, user, str(n), "poison" if n in {3, 11} else f"note {n}")
        wanted = sorted(f"note {n}" for n in range(20) if n not in {3, 11})
        await eventually(lambda: mirrored.descriptions(user), wanted)
        parked = "select key, class, reason from cdc.parked_key order by key"
        refused = [(f"{user}-{n}", "refused", reason) for n in (11, 3)]
        await eventually(lambda: db.execute(parked), refused)
        assert "convex.misconfigured" not in running.log.events
        # A later good change settles it.
        check_in(db, user, "3", "note 3")
        db.execute("""delete from "CheckIn" where id = %s""", f"{user}-11")
        await eventually(lambda: mirrored.descriptions(user), sorted([*wanted, "note 3"]))
        await eventually(lambda: db.execute(parked), [])


@pytest.fixture
def latin(postgres_server: postgres.Server) -> Iterator[str]:
    """The URL of a database whose encoding is LATIN1."""
    with postgres_server.admin() as superuser:
        superuser.execute("create database latin owner application encoding 'LATIN1' template template0")
    try:
        yield postgres_server.dsn("latin")
    finally:
        postgres.drop_database(postgres_server, "latin")


async def test_a_reason_that_the_database_has_no_characters_for_is_kept_as_escapes(
    latin: str, mirrors: Sequence[Mirror], between: Interposed, mirrored: Mirrored, user: str
) -> None:
    said = '{"status": "error", "errorMessage": "Server Error \u2192 no"}'
    between.fault = refuses(b"poison", said=said)
    with Database(latin, TABLES, mirrors) as db:
        async with worker_at_work(quick_settings(latin, between.convex), mirrors):
            check_in(db, user, "1", "poison")
            check_in(db, user, "2", "caf\u00e9")
            await eventually(lambda: mirrored.descriptions(user), ["caf\u00e9"])
            await eventually(
                lambda: db.execute("select key, reason from cdc.parked_key"),
                [(f"{user}-1", r"Server Error \u2192 no")],
            )
            check_in(db, user, "3", "after")
            await eventually(lambda: mirrored.descriptions(user), ["after", "caf\u00e9"])


async def test_keys_that_convex_refuses_one_by_one_are_not_said_one_by_one(
    mirrors: Sequence[Mirror], db: Database, between: Interposed, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    between.fault = refuses(b"poison")
    async with worker_at_work(quick_settings(db.dsn, between.convex), mirrors) as running:
        await running.said("backfill.done")

        async def refuse(keys: range) -> None:
            with db.connection.transaction():
                for n in keys:
                    check_in(db, user, str(n), "poison")
            await eventually(lambda: db.one("select count(*) from cdc.parked_key"), keys.stop)
            # What is in the database already is said a moment later.
            await running.at_rest(db)

        await refuse(range(10))
        assert [line["keys"] for line in running.log.of("key.parked")] == [1]
        monkeypatch.setattr(parking, "_REMINDER_SECONDS", 0.0)
        await refuse(range(10, 11))
        assert [line["keys"] for line in running.log.of("key.parked")] == [1, 10]
        await running.stop()


async def test_functions_that_come_back_just_before_the_probe_are_no_fault_of_the_key(  # fixtures
    mirrors: Sequence[Mirror], db: Database, between: Interposed, mirrored: Mirrored, user: str
) -> None:
    refused = 0

    async def once(request: web.Request, body: bytes, run: Run) -> web.StreamResponse:
        nonlocal refused
        if b"a key alone" in body and refused == 0:
            refused += 1
            return web.Response(text=GONE)
        status, answer = await run()
        return web.Response(status=status, body=answer)

    async with worker_at_work(quick_settings(db.dsn, between.convex), mirrors) as running:
        await running.said("backfill.done")
        between.fault = once
        check_in(db, user, "1", "a key alone")
        await eventually(lambda: mirrored.descriptions(user), ["a key alone"])
        await running.stop()
        assert refused == 1
        assert running.log.of("key.parked") == []


def takes_at_most(size: int, status: int) -> Fault:
    """A proxy that knows the largest body that anybody needs."""

    async def fault(request: web.Request, body: bytes, run: Run) -> web.StreamResponse:
        if len(body) > size:
            return web.Response(status=status, text=HTML)
        answered, answer = await run()
        return web.Response(status=answered, body=answer)

    return fault


@pytest.mark.parametrize("status", [400, 413])
async def test_a_batch_that_is_too_large_for_somebody_in_between_is_made_smaller(
    mirrors: Sequence[Mirror], db: Database, between: Interposed, mirrored: Mirrored, user: str, status: int
) -> None:
    between.fault = takes_at_most(10_000, status)
    async with worker_at_work(quick_settings(db.dsn, between.convex), mirrors) as running:
        await running.said("session.open")
        db.execute(
            """
            insert into "CheckIn" select %s || '-' || n, %s, repeat('x', 1000) || n, null, now()
            from generate_series(1, 60) as n
            """,
            user, user,
        )  # fmt: skip
        await eventually(lambda: len(mirrored.activities(user)), 60)
        await running.stop()
        assert running.log.of("key.parked") == []
        assert running.log.events.count("session.open") == 1


def one_at_a_time(seconds: float) -> Fault:
    """Requests wait in line, and run also when nobody waits for them any more."""
    turn = asyncio.Lock()

    async def fault(_request: web.Request, body: bytes, run: Run) -> web.Response:
        async with turn:
            await asyncio.sleep(seconds)
            status, answer = await run()
        return web.Response(status=status, body=answer, content_type="application/json")

    return fault


async def test_more_at_once_than_convex_answers_in_time_stands_in_nobodys_way(
    mirrors: Sequence[Mirror], db: Database, between: Interposed, user: str
) -> None:
    settings = quick_settings(db.dsn, between.convex, CDC_CONVEX_TIMEOUT_SECONDS=0.5, CDC_BATCH_KEYS=10)
    async with worker_at_work(settings, mirrors) as running:
        await running.said("session.open")
        between.fault = one_at_a_time(0.1)
        db.execute(
            """insert into "CheckIn" select n::text, %s, null, null, now() from generate_series(1, 300) as n""", user
        )
        await running.at_rest(db, seconds=60)
        between.fault = None
        assert running.log.of("convex.unreachable")[0]["cause"] == "no answer in time"
        assert running.log.events.count("session.open") == 1


# What somebody does to documents by hand is put right with the next change of their rows.

BY_HAND = """
import { internalMutationGeneric } from "convex/server";
import { v } from "convex/values";

const tables = ["activities", "userStatus"];

export const remove = internalMutationGeneric({ args: {}, handler: async (ctx) => {
  for (const table of tables) for (const each of await ctx.db.query(table).collect()) await ctx.db.delete(each._id);
} });

export const edit = internalMutationGeneric({ args: { description: v.string(), lastCheckIn: v.number() },
  handler: async (ctx, { description, lastCheckIn }) => {
    for (const each of await ctx.db.query("activities").collect()) await ctx.db.patch(each._id, { description });
    for (const each of await ctx.db.query("userStatus").collect()) await ctx.db.patch(each._id, { lastCheckIn });
  } });
"""


@pytest.fixture(scope="module")
def open_to_hands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[convex.LocalConvex]:
    """A deployment with two more functions, by which somebody reaches into it."""
    folder: Path = tmp_path_factory.mktemp("functions")
    shutil.copytree(convex.ROOT / "convex", folder / "convex")
    (folder / "convex/hand.ts").write_text(BY_HAND)
    (folder / "node_modules").symlink_to(convex.ROOT / "dev/node_modules")
    (folder / "package.json").write_text('{"type": "module"}')
    with convex.start(functions=folder / "convex") as running:
        yield running


async def test_documents_that_were_edited_or_removed_by_hand(
    mirrors: Sequence[Mirror], database: str, open_to_hands: convex.LocalConvex, user: str
) -> None:
    mirrored = Mirrored(open_to_hands.url, open_to_hands.admin_key)
    hand = ConvexHttpClient(open_to_hands.url)
    hand.set_admin_auth(open_to_hands.admin_key)
    both = (*mirrors, STATUS)
    with Database(database, TABLES, both) as db:

        def change(number: int) -> None:
            check_in(db, user, "1", f"note {number}")
            db.execute(
                """
                insert into "User" values (%s, 'A', to_timestamp(%s) at time zone 'UTC')
                on conflict (id) do update set "lastCheckInAt" = excluded."lastCheckInAt"
                """,
                user, number,
            )  # fmt: skip

        def seen() -> tuple[list[str], object]:
            return mirrored.descriptions(user), (mirrored.status(user) or {}).get("lastCheckIn")

        async with worker_at_work(quick_settings(database, open_to_hands), both) as running:
            # What it reads anew would put right what the hand does.
            await running.said("backfill.done", times=len(both))
            change(1)
            await eventually(seen, (["note 1"], 1000.0))

            await asyncio.to_thread(hand.mutation, "hand:edit", {"description": "by hand", "lastCheckIn": 7.0})
            assert seen() == (["by hand"], 7.0)
            change(2)
            await eventually(seen, (["note 2"], 2000.0))

            # To just what the row says next, under the version of what it said before; and the row goes on.
            await asyncio.to_thread(hand.mutation, "hand:edit", {"description": "note 3", "lastCheckIn": 3000.0})
            change(3)
            change(4)
            await eventually(seen, (["note 4"], 4000.0))

            await asyncio.to_thread(hand.mutation, "hand:remove", {})
            assert seen() == ([], None)
            change(5)
            await eventually(seen, (["note 5"], 5000.0))

            # Without a change of the row: a replay, as the command makes it.
            await asyncio.to_thread(hand.mutation, "hand:remove", {})
            async with Pool(database, statement_seconds=5) as pool:
                await replay(pool, [number for (number,) in db.execute("select id from cdc.mirror")], hours=1)
            await eventually(seen, (["note 5"], 5000.0))

            # What is gone already is no obstacle to its own delete, nor to coming back.
            await asyncio.to_thread(hand.mutation, "hand:remove", {})
            db.execute("""delete from "CheckIn"; delete from "User" """)
            change(6)
            await eventually(seen, (["note 6"], 6000.0))
            db.execute("""delete from "CheckIn"; delete from "User" """)
            await eventually(seen, ([], None))
