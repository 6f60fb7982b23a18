"""What a writer leaves in the log, statement by statement; and that no writer ever fails because of it."""

import time
from collections.abc import Callable, Iterator

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdc_worker.keys import join_key, split_key
from cdc_worker.mirrors import Mirror, Source
from dev import postgres
from tests.integration.application import CHECK_INS, STATUS, TABLES, Database, rows_of

T = "create table t (id text primary key, note text, other int)"

Open = Callable[..., Database]


@pytest.fixture
def opened(database: str) -> Iterator[Open]:
    """Opens the test's database, with these tables and mirrors."""
    connections: list[Database] = []

    def opening(ddl: str = T, *mirrors: Mirror) -> Database:
        connections.append(Database(database, ddl, mirrors or (rows_of("t"),)))
        return connections[-1]

    yield opening
    for each in connections:
        each.connection.close()


def test_inserted_rows_are_captured_one_by_one(opened: Open) -> None:
    db = opened()
    db.execute("insert into t values ('a')")
    db.execute("insert into t values ('b'), ('c')")
    assert db.captured() == ["a", "b", "c"]


def test_an_update_is_captured_once_and_one_that_changes_nothing_is_not(opened: Open) -> None:
    db = opened()
    db.execute("insert into t values ('a', 'x'), ('b', 'x'), ('c', null)")
    db.captured()
    db.execute("update t set note = 'x'")
    assert db.captured() == ["c"]
    db.execute("update t set note = note, other = other")
    assert db.captured() == []
    db.execute("update t set note = null where id = 'a'")
    assert db.captured() == ["a"]


def test_a_key_that_moves_is_captured_under_both_names(opened: Open) -> None:
    db = opened()
    db.execute("insert into t values ('a'), ('b')")
    db.captured()
    db.execute("update t set id = id || '2'")
    assert sorted(key or "" for key in db.captured()) == ["a", "a2", "b", "b2"]


def test_one_row_whose_key_moves_is_one_row_of_the_log(opened: Open) -> None:
    db = opened("create table t (id text, note text)")
    db.execute("insert into t values ('a')")
    for written in ("id = 'b'", "id = null", "id = null, note = 'x'", "id = 'c'"):
        db.execute(f"update t set {written}")
    # Never both: a worker of 0.1.0 looks at `key` alone, where null is a rescan and anything else is all there is.
    assert db.execute("select key, keys from cdc.outbox order by ctid") == [
        ("a", None),
        (None, ["b", "a"]),
        ("b", None),
        ("c", None),
    ]


def test_the_last_number_of_a_sequence_is_the_application_s(opened: Open) -> None:
    # PDO's lastInsertId(), Doctrine and EclipseLink ask for it.
    db = opened("create table t (id serial, note text)")
    db.execute("select setval('t_id_seq', 41)")
    db.execute("insert into t (note) values ('a')")
    assert db.one("select lastval()") == 42
    db.execute("update t set note = 'b'")
    assert db.one("select lastval()") == 42


def test_rows_of_one_transaction_with_the_same_id_name_the_same_keys(opened: Open) -> None:
    owners = rows_of("t", name="owners", key=("owner",))
    db = opened("create table t (id text, owner text, note text)", rows_of("t"), owners)
    with db.connection.transaction():
        db.execute("insert into t select n::text, (n / 100)::text, '' from generate_series(1, 1000) as n")
        for n in range(1, 100):
            db.execute("insert into t values (%s, 'one', ''), (%s, %s, '')", f"{n}", f"{n}+", f"{n}")
            db.execute("update t set note = note || '.' where id = %s", f"{n}+")
            db.execute("update t set id = id || '!', owner = null where id = %s", f"{n}+")
            db.execute("update t set id = left(id, -1), owner = '1' where id = %s", f"{n}+!")
        db.execute("update t set note = note || '.' where owner = '1'")
        db.execute("delete from t where owner = '1'")
        db.execute("truncate t")
    assert db.one("select count(distinct xid) from cdc.outbox") == 1
    assert db.one("select count(distinct id) from cdc.outbox") > 500
    named = "count(distinct (mirror, coalesce(keys, array[key])))"
    assert db.execute(f"select id from cdc.outbox group by id having {named} > 1") == []
    # Room for the keys of a row, down to its first.
    assert db.one("select bool_and(id % 64 = 0 and id >= 0) from cdc.outbox")


def test_rows_that_swap_their_keys_are_both_captured(opened: Open) -> None:
    db = opened("create table t (id text primary key deferrable initially deferred, note text)")
    db.execute("insert into t values ('a', 'of a'), ('b', 'of b')")
    db.captured()
    db.execute("update t set id = case id when 'a' then 'b' else 'a' end")
    assert set(db.captured()) == {"a", "b"}


def test_deletes_and_cascades(opened: Open) -> None:
    children = "create table child (id int primary key, parent text references t on delete cascade on update cascade)"
    db = opened(f"{T}; {children}", rows_of("t"), rows_of("child", name="children"))
    db.execute("insert into t values ('a'), ('b'); insert into child values (1, 'a'), (2, 'a'), (3, 'b')")
    db.captured()
    db.execute("update t set id = 'z' where id = 'b'")
    assert db.captured_by_mirror() == [("children", "3"), ("rows", "b"), ("rows", "z")]
    db.execute("delete from t where id = 'a'")
    assert db.captured_by_mirror() == [("children", "1"), ("children", "2"), ("rows", "a")]


def test_truncate_asks_for_a_rescan_of_each_mirror_of_the_table(opened: Open) -> None:
    db = opened(T, rows_of("t"), rows_of("t", name="again"))
    db.execute("truncate t")
    assert db.captured_by_mirror() == [("again", None), ("rows", None)]


def test_copy(opened: Open) -> None:
    db = opened()
    with db.connection.cursor() as cursor, cursor.copy("copy t (id) from stdin") as copy:
        for key in ("a", "b", "c"):
            copy.write_row((key,))
    assert db.captured() == ["a", "b", "c"]


def test_on_conflict_do_update(opened: Open) -> None:
    db = opened()
    db.execute("insert into t values ('a', 'old'), ('same', 'new')")
    db.captured()
    db.execute(
        "insert into t values ('a', 'new'), ('b', 'new'), ('same', 'new')"
        " on conflict (id) do update set note = excluded.note"
    )
    assert sorted(key or "" for key in db.captured()) == ["a", "b"]
    db.execute("insert into t values ('a', 'newer') on conflict do nothing")
    assert db.captured() == []


def test_merge(opened: Open) -> None:
    db = opened()
    db.execute("insert into t values ('changed', 'old'), ('gone', 'old'), ('same', 'new')")
    db.captured()
    db.execute(
        """
        merge into t
        using (values ('changed', 'new'), ('gone', null), ('same', 'new'), ('added', 'new')) as v (id, note)
        on t.id = v.id
        when matched and v.note is null then delete
        when matched then update set note = v.note
        when not matched then insert (id, note) values (v.id, v.note)
        """
    )
    assert sorted(key or "" for key in db.captured()) == ["added", "changed", "gone"]


def test_statements_without_rows_leave_nothing(opened: Open) -> None:
    db = opened()
    db.execute("insert into t select 'a' where false; update t set note = 'x'; delete from t")
    assert db.captured() == []


def test_what_is_rolled_back_is_not_there(opened: Open) -> None:
    db = opened()
    with db.connection.transaction():
        db.execute("insert into t values ('kept')")
        with db.connection.transaction(force_rollback=True):
            db.execute("insert into t values ('rolled back')")
        db.execute("insert into t values ('kept too')")
    with db.connection.transaction(force_rollback=True):
        db.execute("insert into t values ('never')")
    assert db.captured() == ["kept", "kept too"]


def test_the_log_s_transaction_is_the_top_level_one(opened: Open) -> None:
    db = opened()
    with db.connection.transaction():
        top = db.one("select pg_current_xact_id()::text")
        with db.connection.transaction():
            db.execute("insert into t values ('inside a savepoint')")
    assert db.one("select xid::text from cdc.outbox") == top


def test_capture_takes_no_subtransaction_id(opened: Open) -> None:
    # 64 subtransactions with an id in one transaction, and every reader of the database pays.
    db = opened()
    with db.connection.transaction():
        before = int(db.one("select pg_current_xact_id()::text"))
        for n in range(5):
            db.execute("insert into t values (%s)", str(n))
            db.execute("update t set note = 'x' where id = %s", str(n))
    assert int(db.one("select pg_current_xact_id()::text")) == before + 1


def test_only_watched_columns_and_the_key_count(opened: Open) -> None:
    db = opened(T, rows_of("t", watch=("note",)))
    db.execute("insert into t values ('a', 'x', 1)")
    db.captured()
    db.execute("update t set other = 2")
    assert db.captured() == []
    db.execute("update t set note = 'y'")
    assert db.captured() == ["a"]
    db.execute("update t set id = 'b'")
    assert set(db.captured()) == {"a", "b"}
    db.execute("delete from t")
    assert db.captured() == ["b"]


def test_one_table_in_two_mirrors_with_other_keys(opened: Open) -> None:
    db = opened(TABLES, CHECK_INS, STATUS, rows_of('"Alert"', name="alerts"))
    db.execute("""insert into "Alert" values ('a1', 'u1', 'L1', now())""")
    assert db.captured_by_mirror() == [("alerts", "a1"), ("status", "u1")]
    db.execute("""update "Alert" set "userId" = 'u2'""")
    assert db.captured_by_mirror() == [("alerts", "a1"), ("status", "u1"), ("status", "u2")]


def test_two_sources_of_one_mirror_on_the_same_table(opened: Open) -> None:
    friends = Mirror(
        name="friends",
        target="activity",
        key=("id",),
        query="select id, id as user_id, 'alert' as type, '' as description, now() as timestamp from person",
        sources=(Source(table="friendship", key=("one",)), Source(table="friendship", key=("other",))),
    )
    db = opened("create table person (id text); create table friendship (one text, other text)", friends)
    db.execute("insert into friendship values ('a', 'b'), (null, 'c')")
    assert sorted(key or "" for key in db.captured()) == ["a", "b", "c"]
    db.execute("update friendship set other = 'd' where one = 'a'")
    assert sorted(key or "" for key in db.captured()) == ["a", "b", "d"]


def test_a_null_key_makes_nothing_dirty(opened: Open) -> None:
    db = opened("create table t (id text, part text, note text)", rows_of("t", key=("id", "part")))
    db.execute("insert into t values ('a', null), (null, 'b'), (null, null), ('c', 'd')")
    assert db.captured() == ['["c", "d"]']
    db.execute("update t set part = 'x' where id = 'a'")
    assert db.captured() == ['["a", "x"]']
    db.execute("update t set part = null where id = 'a'")
    assert db.captured() == ['["a", "x"]']


@pytest.mark.parametrize(
    ("kind", "value", "key"),
    [
        ("uuid", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        ("bigint", "-9223372036854775808", "-9223372036854775808"),
        ("int", "7", "7"),
        ("smallint", "7", "7"),
        ("varchar(10)", "ü ", "ü "),
        ("text", "", ""),
    ],
)
def test_keys_of_every_type(opened: Open, kind: str, value: str, key: str) -> None:
    db = opened(f"create table t (id {kind} primary key)")
    db.execute(f"insert into t values ('{value}')")
    assert db.captured() == [key]


@pytest.mark.one_postgres
def test_composite_keys_are_written_as_python_writes_them(postgres_server: postgres.Server) -> None:
    with postgres.database(postgres_server) as dsn, Database(dsn, "create table t (a text, b text)") as db:
        db.migrate([rows_of("t", key=("a", "b"))])

        @given(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))] * 2))
        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def same(parts: tuple[str, str]) -> None:
            db.execute("insert into t values (%s, %s)", *parts)
            (key,) = db.captured()
            assert key is not None
            assert split_key(key, 2) == parts
            assert join_key(parts) == key

        same()


def test_a_row_trigger_of_the_application_s_own_changes_the_row_again(opened: Open) -> None:
    db = opened(
        f"""{T};
        create function again() returns trigger language plpgsql as $$
        begin
            if pg_trigger_depth() = 1 then
                update t set note = 'from the trigger' where id = new.id;
                insert into t values (new.id || '-copy');
            end if;
            return null;
        end $$;
        create trigger zz_again after insert or update on t for each row execute function again();
        create function before() returns trigger language plpgsql as
            $$ begin new.id := lower(new.id); return new; end $$;
        create trigger aa_before before insert on t for each row execute function before();
        """
    )
    db.execute("insert into t values ('A')")
    assert set(db.captured()) == {"a", "a-copy"}
    assert db.one("select note from t where id = 'a'") == "from the trigger"


def test_a_session_that_fires_no_triggers_is_captured_too(
    postgres_server: postgres.Server, database: str, opened: Open
) -> None:
    db = opened()
    dbname = database.rsplit("/", 1)[1]
    with postgres_server.admin(dbname) as superuser:
        superuser.execute("set session_replication_role = replica")
        superuser.execute("insert into t values ('a')")
        superuser.execute("update t set note = 'x'")
        superuser.execute("delete from t")
        superuser.execute("truncate t")
    assert db.captured() == ["a", "a", "a", None]


def test_columns_without_equality_are_compared(opened: Open) -> None:
    db = opened("create table t (id int primary key, body json, place point, shape polygon)")
    db.execute("""insert into t values (1, '{"a": 1}', '(1,2)', '((0,0),(1,1))')""")
    db.captured()
    db.execute("""update t set body = '{"a": 1}', place = '(1,2)', shape = '((0,0),(1,1))'""")
    assert db.captured() == []
    db.execute("""update t set body = '{"a":  1}'""")
    assert db.captured() == ["1"]
    db.execute("update t set place = '(1,3)'")
    assert db.captured() == ["1"]


def test_a_toasted_column_is_compared_by_its_content(opened: Open) -> None:
    db = opened(
        "create table t (id int primary key, note text, body text); alter table t alter body set storage external"
    )
    db.execute("insert into t values (1, '', repeat('x', 100000))")
    db.captured()
    db.execute("update t set note = ''")
    assert db.captured() == []
    db.execute("update t set body = repeat('x', 99999) || 'y'")
    assert db.captured() == ["1"]


# Every name that the trigger's own SQL uses, as columns of the application.
NAMES = (
    "here", "place", "key_0", "seen_0", "cdc_old", "cdc_new", "o", "n", "candidate", "mirror", "key", "slot", "changed",
    "tg_op", "found", "new", "old", "xid", "at",
)  # fmt: skip


def test_columns_named_as_the_trigger_names_things(opened: Open) -> None:
    kinds = ("smallint", "int", "text")
    tables = {f"{kind}_{column}": (kind, column) for kind in kinds for column in NAMES}
    db = opened(
        "".join(
            f'create table "{table}" (id text primary key, "{column}" {kind}, note text);'
            for table, (kind, column) in tables.items()
        ),
        *(rows_of(f'"{table}"', name=f"m{n}") for n, table in enumerate(tables)),
    )
    wrong: dict[str, object] = {}
    for table, (_, column) in tables.items():
        steps = {
            f"""insert into "{table}" values ('a', '7', 'x')""": ["a"],
            f"""update "{table}" set note = 'y'""": ["a"],
            f"""update "{table}" set "{column}" = '8'""": ["a"],
            f"""update "{table}" set "{column}" = '8', note = 'y'""": [],
            f"""delete from "{table}" """: ["a"],
        }
        for statement, expected in steps.items():
            try:
                db.execute(statement)
                if (found := db.captured()) != expected:
                    wrong[statement] = found
            except psycopg.Error as error:
                wrong[statement] = error.diag.message_primary
    assert wrong == {}


def test_key_columns_named_as_the_trigger_names_things(opened: Open) -> None:
    db = opened(
        "".join(f'create table "of_{column}" ("{column}" text primary key, note text);' for column in NAMES),
        *(
            rows_of(f'"of_{column}"', key=(column,), watch=("note",), name=f"watched-{n}")
            for n, column in enumerate(NAMES)
        ),
        *(rows_of(f'"of_{column}"', key=(column,), name=f"whole-{n}") for n, column in enumerate(NAMES)),
    )
    wrong: dict[str, object] = {}
    for column in NAMES:
        steps = {
            f"""insert into "of_{column}" values ('a')""": ["a", "a"],
            f"""update "of_{column}" set note = 'y'""": ["a", "a"],
            f"""update "of_{column}" set "{column}" = 'b'""": ["a", "a", "b", "b"],
            f"""delete from "of_{column}" """: ["b", "b"],
        }
        for statement, expected in steps.items():
            try:
                db.execute(statement)
                if (found := sorted(key or "" for key in db.captured())) != expected:
                    wrong[statement] = found
            except psycopg.Error as error:
                wrong[statement] = error.diag.message_primary
    assert wrong == {}


def test_a_table_named_as_the_trigger_names_things(opened: Open) -> None:
    db = opened("create table cdc_new (id text, note text); create table outbox (id text)", rows_of("cdc_new"))
    db.execute("insert into cdc_new values ('a', 'x'); update cdc_new set note = 'y'; delete from cdc_new")
    assert db.captured() == ["a", "a", "a"]


BREAKS = {
    "dropped": "alter table t drop column part",
    "renamed": "alter table t rename column part to piece",
    "watched column dropped": "alter table t drop column note",
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_column_that_is_gone_makes_every_write_a_rescan(opened: Open, what: str) -> None:
    db = opened(
        "create table t (id text, part text, note text, other int)",
        rows_of("t", key=("id", "part"), watch=("note",)),
    )
    # The trigger's plans are cached in this very session.
    db.execute("insert into t (id, other) values ('a', 0); update t set other = 1; delete from t where false")
    db.execute("insert into t (id, other) values ('b', 0); update t set other = 1; delete from t where id = 'b'")
    db.captured()
    db.execute(BREAKS[what])
    # An update of one row has another plan than one of two.
    for statement in (
        "update t set other = 2",
        "insert into t (id) values ('b')",
        "update t set other = 3",
        "delete from t",
    ):
        db.execute(statement)
        assert set(db.captured()) == {None}, statement
    with psycopg.connect(db.dsn) as other:
        other.execute("insert into t (id) values ('c')")
    assert db.captured() == [None]


@pytest.mark.parametrize(
    "kind", ["varchar(100)", "int using length(id)", "jsonb using to_jsonb(id)", "bytea using id::bytea"]
)
def test_a_key_column_of_another_type_never_fails_a_write(opened: Open, kind: str) -> None:
    db = opened("create table t (id text, note text)", rows_of("t"))
    db.execute("insert into t values ('7', 'x'); update t set note = 'y'")
    db.captured()
    db.execute(f"alter table t alter id type {kind}")
    db.execute("update t set note = 'z'")
    db.execute("insert into t select id, 'second' from t")
    db.execute("delete from t where note = 'second'")
    assert len(db.captured()) == 3


def test_another_column_of_another_type_in_a_session_that_has_plans(opened: Open) -> None:
    db = opened()
    db.execute("insert into t values ('a', 'x'); update t set other = 1; delete from t where false")
    db.execute("alter table t alter note type varchar(50), add added int, drop other")
    db.captured()
    db.execute("insert into t values ('b', 'x', 1); update t set added = 2; delete from t where id = 'b'")
    assert db.captured() == ["b", "a", "b", "b"]


def test_a_table_can_be_dropped_and_made_anew(opened: Open) -> None:
    db = opened()
    db.execute("insert into t values ('a'); drop table t; create table t (id text)")
    db.captured()
    db.execute("insert into t values ('b')")
    assert db.captured() == []  # until the next migrate
    db.migrate([rows_of("t")])
    db.execute("insert into t values ('c')")
    assert db.captured() == ["c"]


def test_a_table_can_be_renamed_and_moved(opened: Open) -> None:
    db = opened()
    db.execute("alter table t rename to u; create schema elsewhere; alter table u set schema elsewhere")
    db.execute("insert into elsewhere.u values ('a'); update elsewhere.u set note = 'x'")
    assert db.captured() == ["a", "a"]


def test_a_role_without_any_right_on_the_schema_may_write(postgres_server: postgres.Server, opened: Open) -> None:
    db = opened()
    role = f"writer_{time.monotonic_ns()}"
    with postgres_server.admin() as superuser:
        superuser.execute(f"create role {role} login")
    try:
        db.execute(f"grant select, insert, update, delete, truncate on t to {role}")
        dsn = postgres_server.dsn(db.dsn.rsplit("/", 1)[1], user=role, tcp=False)
        with psycopg.connect(dsn, autocommit=True) as writer:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                writer.execute("select from cdc.outbox")
            writer.execute("insert into t values ('a')")
            writer.execute("update t set note = 'x'")
            writer.execute("set search_path = ''")
            writer.execute("delete from public.t")
            writer.execute("truncate public.t")
        assert db.captured() == ["a", "a", "a", None]
    finally:
        db.execute(f"revoke all on t from {role}")
        with postgres_server.admin() as superuser:
            superuser.execute(f"drop role {role}")


# What a writer puts into its path: everything that the trigger calls, by the types that it calls it with.
TRAPS = {
    "function": (
        "array_agg(text)", "row_number()", "json_build_array(text, text)", "json_build_array(text)",
        "json_build_array(variadic text[])", "pg_try_advisory_xact_lock_shared(int, int)", "current_setting(text)",
        "pg_notify(text, text)", "now()", "pg_current_xact_id()", "is_missing(text)", "written()", "row_id(text, int)",
        "row_id(text[], int)", "hashtextextended(text, int)", "hash_array_extended(text[], int)", "text(int)",
        "coalesce(bool, bool)",
    ),
    "operator": ("=", "<>", "<", "<=", ">", ">=", "/", "||", "*<>", "*=", "#", "&", "<<"),
    "type": ("text", "int2", "int8", "smallint", "regclass", "record", "bool"),
    "relation": ("outbox", "outbox_0", "cdc_new", "cdc_old", "dirty_key"),
}  # fmt: skip
OPERANDS = ("int2, int4", "int2, int2", "int4, int4", "int8, int4", "int8, int8", "text, text", "text[], text[]",
            "record, record", "bool, bool")  # fmt: skip


def lay_traps(db: Database, schema: str) -> None:
    raising = "language plpgsql as $$ begin raise 'a trap'; end $$"
    for name in TRAPS["function"]:
        db.execute(f"create function {schema}.{name} returns int {raising}")
    for number, operands in enumerate(OPERANDS):
        left, right = operands.split(", ")
        db.execute(f"create function {schema}.trap_{number}({operands}) returns bool {raising}")
        for operator in TRAPS["operator"]:
            db.execute(
                f"create operator {schema}.{operator}"
                f" (function = {schema}.trap_{number}, leftarg = {left}, rightarg = {right})"
            )
    for name in TRAPS["type"]:
        db.execute(f"create domain {schema}.{name} as pg_catalog.text check (false)")
    for name in TRAPS["relation"]:
        db.execute(f"create table {schema}.{name} (id pg_catalog.text)")


@pytest.mark.parametrize("schema", ["mine", "pg_temp"])
def test_a_writer_cannot_lead_the_trigger_astray_by_names_of_its_own(opened: Open, schema: str) -> None:
    # The function runs with its owner's rights: nothing of the session's search_path may be reached.
    db = opened(
        "create table t (id text, part text, note text, primary key (id, part))",
        rows_of("t", key=("id", "part")),
        rows_of("t", name="watched", watch=("note",)),
    )
    if schema == "mine":
        db.execute("create schema mine")
    lay_traps(db, schema)
    many = "select n::pg_catalog.text, 'p' from pg_catalog.generate_series(1, 100) as n"
    steps = [
        ("insert into public.t values ('a', 'p'), ('b', 'p')", 2),
        (f"insert into public.t {many}", 100),
        (f"insert into public.t {many} limit 0", 0),
        ("update public.t set note = 'x' where id operator(pg_catalog.=) 'a'", 1),
        ("update public.t set note = 'y'", 102),
        ("update public.t set note = 'y' where id operator(pg_catalog.=) 'a'", 0),
        ("update public.t set part = 'q' where id operator(pg_catalog.=) 'a'", 2),
        ("update public.t set part = 'r'", 204),
        ("delete from public.t where id operator(pg_catalog.=) 'a'", 1),
        ("delete from public.t", 101),
        ("truncate public.t", 1),
    ]
    found = []
    with psycopg.connect(db.dsn, autocommit=True) as reader:
        # As a worker that sleeps: everybody rings.
        reader.execute("select pg_advisory_lock(%s, 1)", (0x6364,))
        for statement, _ in steps:
            db.execute(f"set search_path = {schema}, pg_catalog, public")
            db.execute(statement)
            ((count,),) = reader.execute("select count(*) from cdc.dirty_key where mirror = 1")
            found.append((statement, count))
            reader.execute("truncate cdc.outbox")
    assert found == steps


@pytest.mark.one_postgres
def test_a_plan_made_for_one_row_serves_a_hundred_thousand(opened: Open) -> None:
    db = opened()
    db.execute("insert into t values ('first')")
    for n in range(7):  # past the five custom plans, to the generic one
        db.execute("update t set other = %s", n)
    db.execute("insert into t select n::text from generate_series(1, 100000) as n")
    db.execute("truncate cdc.outbox")
    # A nested loop would compare ten thousand million pairs, and come to the time limit; this takes half a second.
    db.execute("update t set other = 100")
    assert db.one("select sum(cardinality(keys)) from cdc.outbox") == 100_001


def test_an_update_of_many_rows_sorts_none_of_them(opened: Open, database: str) -> None:
    """Beyond work_mem that would write them all to disk once more: here are the transition tables, and little else."""
    db = opened()
    db.execute("insert into t select n, repeat(md5(n::text), 12) from generate_series(1, 10000) as n")
    for at_first in ("false", "id in ('1', '2')"):  # and with a plan that was made for few
        before = db.one("select temp_bytes from pg_stat_database where datname = current_database()")
        with psycopg.connect(database, autocommit=True) as writer:
            writer.execute(f"update t set note = note || 'x' where {at_first}".encode())
            writer.execute("update t set note = note || 'y'")
        # What a session did is counted when it ends.
        look = "select temp_bytes - %s from pg_stat_database where datname = current_database()"
        deadline = time.monotonic() + 10
        while not (written := db.one(look, before)) and time.monotonic() < deadline:
            time.sleep(0.01)
        rows = 2 * db.one("select sum(pg_column_size(t)) from t")
        assert rows * 0.5 < written < rows * 1.3


def test_partitions_are_captured_through_the_parent_and_directly(opened: Open) -> None:
    db = opened(
        """
        create table t (id int, part int, note text, primary key (id, part)) partition by list (part);
        create table t1 partition of t for values in (1);
        create table t2 (note text, gone int, part int not null, id int not null);
        alter table t2 drop column gone;
        alter table t attach partition t2 for values in (2);
        """,
        rows_of("t", key=("id", "part")),
    )
    db.execute("insert into t values (1, 1), (2, 2)")
    assert db.captured() == ['["1", "1"]', '["2", "2"]']
    db.execute("insert into t1 values (3, 1); insert into t2 (id, part) values (4, 2)")
    assert db.captured() == ['["3", "1"]', '["4", "2"]']
    db.execute("update t2 set note = 'x' where id = 4; update t set note = 'x' where id = 1")
    assert db.captured() == ['["4", "2"]', '["1", "1"]']
    db.execute("update t set part = 2 where id = 1")
    assert set(db.captured()) == {'["1", "1"]', '["1", "2"]'}
    db.execute("delete from t1; delete from t where id = 2")
    assert db.captured() == ['["3", "1"]', '["2", "2"]']
    db.execute("truncate t2")
    assert db.captured() == [None]


def test_a_row_that_is_swallowed_on_its_way_to_another_partition_is_captured(opened: Open) -> None:
    db = opened(
        """
        create table t (id text, part int, note text, other text) partition by list (part);
        create table t1 partition of t for values in (1);
        create table t2 partition of t for values in (2);
        create function swallow() returns trigger language plpgsql as
            $$ begin if new.other = 'swallow' then return null; end if; return new; end $$;
        create trigger swallow before insert on t2 for each row execute function swallow();
        """,
        rows_of("t", watch=("note",)),
    )
    for rows in ("('a', 1, 'x', 'swallow')", "('a', 1, 'x', null), ('a', 1, 'x', 'swallow')"):
        db.execute(f"insert into t values {rows}")
        db.captured()
        db.execute("update t set part = 2")
        # Of two that look alike, the one that stays does not answer for the other.
        assert set(db.captured()) == {"a"}, rows
        db.execute("truncate t")


def test_heirs_are_captured_through_the_parent_and_directly(opened: Open) -> None:
    db = opened("create table t (id int, note text); create table heir (more text) inherits (t)")
    db.execute("insert into t values (1); insert into heir values (2)")
    assert db.captured() == ["1", "2"]
    db.execute("update t set note = 'x'")
    assert sorted(key or "" for key in db.captured()) == ["1", "2"]
    db.execute("update heir set more = 'x'")
    assert db.captured() == ["2"]
    db.execute("delete from t")
    assert sorted(key or "" for key in db.captured()) == ["1", "2"]


def test_the_doorbell_rings_only_while_the_worker_sleeps(opened: Open) -> None:
    db = opened()
    with psycopg.connect(db.dsn, autocommit=True) as worker:
        worker.execute("listen cdc_outbox")
        db.execute("insert into t values ('awake')")
        worker.execute("select pg_try_advisory_lock(%s, 1)", (0x6364,))
        db.execute("insert into t values ('asleep')")
        db.execute("update t set note = note")  # nothing changed: nobody is woken for it
        rung = [notify.channel for notify in worker.notifies(timeout=30, stop_after=1)]
        assert rung == ["cdc_outbox"]
        assert list(worker.notifies(timeout=0.2)) == []


def test_a_prepared_transaction_works_while_the_worker_sleeps(postgres_flavour: postgres.Flavour) -> None:
    # Two-phase commit is refused to a transaction that has notified.
    with (
        postgres.start(postgres_flavour, settings={"max_prepared_transactions": "2"}) as server,
        postgres.database(server) as dsn,
        Database(dsn, T, [rows_of("t")]) as db,
        psycopg.connect(dsn, autocommit=True) as worker,
    ):
        worker.execute("select pg_try_advisory_lock(%s, 1)", (0x6364,))
        for statement in ("begin", "insert into t values ('a')", "prepare transaction 'one'", "commit prepared 'one'"):
            db.execute(statement)
        assert db.captured() == ["a"]
