"""A worker at work: in this process, so that a test may reach into it, or in one of its own, as in production."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, LiteralString

import structlog
from structlog.typing import EventDict, WrappedLogger

from cdc_worker.mirrors import Mirror
from cdc_worker.settings import Settings, load_settings
from cdc_worker.worker import Worker
from dev.chaos.forks import Connection, Fork
from dev.local_convex import LocalConvex
from dev.processes import Process, ProcessError
from tests.integration.application import Database, toml

ROOT = Path(__file__).parents[2]
# For what has to come to pass, however busy the machine is; less than a look that comes by itself (reader.py) is away.
SECONDS = 25.0

# Short where a test would have to wait for it.
QUICK: Mapping[str, Any] = {
    "CDC_POLL_SECONDS": 0.05,
    "CDC_BACKOFF_SECONDS": 0.2,
    "CDC_LEASE_SECONDS": 3,
    "CDC_CONVEX_TIMEOUT_SECONDS": 2,
    "CDC_STATEMENT_SECONDS": 5,
    "CDC_DRAIN_SECONDS": 1,
    "CDC_HEARTBEAT_SECONDS": 1,
}


_AT_REST: LiteralString = """
select not exists (select from cdc.outbox o, cdc.checkpoint c where not pg_visible_in_snapshot(o.xid, c.position))
   and not exists (select from cdc.backfill b join cdc.mirror m on m.id = b.mirror
                   where m.configured and b.phase <> 'done')
"""


def quick_settings(dsn: str, convex: LocalConvex | None, **given: Any) -> Settings:
    where = {} if convex is None else {"CONVEX_URL": convex.url, "convex_deploy_key": convex.admin_key}
    return load_settings(Settings, **{"database_url": dsn, **where, **QUICK, **given})


def pause(waited: float) -> float:
    """Seconds until the next look at what others still compute: looks cost them time."""
    return min(max(waited / 10, 0.01), 0.05)


def honcho(*words: str) -> list[str | Path]:
    """The Procfile as a platform runs it, with no .env; at a stop it waits as long as one, not honcho's own 5 s."""
    patient = "from honcho import command, manager; manager.KILL_WAIT = 30; command.main()"
    procfile = ("--procfile", ROOT / "Procfile", "--env", os.devnull, "--app-root", ROOT)
    return [sys.executable, "-c", patient, *procfile, *words]


class Log:
    """The lines of a worker, as fields, in order."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]


class Running:
    """A worker in this process."""

    def __init__(self, worker: Worker, log: Log) -> None:
        self.worker = worker
        self.log = log
        self.task = asyncio.create_task(worker.run())

    async def said(self, event: str, *, times: int = 1, seconds: float = SECONDS) -> dict[str, Any]:
        """Waits for the `times`-th line of that name."""
        deadline = asyncio.get_running_loop().time() + seconds
        while len(found := self.log.of(event)) < times:
            assert not self.task.done(), f"the worker ended, and never said {event}: {self.log.events}"
            assert asyncio.get_running_loop().time() < deadline, f"never said {event}: {self.log.lines}"
            await asyncio.sleep(0.005)
        return found[times - 1]

    async def delivered(self, keys: int) -> None:
        """Waits until so many more keys have been delivered."""

        def so_far() -> int:
            return sum(line["keys"] for line in self.log.of("batch.applied"))

        wanted = so_far() + keys
        deadline = asyncio.get_running_loop().time() + SECONDS
        while so_far() < wanted:
            assert asyncio.get_running_loop().time() < deadline, self.log.lines[-5:]
            await asyncio.sleep(0.002)

    async def at_rest(self, db: Database, *, seconds: float = SECONDS) -> None:
        """Nothing is under way: all that was in the log by now is read, delivered or parked, and that is noted.

        Not by the heartbeat, which knows nothing of what was written since the last look.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        while not await asyncio.to_thread(db.one, _AT_REST):
            assert not self.task.done(), f"the worker ended: {self.log.events}"
            assert asyncio.get_running_loop().time() < deadline, self.log.lines[-5:]
            await asyncio.sleep(0.02)

    async def stop(self, *, seconds: float = SECONDS) -> None:
        """In order. Fails if anything else ended the worker, or if it does not end."""
        self.worker.stop()
        await asyncio.wait({self.task}, timeout=seconds)
        assert self.task.done(), f"the worker does not stop: {self.log.lines[-3:]}"
        if (died := self.died_of()) is not None:
            raise AssertionError(f"the worker died of {died}")

    def died_of(self) -> str | None:
        """In words: the trace of a RecursionError is more than pytest can print."""
        if not self.task.done() or self.task.cancelled() or self.task.exception() is None:
            return None
        error = self.task.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return repr(error)


@asynccontextmanager
async def worker_at_work(settings: Settings, mirrors: Sequence[Mirror]) -> AsyncIterator[Running]:
    """A worker until the block is left; there it is stopped in order, and whatever it died of is raised."""
    log = Log()

    def note(_logger: WrappedLogger, level: str, event_dict: EventDict) -> EventDict:
        log.lines.append({**event_dict, "level": level})
        raise structlog.DropEvent

    structlog.configure(processors=[note], wrapper_class=structlog.BoundLogger, cache_logger_on_first_use=False)
    running = Running(Worker(settings, mirrors), log)
    try:
        yield running
    except BaseException:
        running.worker.stop()
        await asyncio.wait({running.task}, timeout=SECONDS)
        if (died := running.died_of()) is not None:
            raise AssertionError(f"the worker died of {died}") from None
        raise
    else:
        await running.stop()
    finally:
        structlog.reset_defaults()


class Forked:
    """`cdc-worker` in a process of its own that has its modules from a fork, in place of a `Process`.

    Nine tenths of a short life are imports, which only tests of the program as such are about (test_worker_process.py,
    test_procfile.py).
    """

    def __init__(self, stdout: Path, stderr: Path, env: Mapping[str, str], words: Sequence[str]) -> None:
        self.stdout, self.stderr = stdout, stderr
        for path in (stdout, stderr):
            path.write_bytes(b"")
        self._fork = Fork(_as_program, words, dict(env), stdout, stderr)

    @property
    def returncode(self) -> int | None:
        return self._fork.exit_code

    def signal(self, number: signal.Signals) -> None:
        self._fork.signal(number)

    def wait(self, timeout: float) -> int:
        if (code := self._fork.wait(timeout)) is None:
            raise ProcessError(f"it still runs after {timeout:g} s\n{self.tail()}")
        return code

    def kill(self) -> None:
        self._fork.kill()

    def tail(self) -> str:
        return self.stderr.read_text()[-3_000:]


def _as_program(pipe: Connection, words: Sequence[str], env: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    """In the child."""
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = ["cdc-worker", *words]
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    # Here, not above: most tests of a worker have no need of its commands.
    from cdc_worker.__main__ import main  # noqa: PLC0415

    main()


def _end_with_parent(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)


class Child:
    """A worker in a process of its own."""

    def __init__(self, process: Process | Forked) -> None:
        self.process = process

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All whole lines so far; each must be JSON."""
        whole = self.process.stderr.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def said(self, event: str, *, times: int = 1, seconds: float = SECONDS) -> dict[str, Any]:
        started = time.monotonic()
        while True:
            waited = time.monotonic() - started
            ended = self.process.returncode is not None
            found = [line for line in self.lines if line["event"] == event]
            if len(found) >= times:
                return found[times - 1]
            assert not ended, f"it ended with {self.process.returncode}, and never said {event}:\n{self.process.tail()}"
            assert waited < seconds, f"it never said {event}:\n{self.process.tail()}"
            time.sleep(pause(waited))

    def term(self) -> None:
        self.process.signal(signal.SIGTERM)


def environment(dsn: str, convex: LocalConvex | None, config: Path, **given: Any) -> dict[str, str]:
    """The environment of a worker that knows nothing of this machine but its PATH."""
    where = {} if convex is None else {"CONVEX_URL": convex.url, "CONVEX_DEPLOY_KEY": convex.admin_key}
    settings = {**QUICK, **where, "DATABASE_URL": dsn, "CDC_CONFIG": config, "LOG_FORMAT": "json", **given}
    return {"PATH": os.environ["PATH"], **{name: str(value) for name, value in settings.items()}}


@contextmanager
def child(
    folder: Path,
    env: Mapping[str, str],
    *words: str,
    mirrors: Sequence[Mirror] | None = None,
    name: str = "worker",
    program: Sequence[str] = ("-m", "cdc_worker"),
) -> Iterator[Child]:
    """A command of the worker's, `run` by default. Killed on leaving, if it still runs."""
    if mirrors is not None:
        Path(env["CDC_CONFIG"]).write_text(toml(mirrors))
    argv = [sys.executable, *program, *(words or ("run",))]
    stdout, stderr = (folder / f"{name}.{stream}" for stream in ("out", "err"))
    with Process(argv, stdout=stdout, stderr=stderr, env=env, cwd=ROOT, ladder=((signal.SIGTERM, 5.0),)) as process:
        yield Child(process)


@contextmanager
def forked_child(folder: Path, env: Mapping[str, str], *, name: str) -> Iterator[Child]:
    """A worker, forked. Killed on leaving, if it still runs."""
    process = Forked(folder / f"{name}.out", folder / f"{name}.err", env, ["run"])
    try:
        yield Child(process)
    finally:
        process.kill()


def run_command(folder: Path, env: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """A command to its end, forked."""
    process = Forked(folder / "command.out", folder / "command.err", env, words)
    try:
        code = process.wait(60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, code, process.stdout.read_text(), process.stderr.read_text())
