"""The commands. `cdc-worker --help` teaches; what a command does is in the module of its name."""

import asyncio
import io
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeVar

import psycopg
import structlog
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cdc_worker import backfill as rescans
from cdc_worker import parking
from cdc_worker.catalog import check
from cdc_worker.database import Database
from cdc_worker.errors import CdcError, ConfigError, SchemaError
from cdc_worker.locks import when_free
from cdc_worker.logs import LogGone, configure_logs
from cdc_worker.migrate import migrate as bring_up_to_date
from cdc_worker.mirrors import Mirror, load_mirrors
from cdc_worker.outbox import ring
from cdc_worker.plan import Plan
from cdc_worker.postgres_errors import cause, is_gone
from cdc_worker.registry import known_mirrors
from cdc_worker.replay import replay as mark_again
from cdc_worker.settings import Settings, load_settings, unknown_settings

if TYPE_CHECKING:
    from cdc_worker.worker import Worker

app = typer.Typer(
    name="cdc-worker",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Keeps documents in Convex equal to rows in your Postgres.

    Triggers note which rows changed; the worker reads them and mirrors them: nothing lost, nothing doubled,
    nothing back in time.

    First `migrate`, on each deploy; then `run`, for ever. Settings come from the environment: DATABASE_URL, CONVEX_URL,
    CONVEX_DEPLOY_KEY; which rows become which documents is in cdc_worker.toml (or CDC_CONFIG).
    """,
)

log = structlog.get_logger()
T = TypeVar("T")
_EXIT_CONFIG = 2
_LOOKUP_SECONDS = 1.0


def _start() -> tuple[Settings, tuple[Mirror, ...]]:
    settings = load_settings(Settings)
    configure_logs(settings.log_level, settings.log_format)
    if unknown := unknown_settings():
        log.warning("settings.unknown", names=unknown, cure="it does nothing: README, Settings, has all names")
    return settings, load_mirrors(settings.config)


@app.command()
def run() -> None:
    """Mirror changes to Convex until told to stop.

    SIGTERM or Ctrl-C: stops reading, finishes what is under way, notes how far it got, exits 0. A second one
    exits at once; what was under way is delivered again by the next start.
    """
    settings, mirrors = _start()
    # Here, not above: with it comes the client for HTTP, a fifth of a command's start, which no other command needs.
    from cdc_worker.worker import Worker  # noqa: PLC0415

    try:
        asyncio.run(_run(Worker(settings, mirrors)))
    except* LogGone:
        os._exit(1)  # Python's own end would try to say it


async def _run(worker: "Worker") -> None:
    loop = asyncio.get_running_loop()
    asked = False

    def stop(name: str) -> None:
        nonlocal asked
        if asked:
            try:
                log.warning("worker.killed", signal=name, cure="what was under way is delivered again")
            finally:
                os._exit(1)
        asked = True
        # Before it is said: that fails if the reader of the log is gone.
        worker.stop()
        log.info("worker.stop_requested", signal=name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)
    await worker.run()
    # The loop's handlers go with it: a signal that comes now must not turn an end in order into a death.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    # Python does not end while a thread still looks up a name, which may take longer than the platform waits.
    ending = asyncio.create_task(loop.shutdown_default_executor())
    await asyncio.wait({ending}, timeout=_LOOKUP_SECONDS)
    if not ending.done():
        os._exit(0)


@app.command()
def migrate() -> None:
    """Bring the database up to date: the schema cdc, and the triggers that cdc_worker.toml asks for.

    Safe to run twice and at the same time, and while the application writes: a table is locked for a moment, and not
    waited for longer than 0.3 s at a time (once for 1.3 s, where an autovacuum has to give way). Your tables get
    triggers and nothing else.
    """
    settings, mirrors = _start()
    asyncio.run(bring_up_to_date(settings.database_url.get_secret_value(), mirrors, shards=settings.shards))


@app.command()
def backfill(
    mirror: Annotated[str | None, typer.Argument(help="Only this mirror; otherwise all of them.")] = None,
) -> None:
    """Mark every row that exists as changed, so that the worker delivers it again.

    Then the worker looks at every document in Convex as well, so that what has no row any more goes.

    Goes page by page, in the order of the keys; when interrupted, the next call (or the worker) goes on where
    it was. A new mirror, a changed query and an empty deployment are noticed by themselves and need no backfill.
    """
    settings, mirrors = _start()
    chosen = _chosen(mirrors, mirror)
    asyncio.run(_with_database(settings, lambda database: _backfill(database, mirrors, chosen)))


def _chosen(mirrors: Sequence[Mirror], name: str | None) -> list[Mirror]:
    chosen = [each for each in mirrors if name in {None, each.name}]
    if not chosen:
        raise ConfigError(f'there is no mirror "{name}" (there are: {", ".join(each.name for each in mirrors)})')
    return chosen


async def _backfill(database: Database, mirrors: Sequence[Mirror], chosen: Sequence[Mirror]) -> None:
    ids = await known_mirrors(database, mirrors)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as progress:
        for mirror in chosen:
            plan = await when_free(f'mirror "{mirror.name}"', partial(_plan, database, mirror), database.execute)
            await _backfill_one(database, ids[mirror.name], plan, progress)


async def _plan(database: Database, mirror: Mirror) -> Plan:
    async with database.transaction("read only") as connection:
        return await check(connection, mirror)


async def _backfill_one(database: Database, mirror_id: int, plan: Plan, progress: Progress) -> None:
    phase, marked = await rescans.state(database, mirror_id)
    resumed = phase == "rows"
    if not resumed:
        await rescans.request(database, mirror_id, "backfill command")
        marked = 0
    name = plan.mirror.name
    if progress.disable:  # the bar says the same
        log.info("backfill.started", mirror=name, resumed=resumed, already_marked=marked)
    bar = progress.add_task(name, total=max(marked, await rescans.estimate(database, plan)), completed=marked)
    started = time.monotonic()
    while (await rescans.state(database, mirror_id))[0] == "rows":
        step = await rescans.step(database, {mirror_id: plan}, None)
        if step is None:
            await asyncio.sleep(0.2)  # the worker is at this very page
            continue
        await ring(database)
        marked = step.total_marked
        progress.update(bar, completed=marked)
    progress.update(bar, completed=marked, total=marked)
    if progress.disable:
        log.info("backfill.done", mirror=name, keys=marked, took_seconds=round(time.monotonic() - started, 1))


@app.command()
def replay(
    hours: Annotated[
        float,
        typer.Argument(
            help="How far back. A change counts from when its transaction began, so rather ask for more.",
            min=0,
            max=8760,
        ),
    ],
    mirror: Annotated[str | None, typer.Argument(help="Only this mirror; otherwise all of them.")] = None,
) -> None:
    """Mark what changed within the last hours once more, so that the worker delivers it again.

    For a Convex that was set back or edited by hand not long ago. It goes back as far as the log does: what has been
    acknowledged stays in it for CDC_RETENTION_HOURS. For more than that there is `backfill`.
    """
    settings, mirrors = _start()
    chosen = _chosen(mirrors, mirror)
    asyncio.run(_with_database(settings, lambda database: _replay(database, mirrors, chosen, hours)))


async def _replay(database: Database, mirrors: Sequence[Mirror], chosen: Sequence[Mirror], hours: float) -> None:
    ids = await known_mirrors(database, mirrors)
    done = await mark_again(database, [ids[mirror.name] for mirror in chosen], hours)
    log.info("replay.marked", keys=done.keys, since=_utc(done.since))
    if done.log_begins is not None and done.log_begins > done.since:
        log.warning(
            "replay.cut_short",
            log_begins=_utc(done.log_begins),
            cure="the log has nothing from before; if anything changed then, `cdc-worker backfill` finds it",
        )


def _utc(at: datetime) -> str:
    """As the log has its times; the session's zone may be another."""
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


parked = typer.Typer(
    no_args_is_help=True,
    help="""Keys that are parked: refused for a reason of their own, while everything else flows.

    A later good change of a row settles its key by itself.
    """,
)
app.add_typer(parked, name="parked")
_MirrorOption = Annotated[str | None, typer.Option("--mirror", help="Only keys of this mirror.")]


@parked.command("list")
def parked_list(
    mirror: _MirrorOption = None,
    limit: Annotated[int, typer.Option(help="How many at the most; the latest come first.", min=1, max=10_000)] = 50,
) -> None:
    """Show parked keys with their reasons."""
    settings, _ = _start()
    keys = asyncio.run(_with_database(settings, lambda database: parking.list_parked(database, mirror, limit)))
    table = Table("mirror", "key", "kind", "reason", "attempts", "first", "last", box=None, pad_edge=False)
    for each in keys:
        table.add_row(
            each.mirror,
            # What users of the application wrote must not speak to the terminal.
            Text(each.key if each.key.isprintable() else each.key.encode("unicode_escape").decode()),
            each.kind,
            Text(each.reason),
            str(each.attempts),
            _utc(each.first_at),
            _utc(each.last_at),
        )
    # A pipe gets whole lines, however long they are.
    console = Console() if sys.stdout.isatty() else Console(width=1_000)
    console.print(table if keys else "Nothing is parked.")


@parked.command("retry")
def parked_retry(
    key: Annotated[str | None, typer.Argument(help="Only this key; otherwise all of them.")] = None,
    mirror: _MirrorOption = None,
) -> None:
    """Read and deliver parked keys anew. One that goes well is parked no longer."""
    settings, _ = _start()
    count = asyncio.run(_with_database(settings, lambda database: parking.retry_parked(database, mirror, key)))
    log.info("parked.marked", keys=count)


@parked.command("drop")
def parked_drop(
    key: Annotated[str | None, typer.Argument(help="Only this key; otherwise all of them.")] = None,
    mirror: _MirrorOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Forget parked keys. Their documents stay as they are until the row changes again."""
    settings, _ = _start()
    if key is None and not yes:
        counts = asyncio.run(_with_database(settings, lambda database: parking.count_parked(database, mirror)))
        if not counts:
            typer.echo("Nothing is parked.")
            return
        listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
        typer.confirm(f"Forget all parked keys: {listed}?", abort=True)
    count = asyncio.run(_with_database(settings, lambda database: parking.drop_parked(database, mirror, key)))
    log.info("parked.dropped", keys=count)


async def _with_database(settings: Settings, work: Callable[[Database], Awaitable[T]]) -> T:
    async with Database(
        settings.database_url.get_secret_value(), statement_seconds=settings.statement_seconds
    ) as database:
        await database.reopen()  # says why there is no connection; the pool only says that there is none
        try:
            return await work(database)
        except psycopg.errors.UndefinedTable:
            raise SchemaError("this database has no schema cdc: run `cdc-worker migrate` first") from None


def main() -> None:
    """The entry point: what is expected to go wrong is one line, and exit status 2 (settings) or 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a key may have what the terminal lacks
    try:
        for number, word in enumerate(sys.argv[1:], start=1):
            if not _is_utf8(word):
                raise ConfigError(f"word {number} of the command line is not UTF-8, as all names and keys are")
        app()
    except ConfigError as error:
        _refuse(str(error), _EXIT_CONFIG)
    except CdcError as error:
        _refuse(str(error), 1)
    except psycopg.Error as error:
        if is_gone(error):
            # libpq's text names host, port and role; never the password.
            _refuse(f"the database is out of reach: {str(error).strip().splitlines()[0]}", 1)
        _refuse(f"Postgres refuses: {cause(error)}{_cure(error)}", 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_utf8(word: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in word)


def _cure(error: psycopg.Error) -> str:
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return " (use the role that ran `cdc-worker migrate`)"
    if isinstance(error, psycopg.errors.QueryCanceled):
        return " (CDC_STATEMENT_SECONDS is the limit)"
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return " (somebody else holds a lock: run it again)"
    return ""


def _refuse(text: str, status: int) -> None:
    for line in text.splitlines():
        sys.stderr.write(f"cdc-worker: {line}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
