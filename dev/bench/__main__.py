"""`python -m dev.bench [CASE ...]`: measures, prints one table, and writes docs/performance.* and its pictures."""

import time
from collections.abc import Callable
from typing import Annotated, Final

import typer
from rich.console import Console

from dev.bench import (
    draining,
    living,
    parts,
    pictures,
    real_functions,
    report,
    rivals,
    rotating,
    sharding,
    stations,
    writers,
)
from dev.bench.results import Bench, Results, Row, machine
from dev.bench.stage import durable_server

CASES: Final[dict[str, Callable[[Bench, Results], list[Row]]]] = {
    "drain": draining.backlogs,
    "latency": living.latency,
    "idle": living.idle,
    "writers": writers.writers,
    "capture": parts.parts,
    "held": draining.held,
    "rotation": rotating.rotation,
    "coalescing": draining.coalescing,
    "distance": draining.distance,
    "shards": sharding.shards,
    "rebalance": sharding.rebalance,
    "peers": rivals.peers,
    "local": real_functions.local,
    "profile": stations.profile,
}
# A smoke run installs nothing.
_NOT_QUICK: Final = {"peers"}

_console = Console(stderr=True)


def main(
    cases: Annotated[
        list[str] | None, typer.Argument(help=f"Some of: {', '.join(CASES)}. All, if none is named.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run at all? Writes no file.")] = False,
    write: Annotated[bool, typer.Option(help="Write docs/performance.json, .md and the pictures.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Measure nothing; write page and pictures anew.")] = False,
) -> None:
    """Measures the worker on a Postgres with durable commits, against what a user would pick instead.

    One run takes twenty minutes. The figures of two runs on a shared machine differ by a fifth; the ratios within
    one run differ by much less.
    """
    chosen = cases or [case for case in CASES if not (quick and case in _NOT_QUICK)]
    unknown = [case for case in chosen if case not in CASES]
    if unknown:
        raise typer.BadParameter(f"there is no case {', '.join(unknown)} (there are: {', '.join(CASES)})")
    results = Results() if quick else Results.load()
    if not again:
        _measure(results, chosen, quick=quick)
    report.show(results, chosen)
    if write and not quick:
        results.save()
        report.write(results)
        pictures.write(results)


def _measure(results: Results, chosen: list[str], *, quick: bool) -> None:
    with durable_server() as server:
        results.machine = machine(server)
        bench = Bench(server, quick, lambda text: _console.print(text, highlight=False, markup=False))
        for case in chosen:
            bench.say(f"== {case}")
            began = time.monotonic()
            results.cases[case] = CASES[case](bench, results)
            results.seconds[case] = round(time.monotonic() - began, 1)


if __name__ == "__main__":
    typer.run(main)
