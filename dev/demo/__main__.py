"""`make demo`, or `python -m dev.demo`: see it work, and have it proved at the end."""

import asyncio
import contextlib
import random
import signal
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import aiohttp
import psycopg
import typer
from rich.console import Console

from dev.demo.application import Application
from dev.demo.comparison import Comparison, compare
from dev.demo.convex_reads import ConvexReadError, ConvexReads, subscriptions
from dev.demo.dashboard import Dashboard
from dev.demo.rows import STATUS_MIRROR, Connection
from dev.demo.screen import Screen
from dev.demo.sightings import Change, Sightings
from dev.demo.stage import Servers, StageError, Worker, servers, worker
from dev.local_convex import LocalConvexError
from dev.postgres import PostgresError
from dev.processes import ProcessError

# The rows that were there before: the worker's start included.
FILL_SECONDS = 60.0
# After the last write; a difference that lasts longer is one.
SETTLE_SECONDS = 10.0
LATE_SECONDS = 3.0
# One answer of Convex, on this machine.
READ_SECONDS = 30.0

TROUBLES = (StageError, ConvexReadError, LocalConvexError, PostgresError, ProcessError, psycopg.Error, OSError)


class Demo:
    """One run, from the first row to the comparison."""

    def __init__(self, servers: Servers, worker: Worker, screen: Screen) -> None:
        self._servers = servers
        self._worker = worker
        self._screen = screen
        self._stop = asyncio.Event()
        self._sightings = Sightings(self._seen)
        self._existing: Change | None = None
        self._filled = asyncio.Event()
        self._written: list[Change] = []
        self._seen_changes: list[Change] = []
        self._left: list[str] = []

    async def run(self, *, rate: float, seconds: float | None, logs: bool) -> bool:
        """Whether Convex equals Postgres at the end. Raises one of TROUBLES, maybe in a group."""
        with self._signals():
            async with (
                await psycopg.AsyncConnection.connect(self._servers.database_url, autocommit=True) as connection,
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=READ_SECONDS)) as session,
                subscriptions(session, self._servers.convex.url) as subscribed,
                asyncio.TaskGroup() as tasks,
            ):
                application = Application(connection, random.Random())  # noqa: S311 - play, not secrets
                dashboard = Dashboard(subscribed, self._sightings)
                beside = [tasks.create_task(dashboard.run()), tasks.create_task(self._watch_worker())]
                if logs:
                    beside.append(tasks.create_task(self._tail_log()))
                with self._screen.busy("the worker starts, and fills Convex with the rows that exist"):
                    await self._fill(application, dashboard)
                started = time.monotonic()
                await self._play(application, dashboard, rate, None if seconds is None else started + seconds)
                took = time.monotonic() - started
                with self._screen.busy("comparing"):
                    reads = ConvexReads(session, self._servers.convex.url, self._servers.convex.admin_key)
                    comparison = await self._compare(connection, reads, application)
                for task in beside:
                    task.cancel()
        unseen = self._sightings.unseen
        self._screen.summary(
            took,
            written=self._written,
            seen=self._seen_changes,
            unseen=unseen,
            comparison=comparison,
            log=self._worker.log,
        )
        return not comparison.differences and not unseen

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the play, a second one everything."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def end() -> None:
            if self._stop.is_set():
                task.cancel()
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.default_int_handler)

    async def _fill(self, application: Application, dashboard: Dashboard) -> None:
        self._existing = await application.existing_rows()
        await asyncio.to_thread(self._worker.migrate)
        self._existing.committed = time.monotonic()
        self._worker.start()
        self._sightings.committed(self._existing)
        await dashboard.open_pages(sorted(application.users))
        try:
            async with asyncio.timeout(FILL_SECONDS):
                await self._filled.wait()
        except TimeoutError:
            raise StageError(
                f"the rows that existed before are not in Convex after {FILL_SECONDS:g} s;"
                f" the worker's last lines:\n{self._worker.tail()}"
            ) from None

    async def _play(self, application: Application, dashboard: Dashboard, rate: float, until: float | None) -> None:
        opened = set(application.users)
        following = time.monotonic()
        while not self._stop.is_set() and (until is None or time.monotonic() < until):
            change = await application.write()
            self._written.append(change)
            if change.rolled_back:
                self._screen.change(change)
            self._sightings.committed(change)
            new = application.users - opened
            if new:
                await dashboard.open_pages(sorted(new))
                opened |= new
            while self._left:
                await dashboard.close_page(self._left.pop())
            self._say_what_is_late()
            # Uneven, as people are; and what could not be kept is not made up for.
            following = max(time.monotonic(), following + random.uniform(0.4, 1.6) / rate)  # noqa: S311 - as above
            pause = (following if until is None else min(following, until)) - time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()

    def _seen(self, change: Change) -> None:
        if change is self._existing:
            self._screen.filled(change)
            self._filled.set()
            return
        self._seen_changes.append(change)
        self._screen.change(change)
        left = [slot for slot, document in change.effects.items() if document is None]
        self._left += [key for mirror, key in left if mirror == STATUS_MIRROR]
        # The demo may run for days.
        self._sightings.forget(set(left))
        change.effects = {}

    def _say_what_is_late(self) -> None:
        before = time.monotonic() - LATE_SECONDS
        for change in self._sightings.unseen:
            if not change.late and change.committed < before:
                change.late = True
                self._screen.late(change)

    async def _compare(self, connection: Connection, reads: ConvexReads, application: Application) -> Comparison:
        """The last change takes its few milliseconds: compares until there is no difference, or no patience left."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            comparison = await compare(connection, reads, application.users)
            if not comparison.differences and not self._sightings.unseen:
                return comparison
            if time.monotonic() > deadline:
                return comparison
            await asyncio.sleep(0.1)

    async def _watch_worker(self) -> None:
        while True:
            self._worker.check()
            await asyncio.sleep(0.2)

    async def _tail_log(self) -> None:
        said = 0
        while True:
            if self._worker.log.exists():
                with self._worker.log.open("rb") as log:
                    log.seek(said)
                    *lines, rest = log.read().split(b"\n")
                    said = log.tell() - len(rest)
                for line in lines:
                    self._screen.log(line.decode(errors="replace"))
            await asyncio.sleep(0.1)


def _demo(
    seconds: Annotated[
        float | None, typer.Option("--for", metavar="SECONDS", min=1, help="End by itself. Otherwise: Ctrl-C.")
    ] = None,
    rate: Annotated[
        float, typer.Option(metavar="WRITES_PER_SECOND", min=0.01, max=100, help="Transactions, on average.")
    ] = 3.0,
    logs: Annotated[bool, typer.Option("--logs", help="Show the worker's log lines, too.")] = False,
) -> None:
    """A small application on an embedded Postgres, the local Convex, and the worker between them.

    Prints what was written, and when it was seen in Convex.

    At the end every row is compared with every document; exit status 0 only if they are equal.

    Nothing is kept, and nothing is left running.
    """
    screen = Screen(Console(highlight=False, emoji=False, markup=False))
    # As Ctrl-C: the blocks below are left in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.ExitStack() as stack:
            with screen.busy("Postgres and Convex start"):
                running = stack.enter_context(servers())
            screen.banner(running, rate, seconds)
            demo = Demo(running, stack.enter_context(worker(running)), screen)
            equal = asyncio.run(demo.run(rate=rate, seconds=seconds, logs=logs))
    except* TROUBLES as group:
        for error in _leaves(group):
            screen.trouble(error)
        sys.exit(1)
    except* (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
    sys.exit(0 if equal else 1)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name="demo")(_demo)
    app(prog_name="python -m dev.demo")


if __name__ == "__main__":
    main()
