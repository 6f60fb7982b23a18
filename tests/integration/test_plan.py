"""The events that Postgres makes are those that plain Python would make, whatever is in the rows."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest
from convex.values import json_to_convex
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cdc_worker.catalog import check
from cdc_worker.database import connect
from cdc_worker.documents import LARGEST_DOCUMENT, Event, EventMaker
from cdc_worker.keys import join_key, key_arrays
from cdc_worker.mirrors import Mirror, Source
from cdc_worker.plan import Plan
from cdc_worker.safe_json import DEEPEST, LONGEST_KEY, MOST_FIELDS, MOST_ITEMS, PLAIN_BYTES, parse, restore
from tests.unit.test_safe_json import exact, fits, values, written

NUMBER = 7
EVERY_BYTE = 2_147_483_647

# What Postgres can store in a text: all but NUL and surrogates. And what JSON, SQL or JavaScript stumble over.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20) | st.sampled_from(
    [
        "",
        '"',
        "\\",
        '\\"',
        "\b\f\n\r\t\x1b\x7f",
        "\u2028\u2029",
        "\U0001f600é",
        "'; --",
        "$1 %s {}",
        "null",
        "}}",
        "~{7e}",
    ]
)
instants = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)) | st.sampled_from(  # noqa: DTZ001
    [
        datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC),
    ]
)
endless = st.sampled_from(["infinity", "-infinity"])


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


# A JSON text of a `json` column stays as it was written. NUL in an escape is for `json` alone.
metadata = st.builds(
    lambda value, space: (
        written(value).replace(":", f"{space}:{space}") if '"' not in written(value) else written(value)
    ),
    values,
    st.sampled_from(["", " ", "\n"]),
) | st.sampled_from(
    ['{"":1}', '{"a"\n:1}', '{"é" :1}', '["é", ": 1e5"]', "-0", " 1e5", "[\t-0.0]", '{"$a":"$b"}', "[" * 13 + "]" * 13]
)

ACTIVITY = Mirror(
    name="rows",
    target="activity",
    key=("id", "part"),
    query="select id, part, owner as user_id, kind as type, note as description, at as timestamp, meta as metadata"
    " from a",
    sources=(Source(table="a", key=("id", "part")),),
)
STATUS = Mirror(
    name="status",
    target="status",
    key=("user_id",),
    query="select id as user_id, seen as last_check_in, due as next_due, day as alert_triggered_at,"
    " level as alert_level from s",
    sources=(Source(table="s", key=("id",)),),
)
TABLES = """
create table a (id text, part bigint, owner text, kind text, note text, at timestamptz, meta json);
create table s (id text, seen timestamptz, due timestamp, day date, level text);
"""


class Events:
    """What the plan of a mirror makes of rows that nobody else sees."""

    def __init__(self, connection: psycopg.Connection[Any], plan: Plan, table: str) -> None:
        self._connection = connection
        self._plan = plan
        self._columns = ROWS[table]
        self._insert = f"insert into {table} values ({', '.join(['%s'] * len(ROWS[table]))})"

    def of(self, row: Mapping[str, Any]) -> tuple[Any, str | None]:
        """The value that Convex gets for the only row, and the reason if it gets none."""
        key = key_of(self._plan.mirror, row)
        with self._connection.transaction(force_rollback=True):
            self._connection.execute(self._insert, [row[name] for name in self._columns])
            cursor = psycopg.RawCursor(self._connection)
            arrays = key_arrays([key], self._plan.key_types)
            (found,) = cursor.execute(self._plan.documents, (*arrays, EVERY_BYTE), binary=True).fetchall()
        event = EventMaker(self._plan, 3, NUMBER).put(found)
        assert (event.mirror_id, event.key) == (3, key)
        if event.problem is not None:
            return None, event.problem[1]
        assert event.text.count(b'"metadata":') <= 1
        return json_to_convex(json.loads(event.text, parse_int=float)), None


ROWS: Mapping[str, Sequence[str]] = {
    "a": ("id", "part", "user_id", "type", "description", "timestamp", "metadata"),
    "s": ("user_id", "last_check_in", "next_due", "alert_triggered_at", "alert_level"),
}
FIELDS = {
    "user_id": "userId",
    "last_check_in": "lastCheckIn",
    "next_due": "nextDue",
    "alert_triggered_at": "alertTriggeredAt",
    "alert_level": "alertLevel",
}


def key_of(mirror: Mirror, row: Mapping[str, Any]) -> str:
    return join_key([str(row[name]) for name in mirror.key])


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection[Any]]:
    # Without a zone it is UTC, whatever the session's zone.
    with psycopg.connect(database, autocommit=True, options="-c timezone=America/New_York") as opened:
        opened.execute(TABLES)
        yield opened


async def plan_of(dsn: str, mirror: Mirror) -> Plan:
    async with await connect(dsn) as connection:
        return await check(connection, mirror)


def milliseconds(value: datetime | date) -> float:
    instant = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day, tzinfo=UTC)
    return float((instant.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1))


def expected(mirror: Mirror, row: Mapping[str, Any]) -> tuple[Any, str | None]:
    """By the words of docs/mirrors.md, in Python."""
    for name in ("user_id", "type", "description", "timestamp"):
        if name in row and row[name] is None:
            return None, f"{name} is null: let the query leave such rows out, or give a value with coalesce()"
    document: dict[str, Any] = {}
    for name in ("timestamp", "last_check_in", "next_due", "alert_triggered_at"):
        if row.get(name) in {"infinity", "-infinity"}:
            return None, f"{name} is infinite"
    for name, value in row.items():
        if value is None or name in {"id", "part"}:
            continue
        if name == "metadata":
            document[name] = parse(value)
        else:
            document[FIELDS.get(name, name)] = milliseconds(value) if isinstance(value, date) else value
    return {
        "key": f"{mirror.name}:{key_of(mirror, row)}",
        "number": 7.0,
        "target": mirror.target,
        "document": document,
    }, None


# Whatever the machine is busy with: what is slow is Postgres, once for each example.
RELAXED = settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
PLAIN = {
    "id": "1",
    "part": 2,
    "user_id": "u",
    "type": "alert",
    "description": "x",
    "timestamp": datetime(2026, 1, 2, tzinfo=UTC),
}


@pytest.mark.timeout(300)
def test_an_activity_is_as_plain_python_makes_it(database: str, connection: psycopg.Connection[Any]) -> None:
    events = Events(connection, asyncio.run(plan_of(database, ACTIVITY)), "a")

    @RELAXED
    @given(
        st.fixed_dictionaries(
            {
                "id": texts,
                "part": st.integers(-(2**63), 2**63 - 1),
                "user_id": maybe(texts),
                "type": maybe(texts),
                "description": maybe(texts),
                "timestamp": maybe(instants | endless),
                "metadata": maybe(metadata),
            }
        )
    )
    @example(PLAIN | {"metadata": '["~{json}1"]'})
    @example(PLAIN | {"metadata": '{"a":"\\u0000\\ud800"}'})
    @example(PLAIN | {"metadata": '{"id":"0cc175b9c0f1b6a831c399e269772661","n":[1.5, 2, -3]}'})
    @example(PLAIN | {"metadata": "9007199254740993"})
    @example(PLAIN | {"metadata": None})
    @example(PLAIN | {"metadata": "[" * 14 + "]" * 14})
    @example(PLAIN | {"metadata": json.dumps({key: [0, {}] for key in "abcdefg"})})
    def holds(row: Mapping[str, Any]) -> None:
        assert events.of(row) == expected(ACTIVITY, row)

    holds()


@pytest.mark.timeout(300)
def test_a_status_is_as_plain_python_makes_it(database: str, connection: psycopg.Connection[Any]) -> None:
    events = Events(connection, asyncio.run(plan_of(database, STATUS)), "s")

    @RELAXED
    @given(
        st.fixed_dictionaries(
            {
                "user_id": texts,
                "last_check_in": maybe(instants | endless),
                "next_due": maybe(instants.map(lambda at: at.replace(tzinfo=None)) | endless),
                "alert_triggered_at": maybe(st.dates() | endless),
                "alert_level": maybe(texts),
            }
        )
    )
    def holds(row: Mapping[str, Any]) -> None:
        assert events.of(row) == expected(STATUS, row)

    holds()


def test_times_beyond_pythons_own(connection: psycopg.Connection[Any], database: str) -> None:
    events = Events(connection, asyncio.run(plan_of(database, STATUS)), "s")
    row = {"user_id": "u", "last_check_in": "4713-01-01 00:00:00Z BC", "next_due": "294276-12-31 23:59:59.999999"}
    found, _ = events.of(row | {"alert_triggered_at": "5874897-12-31", "alert_level": None})
    assert found["document"] == {
        "userId": "u",
        "lastCheckIn": -210863520000000.0,
        "nextDue": 9224318015999999.0,
        "alertTriggeredAt": 185331706992000000.0,
    }


JSONB = Mirror(
    name="jsonb",
    target="activity",
    key=("id",),
    query="select id, 'u' as user_id, 'alert' as type, 'x' as description, now() as timestamp, meta as metadata from j",
    sources=(Source(table="j", key=("id",)),),
)
# The limits of the rule and of Convex, from both sides; and of what jsonb holds.
LIMITS = [
    "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1),
    "[" * DEEPEST + "]" * DEEPEST,
    "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1),
    '{"a":' * 5_000 + "1" + "}" * 5_000,
    json.dumps([0] * MOST_ITEMS),
    json.dumps([0] * (MOST_ITEMS + 1)),
    json.dumps({f"k{n}": n for n in range(MOST_FIELDS)}),
    json.dumps({f"k{n}": n for n in range(MOST_FIELDS + 1)}),
    json.dumps({"k" * LONGEST_KEY: 1}),
    json.dumps({"k" * (LONGEST_KEY + 1): 1}),
    json.dumps("x" * (PLAIN_BYTES - 2)),
    json.dumps("x" * (PLAIN_BYTES - 1)),
    json.dumps("x" * 1_040_000),
    json.dumps("x" * 1_050_000),
    json.dumps("\U0001f600" * 262_100),
    json.dumps(["~{json}"] * 100_000),
    "9" * 131_072,
    "-0.000" + "1" * 16_000,
    "1e-16383",
    '{"a":1,"a":2,"":{"":[]}}',
]


@pytest.mark.timeout(400)
def test_any_jsonb_comes_back_equal_or_says_why_it_cannot(database: str, connection: psycopg.Connection[Any]) -> None:
    """Whatever Postgres takes as jsonb, in its own words: no digit and no character of it is lost."""
    connection.execute("create table j (id text, meta jsonb)")
    plan = asyncio.run(plan_of(database, JSONB))
    arrived: Counter[bool] = Counter()

    def reading(text: str) -> tuple[str, Event] | None:
        with connection.transaction(force_rollback=True):
            try:
                ((stored,),) = connection.execute("insert into j values ('1', %s) returning meta::text", [text])
            except psycopg.DataError:  # jsonb does not hold it
                return None
            cursor = psycopg.RawCursor(connection)
            (found,) = cursor.execute(plan.documents, (*key_arrays(["1"], plan.key_types), EVERY_BYTE), binary=True)
        return stored, EventMaker(plan, 3, NUMBER).put(found)

    def check_one(text: str) -> None:
        read = reading(text)
        if read is None:
            return
        stored, event = read
        arrived[event.problem is None] += 1
        if event.problem is not None:
            assert event.problem[0] == "row"
            assert "Convex holds" in event.problem[1]
            # It is refused for its size alone.
            assert len(stored.encode()) > LARGEST_DOCUMENT / 3
            return
        document = json.loads(event.text, parse_int=float)["document"]
        assert fits(document, 16)
        json_to_convex(document)
        assert exact(restore(document["metadata"])) == exact(stored)

    @RELAXED
    @given(values.map(written))
    @example("null")
    @example('"~{json}1"')
    @example("[-0, -0.0, 1.50, 1e2, 9007199254740993, 1e400, 0.1000000000000000055511151231257827]")
    def holds(text: str) -> None:
        check_one(text)

    holds()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(60_000)
    try:
        for text in LIMITS:
            check_one(text)
    finally:
        sys.setrecursionlimit(limit)
    assert arrived[True] > 100
    assert arrived[False] >= 1
