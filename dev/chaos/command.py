"""The command `python -m dev.chaos`."""

import argparse
import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from cdc_worker.logs import configure_logs
from dev import postgres
from dev.chaos.campaign import KINDS, Campaign, Case, Result
from dev.chaos.generator import schedule_of
from dev.chaos.report import show_finding, show_result, write_figures
from dev.chaos.schedule import printed
from dev.chaos.shrink import smaller
from dev.chaos.written import WRITTEN

# A world mostly waits: this number of them keeps a core busy.
_WORLDS_PER_CORE = 3
_MOST_JOBS = 16

_HELP = """Plays schedules of writes and faults against a real Postgres, the real worker and the real Convex functions,
and compares what Convex holds with what Postgres holds: lost, doubled, stale.

  python -m dev.chaos --seed 7                 one schedule, the same steps with the same values each time
  python -m dev.chaos --seeds 1000             the schedules of seeds 0 to 999
  python -m dev.chaos --seeds 500 --from 1000  those of seeds 1000 to 1499
  python -m dev.chaos --written                the schedules that were written down
  python -m dev.chaos --seed 7 --shrink        as few steps as still fail

Exit status 1 if anything was found. What is promised, and what this covers: docs/reliability.md.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dev.chaos", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, metavar="N", help="one schedule")
    which.add_argument("--seeds", type=int, metavar="COUNT", help="how many schedules")
    which.add_argument("--written", action="store_true", help="those of dev/chaos/written.py")
    parser.add_argument("--from", type=int, default=0, metavar="N", dest="first", help="the first seed (default: 0)")
    parser.add_argument("--jobs", type=int, metavar="J", help="worlds at once (default: three for each core)")
    parser.add_argument("--times", type=int, default=1, metavar="T", help="how often each is played: timing is chance")
    parser.add_argument("--shards", type=int, default=1, metavar="K", help="shards, and workers (default: 1)")
    parser.add_argument("--postgres", choices=list(postgres.flavours()), default=next(iter(postgres.flavours()), None))
    parser.add_argument("--stop", action="store_true", help="end with the first finding")
    parser.add_argument("--shrink", action="store_true", help="with --seed: look for a smaller schedule that fails")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if nothing was found."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.postgres is None:
        parser.error("there is no Postgres here: run `make setup`")
    configure_logs("ERROR", "json")
    console = Console(highlight=False)
    cases = _cases(asked) * asked.times
    jobs = min(asked.jobs or min(_WORLDS_PER_CORE * (os.cpu_count() or 1), _MOST_JOBS), len(cases))
    campaign = Campaign(asked.postgres, jobs=jobs, shards=asked.shards, stop=asked.stop)
    if asked.shrink:
        return _shrink(console, campaign, cases[0])
    _announce(console, asked, campaign, cases)
    result = _play(console, campaign, cases)
    show_result(console, result)
    if asked.report is not None:
        write_figures(result, asked.report)
    return int(bool(result.findings))


def _cases(asked: argparse.Namespace) -> list[Case]:
    if asked.written:
        return list(WRITTEN.items())
    seeds = [asked.seed] if asked.seed is not None else range(asked.first, asked.first + asked.seeds)
    return [(f"seed {seed}", schedule_of(seed)) for seed in seeds]


def _announce(console: Console, asked: argparse.Namespace, campaign: Campaign, cases: list[Case]) -> None:
    version = postgres.flavours()[campaign.flavour]
    worlds = "one world" if campaign.jobs == 1 else f"{campaign.jobs} worlds at once"
    console.print(
        Text.assemble(
            (f"{len(cases):,} schedule{'s' if len(cases) > 1 else ''}", "bold"),
            f" from {cases[0][0]} to {cases[-1][0]}" if len(cases) > 1 else f", {cases[0][0]}",
            f"; {worlds}, each with a Postgres {version}, a Convex and three writers of its own",
        )
    )
    if asked.seed is not None:
        console.print(Text(printed(cases[0][1])), soft_wrap=True)


def _play(console: Console, campaign: Campaign, cases: list[Case]) -> Result:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        task = bars.add_task(_standing(Result()), total=len(cases))
        shown = 0

        def progress(result: Result) -> None:
            nonlocal shown
            for finding in result.findings[shown:]:
                show_finding(bars.console, finding)
            shown = len(result.findings)
            bars.update(task, completed=result.schedules, description=_standing(result))

        return asyncio.run(campaign.play(cases, progress))


def _standing(result: Result) -> str:
    return "  ".join(f"{kind} {result.count(kind)}" for kind in KINDS)


def _shrink(console: Console, campaign: Campaign, case: Case) -> int:
    name, schedule = case
    small = asyncio.run(
        smaller(campaign, name, schedule, lambda text: console.print(Text(text, style="dim"), soft_wrap=True))
    )
    if small is None:
        console.print(Text(f"{name} does not fail here"))
        return 0
    console.print(Text(printed(small)), soft_wrap=True)
    return 1
