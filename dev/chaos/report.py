"""What a person sees of a campaign."""

import json
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dev.chaos.campaign import KINDS, Finding, Result
from dev.chaos.schedule import printed

_MOST_DIFFERENCES = 12
_WRITES: Final = ("statements", "statements given up", "transactions committed", "transactions rolled back")
# What the network counts beside what it does to requests on purpose.
_NO_FAULTS: Final = ("request: clear",)


def figures(result: Result) -> dict[str, Any]:
    """The same in numbers, for programs."""
    return {
        "schedules": result.schedules,
        "took_seconds": round(result.took_seconds, 1),
        **{kind: result.count(kind) for kind in KINDS},
        "tally": dict(sorted(result.tally.items())),
        "findings": [
            {"name": each.name, "when": each.when, "found": [[one.kind, one.what] for one in each.found]}
            for each in result.findings
        ],
    }


def write_figures(result: Result, file: Path) -> None:
    file.write_text(json.dumps(figures(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show_finding(console: Console, finding: Finding) -> None:
    """Everything that is needed to look into it, the worst last."""
    console.print(Text(f"\n{finding.name}: the schedule", style="bold"))
    console.print(Text(printed(finding.schedule)), soft_wrap=True)
    console.print(Text("the ends of the workers' logs", style="bold"))
    console.print(Text(finding.story), soft_wrap=True, style="dim")
    console.print(Text(f"{finding.name}, {finding.when}", style="bold red"))
    for each in finding.found[:_MOST_DIFFERENCES]:
        console.print(Text(f"  {each.kind}: {each.what}", style="red"), soft_wrap=True)
    if len(finding.found) > _MOST_DIFFERENCES:
        console.print(Text(f"  and {len(finding.found) - _MOST_DIFFERENCES} more", style="red"))


def show_result(console: Console, result: Result) -> None:
    tally = result.tally
    rate = result.schedules / result.took_seconds if result.took_seconds else 0.0
    console.print()
    console.print(
        Text.assemble(
            (f"{result.schedules:,} schedules", "bold"), f" in {result.took_seconds:,.0f} s ({rate:.1f} a second)"
        )
    )
    writes = [(name, tally[name]) for name in _WRITES]
    keys = sum(count for name, count in tally.items() if name.startswith("verdict: ") and not name.endswith("requests"))
    deliveries = [("requests", tally["verdict: requests"]), ("keys", keys)]
    deliveries += [(name, count) for name, count in _named(tally, "verdict: ") if name != "requests"]
    faults = [
        (name, count)
        for name, count in sorted(tally.items())
        if ": " in name and not name.startswith("verdict: ") and name not in _NO_FAULTS
    ]
    for title, rows in (("writes", writes), ("deliveries", deliveries), ("faults", faults)):
        console.print(_block(title, rows))
    console.print()
    console.print(
        Text("   ").join(
            Text.assemble((f"{kind} ", "bold"), (f"{count:,}", "bold red" if count else "bold green"))
            for kind, count in ((kind, result.count(kind)) for kind in KINDS)
        )
    )
    if result.findings:
        names = ", ".join(finding.name for finding in result.findings)
        console.print(Text(f"found by {names}", style="red"))


def _named(tally: "dict[str, int]", start: str) -> list[tuple[str, int]]:
    return sorted((name.removeprefix(start), count) for name, count in tally.items() if name.startswith(start))


def _block(title: str, rows: list[tuple[str, int]]) -> Group:
    """Two columns of names and counts, read downwards."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    half = (len(rows) + 1) // 2
    cells = [(name, f"{count:,}") for name, count in rows]
    for left, right in zip(cells[:half], [*cells[half:], ("", "")][:half], strict=True):
        table.add_row(*left, *right)
    return Group(Text(f"\n{title}", style="bold"), Padding(table, (0, 0, 0, 2)))
