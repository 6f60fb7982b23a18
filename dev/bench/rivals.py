"""Case 8: the same backlog for those that a user would pick instead. Installs them into an environment of their own."""

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from dev import postgres
from dev.bench import meter, sink
from dev.bench.draining import drain
from dev.bench.peers.payload import events
from dev.bench.results import Bench, Results, Row, middle
from dev.bench.stage import ROOT, Stage, stage
from dev.local_convex import node
from dev.processes import Process

HERE: Final = Path(__file__).parent / "peers"
# Git, linters and type checkers all pass over .venv.
CACHE: Final = ROOT / ".venv/bench"
INSTALL_SECONDS: Final = 300.0
_LADDER: Final = ((signal.SIGTERM, 2.0),)

PYTHON_PEERS: Final = {
    "naive loop": "naive",
    "batch loop by hand (500 a POST)": "batch_loop",
    "procrastinate": "procrastinate_jobs",
    "pgqueuer (asyncpg, 100)": "pgqueuer_jobs",
    "dual write": "dual_write",
}
NODE_PEERS: Final = {"graphile-worker (local queue 500)": "graphile", "pg-boss (8 x 500)": "pgboss"}
OURS: Final = "cdc_worker"


def peers(bench: Bench, results: Results) -> list[Row]:
    del results
    jobs, seconds = bench.size(20_000, 200), bench.size(8, 2)
    theirs: list[Row] = []
    ours: list[Row] = []
    with stage(bench.server) as on:
        for what, argv in _programs(bench.say):
            # Ours before each of theirs, so that a noisy minute is in both.
            ours.append(_ours(on, jobs))
            try:
                theirs.append(_measure(bench, what, argv, jobs, seconds))
            except (subprocess.SubprocessError, OSError, LookupError) as error:
                bench.say(f"{what} could not be measured: {error}")
        rows = [middle(ours or [_ours(on, jobs)], "jobs_per_second"), *theirs]
    for row in rows:
        row["ours_is_times"] = rows[0]["jobs_per_second"] / (row["jobs_per_second"] or float("nan"))
    return rows


def _ours(on: Stage, jobs: int) -> Row:
    on.add(jobs)
    done = drain(on, jobs)
    return {
        "what": OURS,
        "jobs": done.keys,
        "jobs_per_second": done.rate,
        "cpu_us_per_job": done.cost.worker_seconds / done.keys * 1e6,
        "requests": done.requests,
    }


def _measure(bench: Bench, what: str, argv: Sequence[str | Path], jobs: int, seconds: float) -> Row:
    """From its first POST on, for so long or until all is done."""
    with postgres.database(bench.server) as dsn, sink.start() as convex, _folder() as folder:
        script = argv[-1]
        is_node = str(script).endswith(".mjs")
        cwd = CACHE / "node" if is_node else ROOT
        done = subprocess.run(
            [*argv, "setup", dsn, events(jobs) if is_node else str(jobs)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=cwd,
            check=False,
            timeout=120,
        )
        if done.returncode:
            raise LookupError(done.stderr[-1_000:])
        # With statistics, as a queue has them after its first minutes.
        with bench.server.admin(dsn.rpartition("/")[2]) as connection:
            connection.execute("analyze")
        with Process([*argv, "work", dsn, convex.url], stdout=folder / "log", cwd=cwd, ladder=_LADDER) as process:
            first = convex.wait(keys=1, seconds=20.0)
            if not first.keys:
                raise LookupError(f"it sent nothing:\n{process.tail()}")
            pid = meter.program_of(process.keeper_pid)
            before = meter.cpu_seconds(pid)
            counts = convex.wait(keys=jobs, seconds=seconds)
            end = counts.last_at if counts.keys >= jobs else time.monotonic()
            cpu = meter.cpu_seconds(pid) - before
    return {
        "what": what,
        "jobs": counts.keys,
        "jobs_per_second": (counts.keys - first.keys) / max(end - first.last_at, 1e-9),
        "cpu_us_per_job": cpu / max(counts.keys - first.keys, 1) * 1e6,
        "requests": counts.requests,
    }


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cdc-peer-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs(say: Callable[[str], None]) -> Iterator[tuple[str, Sequence[str | Path]]]:
    """What can be installed here, with how it is run."""
    try:
        python = _python_environment(say)
        for what, module in PYTHON_PEERS.items():
            yield what, [python, "-m", f"dev.bench.peers.{module}"]
    except (subprocess.SubprocessError, OSError) as error:
        say(f"the Python peers cannot be installed: {error}")
    try:
        folder = _node_environment(say)
        for what, script in NODE_PEERS.items():
            yield what, [node(), folder / f"{script}.mjs"]
    except (subprocess.SubprocessError, OSError) as error:
        say(f"the Node peers cannot be installed: {error}")


def _python_environment(say: Callable[[str], None]) -> Path:
    folder, pins = CACHE / "python", HERE / "requirements.txt"
    python = folder / "bin/python"
    if not _fresh(folder, pins):
        say("installing the Python peers")
        _run(sys.executable, "-m", "venv", "--clear", folder)
        _run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-r", pins)
        _note(folder, pins)
    return python


def _node_environment(say: Callable[[str], None]) -> Path:
    folder, pins = CACHE / "node", HERE / "package.json"
    if not _fresh(folder, pins):
        say("installing the Node peers")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copy(pins, folder)
        npm = [node(), node().parents[1] / "lib/node_modules/npm/bin/npm-cli.js"]
        _run(*npm, "install", "--no-package-lock", "--ignore-scripts", "--loglevel=error", cwd=folder)
        _note(folder, pins)
    # A module is found from where the script lies.
    for script in HERE.glob("*.mjs"):
        shutil.copy(script, folder)
    return folder


def _fresh(folder: Path, pins: Path) -> bool:
    note = folder / ".pins"
    return note.exists() and note.read_bytes() == pins.read_bytes()


def _note(folder: Path, pins: Path) -> None:
    shutil.copy(pins, folder / ".pins")


def _run(*argv: str | Path, cwd: Path = ROOT) -> None:
    """Raises CalledProcessError; what an installer says of the machine's own settings is nobody's business."""
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True, cwd=cwd, timeout=INSTALL_SECONDS)
