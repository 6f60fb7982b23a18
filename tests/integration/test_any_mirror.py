"""A mirror of any names and any query, as cdc_worker.toml may have it: it has a plan, or is refused in words."""

import asyncio
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cdc_worker.catalog import check
from cdc_worker.database import Connection, connect
from cdc_worker.errors import ConfigError
from cdc_worker.mirrors import Mirror
from cdc_worker.plan import Plan

pytestmark = pytest.mark.one_postgres

# What a TOML text can hold; and what SQL, or what puts it together, might stumble over.
ODD = [
    "\0",
    "a\0b",
    '"',
    "'",
    "%",
    "%s",
    "$1",
    "{}",
    "{0}",
    "--",
    "/*",
    ";",
    "\\",
    "\n",
    "é",
    "\U0001f600",
    "",
    "t",
    '"t"',
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(ODD)
columns = st.lists(
    st.sampled_from(["id", "user_id", "T d", "n"]) | texts.filter(bool), min_size=1, max_size=2, unique=True
)
COLUMNS = "'u'::text as user_id, 'alert' as type, 'x' as description, now() as timestamp"
queries = (
    texts
    | st.builds("select id, {} from t{}".format, st.just(COLUMNS), texts)
    | st.builds("select {}, {} from t".format, st.sampled_from(["id", '"T d" as id', "n as id", "1.5 as id"]), texts)
    | st.builds('select id as "{}", {} from t'.format, texts, st.just(COLUMNS))
)
tables = st.sampled_from(["t", "public.t", "pg_class", "v", "cdc.outbox"]) | texts.filter(bool)


def mirror_of(raw: dict[str, Any]) -> Mirror | None:
    try:
        return Mirror.model_validate(raw)
    except ValidationError:
        return None


mirrors = st.fixed_dictionaries(
    {
        "name": st.just("rows"),
        "target": st.sampled_from(["activity", "status"]),
        "key": columns,
        "query": queries,
        "sources": st.lists(
            st.fixed_dictionaries({"table": tables, "key": columns}, optional={"watch": columns}),
            min_size=1,
            max_size=2,
        ),
    }
)
GOOD = {
    "name": "rows",
    "target": "activity",
    "key": ["id"],
    "query": f"select id, {COLUMNS} from t",
    "sources": [{"table": "t", "key": ["id"]}],
}


@pytest.mark.timeout(300)
def test_it_has_a_plan_or_is_refused_by_its_name(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute('create table t (id text, "T d" text, n int); create view v as select 1')
    outcomes: set[type] = set()

    async def outcome(connection: Connection, mirror: Mirror) -> Plan | ConfigError:
        try:
            async with connection.transaction():
                return await check(connection, mirror)
        except ConfigError as error:
            return error

    with asyncio.Runner() as runner:
        opened = runner.run(connect(database))

        @settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
        @given(mirrors)
        @example(GOOD)
        @example(GOOD | {"query": "select id, 'a\0b' as user_id from t"})
        @example(GOOD | {"key": ["a\0b"]})
        @example(GOOD | {"sources": [{"table": "t\0", "key": ["id"]}]})
        @example(GOOD | {"query": f"select id, {COLUMNS} from t) as q; drop table t; --"})
        @example(GOOD | {"query": "copy t to stdout"})
        @example(GOOD | {"query": "select $1::text"})
        def holds(raw: dict[str, Any]) -> None:
            mirror = mirror_of(raw)
            if mirror is None:
                return
            found = runner.run(outcome(opened, mirror))
            outcomes.add(type(found))
            if isinstance(found, ConfigError):
                assert str(found).startswith('mirror "rows": ')
            else:
                # What has a plan can be run.
                arrays = ["{}"] * len(mirror.key)
                runner.run(_run(opened, found, arrays))

        holds()
        runner.run(opened.close())
    assert outcomes == {Plan, ConfigError}
    with psycopg.connect(database) as connection:
        assert connection.execute("select count(*) from t").fetchone() == (0,)


async def _run(connection: Connection, plan: Plan, arrays: list[str]) -> None:
    cursor = await connection.execute(plan.documents, (*arrays, 1_000), binary=True)
    assert await cursor.fetchall() == []
    await connection.execute(plan.first_keys, (10,))
