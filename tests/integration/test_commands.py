"""`backfill` and `parked`, as a person calls them."""

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import psycopg
import pytest

from dev import postgres
from dev.local_convex import LocalConvex
from tests.integration.application import CHECK_INS, MIRRORS, TABLES, Database, toml
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import child, environment, quick_settings, run_command, worker_at_work

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def db(database: str) -> Iterator[Database]:
    with Database(database, TABLES, MIRRORS) as made:
        yield made


@pytest.fixture
def command(db: Database, tmp_path: Path) -> Command:
    config = tmp_path / "cdc_worker.toml"
    config.write_text(toml(MIRRORS))

    return partial(run_command, tmp_path, environment(db.dsn, None, config))


def line(done: subprocess.CompletedProcess[str], event: str) -> list[dict[str, object]]:
    lines = [json.loads(text) for text in done.stderr.splitlines()]
    return [each for each in lines if each["event"] == event]


@pytest.mark.one_postgres
def test_backfill_marks_every_row_once_and_goes_on_where_it_was(db: Database, command: Command) -> None:
    db.execute(
        """insert into "CheckIn" select 'c' || n, 'u1', null, null, now() from generate_series(1, 2500) as n;
        insert into "User" values ('u1', 'Ada'), ('u2', null);
        delete from cdc.outbox; update cdc.backfill set phase = 'done'"""
    )
    done = command("backfill")
    assert done.returncode == 0, done.stderr
    assert [each["keys"] for each in line(done, "backfill.done")] == [2500, 2]
    captured = db.captured_by_mirror()
    assert len(captured) == len(set(captured)) == 2502

    # As an interrupted one leaves it: some keys marked, more to come.
    last = db.one("""select id from "CheckIn" order by id offset 1999 limit 1""")
    db.execute(
        "update cdc.backfill set phase = 'rows', after = %s, marked = 2000"
        " where mirror = (select id from cdc.mirror where name = 'check-ins')",
        last,
    )
    done = command("backfill", "check-ins")
    assert [each["keys"] for each in line(done, "backfill.done")] == [2500]
    assert line(done, "backfill.started")[0]["resumed"] is True
    assert len(db.captured()) == 500


@pytest.mark.one_postgres
def test_backfill_of_what_there_is_not_is_refused(command: Command) -> None:
    done = command("backfill", "nope")
    assert done.returncode == 2
    assert 'there is no mirror "nope" (there are: check-ins, status)' in done.stderr


@pytest.mark.one_postgres
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("update cdc.mirror set definition = '' where name = 'status'", 'mirror "status" is not as the database knows'),
        ("insert into cdc.mirror (name, definition) values ('more', '')", 'the database has mirror "more", and this'),
        ("insert into cdc.migration values (99, '0099_future', '')", "the database has migration 99: run"),
    ],
)
def test_what_the_worker_would_refuse_is_refused(db: Database, command: Command, change: str, said: str) -> None:
    db.execute(change)
    for words in [("backfill", "check-ins"), ("replay", "1", "check-ins")]:
        done = command(*words)
        assert done.returncode == 1
        assert said in done.stderr


def test_replay_marks_once_more_what_changed_within_the_hours(db: Database, command: Command) -> None:
    db.execute(
        """insert into "CheckIn" select 'old' || n, 'u1', null, null, now() from generate_series(1, 3) as n;
        update cdc.outbox set at = now() - interval '2 hours'"""
    )
    db.execute("""insert into "CheckIn" select 'c' || n, 'u1', null, null, now() from generate_series(1, 200) as n""")
    db.execute("""update "CheckIn" set note = 'twice' where id = 'c7'""")
    db.execute("""insert into "User" values ('u1', 'Ada')""")
    db.execute("update cdc.checkpoint set position = pg_current_snapshot()")
    before = sorted(db.execute("select mirror, key from cdc.dirty_key where at > now() - interval '1 hour'"))
    assert before

    done = command("replay", "1")
    assert done.returncode == 0, done.stderr
    again = db.execute(
        "select mirror, key from cdc.dirty_key, cdc.checkpoint where not pg_visible_in_snapshot(xid, position)"
    )
    assert sorted(again) == sorted(set(before)), "each key once, and no older one"
    assert line(done, "replay.marked")[0]["keys"] == len(again)
    assert not line(done, "replay.cut_short")

    # What replay has marked is in the log as well, and is no reason to go on for ever.
    db.execute("update cdc.checkpoint set position = pg_current_snapshot()")
    db.execute(f"alter database {db.one('select current_database()')} set timezone = 'Asia/Tokyo'")
    db.execute(f"alter database {db.one('select current_database()')} set datestyle = 'German'")
    done = command("replay", "30", "status")
    statuses = db.execute(
        "select key from cdc.dirty_key, cdc.checkpoint where not pg_visible_in_snapshot(xid, position)"
    )
    assert set(statuses) == {("u1",)}
    assert line(done, "replay.cut_short")
    since = datetime.fromisoformat(str(line(done, "replay.marked")[0]["since"]))
    assert abs(datetime.now(UTC) - timedelta(hours=30) - since) < timedelta(minutes=10), "Z means UTC"


def test_replay_repeats_a_rescan_too(db: Database, command: Command) -> None:
    db.execute('truncate "CheckIn"')
    db.execute("update cdc.checkpoint set position = pg_current_snapshot()")
    command("replay", "1", "check-ins")
    again = db.execute("select key from cdc.dirty_key, cdc.checkpoint where not pg_visible_in_snapshot(xid, position)")
    assert again == [(None,)]


@pytest.mark.one_postgres
async def test_parked_keys_are_listed_retried_and_dropped(
    db: Database, command: Command, fresh_convex: LocalConvex
) -> None:
    broken = CHECK_INS.model_copy(
        update={
            "query": CHECK_INS.query.replace("coalesce(note,", "coalesce(nullif(note, '0'),").replace(
                "'Checked in')", "(1 / length(note))::text)"
            )
        }
    )
    db.migrate([broken])
    db.execute("""insert into "CheckIn" values ('good', 'u1', 'fine', null, now()), ('bad', 'u1', '', null, now())""")
    mirrored = Mirrored(fresh_convex.url, fresh_convex.admin_key)
    db.execute("""update "CheckIn" set note = null where id = 'bad'""")
    async with worker_at_work(quick_settings(db.dsn, fresh_convex), [broken]) as running:
        await eventually(lambda: mirrored.keys("check-ins"), ["good"])
        # What is parked is read once more when the mirror is scanned.
        await running.said("backfill.done")
        await running.at_rest(db)
        before = len(running.log.of("key.parked"))
        assert before

        db.execute(f"alter database {db.one('select current_database()')} set timezone = 'Asia/Tokyo'")
        db.execute(f"alter database {db.one('select current_database()')} set datestyle = 'German'")
        listed = command("parked", "list")
        parked_at = db.one("select last_at at time zone 'UTC' from cdc.parked_key")
        assert f"{parked_at:%Y-%m-%dT%H:%M:%S}Z" in listed.stdout
        assert "check-ins" in listed.stdout
        assert "bad" in listed.stdout
        assert "description is null" in listed.stdout
        assert "fine" not in listed.stdout
        db.execute(
            "insert into cdc.parked_key select id, E'\\x1b[2J\\n', 'row', 'x' from cdc.mirror where name = 'status'"
        )
        listed = command("parked", "list", "--mirror", "status")
        assert r"\x1b[2J\n" in listed.stdout
        assert "\x1b" not in listed.stdout
        command("parked", "drop", "--mirror", "status", "--yes")
        assert "Nothing is parked." in command("parked", "list", "--mirror", "status").stdout
        for word in ("list", "retry", "drop"):
            refused = command("parked", word, "--mirror", "statsu", *(["--yes"] if word == "drop" else []))
            assert refused.returncode == 2
            assert refused.stderr == 'cdc-worker: there is no mirror "statsu" (there are: check-ins, status)\n'

        retried = command("parked", "retry", "bad")
        assert line(retried, "parked.marked")[0]["keys"] == 1
        assert (await running.said("key.parked", times=before + 1))["parked_keys"] == 1, "the same one once more"
        assert str(before + 1) in command("parked", "list").stdout

        assert command("parked", "drop").returncode != 0, "all of them, and nobody to ask"
        assert line(command("parked", "drop", "--yes"), "parked.dropped")[0]["keys"] == 1
        since = len(running.log.of("worker.heartbeat"))
        # The last of two began after it.
        assert (await running.said("worker.heartbeat", times=since + 2))["parked_keys"] == 0
        assert "Nothing is parked." in command("parked", "list").stdout


@pytest.mark.one_postgres
def test_a_key_may_have_what_the_terminal_lacks(db: Database, command: Command, tmp_path: Path) -> None:
    db.execute(
        "insert into cdc.parked_key select id, 'caf\u00e9 \u20ac', 'row', 'x' from cdc.mirror where name = 'status'"
    )
    env = environment(db.dsn, None, tmp_path / "cdc_worker.toml", PYTHONIOENCODING="ascii")
    with child(tmp_path, env, "parked", "list") as listing:
        assert listing.process.wait(30) == 0, listing.process.tail()
        assert r"caf\xe9 \u20ac" in listing.process.stdout.read_text()


@pytest.mark.one_postgres
def test_what_is_to_be_forgotten_is_counted_before_it_is_asked_for(db: Database, command: Command) -> None:
    nothing = command("parked", "drop")
    assert (nothing.returncode, nothing.stdout) == (0, "Nothing is parked.\n")
    db.execute(
        "insert into cdc.parked_key select id, n::text, 'row', 'x' from cdc.mirror, generate_series(1, 1 + id) as n"
    )
    parked = dict(db.execute("select name, 1 + id from cdc.mirror"))
    asked = command("parked", "drop")
    assert asked.returncode == 1
    assert asked.stdout.startswith(
        f"Forget all parked keys: {parked['check-ins']} of check-ins, {parked['status']} of status? [y/N]"
    )
    asked = command("parked", "drop", "--mirror", "status")
    assert asked.stdout.startswith(f"Forget all parked keys: {parked['status']} of status? [y/N]")
    assert db.one("select count(*) from cdc.parked_key") == sum(parked.values()), "nobody said yes"


@pytest.mark.one_postgres
@pytest.mark.parametrize("word", ["retry", "drop"])
def test_a_key_that_is_not_parked_is_refused_and_mirrors_are_named(db: Database, command: Command, word: str) -> None:
    refused = command("parked", word, "status")
    assert refused.returncode == 2
    assert refused.stderr == (
        'cdc-worker: no key "status" is parked (a mirror is named with --mirror; there are: check-ins, status)\n'
    )
    refused = command("parked", word, b"M\xfcller".decode(errors="surrogateescape"))
    assert refused.returncode == 2
    assert refused.stderr == "cdc-worker: word 3 of the command line is not UTF-8, as all names and keys are\n"
    refused = command("parked", word, "7", "--mirror", "status")
    assert refused.returncode == 2
    assert refused.stderr == 'cdc-worker: no key "7" of mirror "status" is parked: `cdc-worker parked list`\n'


@pytest.mark.one_postgres
def test_a_page_that_cannot_be_marked_for_a_lock_is_said_in_words(db: Database, command: Command) -> None:
    with psycopg.connect(db.dsn) as full:
        full.execute("lock table cdc.outbox in share mode")
        done = command("backfill", "check-ins")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "cdc-worker: Postgres refuses: canceling statement due to lock timeout (somebody"
    )


@pytest.mark.parametrize("words", [("parked", "list"), ("parked", "retry"), ("parked", "drop", "--yes"), ("backfill",)])
def test_a_command_says_what_keeps_it_from_postgres(
    db: Database, postgres_server: postgres.Server, tmp_path: Path, words: Sequence[str]
) -> None:
    config = tmp_path / "cdc_worker.toml"
    config.write_text(toml(MIRRORS))

    def refusal(dsn: str) -> str:
        done = run_command(tmp_path, environment(dsn, None, config), *words)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        return line

    with contextlib.suppress(psycopg.errors.DuplicateObject):
        postgres_server.create_role("stranger")
    name = db.dsn.rsplit("/", 1)[1]
    assert "Postgres refuses: permission denied for schema cdc (use the role" in refusal(
        postgres_server.dsn(name, user="stranger")
    )
    unreachable = refusal(postgres_server.dsn("nowhere"))
    assert "the database is out of reach: connection failed: " in unreachable
    assert 'database "nowhere" does not exist' in unreachable
