"""Plays schedules against a real Postgres, the real worker and the real Convex functions, and compares."""

import asyncio
import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import LiteralString, Self

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.conninfo import conninfo_to_dict

from cdc_worker.errors import CdcError
from cdc_worker.migrate import migrate
from cdc_worker.mirrors import load_mirrors
from dev.chaos import application
from dev.chaos.comparison import Difference
from dev.chaos.network import Network
from dev.chaos.schedule import (
    WRITERS,
    Arm,
    Awake,
    Beside,
    Commit,
    Convex,
    Disturb,
    Divide,
    Do,
    Hit,
    Kill,
    KillWriter,
    Link,
    Pause,
    Postgres,
    Reach,
    Release,
    Reopen,
    Replace,
    Replay,
    Rollback,
    Rotate,
    Schedule,
    Serve,
    Settle,
    Start,
    Step,
    Stop,
    Supervise,
    Wait,
    Wire,
    Write,
)
from dev.chaos.servers import ConvexServer, PostgresServer
from dev.chaos.supervisor import EndedByItself, Supervisor
from dev.chaos.witness import Witness
from dev.chaos.writers import Writer
from dev.link import Link as WireLink
from dev.link import link_to
from dev.postgres_programs import Flavour

# Far beyond what is needed on a busy machine: who gets here is stuck.
_CONVERGE_SECONDS = 90.0
_MOMENT_SECONDS = 0.15
_HIT_SECONDS = 0.4
_SETTLE_SECONDS = 0.8
_SAME_SECONDS = 0.03
_ZOMBIE_SECONDS = 0.3
_POLL_SECONDS = 0.005
_LOCK_TIMEOUT = "10ms"
_SLOW_SECONDS = 0.01

# By what the tables of the worker mean (migrations/), not by its code.
_ACKNOWLEDGED: LiteralString = """
select c.window_end is null
   and not exists (select from cdc.outbox where not pg_visible_in_snapshot(xid, c.position))
from cdc.checkpoint c
"""
_RESCANNED: LiteralString = "select not exists (select from cdc.backfill where phase <> 'done')"
# As if the sleeper had slept for longer than its lease.
_EXPIRE: LiteralString = "update cdc.checkpoint set expires_at = clock_timestamp() - interval '1 second'"
_AGE: LiteralString = "update cdc.rotation set rotated_at = clock_timestamp() - interval '1 day'"
_TERMINATE: LiteralString = """
select pg_terminate_backend(pid) from pg_stat_activity
where application_name = 'cdc_worker' and datname = current_database()
"""


class Diverged(AssertionError):
    """Convex does not hold what Postgres does, or held something else on the way."""

    def __init__(self, when: str, found: list[Difference], story: str) -> None:
        self.found = found
        self.when = when
        self.story = story
        lines = "\n".join(f"  {each.kind}: {each.what}" for each in found)
        super().__init__(f"{when}:\n{lines}")


class World:
    """One Postgres, one Convex, and a worker most of the time. `async with` sets it up and ends it.

    A schedule starts and ends with nothing in the tables and nothing in Convex, so that one may follow the other; what
    is left of the one before is tombstones, and higher epochs and numbers. After a Diverged, make another World.
    """

    def __init__(self, flavour: Flavour, functions: Path, *, shards: int = 1) -> None:
        """`functions`: the folder of Convex functions, with the probe in it (servers.probed_functions)."""
        self._stack = contextlib.AsyncExitStack()
        self._postgres = PostgresServer(flavour)
        self._convex = ConvexServer(functions)
        self._shards = self._divided = shards
        self._seen = 0
        # Writers with a TRUNCATE in their transaction.
        self._truncating: set[int] = set()
        # Acts of failpoints when the last one was armed.
        self._acts = 0
        # Nobody tells a worker that its Convex is another; with nothing to do it does not ask.
        self._convex_replaced = False
        # What was done, by name.
        self.counts: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        try:
            await self._set_up()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _set_up(self) -> None:
        enter = self._stack.enter_async_context
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cdc-world-")))
        await enter(self._postgres)
        await enter(self._convex)
        self._witness = Witness(self._convex)
        self._stack.push_async_callback(self._witness.close)
        self._network = await enter(Network(self._convex.url, ran=self._witness.ran))
        self._wires: dict[str, WireLink] = {
            "postgres": await enter(link_to("127.0.0.1", self._postgres.port)),
            "convex": await enter(link_to("127.0.0.1", self._network.port)),
        }
        await self._connect()
        self._stack.push_async_callback(self._disconnect)
        config = await self._prepare(folder)
        self._writers = [Writer(self._postgres.dsn) for _ in range(WRITERS)]
        for writer in self._writers:
            self._stack.callback(writer.close)
        environment = {
            "DATABASE_URL": self._postgres.dsn_over(self._wires["postgres"].port),
            "CONVEX_URL": f"http://127.0.0.1:{self._wires['convex'].port}",
            "CONVEX_DEPLOY_KEY": self._convex.admin_key,
            "CDC_CONFIG": str(config),
            "CDC_SHARDS": str(self._shards),
        }
        self.workers = Supervisor(folder, environment, wanted=self._shards, expire_leases=self._expire_leases)
        self._stack.callback(self.workers.kill_all)
        watching = asyncio.create_task(self._witness.watch())
        self._stack.callback(watching.cancel)

    async def _connect(self) -> None:
        self._admin = await AsyncConnection.connect(self._postgres.dsn, autocommit=True)
        self._reader = await AsyncConnection.connect(
            self._postgres.dsn, autocommit=True, options=f"-c lock_timeout={_LOCK_TIMEOUT}"
        )

    async def _disconnect(self) -> None:
        await self._admin.close()
        await self._reader.close()

    async def _prepare(self, folder: Path) -> Path:
        name = conninfo_to_dict(self._postgres.dsn)["dbname"]
        await self._admin.execute(application.SCHEMA)
        await self._admin.execute(
            sql.SQL("alter database {} set timezone = {}").format(
                sql.Identifier(str(name)), sql.Literal(application.TIME_ZONE)
            )
        )
        config = folder / "cdc_worker.toml"
        config.write_text(application.MIRRORS)
        self._mirrors = load_mirrors(config)
        await migrate(self._postgres.dsn, self._mirrors, shards=self._shards)
        return config

    async def _expire_leases(self) -> None:
        await self._admin.execute(_EXPIRE)

    async def play(self, schedule: Schedule) -> None:
        """Plays the steps, then lets everything come to rest. Raises Diverged if Convex is not as Postgres then."""
        self._witness.begin()
        await self._note_state()
        try:
            await self._divide(self._shards)
            self.workers.start()
            for step in schedule:
                await self.workers.tidy()
                await self._step(step)
            await self._end()
        except EndedByItself as error:
            raise self._diverged("while it was played", [Difference("stuck", str(error))]) from None

    # The steps.

    async def _step(self, step: Step) -> None:
        match step:
            case Pause() | Reach() | Settle() | Hit():
                await self._wait(step)
            case Kill() | Stop() | Start() | Beside() | Replace() | Divide() | Awake() | Arm():
                await self._supervise(step)
            case Link() | Replay() | Release() | Reopen() | Wire():
                await self._disturb(step)
            case Postgres() | Convex() | Rotate():
                await self._serve(step)
            case _:
                await self._write(step)

    async def _supervise(self, step: Supervise) -> None:
        match step:
            case Kill(start):
                self.workers.kill(start=start)
            case Stop(start):
                await self.workers.stop(_CONVERGE_SECONDS, self._until)
                if start:
                    self.workers.start()
            case Start():
                self.workers.start()
            case Beside():
                self.workers.add()
            case Replace():
                await self.workers.replace()
            case Divide(shards):
                await self._divide(shards)
            case Awake():
                self.workers.wake()
            case Arm(point, passage, act):
                self._acts = self.workers.acts
                self.workers.arm(point, passage, act)

    async def _divide(self, shards: int) -> None:
        if shards == self._divided:
            return
        try:
            await migrate(self._postgres.dsn, self._mirrors, shards=shards)
        except (CdcError, psycopg.Error):
            # A writer holds a table, or Postgres is away: a deploy fails then, and the old workers go on.
            self.counts["shards not divided: migrate failed"] += 1
            return
        self._divided = shards
        self.workers.divide(shards)

    async def _disturb(self, step: Disturb) -> None:
        match step:
            case Link(mode):
                self._network.set(mode)
            case Replay():
                for place in range(self._network.kept):
                    await self._network.replay(place)
                    self._witness.ran()
            case Release(order):
                await self._network.release(order)
            case Reopen():
                await self._network.reopen()
            case Wire(to, state):
                self._set_wire(to, state)

    def _set_wire(self, to: str, state: str) -> None:
        wire = self._wires[to]
        if state != "normal":
            self.counts[f"TCP to {to}: {state}"] += 1
        match state:
            case "cut":
                wire.cut()
            case "deaf":
                wire.deaf()
            case "forget":
                wire.forget()
            case "slow":
                wire.slow(_SLOW_SECONDS)
            case _:
                wire.normal()

    async def _serve(self, step: Serve) -> None:
        match step:
            case Postgres("terminate"):
                self.counts["Postgres: connections terminated"] += 1
                await self._admin.execute(_TERMINATE)
            case Postgres("fast" | "immediate" as mode):
                self.counts[f"Postgres: restart {mode}"] += 1
                await self._disconnect()
                await self._postgres.restart(mode)
                await self._connect()
            case Convex(fault):
                await self._serve_convex(fault)
            case Rotate():
                await self._admin.execute(_AGE)

    async def _serve_convex(self, fault: str) -> None:
        match fault:
            case "kill" if self._convex.runs:
                self.counts["Convex: killed, back empty"] += 1
                self._convex_replaced = True
                await self._witness.kill()
            case "start":
                await self._convex.start()
                self._network.target = self._convex.url
            case "hang" if not self._convex.hangs:
                self.counts["Convex: hangs"] += 1
                self._convex.hang()
            case "resume":
                self._convex.resume()
            case "empty" if self._convex.runs and not self._convex.hangs:
                self.counts["Convex: emptied"] += 1
                self._convex_replaced = True
                await self._witness.empty()
            case _:
                pass

    async def _wait(self, step: Wait) -> None:
        match step:
            case Pause():
                await asyncio.sleep(_MOMENT_SECONDS)
                return
            case Hit():
                await self._until(self._has_hit, _HIT_SECONDS)
            case Reach():
                if self.workers.awake:
                    await self._until(lambda: self._network.arrived > self._seen, _MOMENT_SECONDS)
            case Settle():
                if self._nothing_in_the_way:
                    await self._until(self._acknowledged, _SETTLE_SECONDS)
        self._seen = self._network.arrived

    @property
    def _nothing_in_the_way(self) -> bool:
        convex = self._convex.runs and not self._convex.hangs
        return bool(self.workers.awake) and convex and self._network.mode in {"clear", "ghost", "double"}

    async def _has_hit(self) -> bool:
        await self.workers.tidy()
        return self.workers.acts > self._acts

    async def _write(self, step: Write) -> None:
        writer = self._writers[step.writer]
        if isinstance(step, KillWriter):
            self.counts["writer: SIGKILL"] += 1
            self._truncating.discard(step.writer)
            writer.kill()
            return
        if isinstance(step, Commit):
            # Before: the worker may be quicker than the answer.
            self._seen = self._network.arrived
        outcome = await writer.do(step)
        if outcome == "gone" and not isinstance(step, Commit):
            # Its connection went with the server: a new transaction, then.
            outcome = await writer.do(step)
        match step:
            case Do():
                self.counts["statements" if outcome == "done" else "statements given up"] += 1
                if step.statement.startswith("truncate"):
                    self._truncating.add(step.writer)
            case Commit() if outcome == "done":
                self.counts["transactions committed"] += 1
                if step.writer in self._truncating:
                    self._truncating.remove(step.writer)
                    self._witness.note_truncation()
                await self._note_state()
            case Rollback() if outcome == "done":
                self.counts["transactions rolled back"] += 1
                self._truncating.discard(step.writer)
            case _:
                pass
        if self._witness.states_missing:
            await self._note_state()

    async def _note_state(self) -> None:
        await self._witness.note_state(self._reader)

    # The end.

    async def _end(self) -> None:
        for number in range(WRITERS):
            await self._write(Commit(number))
        await self._mend()
        await self._retire_zombies()
        await self._come_to_rest(to="hold what Postgres holds")
        await self._compare("at the end")
        # Ghosts, newest first and looked at one by one: the older one is what a newer one must not hide.
        for place in reversed(range(self._network.kept)):
            await self._network.replay(place)
            await self._compare(f"when request {place} of the {self._network.kept} kept had come late")
        tables = sql.SQL(";").join(sql.SQL("delete from {}").format(sql.SQL(table)) for table in application.TABLES)
        async with self._admin.transaction():
            await self._admin.execute(tables)
        await self._note_state()
        await self._come_to_rest(to="be empty again")
        await self._compare("with all rows deleted")
        for place in range(self._network.kept):
            await self._network.replay(place)
        await self._compare("with all rows deleted, and what was kept come late")
        self._network.forget()
        if wrong := self._witness.history.check():
            raise self._diverged("while it was played", wrong)

    async def _mend(self) -> None:
        """Nothing stands in the way any more."""
        self._network.set("clear")
        for wire in self._wires.values():
            wire.normal()
        self._convex.resume()
        await self._serve_convex("start")
        self.workers.disarm()
        await self._network.release("first")

    async def _retire_zombies(self) -> None:
        sleepers = self.workers.wake()
        if self._convex_replaced:
            self._convex_replaced = False
            await self._restart()
        self.workers.start()
        if sleepers:
            # What they still have in mind is done, or refused, by then.
            await self._until(lambda: all(each.said("session.fenced") for each in sleepers), _ZOMBIE_SECONDS)
        self.workers.thin_out()

    async def _restart(self) -> None:
        """So that they open their shards anew."""
        self.workers.restart()
        started = self.workers.awake
        await self._until(lambda: all(each.said("session.open") for each in started), _CONVERGE_SECONDS)

    async def _come_to_rest(self, *, to: str) -> None:
        """Everything acknowledged, nothing under way; seen twice, since a look is not a proof."""
        deadline = time.monotonic() + _CONVERGE_SECONDS
        quiet = 0
        while time.monotonic() < deadline:
            await self.workers.tidy()
            arrived = self._network.arrived
            if self._network.under_way or not await self._acknowledged() or not await self._all(_RESCANNED):
                quiet = 0
                await asyncio.sleep(_POLL_SECONDS)
                continue
            if quiet:
                return
            await asyncio.sleep(_SAME_SECONDS)
            quiet = self._network.arrived == arrived
        what = f"the worker did not come to rest within {_CONVERGE_SECONDS:g} s, to {to}"
        raise self._diverged("at the end", [Difference("stuck", what), *await self._witness.compare(self._reader)])

    async def _acknowledged(self) -> bool:
        return await self._all(_ACKNOWLEDGED)

    async def _all(self, question: LiteralString) -> bool:
        return all(yes for (yes,) in await (await self._admin.execute(question)).fetchall())

    async def _compare(self, when: str) -> None:
        if wrong := await self._witness.compare(self._reader):
            raise self._diverged(when, wrong)

    def _diverged(self, when: str, wrong: list[Difference]) -> Diverged:
        return Diverged(when, wrong, self.workers.story())

    async def _until(self, done: Callable[[], bool | Awaitable[bool]], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            result = done()
            if result if isinstance(result, bool) else await result:
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)

    @property
    def tally(self) -> "Counter[str]":
        """What was done so far, and what came of it, by name."""
        requests = Counter({f"request: {mode}": count for mode, count in self._network.counts.items()})
        verdicts = Counter({f"verdict: {name}": count for name, count in self._network.verdicts.items()})
        return self.counts + self.workers.counts + requests + verdicts
