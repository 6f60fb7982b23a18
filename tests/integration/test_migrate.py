"""`migrate`: twice, at once, beside the application's traffic; and what is wrong is refused before anything changes."""

import asyncio
import contextlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from cdc_worker import capture, locks, schema
from cdc_worker import migrate as migrating
from cdc_worker import triggers as bringing
from cdc_worker.errors import READ_ONLY, ConfigError, SchemaError
from cdc_worker.mirrors import Mirror, Source, load_mirrors
from dev import postgres
from tests.integration.application import CHECK_INS, MIRRORS, STATUS, TABLES, Database, migrate_now, rows_of, toml

T = "create table t (id text primary key, note text)"


@pytest.fixture
def db(database: str) -> Iterator[Database]:
    with Database(database) as opened:
        yield opened


def triggers(db: Database) -> set[tuple[str, str]]:
    """(table, trigger) of all triggers that are not Postgres' own."""
    found = db.execute("select tgrelid::regclass::text, tgname from pg_trigger where not tgisinternal")
    return {(table, name) for table, name in found}


def captured_tables(db: Database) -> set[str]:
    tables = {table for table, _ in triggers(db)}
    events = {"cdc_insert", "cdc_update", "cdc_delete", "cdc_truncate"}
    assert triggers(db) == {(table, event) for table in tables for event in events}
    return tables


def everything(db: Database) -> list[tuple[Any, ...]]:
    """All that migrate may touch, but for times."""
    return db.execute(
        """
        select 'function', proname, md5(prosrc), p.oid::int8 from pg_proc p where pronamespace = 'cdc'::regnamespace
        union all select 'trigger', tgname, tgrelid::regclass::text, oid::int8 from pg_trigger where not tgisinternal
        union all select 'relation', relname, relkind::text, oid::int8 from pg_class
                  where relnamespace = 'cdc'::regnamespace
        union all select 'mirror', name, definition, id from cdc.mirror
        union all select 'backfill', phase, reason, mirror from cdc.backfill
        order by 1, 2, 3, 4
        """
    )


def nothing_was_made(db: Database) -> bool:
    return db.one("select to_regnamespace('cdc') is null") is True and triggers(db) == set()


def test_a_second_time_changes_nothing(db: Database) -> None:
    db.execute(TABLES)
    db.migrate(MIRRORS)
    first = everything(db)
    assert captured_tables(db) == {'"CheckIn"', '"User"', '"Alert"'}
    db.migrate(MIRRORS)
    assert everything(db) == first


def test_a_mirror_s_number_is_used_up_by_a_new_mirror_only(db: Database) -> None:
    # There are 32,767, and each deploy runs `migrate`.
    db.execute(T)
    for _ in range(3):
        db.migrate([rows_of("t")])
    db.migrate([rows_of("t"), rows_of("t", name="another")])
    assert db.execute("select id, name from cdc.mirror order by id") == [(1, "rows"), (2, "another")]


@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_new_mirror_has_a_number_where_the_sequence_stayed_behind(db: Database, before: int) -> None:
    """As logical replication leaves it."""
    mirrors = [rows_of("t", name=f"mirror-{n}") for n in range(1, before + 2)]
    db.execute(T)
    db.migrate(mirrors[:-1])
    db.execute("alter sequence cdc.mirror_id_seq restart")
    db.migrate(mirrors)
    assert db.execute("select id, name from cdc.mirror order by id") == [
        (n, mirror.name) for n, mirror in enumerate(mirrors, start=1)
    ]


def test_several_at_the_same_time(db: Database) -> None:
    db.execute(TABLES)

    async def at_once() -> None:
        await asyncio.gather(*(migrating.migrate(db.dsn, MIRRORS) for _ in range(6)))

    asyncio.run(asyncio.wait_for(at_once(), 30))
    assert captured_tables(db) == {'"CheckIn"', '"User"', '"Alert"'}
    assert db.execute("select name, configured from cdc.mirror order by id") == [("check-ins", True), ("status", True)]


def test_several_at_the_same_time_that_take_triggers_away(db: Database) -> None:
    db.execute(TABLES)
    db.migrate([*MIRRORS, rows_of('"Alert"', name="alerts")])

    async def at_once() -> None:
        await asyncio.gather(*(migrating.migrate(db.dsn, [CHECK_INS]) for _ in range(6)))

    asyncio.run(asyncio.wait_for(at_once(), 30))
    assert captured_tables(db) == {'"CheckIn"'}


def test_a_migration_that_was_changed_is_refused(db: Database) -> None:
    db.migrate([])
    db.execute("update cdc.migration set checksum = 'another' where number = 1")
    with pytest.raises(SchemaError, match="0001_capture was changed after it was applied"):
        db.migrate([])


def test_a_newer_database_is_refused(db: Database) -> None:
    db.migrate([])
    db.execute("insert into cdc.migration (number, name, checksum) values (99, '0099_future', '')")
    with pytest.raises(SchemaError, match=r"has migration 99, this worker knows \d+: deploy the newer worker"):
        db.migrate([])


def test_a_migration_that_fails_leaves_nothing(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    good = schema.load_migrations()
    bad = schema.Migration(good[-1].number + 1, "broken", "create table cdc.half (id int); select 1 / 0;")
    monkeypatch.setattr(schema, "load_migrations", lambda: [*good, bad])
    with pytest.raises(psycopg.errors.DivisionByZero):
        db.migrate([])
    assert nothing_was_made(db)


def test_a_publication_that_has_got_new_tables_is_named(postgres_server: postgres.Server, db: Database) -> None:
    with postgres_server.admin(db.dsn.rsplit("/", 1)[1]) as superuser:
        superuser.execute("create publication everything for all tables; create publication another")
    with capture_logs() as first:
        db.migrate([])
    with capture_logs() as second:
        db.migrate([])
    said = [line["publications"] for line in (*first, *second) if line["event"] == "migrate.published"]
    assert said == [["everything"]]


def test_triggers_follow_the_config(db: Database) -> None:
    db.execute(f"{T}; create schema shop; create table shop.t (id int, part text, note text, primary key (id, part))")
    orders = rows_of("shop.t", name="orders", key=("id", "part"))
    db.migrate([rows_of("t")])
    assert captured_tables(db) == {"t"}
    db.migrate([rows_of("t"), orders])
    assert captured_tables(db) == {"t", "shop.t"}
    db.execute("insert into t values ('a'); insert into shop.t values (1, 'b')")
    assert db.captured_by_mirror() == [("orders", '["1", "b"]'), ("rows", "a")]
    db.migrate([orders])
    assert captured_tables(db) == {"shop.t"}
    assert db.execute("select name from cdc.mirror where configured") == [("orders",)]
    db.execute("insert into t values ('c'); insert into shop.t values (2, 'd')")
    assert db.captured_by_mirror() == [("orders", '["2", "d"]')]
    db.migrate([])
    assert captured_tables(db) == set()
    assert (
        db.one("select count(*) from pg_proc where pronamespace = 'cdc'::regnamespace and proname ~ '^capture_'") == 0
    )


def test_watched_columns_follow_the_config(db: Database) -> None:
    db.execute("create table t (id text primary key, note text, other text)")
    db.migrate([rows_of("t")])
    db.migrate([rows_of("t", watch=("note",))])
    db.execute("insert into t values ('a')")
    db.captured()
    db.execute("update t set other = 'x'")
    assert db.captured() == []


def test_partitions_and_heirs_have_triggers_of_their_own(db: Database) -> None:
    db.execute(
        """
        create table t (id int, part int) partition by list (part);
        create table t1 partition of t for values in (1) partition by list (id);
        create table t11 partition of t1 default;
        create table parent (id int); create table heir () inherits (parent)
        """
    )
    mirrors = [rows_of("t"), rows_of("parent", name="others")]
    db.migrate(mirrors)
    assert captured_tables(db) == {"t", "t1", "t11", "parent", "heir"}
    db.execute("create table t2 partition of t for values in (2)")
    db.migrate(mirrors)
    assert captured_tables(db) == {"t", "t1", "t11", "t2", "parent", "heir"}


def test_a_renamed_table_keeps_being_captured_under_its_new_name(db: Database) -> None:
    db.execute(T)
    db.migrate([rows_of("t")])
    # As a table is swapped for a new copy of it.
    db.execute(f"alter table t rename to t_old; {T}")
    db.migrate([rows_of("t")])
    assert captured_tables(db) == {"t"}
    db.execute("insert into t values ('a'); insert into t_old values ('b')")
    assert db.captured() == ["a"]


def test_the_application_s_tables_are_otherwise_as_they_were(db: Database) -> None:
    db.execute(TABLES)

    def look() -> list[tuple[Any, ...]]:
        return db.execute(
            """
            select c.relname, c.relkind, c.reltuples, c.relacl::text, c.reloptions::text, c.relreplident, c.relowner,
                   c.relfilenode, a.attname, a.atttypid, a.attnum, a.attnotnull, a.atthasdef
            from pg_class c join pg_attribute a on a.attrelid = c.oid
            where c.relnamespace = 'public'::regnamespace order by 1, a.attnum
            """
        )

    before = look()
    db.migrate(MIRRORS)
    assert look() == before
    db.migrate([])
    assert triggers(db) == set()


def test_the_application_s_own_triggers_stay(db: Database) -> None:
    db.execute(
        f"{T}; create function own() returns trigger language plpgsql as 'begin return null; end';"
        " create trigger cdc_mine after insert on t for each row execute function own()"
    )
    db.migrate([rows_of("t")])
    db.migrate([])
    assert triggers(db) == {("t", "cdc_mine")}


def test_an_own_trigger_of_the_same_name_is_refused_in_words(db: Database) -> None:
    db.execute(
        f"{T}; create function own() returns trigger language plpgsql as 'begin return null; end';"
        " create trigger cdc_insert after insert on t for each row execute function own()"
    )
    with pytest.raises((ConfigError, SchemaError), match="cdc_insert"):
        db.migrate([rows_of("t")])


def test_a_new_or_changed_mirror_asks_for_a_rescan_and_others_do_not(db: Database) -> None:
    db.execute(TABLES)
    db.migrate(MIRRORS)
    assert db.execute("select reason from cdc.backfill") == [("new mirror",)] * 2
    db.execute("update cdc.backfill set phase = 'done'")
    changed = STATUS.model_copy(update={"query": STATUS.query.replace("order by level desc", "order by level")})
    db.migrate([CHECK_INS, changed])
    assert db.execute("select phase, reason from cdc.backfill order by mirror") == [
        ("done", "new mirror"),
        ("rows", "definition changed"),
    ]


def test_a_mirror_that_comes_back_is_scanned_anew(db: Database) -> None:
    # What changed while it was away was captured by nobody.
    db.execute(T)
    db.migrate([rows_of("t")])
    db.execute("update cdc.backfill set phase = 'done'")
    db.migrate([])
    db.execute("insert into t values ('meanwhile')")
    db.migrate([rows_of("t")])
    assert db.execute("select phase from cdc.backfill") == [("rows",)]


TARGETS = {
    "activity": rows_of("t"),
    "status": Mirror(
        name="rows",
        target="status",
        key=("user_id",),
        query="select id as user_id from t",
        sources=(Source(table="t", key=("id",)),),
    ),
}


@pytest.mark.parametrize("meanwhile", ["at work", "taken out"])
@pytest.mark.parametrize(("before", "after"), [("activity", "status"), ("status", "activity")])
def test_another_target_under_the_same_name_is_refused_before_anything_is_changed(
    db: Database, before: str, after: str, meanwhile: str
) -> None:
    # A rescan looks at documents of one kind: those of the other would stay for ever.
    db.execute(T)
    db.migrate([TARGETS[before]])
    if meanwhile == "taken out":
        db.migrate([])
    was = everything(db)
    with pytest.raises(ConfigError, match=f'mirror "rows": its target was "{before}".*another name'):
        db.migrate([TARGETS[after]])
    assert everything(db) == was
    db.migrate([TARGETS[before]])
    db.migrate([TARGETS[after].model_copy(update={"name": "others"})])


def test_the_target_of_a_mirror_from_before_is_filled_in_without_a_rescan(db: Database) -> None:
    db.execute(T)
    db.migrate([TARGETS["activity"]])
    db.execute("delete from cdc.migration where number = 10; alter table cdc.mirror drop column target")
    db.execute("update cdc.backfill set phase = 'done'")
    db.migrate([TARGETS["activity"]])
    assert db.execute("select target, phase from cdc.mirror join cdc.backfill on mirror = id") == [("activity", "done")]


def test_another_source_asks_for_a_rescan(db: Database) -> None:
    # Changes of the new source before this moment were captured by nobody.
    db.execute(TABLES)
    db.migrate([STATUS.model_copy(update={"sources": STATUS.sources[:1]})])
    db.execute("update cdc.backfill set phase = 'done'")
    db.execute("""insert into "Alert" values ('a', 'u', 'L1', now())""")
    db.migrate([STATUS])
    assert db.execute("select phase from cdc.backfill") == [("rows",)]


def test_a_table_that_was_made_anew_asks_for_a_rescan(db: Database) -> None:
    # Between the new table and its triggers, writes were captured by nobody.
    db.execute(T)
    db.migrate([rows_of("t")])
    db.execute("update cdc.backfill set phase = 'done'")
    db.execute(f"drop table t; {T}; insert into t values ('unseen')")
    db.migrate([rows_of("t")])
    assert db.execute("select phase from cdc.backfill") == [("rows",)]


def test_a_table_that_was_made_anew_is_not_forgotten_by_a_migrate_that_ends_early(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The next one finds the triggers in place: only what this one noted says that they were missing.
    db.execute(T)
    db.migrate([rows_of("t")])
    db.execute("update cdc.backfill set phase = 'done'")
    db.execute(f"drop table t; {T}; insert into t values ('unseen')")
    with monkeypatch.context() as killed:
        killed.setattr(migrating, "_finish", None)
        with pytest.raises(TypeError):
            db.migrate([rows_of("t")])
    db.migrate([rows_of("t")])
    assert db.execute("select phase, reason from cdc.backfill") == [("rows", "a source had no triggers")]


# A wrong config, and the words that say so.


def activity(query: str, table: str = "t", key: Sequence[str] = ("id",), watch: Sequence[str] = ()) -> Mirror:
    return Mirror(
        name="rows",
        target="activity",
        key=("id",),
        query=query,
        sources=(Source(table=table, key=tuple(key), watch=tuple(watch)),),
    )


GOOD = "select id, 'u' as user_id, 'alert' as type, '' as description, at as timestamp from t"
WRONG = {
    "missing table": (activity(GOOD, table="nowhere"), "there is no table nowhere"),
    "name without quotes": (activity(GOOD, table="Mixed"), "capital letters need the double quotes"),
    "no table's name at all": (activity(GOOD, table="two words"), "there is no table two words"),
    "quote left open": (activity(GOOD, table='"t'), 'there is no table "t'),
    "table of another database": (activity(GOOD, table="elsewhere.public.t"), "there is no table elsewhere.public.t"),
    "too many dots": (activity(GOOD, table="a.b.c.d"), "there is no table a.b.c.d"),
    "view": (activity(GOOD, table="a_view"), "a_view is a view: name the tables it is made from"),
    "materialized view": (activity(GOOD, table="a_copy"), "a_copy is a materialized view"),
    "sequence": (activity(GOOD, table="a_sequence"), "a_sequence is a sequence"),
    "partition": (activity(GOOD, table="a_part"), "a_part is a partition of parted.*: name parted"),
    "missing key column": (activity(GOOD, key=("nothing",)), r"table t has no column nothing \(it has id, at, n, "),
    "missing watched column": (activity(GOOD, watch=("nothing",)), "table t has no column nothing"),
    "source's key of another type": (activity(GOOD, key=("n",)), r"column n of t has another type than the key .*text"),
    "no such column": (activity(GOOD.replace("at as", "wrong as")), 'its query fails: column "wrong" does not exist'),
    "no such function": (activity(GOOD.replace("''", "f()")), "its query fails: function f"),
    "broken SQL": (activity("selec 1"), "its query fails: syntax error"),
    "two statements": (activity(GOOD + "; select 1"), "its query fails: syntax error"),
    "a statement that writes": (activity("delete from t returning *"), "its query fails"),
    "a query that locks": (activity(GOOD + " for update"), "its query fails: cannot execute SELECT FOR UPDATE"),
    "a parameter": (activity(GOOD + " where id = $1"), "its query"),
    "column missing": (activity("select id, at as timestamp from t"), "has no column user_id, type, description"),
    "key missing": (activity(GOOD.replace("select id,", "select")), "has no column id"),
    "unknown column": (activity(GOOD.replace("from", ", 1 as extra from")), "column extra has no place in a document"),
    "duplicate column": (activity(GOOD.replace("from", ", id from")), "has two columns called id"),
    "key of a wrong type": (
        activity(GOOD.replace("select id", "select 1.5 as id")),
        "key column id must be text, uuid, int or bigint",
    ),
    "time that is none": (activity(GOOD.replace("at as", "n as")), "timestamp must be a timestamp or a date"),
    "metadata that is no json": (activity(GOOD.replace("from", ", n as metadata from")), "metadata must be json"),
    "metadata in a status": (
        Mirror(
            name="rows",
            target="status",
            key=("user_id",),
            query="select id as user_id, '{}'::jsonb as metadata from t",
            sources=(Source(table="t", key=("id",)),),
        ),
        "column metadata has no place",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_config_is_refused_before_anything_is_changed(db: Database, what: str) -> None:
    db.execute(
        """
        create table t (id text, at timestamptz, n int, body json);
        create view a_view as select * from t; create materialized view a_copy as select * from t;
        create table parted (like t) partition by list (id); create table a_part partition of parted default;
        create sequence a_sequence; create table "Mixed" (id text); create table good (id text)
        """
    )
    mirror, words = WRONG[what]
    good = rows_of("good", name="good")
    with pytest.raises(ConfigError, match=words) as caught:
        db.migrate([mirror, good])
    assert 'mirror "rows"' in str(caught.value)
    assert 'mirror "good"' not in str(caught.value)
    assert nothing_was_made(db)


def test_a_virtual_generated_column_is_refused_where_a_trigger_would_read_it(
    postgres_server: postgres.Server, db: Database
) -> None:
    if int(postgres_server.version.split(".")[0]) < 18:
        pytest.skip("this Postgres has none")
    db.execute("create table t (id text, at timestamptz, twice text generated always as (id || id) virtual)")
    for key, watch in (("twice", ()), ("id", ("twice",))):
        with pytest.raises(ConfigError, match="column twice of t is a virtual generated column"):
            db.migrate([activity(GOOD, key=(key,), watch=watch)])
    assert nothing_was_made(db)
    # Where no trigger reads it, it is a column like others.
    db.migrate([activity(GOOD.replace("''", "twice"))])
    db.execute("insert into t values ('1'), ('2'); update t set id = id || 'x'; update t set at = now()")
    assert sorted(filter(None, db.captured())) == ["1", "1", "1x", "1x", "2", "2", "2x", "2x"]


@pytest.mark.parametrize("how", ["partition", "heir"])
def test_a_foreign_table_behind_a_source_is_refused(postgres_server: postgres.Server, db: Database, how: str) -> None:
    # The application's writes would fail: "cannot collect transition tuples from child foreign tables".
    with postgres_server.admin(db.dsn.rsplit("/", 1)[1]) as superuser:
        superuser.execute(
            "create foreign data wrapper far; create server far foreign data wrapper far;"
            " grant usage on foreign server far to application"
        )
    db.execute(
        "create table parted (id text) partition by hash (id); create table parent (id text); create table t (id text);"
        " create foreign table part partition of parted for values with (modulus 1, remainder 0) server far;"
        " create foreign table heir () inherits (parent) server far"
    )
    table, name = {"partition": ("parted", "part"), "heir": ("parent", "heir")}[how]
    with pytest.raises(ConfigError, match=rf"{table} has foreign tables among its partitions or heirs \({name}\)"):
        db.migrate([activity(GOOD.replace("at as", "now() as"), table=table)])
    assert nothing_was_made(db)


@pytest.mark.parametrize("key", [("id",), ("n", "id")])
def test_keys_without_an_order_are_refused(db: Database, key: Sequence[str]) -> None:
    # Rows can be read by such a key, but no rescan could go through them.
    db.execute("""create table t (id text, n int, a text collate "C", b text collate "POSIX")""")
    mirror = rows_of("t", key=key)
    for columns, words in {
        "coalesce(a, b)": r"its keys cannot be put in order: could not determine which collation .* \(Use the COLLATE",
        """coalesce(a collate "C", b collate "POSIX")""": "its query fails: collation mismatch",
    }.items():
        unordered = mirror.model_copy(update={"query": mirror.query.replace('"id"', f"{columns} as id")})
        with pytest.raises(ConfigError, match=f'mirror "rows": {words}'):
            db.migrate([unordered])
    assert nothing_was_made(db)
    ordered = mirror.model_copy(update={"query": mirror.query.replace('"id"', 'coalesce(a, b) collate "C" as id')})
    db.migrate([ordered])


def test_no_row_is_read_to_see_if_keys_have_an_order(db: Database) -> None:
    db.execute(
        f"{T}; insert into t values ('1'); create function f(text) returns text language plpgsql"
        " as $$ begin raise 'a row was read'; end $$"
    )
    for query in (
        "select f(id) as id from t",
        "select f(id) as id from t limit 1",
        "with r as materialized (select f(id) as id from t) select id from r",
        "select f(id) as id from t group by f(id)",
    ):
        rows = rows_of("t")
        db.migrate([rows.model_copy(update={"query": rows.query.replace("from t", f"from ({query}) as inner_q")})])


def test_a_domain_gives_a_key_like_its_type(db: Database) -> None:
    db.execute("create domain filled as text check (value <> ''); create domain user_id as filled")
    db.execute("create table t (id user_id primary key)")
    db.migrate([rows_of("t")])
    db.execute("insert into t values ('1')")
    assert db.captured() == ["1"]


def test_all_that_is_wrong_is_said_at_once(db: Database) -> None:
    with pytest.raises(ConfigError) as caught:
        db.migrate([rows_of("nowhere", name="one"), rows_of("t", name="two")])
    one, two = str(caught.value).splitlines()
    assert one.startswith('mirror "one": its query fails')
    assert two.startswith('mirror "two": its query fails')


def test_two_status_mirrors_are_refused(db: Database, tmp_path: Path) -> None:
    config = tmp_path / "cdc_worker.toml"
    config.write_text(toml([STATUS, STATUS.model_copy(update={"name": "status-2"})]))
    with pytest.raises(ConfigError, match='one mirror with target "status"'):
        load_mirrors(config)
    assert nothing_was_made(db)


def test_a_query_that_writes_is_not_run(db: Database) -> None:
    db.execute(
        f"{T}; create table ran (id int); create function f() returns text language sql as 'insert into ran values (1);"
        " select 1::text'"
    )
    db.migrate([activity(GOOD.replace("''", "f()").replace("at as", "now() as"))])
    assert db.one("select count(*) from ran") == 0


# Roles and servers that do not let us.


def test_a_role_that_may_not_create_is_told_so(postgres_server: postgres.Server, db: Database) -> None:
    name = db.dsn.rsplit("/", 1)[1]
    with postgres_server.admin(name) as superuser:
        superuser.execute("create table t (id text)")
        superuser.execute(f"alter database {name} owner to postgres")
        superuser.execute(f"revoke create on database {name} from application")
        superuser.execute("alter table t owner to application")
    with pytest.raises(SchemaError, match=r"permission denied for database .*must be allowed to create a schema"):
        db.migrate([rows_of("t")])
    assert nothing_was_made(db)


@pytest.mark.parametrize("whose", ["table", "partition"])
def test_a_table_of_somebody_else_is_refused_before_anything_is_changed(
    postgres_server: postgres.Server, db: Database, whose: str
) -> None:
    # Whoever may create triggers may not yet have them fire always.
    with postgres_server.admin(db.dsn.rsplit("/", 1)[1]) as superuser:
        superuser.execute(
            "create table t (id text) partition by list (id); create table part partition of t default;"
            " grant select, trigger on t, part to application"
        )
        if whose == "partition":
            superuser.execute("alter table t owner to application")
    table = "t" if whose == "table" else "part"
    with pytest.raises(ConfigError, match=f'mirror "rows": table {table} belongs to the role postgres.*grant postgres'):
        db.migrate([rows_of("t")])
    assert nothing_was_made(db)


def test_a_member_of_the_role_that_owns_a_table_may_migrate(postgres_server: postgres.Server, db: Database) -> None:
    role = f"owners_{db.dsn.rsplit('/', 1)[1]}"
    with postgres_server.admin(db.dsn.rsplit("/", 1)[1]) as superuser:
        superuser.execute(f"create role {role}; create table t (id text); alter table t owner to {role}")
        superuser.execute(f"grant {role} to application")
    try:
        db.migrate([rows_of("t")])
        assert captured_tables(db) == {"t"}
    finally:
        with postgres_server.admin(db.dsn.rsplit("/", 1)[1]) as superuser:
            superuser.execute(f"reassign owned by {role} to application; drop role {role}")


def test_a_table_that_has_its_triggers_may_go_to_somebody_else(postgres_server: postgres.Server, db: Database) -> None:
    db.execute("create table t (id text)")
    db.migrate([rows_of("t")])
    with postgres_server.admin(db.dsn.rsplit("/", 1)[1]) as superuser:
        superuser.execute("alter table t owner to postgres; grant select on t to application")
    before = everything(db)
    db.migrate([rows_of("t")])
    assert everything(db) == before


def test_a_schema_of_somebody_else_is_told_so(postgres_server: postgres.Server, db: Database) -> None:
    db.execute("create table t (id text)")
    with postgres_server.admin(db.dsn.rsplit("/", 1)[1]) as superuser:
        superuser.execute("create schema cdc")
    with pytest.raises(SchemaError, match=r"must own .*, and the schema cdc where it is there"):
        db.migrate([rows_of("t")])


def test_a_table_that_may_not_be_read_is_told_so(postgres_server: postgres.Server, db: Database) -> None:
    with postgres_server.admin(db.dsn.rsplit("/", 1)[1]) as superuser:
        superuser.execute("create table t (id text)")
    with pytest.raises(ConfigError, match='mirror "rows": its query fails: permission denied for table t'):
        db.migrate([rows_of("t")])
    assert nothing_was_made(db)


def test_a_table_whose_rows_a_policy_hides_is_told_so(db: Database) -> None:
    db.execute("create table t (id text); alter table t enable row level security, force row level security")
    with pytest.raises(ConfigError, match=r"affected by row-level security policy .* NO FORCE ROW LEVEL SECURITY"):
        db.migrate([rows_of("t")])
    db.execute("alter table t no force row level security")
    db.migrate([rows_of("t")])


def test_a_role_that_is_set_to_read_only_is_refused(postgres_server: postgres.Server) -> None:
    with postgres.database(postgres_server) as dsn, Database(dsn, T) as db:
        name = dsn.rsplit("/", 1)[1]
        db.execute(f"alter database {name} set default_transaction_read_only = on")
        with pytest.raises(SchemaError, match=re.escape(READ_ONLY)):
            migrate_now(dsn, [rows_of("t")])
        assert nothing_was_made(db)


def test_a_database_without_an_encoding_is_refused(postgres_server: postgres.Server) -> None:
    with postgres_server.admin() as superuser:
        superuser.execute("create database bytes owner application encoding 'SQL_ASCII' template template0 locale 'C'")
    try:
        with pytest.raises(SchemaError, match="the encoding SQL_ASCII"):
            migrate_now(postgres_server.dsn("bytes"), [rows_of("t")])
    finally:
        postgres.drop_database(postgres_server, "bytes")


@pytest.mark.parametrize(
    "theirs",
    [
        "create table cdc.outbox (id int)",
        "create table cdc.migration (version text)",
        "create type cdc.missing as enum ()",
    ],
)
def test_a_schema_of_that_name_that_is_somebody_else_s_is_refused(db: Database, theirs: str) -> None:
    db.execute(f"{T}; create schema cdc; {theirs}")
    with pytest.raises(SchemaError, match="a schema cdc that is not the worker's"):
        db.migrate([rows_of("t")])


def test_a_schema_without_its_rows_is_told_how_to_go_with_its_triggers(db: Database) -> None:
    """What `pg_dump --schema-only` makes of a database. To rename the schema would make each write fail."""
    db.execute(T)
    db.migrate([rows_of("t")])
    db.execute("truncate cdc.migration, cdc.mirror, cdc.checkpoint, cdc.rotation, cdc.backfill, cdc.parked_key")
    with pytest.raises(SchemaError, match=r"without its rows.*`drop schema cdc cascade`"):
        db.migrate([rows_of("t")])
    db.execute("insert into t values ('written meanwhile')")
    db.execute("drop schema cdc cascade")
    db.migrate([rows_of("t")])
    db.execute("insert into t values ('a')")
    assert db.captured() == ["a"]


def test_a_role_that_may_not_call_what_capture_calls_is_told_so(db: Database, postgres_server: postgres.Server) -> None:
    db.execute(T)
    with postgres_server.admin(db.dsn.rpartition("/")[2]) as superuser:
        superuser.execute("revoke execute on function pg_notify(text, text) from public")
    with pytest.raises(SchemaError, match=r"may not call pg_notify\(text, text\)"):
        db.migrate([rows_of("t")])


@pytest.mark.one_postgres
def test_a_standby_is_refused(postgres_flavour: postgres.Flavour) -> None:
    with postgres.start(postgres_flavour) as server:
        dsn = server.dsn(postgres.create_database(server))
        with Database(dsn, T):
            pass
        server.stop()
        standby = server.folder / "data/standby.signal"
        standby.touch()
        shutil.chown(standby, *_owner(server.folder / "data"))
        server.start()
        with pytest.raises(SchemaError, match=re.escape(READ_ONLY)):
            migrate_now(dsn, [rows_of("t")])


def _owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


# The application's traffic goes on.


@contextlib.contextmanager
def migrating_aside(dsn: str, mirrors: Sequence[Mirror]) -> Iterator[Callable[[], bool]]:
    """Migrate in a thread; the value says whether it is still at it. Leaving the block raises what it raised."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            migrate_now(dsn, mirrors)
        except BaseException as error:  # noqa: BLE001  # raised again below
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread.is_alive
    finally:
        thread.join(30)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


PARTITIONED = """
create schema s;
create table t (id text, note text) partition by list (id);
create table p partition of t for values in ('x');
"""


@pytest.mark.parametrize(
    ("going", "error", "said"),
    [
        ("drop table t", ConfigError, 'mirror "rows": its query fails: relation "t" does not exist'),
        ("drop table t; create table t (id text, note text)", SchemaError, "table public.p was dropped or renamed"),
        ("drop table p", SchemaError, "table public.p was dropped or renamed meanwhile: run `cdc-worker migrate`"),
        ("alter table p set schema s", SchemaError, "table public.p was dropped or renamed"),
    ],
)
def test_a_table_that_goes_between_look_and_change_is_said_in_words(
    db: Database, monkeypatch: pytest.MonkeyPatch, going: str, error: type[Exception], said: str
) -> None:
    db.execute(PARTITIONED)
    look = bringing._wanted

    async def look_and_lose(*args: Any) -> Any:
        wanted = await look(*args)
        await asyncio.to_thread(db.execute, going)
        return wanted

    with monkeypatch.context() as losing:
        losing.setattr(bringing, "_wanted", look_and_lose)
        with pytest.raises(error, match=re.escape(said)):
            db.migrate([rows_of("t")])
    if error is SchemaError:
        db.migrate([rows_of("t")])
        assert "t" in {table for table, _ in triggers(db)}


def test_a_table_that_goes_before_its_triggers_are_taken_away_is_no_matter(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.execute(f"{T}; create table u (id text primary key, note text)")
    db.migrate([rows_of("t"), rows_of("u", name="others")])
    look = bringing._wanted

    async def look_and_lose(*args: Any) -> Any:
        monkeypatch.setattr(bringing, "_wanted", look)
        await asyncio.to_thread(db.execute, "drop table u")
        return await look(*args)

    monkeypatch.setattr(bringing, "_wanted", look_and_lose)
    db.migrate([rows_of("t")])
    assert {table for table, _ in triggers(db)} == {"t"}


@pytest.mark.one_postgres
def test_a_long_writer_is_waited_for_and_nobody_waits_behind_us(db: Database) -> None:
    db.execute(T)
    asks = "select count(*) from pg_locks where not granted and relation = 't'::regclass"
    with psycopg.connect(db.dsn) as long, psycopg.connect(db.dsn, autocommit=True) as other:
        long.execute("insert into t values ('long')")
        # The lock_timeout of migrate is a fraction of it; without one it would wait for the long writer.
        other.execute("set statement_timeout = '5s'")
        with migrating_aside(db.dsn, [rows_of("t")]) as busy:
            for round_ in range(4):
                # The worst moment for a writer: migrate has just queued for its lock.
                wait_until(lambda: db.one(asks) == 1)
                other.execute("insert into t values (%s)", (str(round_),))
                wait_until(lambda: db.one(asks) == 0)
            assert busy()
            long.commit()
    assert captured_tables(db) == {"t"}


def test_a_writer_is_waited_for_before_its_table_feeds_another_mirror(db: Database) -> None:
    # What it has written is captured for the first mirror only, and a rescan does not see it yet.
    db.execute(T)
    db.migrate([rows_of("t")])
    with psycopg.connect(db.dsn) as writer:
        writer.execute("insert into t values ('a')")
        with migrating_aside(db.dsn, [rows_of("t"), rows_of("t", name="again")]) as busy:
            wait_until(lambda: db.one("select count(*) from pg_locks where not granted") == 1)
            assert db.one("select count(*) from cdc.backfill") == 1
            assert busy()
            writer.commit()
    assert db.execute("select m.name from cdc.backfill join cdc.mirror m on m.id = mirror") == [("rows",), ("again",)]
    db.captured()
    db.execute("insert into t values ('b')")
    assert db.captured_by_mirror() == [("again", "b"), ("rows", "b")]


def test_what_a_migrate_that_failed_has_left_out_is_scanned_anew(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.execute(T)
    both = [rows_of("t"), rows_of("t", name="again")]
    db.migrate(both)
    db.execute("update cdc.backfill set phase = 'done'")
    with monkeypatch.context() as killed:
        killed.setattr(migrating, "_finish", None)
        with pytest.raises(TypeError):
            db.migrate(both[:1])
    db.execute("insert into t values ('unseen')")
    assert db.captured_by_mirror() == [("rows", "unseen")]
    # Back to how it was, which is as cdc.mirror has it all along.
    db.migrate(both)
    phases = "select m.name, b.phase from cdc.backfill b join cdc.mirror m on m.id = b.mirror order by name"
    assert db.execute(phases) == [("again", "rows"), ("rows", "done")]


@pytest.mark.one_postgres
def test_a_busy_table_is_given_up_in_words(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_TABLE_SECONDS", 0.5)
    db.execute(f"{T}; create table free (id text)")
    with psycopg.connect(db.dsn, application_name="a report") as long:
        long.execute("insert into t values ('long')")
        held = rf"process {long.info.backend_pid} \(a report, role application\) holds RowExclusiveLock on t"
        with pytest.raises(SchemaError, match=rf"table public\.t: canceling statement due to lock timeout; .*{held}"):
            db.migrate([rows_of("free", name="free"), rows_of("t")])
    db.migrate([rows_of("free", name="free"), rows_of("t")])
    assert captured_tables(db) == {"t", "free"}


@pytest.mark.one_postgres
def test_a_function_that_feeds_what_it_fed_waits_for_no_writer(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.execute(T)
    db.migrate([rows_of("t")])
    monkeypatch.setattr(locks, "_TABLE_SECONDS", 0)
    body = capture.function_body
    monkeypatch.setattr(bringing, "function_body", lambda feeds, event: f"{body(feeds, event)}-- in other words\n")
    with psycopg.connect(db.dsn) as writer:
        writer.execute("insert into t values ('a')")
        db.migrate([rows_of("t")])
    functions = "select count(*) from pg_proc where proname like 'capture%' and prosrc like '%in other words%'"
    assert db.one(functions) == 4
    assert db.captured() == ["a"]


def test_a_table_that_only_grows_may_feed_another_mirror(db: Database) -> None:
    # Its owner has taken the rights from itself that LOCK TABLE asks for.
    db.execute(f"{T}; revoke update, delete, truncate on t from application")
    db.migrate([rows_of("t")])
    db.migrate([rows_of("t"), rows_of("t", name="again")])
    db.execute("insert into t values ('a')")
    assert db.captured_by_mirror() == [("again", "a"), ("rows", "a")]


@pytest.mark.one_postgres
def test_an_autovacuum_of_a_large_table_gives_way(
    postgres_flavour: postgres.Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_PATIENT_TRY", 2)
    monkeypatch.setattr(locks, "_TABLE_SECONDS", 5)
    at_it = (
        "select count(*) from pg_locks l join pg_stat_activity a on a.pid = l.pid"
        " where l.relation = 't'::regclass and a.usesysid is null"
    )
    with (
        postgres.start(postgres_flavour, settings={"autovacuum_naptime": "1s"}) as server,
        postgres.database(server) as dsn,
        Database(dsn) as db,
    ):
        db.execute(
            f"""
            {T} with (autovacuum_vacuum_cost_limit = 1, autovacuum_vacuum_cost_delay = 100,
                      autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0);
            insert into t select g::text, repeat('x', 500) from generate_series(1, 10000) g;
            delete from t where id < '5'
            """
        )
        wait_until(lambda: db.one(at_it), 30)
        with monkeypatch.context() as hurried:
            hurried.setattr(locks, "_TABLE_SECONDS", 0)
            with pytest.raises(SchemaError, match=r"process \d+ \(autovacuum\) holds ShareUpdateExclusiveLock on t"):
                db.migrate([rows_of("t")])
        assert db.one(at_it)
        db.migrate([rows_of("t")])
        assert captured_tables(db) == {"t"}


@pytest.mark.one_postgres
def test_a_reader_that_keeps_a_trigger_is_named(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_TABLE_SECONDS", 0)
    db.execute(T)
    db.migrate([rows_of("t")])
    with psycopg.connect(db.dsn, application_name="a dump") as reader:
        reader.execute("select from t")
        time.sleep(2)
        held = rf"process {reader.info.backend_pid} \(a dump, role application\) holds AccessShareLock on t"
        with pytest.raises(SchemaError, match=held):
            db.migrate([])


def test_a_prepared_transaction_that_keeps_a_table_is_named(
    postgres_flavour: postgres.Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It has no process. Nobody may come any more to commit it.
    monkeypatch.setattr(locks, "_TABLE_SECONDS", 0)
    with (
        postgres.start(postgres_flavour, settings={"max_prepared_transactions": "2"}) as server,
        postgres.database(server) as dsn,
        Database(dsn, T) as db,
    ):
        for statement in ("begin", "insert into t values ('a')", "prepare transaction 'of the shop'"):
            db.execute(statement)
        held = r"prepared transaction 'of the shop' \(role application\) holds RowExclusiveLock on t"
        try:
            with pytest.raises(SchemaError, match=held):
                db.migrate([rows_of("t")])
        finally:
            db.execute("rollback prepared 'of the shop'")


@pytest.mark.one_postgres
def test_a_locked_table_is_waited_for_before_anything_is_changed(db: Database) -> None:
    db.execute(T)
    with psycopg.connect(db.dsn) as altering:
        altering.execute("alter table t add column more text")
        with migrating_aside(db.dsn, [rows_of("t")]) as busy:
            asks = "select count(*) from pg_locks where not granted and relation = 't'::regclass"
            for _ in range(2):  # the first wait is over, and it asks again
                wait_until(lambda: db.one(asks) == 1)
                wait_until(lambda: db.one(asks) == 0)
            assert busy()
            assert nothing_was_made(db)
            altering.commit()
    assert captured_tables(db) == {"t"}


@pytest.mark.one_postgres
def test_a_table_that_stays_locked_is_no_fault_of_the_mirror(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", 0.5)
    db.execute(T)
    with psycopg.connect(db.dsn, application_name="vacuum") as full:
        full.execute("lock table t in access exclusive mode")
        held = rf"process {full.info.backend_pid} \(vacuum, role application\) holds AccessExclusiveLock on t: run it"
        with pytest.raises(
            SchemaError, match=rf"the mirrors' tables: canceling statement due to lock timeout; .*{held}"
        ):
            db.migrate([rows_of("t")])
        assert nothing_was_made(db)


@pytest.mark.one_postgres
def test_another_migrator_that_takes_its_time_is_waited_for(db: Database) -> None:
    db.execute(T)
    lock = "select pg_advisory_xact_lock(hashtextextended('cdc_worker.migrate', 0))"
    with psycopg.connect(db.dsn) as slow:
        slow.execute(lock)
        with migrating_aside(db.dsn, [rows_of("t")]):
            waiting = (
                "select count(*) from pg_stat_activity where wait_event = 'advisory' and datname = current_database()"
            )
            wait_until(lambda: db.one(waiting) == 1)
            time.sleep(1.5)  # longer than any lock_timeout that is meant for tables
            assert nothing_was_made(db)
            slow.commit()
    assert captured_tables(db) == {"t"}


def test_writers_go_on_while_triggers_come_and_go(db: Database) -> None:
    db.execute(T)
    stop = threading.Event()
    written: list[int] = []
    failed: list[BaseException] = []

    def write() -> None:
        try:
            with psycopg.connect(db.dsn, autocommit=True) as connection:
                for n in range(1_000_000):
                    connection.execute("insert into t values (%s)", (str(n),))
                    connection.execute("update t set note = 'x' where id = %s", (str(n),))
                    written.append(n)
                    if stop.is_set():
                        return
        except psycopg.Error as error:
            failed.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for mirrors in ([rows_of("t")], [rows_of("t", watch=("note",))], [], [rows_of("t")]):
            db.migrate(mirrors)
            so_far = len(written)
            wait_until(lambda: len(written) > so_far + 5 or failed)  # noqa: B023
    finally:
        stop.set()
        thread.join(10)
    assert failed == []


# From the log of version 0.1.0 to this one.


@pytest.fixture
def old(db: Database) -> Database:
    """As 0.1.0 left it, with triggers on `t` and a key that was not delivered."""
    first = schema.load_migrations()[0]
    db.execute(T)
    db.execute("create schema cdc")
    db.execute("create table cdc.migration (number int primary key, name text, checksum text, applied_at timestamptz)")
    db.execute(first.text)
    db.execute("insert into cdc.migration values (1, %s, %s, now())", first.name, first.checksum)
    db.execute("insert into cdc.mirror (name, definition) values ('rows', %s)", rows_of("t").definition)
    db.execute(Path(__file__).with_name("capture_0001.sql").read_text())
    db.execute("insert into t values ('undelivered')")
    return db


def test_a_function_for_each_event_takes_the_place_of_one_for_all(db: Database) -> None:
    db.execute(T)
    db.migrate([rows_of("t")])
    wanted = everything(db)
    # As it was: one function that all of the table's triggers call.
    db.execute(
        Path(__file__).with_name("capture_0001.sql").read_text().replace("create trigger", "create or replace trigger")
    )
    for event in ("insert", "update", "delete", "truncate"):
        db.execute(f"drop function cdc.capture_f059f10c4aedb640_{event}()")
    db.execute("update cdc.backfill set phase = 'done'")
    db.migrate([rows_of("t")])
    # But for oids.
    assert {row[:3] for row in everything(db)} - {row[:3] for row in wanted} == {("backfill", "done", "new mirror")}
    assert db.one("select phase from cdc.backfill") == "done"


def test_old_triggers_write_to_the_new_log_until_they_are_replaced(old: Database) -> None:
    old.execute(schema.load_migrations()[1].text)
    old.execute("insert into t values ('a'); update t set note = 'x' where id = 'a'; delete from t where id = 'a'")
    assert old.captured() == ["undelivered", "a", "a", "a"]
    # The log was turned meanwhile.
    old.execute("select setval('cdc.slot', 2); insert into t values ('b')")
    assert old.execute("select slot, key from cdc.outbox") == [(2, "b")]


def test_the_log_goes_on_in_the_partition_where_it_was(old: Database) -> None:
    old.execute("select setval('cdc.slot', 2)")
    old.migrate([rows_of("t")])
    old.captured()
    old.execute("insert into t values ('a'); insert into t select n::text from generate_series(1, 20) as n")
    assert old.execute("select distinct slot from cdc.outbox") == [(2,)]


def test_an_upgrade_beside_writers_loses_nothing_and_fails_none(old: Database) -> None:
    stop = threading.Event()
    written: list[list[str]] = [[], [], []]
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            with psycopg.connect(old.dsn) as connection:
                for n in range(1_000_000):
                    key = f"{number}-{n}"
                    # By turns one row, several in one transaction, and many in one statement.
                    connection.execute("insert into t values (%s)", (key,))
                    if n % 3 == 1:
                        connection.execute("update t set note = 'x' where id = %s", (key,))
                    if n % 3 == 2:
                        connection.execute("insert into t select %s || '-' || n from generate_series(1, 20) n", (key,))
                    connection.commit()
                    written[number] += [key, *(f"{key}-{each}" for each in range(1, 21) if n % 3 == 2)]
                    if stop.is_set():
                        return
        except psycopg.Error as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(written))]
    for thread in threads:
        thread.start()
    try:
        with psycopg.connect(old.dsn) as long:
            long.execute("insert into t values ('long')")
            with migrating_aside(old.dsn, [rows_of("t")]) as busy:
                asks = "select count(*) from pg_locks where not granted and mode = 'AccessExclusiveLock'"
                wait_until(lambda: old.one(asks))
                so_far = len(written[0])
                wait_until(lambda: len(written[0]) > so_far + 10 or failed)
                assert busy()
                long.execute("insert into t values ('longer')")
                long.commit()
        so_far = len(written[0])
        wait_until(lambda: len(written[0]) > so_far + 50 or failed)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert failed == []
    keys = {key for (key,) in old.execute("select key from cdc.dirty_key")}
    assert keys == {"undelivered", "long", "longer", *(key for each in written for key in each)}
    assert old.one("select count(*) from cdc.outbox where keys is not null") > 0
    # Nobody was without triggers for a moment: no rescan.
    assert old.execute("select reason from cdc.backfill") == []
