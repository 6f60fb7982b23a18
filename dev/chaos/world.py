"""Plays schedules against a real Postgres, the real worker and the real Convex functions, and compares at the end."""

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, LiteralString, Self

import aiohttp
import psycopg
from psycopg import AsyncConnection, sql
from psycopg.conninfo import conninfo_to_dict

from cdc_worker.migrate import migrate
from cdc_worker.mirrors import load_mirrors
from dev import local_convex
from dev.chaos import application
from dev.chaos.link import Network
from dev.chaos.schedule import (
    WRITERS,
    Awake,
    Commit,
    Do,
    Kill,
    Link,
    Pause,
    Reach,
    Release,
    Reopen,
    Replace,
    Replay,
    Rollback,
    RollbackTo,
    Savepoint,
    Schedule,
    Settle,
    Start,
    Step,
    Stop,
)
from dev.chaos.workers import WorkerProcess

# Small pages and batches, so that a few rows make several of each; waits as short as the worker lets them be.
SETTINGS: Final = {
    "CDC_BATCH_KEYS": "2",
    "CDC_IN_FLIGHT": "3",
    "CDC_PAGE_ROWS": "3",
    "CDC_BACKOFF_SECONDS": "0.05",
    "CDC_CONVEX_TIMEOUT_SECONDS": "0.5",
    "CDC_LEASE_SECONDS": "3",
    "CDC_DRAIN_SECONDS": "0.3",
    "CDC_HEARTBEAT_SECONDS": "1",
    "LOG_FORMAT": "json",
    "LOG_LEVEL": "DEBUG",
}
# Far beyond what is needed on a busy machine: who gets here is stuck.
_CONVERGE_SECONDS = 20.0
_MOMENT_SECONDS = 0.15
_SETTLE_SECONDS = 0.8
_SAME_SECONDS = 0.03
_ZOMBIE_SECONDS = 0.3
_RESCAN_SECONDS = 0.3

# A writer that waits for another gives up soon, and its transaction is rolled back: it may wait for one that we hold.
_WRITER_OPTIONS = "-c lock_timeout=15ms"
_GIVES_UP = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.UniqueViolation,
    psycopg.errors.CardinalityViolation,
)

# By what the tables of the worker mean (migrations/), not by its code.
_ACKNOWLEDGED: LiteralString = """
select c.window_end is null
   and not exists (select from cdc.outbox where not pg_visible_in_snapshot(xid, c.position))
from cdc.checkpoint c
"""
_RESCANNED: LiteralString = "select not exists (select from cdc.backfill where phase <> 'done')"
_PARKED: LiteralString = "select m.name, p.key from cdc.parked_key p join cdc.mirror m on m.id = p.mirror"
# As if the sleeper had slept for longer than its lease.
_EXPIRE: LiteralString = "update cdc.checkpoint set expires_at = clock_timestamp() - interval '1 second'"


class Diverged(AssertionError):
    """Convex does not hold what Postgres does."""


@contextlib.contextmanager
def probed_convex() -> Iterator[local_convex.LocalConvex]:
    """A local Convex that serves this project's functions and, beside them, probe.ts."""
    with tempfile.TemporaryDirectory(prefix="cdc-probe-") as name:
        folder = Path(name)
        shutil.copytree(local_convex.ROOT / "convex", folder / "convex")
        shutil.copy(Path(__file__).with_name("probe.ts"), folder / "convex/probe.ts")
        (folder / "node_modules").symlink_to(local_convex.ROOT / "dev/node_modules")
        with local_convex.start(functions=folder / "convex", arguments=["--quiet"]) as running:
            yield running


class World:
    """One database, one deployment, one worker most of the time. `async with` sets it up and ends it.

    A schedule starts and ends with nothing in the tables and nothing in Convex, so that one may follow the other; what
    is left of the one before is tombstones, and higher epochs and numbers. After a Diverged, make another World.
    """

    def __init__(self, dsn: str, convex: local_convex.LocalConvex) -> None:
        self._dsn = dsn
        self._convex = convex
        self._stack = contextlib.AsyncExitStack()
        self._network = Network(convex.url)
        self._folder = Path()
        self._workers: list[WorkerProcess] = []
        self._started = 0
        self._seen = 0
        self.took: dict[str, float] = {}

    async def __aenter__(self) -> Self:
        try:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cdc-world-")))
            self._http = await self._stack.enter_async_context(
                aiohttp.ClientSession(headers={"Authorization": f"Convex {self._convex.admin_key}"})
            )
            admin = await AsyncConnection.connect(self._dsn, autocommit=True)
            self._admin = await self._stack.enter_async_context(admin)
            await self._prepare()
            self._writers = [
                await self._stack.enter_async_context(await AsyncConnection.connect(self._dsn, options=_WRITER_OPTIONS))
                for _ in range(WRITERS)
            ]
            self._savepoints = [0] * WRITERS
            await self._stack.enter_async_context(self._network)
            self._stack.callback(self._kill_all)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def _prepare(self) -> None:
        name = conninfo_to_dict(self._dsn)["dbname"]
        await self._admin.execute(application.SCHEMA)
        await self._admin.execute(
            sql.SQL("alter database {} set timezone = {}").format(
                sql.Identifier(str(name)), sql.Literal(application.TIME_ZONE)
            )
        )
        config = self._folder / "cdc_worker.toml"
        config.write_text(application.MIRRORS)
        await migrate(self._dsn, load_mirrors(config))
        await self._ask("mutation", "probe:wipe")

    async def play(self, schedule: Schedule) -> None:
        """Plays the steps, then lets everything come to rest. Raises Diverged if Convex is not as Postgres then."""
        try:
            await self._come_to_rest(to="begin with nothing")
            for step in schedule:
                await self._measured(type(step).__name__, self._step(step))
            await self._measured("end", self._end())
        except Diverged as error:
            raise Diverged(f"{error}\n\n{self._story()}") from None

    # The steps.

    async def _step(self, step: Step) -> None:
        match step:
            case Do() | Savepoint() | RollbackTo() | Commit() | Rollback():
                await self._write(step)
            case Kill() | Stop() | Start() | Replace() | Awake():
                await self._supervise(step)
            case Link() | Replay() | Release() | Reopen():
                await self._disturb(step)
            case Pause() | Reach() | Settle():
                await self._wait(step)

    async def _supervise(self, step: Kill | Stop | Start | Replace | Awake) -> None:
        match step:
            case Kill(start):
                self._kill(start=start)
            case Stop(start):
                await self._stop(start=start)
            case Start():
                self._start()
            case Replace():
                await self._replace()
            case Awake():
                self._awake()

    async def _disturb(self, step: Link | Replay | Release | Reopen) -> None:
        match step:
            case Link(mode):
                self._network.set(mode)
            case Replay():
                for place in range(self._network.kept):
                    await self._network.replay(place)
            case Release():
                self._network.release()
            case Reopen():
                await self._network.reopen()

    async def _wait(self, step: Pause | Reach | Settle) -> None:
        match step:
            case Pause():
                await asyncio.sleep(_MOMENT_SECONDS)
            case Reach():
                if self._worker is not None:
                    await self._until(lambda: self._network.arrived > self._seen, _MOMENT_SECONDS)
            case Settle():
                if self._worker is not None and self._network.mode in {"clear", "ghost"}:
                    await self._until(self._acknowledged, _SETTLE_SECONDS)
        if not isinstance(step, Pause):
            self._seen = self._network.arrived

    async def _write(self, step: Do | Savepoint | RollbackTo | Commit | Rollback) -> None:
        writer = self._writers[step.writer]
        depth = self._savepoints[step.writer]
        try:
            match step:
                case Do(_, statement, values):
                    await writer.execute(application.STATEMENTS[statement], values)
                case Savepoint(number):
                    await writer.execute("savepoint here")
                    self._savepoints[number] += 1
                case RollbackTo() if depth:
                    await writer.execute("rollback to here")
                case Commit():
                    # Before: the worker may be quicker than the answer.
                    self._seen = self._network.arrived
                    await writer.commit()
                case Rollback():
                    await writer.rollback()
                case _:
                    pass
        except _GIVES_UP:
            if depth:
                await writer.execute("rollback to here")
            else:
                await writer.rollback()
        if writer.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            self._savepoints[step.writer] = 0

    # The workers. The last of the list is the one that should work; those before it sleep, or did.

    @property
    def _worker(self) -> WorkerProcess | None:
        last = self._workers[-1] if self._workers else None
        return last if last is not None and last.alive and not last.asleep else None

    def _start(self) -> None:
        if self._worker is not None:
            return
        self._started += 1
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            **SETTINGS,
            "DATABASE_URL": self._dsn,
            "CONVEX_URL": self._network.url,
            "CONVEX_DEPLOY_KEY": self._convex.admin_key,
            "CDC_CONFIG": str(self._folder / "cdc_worker.toml"),
        }
        self._workers.append(WorkerProcess(environment, self._folder / f"worker-{self._started}.log"))

    def _kill(self, *, start: bool) -> None:
        if self._worker is not None:
            self._workers.pop().kill()
        if start:
            self._start()

    async def _stop(self, *, start: bool) -> None:
        worker = self._worker
        if worker is not None:
            worker.terminate()
            # Drain and release have their own deadlines; a connection that is being made adds to them.
            if not await self._until(lambda: not worker.alive, _CONVERGE_SECONDS):
                raise Diverged("a worker did not end after SIGTERM")
            # One that is still being imported has no handler yet, and nothing to put in order.
            if worker.exit_code != 0 and worker.said("worker.started"):
                raise Diverged(f"a worker ended with {worker.exit_code} after SIGTERM")
            self._workers.remove(worker)
            worker.kill()
        if start:
            self._start()

    async def _replace(self) -> None:
        if self._worker is not None:
            self._worker.sleep()
            await self._admin.execute(_EXPIRE)
        self._start()

    def _awake(self) -> None:
        for worker in self._workers:
            if worker.asleep:
                worker.wake()

    def _kill_all(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    # The end.

    async def _end(self) -> None:
        for number in range(WRITERS):
            await self._write(Commit(number))
        self._network.set("clear")
        self._network.release()
        asleep = [worker for worker in self._workers if worker.asleep]
        self._awake()
        self._start()
        replaced = self._workers[:-1]
        if replaced:
            # What they still have in mind is done, or refused, by then.
            await self._until(lambda: all(worker.said("session.fenced") for worker in asleep), _ZOMBIE_SECONDS)
            for worker in replaced:
                worker.kill()
            del self._workers[:-1]
        await self._come_to_rest(to="hold what Postgres holds")
        wanted = await application.expected_documents(self._admin)
        await self._compare("at the end", *wanted)
        # Ghosts, newest first and looked at one by one: the older one is what a newer one must not hide.
        for place in reversed(range(self._network.kept)):
            await self._network.replay(place)
            await self._compare(f"when request {place} of the {self._network.kept} kept had come late", *wanted)
        for table in application.TABLES:
            await self._admin.execute(sql.SQL("delete from {}").format(sql.SQL(table)))
        await self._come_to_rest(to="be empty again")
        empty = await application.expected_documents(self._admin)
        await self._compare("with all rows deleted", *empty)
        for place in range(self._network.kept):
            await self._network.replay(place)
        await self._compare("with all rows deleted, and what was kept come late", *empty)
        self._network.forget()

    async def _come_to_rest(self, *, to: str) -> None:
        """Everything acknowledged, nothing under way; seen twice, since a look is not a proof.

        A rescan (after TRUNCATE) may be begun as late as the worker likes; the next session begins it at once. That is
        what happens here, since waiting proves nothing: a restart.
        """
        self._start()
        deadline = time.monotonic() + _CONVERGE_SECONDS
        rescan_since = time.monotonic()
        quiet = 0
        while time.monotonic() < deadline:
            arrived = self._network.arrived
            if self._worker is None:
                raise Diverged("the worker ended by itself")
            if self._network.under_way or not await self._acknowledged():
                quiet = 0
                await asyncio.sleep(0.004)
                continue
            rescanned = await self._all(_RESCANNED)
            if rescanned and quiet:
                return
            quiet += rescanned
            await asyncio.sleep(_SAME_SECONDS)
            quiet *= self._network.arrived == arrived
            if rescanned or self._network.arrived != arrived or not self._worker.said("session.open"):
                rescan_since = time.monotonic()
            elif time.monotonic() - rescan_since > _RESCAN_SECONDS:
                self._kill(start=True)
        raise Diverged(f"the worker did not come to rest within {_CONVERGE_SECONDS:g} s, to {to}")

    async def _acknowledged(self) -> bool:
        return await self._all(_ACKNOWLEDGED)

    async def _all(self, question: LiteralString) -> bool:
        return all(yes for (yes,) in await (await self._admin.execute(question)).fetchall())

    async def _compare(self, when: str, wanted: application.Documents, unfit: set[tuple[str, ...]]) -> None:
        found, doubled = application.dumped_documents(await self._ask("query", "probe:dump"))
        parked = {
            (mirror, *(json.loads(key) if mirror == "visits" else [key]))
            for mirror, key in await (await self._admin.execute(_PARKED)).fetchall()
        }
        wrong = [
            f"{'/'.join(key)}: Convex has {found.get(key, 'nothing')}, and must have {wanted.get(key, 'nothing')}"
            for key in sorted({*wanted, *found})
            # A document of a key that is parked is as it was before the row became unfit.
            if key not in unfit and found.get(key) != wanted.get(key)
        ]
        wrong += [f"{'/'.join(key)}: two documents" for key in doubled]
        wrong += [f"{'/'.join(key)}: parked, and the row is fit" for key in sorted(parked - unfit)]
        wrong += [f"{'/'.join(key)}: not parked, and the row is unfit" for key in sorted(unfit - parked)]
        if wrong:
            raise Diverged(f"{when}, Convex is not as Postgres:\n" + "\n".join(wrong))

    # What all of it stands on.

    async def _ask(self, kind: str, path: str) -> Any:
        request = {"path": path, "args": {}, "format": "json"}
        async with self._http.post(f"{self._convex.url}/api/{kind}", json=request) as response:
            answer = await response.json()
        if answer.get("status") != "success":
            raise RuntimeError(f"{path}: {answer}")
        return answer["value"]

    async def _until(self, done: Callable[[], bool | Awaitable[bool]], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            result = done()
            if result if isinstance(result, bool) else await result:
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.003)

    async def _measured(self, name: str, work: Awaitable[None]) -> None:
        started = time.monotonic()
        try:
            await work
        finally:
            self.took[name] = self.took.get(name, 0.0) + time.monotonic() - started

    def _story(self) -> str:
        """The ends of the workers' logs."""
        parts = []
        for log in sorted(self._folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[-3:]:
            lines = log.read_text(errors="replace").splitlines()[-40:]
            parts.append(f"--- {log.name}\n" + "\n".join(lines))
        return "\n".join(parts)


@contextlib.asynccontextmanager
async def world(dsn: str, convex: local_convex.LocalConvex) -> AsyncIterator[World]:
    async with World(dsn, convex) as made:
        yield made
