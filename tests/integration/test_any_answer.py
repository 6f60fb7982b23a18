"""Whatever answers in Convex' place: the worker lives, says what it hears, and goes on when Convex is back."""

import asyncio
import json
import uuid
from collections import Counter

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdc_worker import care, outage
from dev import local_convex as convex
from tests.integration.application import CHECK_INS, TABLES, Database, renamed
from tests.integration.interposed import Interposed, Run
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import quick_settings, worker_at_work
from tests.unit.test_deployment_answers import answers, statuses

pytestmark = pytest.mark.one_postgres

# Half of a surrogate pair is JSON, and nothing that Postgres, a log or Convex could hold. NUL is no better.
texts = st.text(max_size=6) | st.sampled_from(["\ud800", "a\udfffb", "\0", "x" * 10_000, "~"])
numbers = st.integers(-3, 1_000) | st.floats() | st.booleans() | st.none()
verdicts = st.sampled_from(["stale", "unchanged?", 5, None]) | st.fixed_dictionaries({"rejected": texts | numbers})
# In the form of each function's own, or nearly.
values = (
    st.fixed_dictionaries(
        {"deployment": texts, "epoch": numbers, "previous": numbers, "previousSaves": numbers}, optional={"more": texts}
    )
    | st.fixed_dictionaries({"outcome": st.just("applied"), "verdicts": st.lists(verdicts, max_size=3)})
    | st.fixed_dictionaries({"outcome": st.sampled_from(["fenced", "other"]), "epoch": numbers})
    | st.lists(texts | numbers, max_size=3)
    | numbers
    | texts
)
likely = st.fixed_dictionaries({"status": st.just("success"), "value": values}) | st.fixed_dictionaries(
    {"status": st.just("error"), "errorMessage": texts}, optional={"errorData": values}
)
# The status, and the body.
said = st.tuples(st.just(200), likely.map(lambda answer: json.dumps(answer).encode())) | st.tuples(
    statuses.filter(lambda status: status not in {204, 301, 302}),
    answers.map(lambda answer: json.dumps(answer).encode()) | st.binary(max_size=40),
)


def success(value: object) -> tuple[int, bytes]:
    return 200, json.dumps({"status": "success", "value": value}).encode()


# In the form of the worker's own functions, and with texts that Postgres does not take.
UNSPEAKABLE: list[tuple[str, tuple[int, bytes]]] = [
    *(
        ("cdc:open", success({"deployment": text, "epoch": 5, "previous": None, "previousSaves": 0}))
        for text in ("\ud800", "a\0")
    ),
    ("cdc:open", success({"deployment": "d", "epoch": 1e300, "previous": None, "previousSaves": 0})),
    *(
        ("cdc:apply", success({"outcome": "applied", "verdicts": [{"rejected": text}]}))
        for text in ("\ud800", "a\0", "x" * 100_000)
    ),
    ("cdc:apply", (200, json.dumps({"status": "error", "errorMessage": "\ud800\0"}).encode())),
    ("cdc:keys", success(["\ud800", "\0", "a\udfff"])),
    ("cdc:keys", (503, b"\xff<html>")),
]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "_FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(care, "_SELDOM_SECONDS", 0.2)
    monkeypatch.setattr(care, "_RESCAN_SECONDS", 0.01)


@pytest.mark.timeout(400)
def test_the_worker_outlives_any_answer_and_loses_nothing(database: str, local_convex: convex.LocalConvex) -> None:
    mirrored = Mirrored(local_convex.url, local_convex.admin_key)
    heard: Counter[str] = Counter()

    async def outlives(script: list[tuple[int, bytes]], to: str = "") -> None:
        user = f"user-{uuid.uuid4().hex[:8]}"
        (mirror,) = renamed(CHECK_INS)
        left, unheard = iter(script), len(script)

        async def fault(_request: web.Request, asked: bytes, run: Run) -> web.Response:
            nonlocal unheard
            if unheard and to.encode() in asked:
                unheard -= 1
                status, body = next(left)
            else:
                status, body = await run()
            return web.Response(status=status, body=body, content_type="application/json")

        def insert(key: str) -> None:
            db.execute("""insert into "CheckIn" values (%s, %s, %s, null, now())""", f"{user}-{key}", user, key)

        with Database(database, 'drop schema if exists cdc cascade; drop table if exists "CheckIn"') as db:
            db.execute(TABLES.partition("create type")[0].replace('"User"', f'"User {user}"'))
            await asyncio.to_thread(db.migrate, [mirror])
            async with Interposed(local_convex) as between:
                between.fault = fault
                config = quick_settings(database, between.convex, CDC_BACKOFF_SECONDS=0.05, CDC_HEARTBEAT_SECONDS=60)
                async with worker_at_work(config, [mirror]) as running:
                    insert("during")
                    while unheard:
                        await asyncio.wait({running.task}, timeout=0.01)
                        assert not running.task.done(), running.died_of()
                    insert("after")
                    # What somebody said of a key in Convex' name is settled by the next change, or a retry.
                    db.execute("""update "CheckIn" set note = note || '.'""")
                    await eventually(lambda: mirrored.descriptions(user), ["after.", "during."])
                    await eventually(lambda: db.one("select count(*) from cdc.parked_key"), 0)
                heard.update(running.log.events)

    with asyncio.Runner() as runner:
        for function, answer in UNSPEAKABLE:
            runner.run(asyncio.wait_for(outlives([answer], function), 60))

        @settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
        @given(st.lists(said, min_size=20, max_size=40))
        def holds(script: list[tuple[int, bytes]]) -> None:
            runner.run(asyncio.wait_for(outlives(script), 60))

        holds()
    assert heard["convex.misconfigured"]
    assert heard["convex.unreachable"]
