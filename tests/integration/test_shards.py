"""Several workers side by side, each with a part of the shards: who has what, and nothing is lost when that changes."""

import asyncio
import contextlib
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dev import local_convex as convex
from dev.processes import Process
from tests.integration.application import MIRRORS, TABLES, Database, toml
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import SECONDS, Child, environment, forked_child, honcho

pytestmark = pytest.mark.one_postgres

ROWS = 60


@pytest.fixture
def db(database: str) -> Iterator[Database]:
    with Database(database, TABLES) as opened:
        yield opened


@pytest.fixture
def mirrored(fresh_convex: convex.LocalConvex) -> Mirrored:
    """A deployment of the test's own: it belongs to one number of shards."""
    return Mirrored(fresh_convex.url, fresh_convex.admin_key)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cdc_worker.toml"
    path.write_text(toml(MIRRORS))
    return path


def until(look: Callable[[], object], expected: object, *, seconds: float = SECONDS) -> None:
    asyncio.run(eventually(look, expected, seconds=seconds))


def write(db: Database, note: str) -> None:
    db.execute(
        """
        insert into "CheckIn" select n::text, 'someone', %s || n, null, now() from generate_series(1, %s) as n
        on conflict (id) do update set note = excluded.note
        """,
        note, ROWS,
    )  # fmt: skip


def notes(note: str) -> list[str]:
    return sorted(f"{note}{n}" for n in range(1, ROWS + 1))


def spread(db: Database) -> list[int]:
    """How many shards each worker has that has any; those that nobody has count as a worker's."""
    return sorted(count for (count,) in db.execute("select count(*) from cdc.checkpoint group by holder"))


def held(db: Database) -> int:
    """How many shards have a reader whose end would be seen."""
    return int(db.one("select count(*) from cdc.checkpoint where holder_pid is not null"))


def gate_is_kept(db: Database, keepers: list[str]) -> bool:
    """Whether somebody sleeps at the gate; who that is, is added to `keepers`."""
    found = db.execute(
        "select c.holder from pg_locks l join cdc.checkpoint c on c.holder_pid = l.pid"
        " where locktype = 'advisory' and classid = 25444 and mode = 'ExclusiveLock' and granted"
    )
    keepers += [holder for (holder,) in found]
    return bool(found)


class Workers:
    """Processes with one environment, started and ended one by one."""

    def __init__(self, folder: Path, env: dict[str, str], stack: contextlib.ExitStack) -> None:
        self._folder, self._env, self._stack = folder, env, stack
        self.all: list[Child] = []

    def start(self, **given: Any) -> Child:
        env = {**self._env, **{name: str(value) for name, value in given.items()}}
        worker = self._stack.enter_context(forked_child(self._folder, env, name=f"worker-{len(self.all)}"))
        self.all.append(worker)
        return worker

    @property
    def have_opened(self) -> bool:
        """Whatever they took: of one that dies before, the next one looks at all rows again."""
        events = Counter(line["event"] for worker in self.all for line in worker.lines)
        return events["session.open"] == events["lease.acquired"]


@pytest.fixture
def workers(db: Database, fresh_convex: convex.LocalConvex, config: Path) -> Iterator[Workers]:
    # Looks that would come by themselves are far away: what is seen here is rung for, or taken over.
    env = environment(db.dsn, fresh_convex, config, CDC_POLL_SECONDS=30, CDC_LEASE_SECONDS=6, CDC_SHARDS=4)
    with contextlib.ExitStack() as stack:
        yield Workers(config.parent, env, stack)


def test_shards_are_spread_and_follow_who_comes_and_goes(db: Database, workers: Workers, mirrored: Mirrored) -> None:
    db.migrate(MIRRORS, shards=4)
    workers.start().said("session.open", times=4)
    assert spread(db) == [4]
    # Its lease outlasts all that is waited for here.
    second = workers.start(CDC_LEASE_SECONDS=120)
    until(lambda: (held(db), spread(db), workers.have_opened), (4, [2, 2], True))
    third = workers.start()
    until(lambda: (held(db), spread(db), workers.have_opened), (4, [1, 1, 2], True))
    write(db, "with three of ")
    until(lambda: mirrored.descriptions("someone"), notes("with three of "))

    third.term()
    assert third.process.wait(SECONDS) == 0
    until(lambda: (held(db), spread(db), workers.have_opened), (4, [2, 2], True))
    second.process.signal(signal.SIGKILL)
    write(db, "with one of ")
    until(lambda: mirrored.descriptions("someone"), notes("with one of "))
    until(lambda: (held(db), spread(db)), (4, [4]))
    # Nobody leaves a part to the dead one.
    dead = second.said("worker.started")["holder"]
    assert db.one("select count(*) from cdc.worker where name = %s", dead) == 0
    events = [line["event"] for worker in workers.all for line in worker.lines]
    assert "session.fenced" not in events
    assert events.count("session.rescan") == 4  # the first opening of each shard


def test_a_clock_that_is_set_back_holds_up_nobody(db: Database, workers: Workers) -> None:
    """What was noted before then lasts longer by as much: here, by an hour."""
    later = "clock_timestamp() + interval '1 hour'"
    db.migrate(MIRRORS, shards=4)
    # By one that died unseen.
    db.execute(f"update cdc.checkpoint set holder = 'gone', expires_at = {later}")
    db.execute(f"insert into cdc.worker values ('gone', 4, {later})")
    # With no checkpoints, which renew as well.
    workers.start(CDC_HEARTBEAT_SECONDS=3600).said("session.open", times=4)
    # By one that lives, and keeps what it has.
    tokens = db.execute("select shard, token from cdc.checkpoint order by shard")
    db.execute(f"update cdc.checkpoint set expires_at = {later}; update cdc.worker set expires_at = {later}")
    latest = "select max(expires_at) < clock_timestamp() + interval '6 seconds'"
    until(lambda: db.one(f"{latest} from cdc.checkpoint"), expected=True)
    until(lambda: db.one(f"{latest} from cdc.worker where name <> 'gone'"), expected=True)
    assert db.execute("select shard, token from cdc.checkpoint order by shard") == tokens


def test_all_who_sleep_are_woken(db: Database, workers: Workers, mirrored: Mirrored) -> None:
    """One keeps the gate; the others sleep behind it, and one of them closes it again when he goes."""
    db.migrate(MIRRORS, shards=4)
    first, second = workers.start(), workers.start()
    until(lambda: (held(db), spread(db)), (4, [2, 2]))
    keepers: list[str] = []
    for round_ in range(4):
        until(lambda: gate_is_kept(db, keepers), expected=True)
        write(db, f"round {round_}, ")
        # Long before anybody looks by himself.
        until(lambda: mirrored.descriptions("someone"), notes(f"round {round_}, "))
    # Whoever keeps the gate goes.
    until(lambda: gate_is_kept(db, keepers), expected=True)
    gone = first if first.said("worker.started")["holder"] == keepers[-1] else second
    gone.process.signal(signal.SIGKILL)
    gone.process.wait(30)
    write(db, "after the keeper, ")
    until(lambda: mirrored.descriptions("someone"), notes("after the keeper, "))


def test_another_number_of_shards_loses_nothing(db: Database, workers: Workers, mirrored: Mirrored) -> None:
    db.migrate(MIRRORS, shards=1)
    old = workers.start(CDC_SHARDS=1)
    old.said("session.open")
    write(db, "one, ")
    until(lambda: mirrored.descriptions("someone"), notes("one, "))
    for shards in (3, 2):
        write(db, f"before {shards}, ")
        db.migrate(MIRRORS, shards=shards)
        write(db, f"{shards}, ")
        # The old one is fenced, whatever it had under way, and says what it waits for.
        assert f"has {shards} shards" in old.said("database.not_ready")["cause"]
        new = workers.start(CDC_SHARDS=shards)
        until(lambda: mirrored.descriptions("someone"), notes(f"{shards}, "))
        old.term()
        assert old.process.wait(30) == 0
        old = new
        assert "session.rescan" not in [line["event"] for line in new.lines]
    db.execute("""delete from "CheckIn" """)
    until(lambda: mirrored.descriptions("someone"), [])


def test_a_worker_of_another_number_waits(db: Database, workers: Workers) -> None:
    db.migrate(MIRRORS, shards=4)
    worker = workers.start(CDC_SHARDS=2)
    assert worker.said("database.not_ready")["cause"] == (
        "the database has 4 shards, CDC_SHARDS is 2: run `cdc-worker migrate`"
    )
    db.migrate(MIRRORS, shards=2)
    worker.said("session.open", times=2)


def test_several_dynos_of_one_procfile(
    db: Database, fresh_convex: convex.LocalConvex, mirrored: Mirrored, config: Path, tmp_path: Path
) -> None:
    env = environment(db.dsn, fresh_convex, config, CDC_SHARDS=3, PYTHONUNBUFFERED=1)
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    release = honcho("run", "python", "-m", "cdc_worker", "migrate")
    with Process(release, stdout=tmp_path / "release", env=env) as it:
        assert it.wait(60) == 0, it.tail()
    with Process(honcho("start", "-c", "worker=3", "worker"), stdout=tmp_path / "workers", env=env) as dynos:
        until(lambda: (held(db), spread(db)), (3, [1, 1, 1]), seconds=60)
        write(db, "from three dynos, ")
        until(lambda: mirrored.descriptions("someone"), notes("from three dynos, "))
        dynos.signal(signal.SIGTERM)
        dynos.wait(45)
        text = dynos.stdout.read_text()
    assert text.count('"event": "worker.stopped"') == 3, text
    assert held(db) == 0


def test_no_shard_is_left_to_a_worker_that_is_not_ready(
    db: Database, workers: Workers, mirrored: Mirrored, config: Path
) -> None:
    """A deploy's old worker, or one with another file: it lives, and reads nothing."""
    db.migrate(MIRRORS, shards=4)
    other = config.with_name("other.toml")
    other.write_text(toml(MIRRORS[:1]))
    unready = workers.start(CDC_CONFIG=other)
    unready.said("database.not_ready")
    workers.start().said("session.open", times=4)
    write(db, "note ")
    until(lambda: mirrored.descriptions("someone"), notes("note "))
    # One that was at work with the old file, too, once its sessions have ended.
    unready.term()
    other.write_text(toml(MIRRORS))
    old = workers.start(CDC_CONFIG=other)
    old.said("session.open", times=2)
    db.migrate(MIRRORS[:1], shards=4)
    config.write_text(toml(MIRRORS[:1]))
    new = workers.start()
    workers.all[1].term()
    db.execute("select pg_terminate_backend(holder_pid) from cdc.checkpoint")
    old.said("database.not_ready")
    new.said("session.open", times=4)
