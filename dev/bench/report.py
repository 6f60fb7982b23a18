"""The results for people: one table in the terminal, and the tables inside docs/performance.md.

docs/performance.md is written by hand, except for what stands between `<!-- figures: NAME -->` and `<!-- end -->`.
"""

import re
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dev.bench.results import Results
from dev.bench.targets import targets

PAGE: Final = Path(__file__).parents[2] / "docs/performance.md"

# Column: heading, digits.
_COLUMNS: Final = {
    "keys": ("keys", 0),
    "jobs": ("jobs", 0),
    "writes": ("writes", 0),
    "changes": ("changes", 0),
    "keys_per_second": ("keys/s", 0),
    "local_keys_per_second": ("keys/s, local Convex", 0),
    "steady_keys_per_second": ("keys/s, second half", 0),
    "jobs_per_second": ("jobs/s", 0),
    "changes_per_second": ("changes/s", 0),
    "ours_is_times": ("cdc_worker is times", 1),
    "worker_us_per_key": ("worker us/key", 1),
    "postgres_us_per_key": ("Postgres us/key", 1),
    "cpu_us_per_job": ("us/job", 0),
    "us_per_key": ("us/key", 1),
    "share": ("share", 3),
    "peak_mib": ("peak MiB", 0),
    "keys_per_request": ("keys/request", 0),
    "bytes_per_key": ("bytes/key", 0),
    "statements_per_1000": ("statements per 1,000 keys", 1),
    "most_in_flight": ("most in flight", 0),
    "refused": ("refused", 0),
    "events_sent": ("events sent", 0),
    "requests": ("requests", 0),
    "changes_per_event": ("changes/event", 2),
    "drained_after_seconds": ("drained after s", 2),
    "p50_ms": ("p50 ms", 1),
    "p99_ms": ("p99 ms", 1),
    "max_ms": ("max ms", 1),
    "worker_core_percent": ("worker % of a core", 2),
    "postgres_core_percent": ("Postgres % of a core", 2),
    "statements_per_minute": ("statements/min", 1),
    "seconds": ("seconds", 0),
    "without": ("without", 1),
    "floor": ("floor", 1),
    "with": ("with", 1),
    "floor_ratio": ("ratio of the floor", 2),
    "ratio": ("ratio", 2),
    "largest_part": ("largest part, times an even one", 3),
    "read_again_ms": ("all read again after ms", 0),
    "longest_wait_ms": ("longest wait of a key, ms", 0),
    "rotations": ("rotations", 0),
    "refused_rotations": ("put off", 0),
    "inserts": ("inserts", 0),
    "most_log_mib": ("log MiB, at most", 1),
    "last_log_mib": ("at the end", 1),
    "dead_rows": ("dead rows", 0),
    "rotating_ms": ("longest insert beside a rotation, ms", 1),
    "between_ms": ("between them, ms", 1),
    "lock_timeout_ms": ("lock timeout, ms", 0),
    "insert_together_us": ("insert, one transaction", 1),
    "insert_each_us": ("insert, each its own", 1),
    "update_each_us": ("update, each its own", 1),
    "bulk_insert_us": ("row of an insert of 10,000", 2),
    "bulk_update_us": ("of an update", 2),
    "bulk_delete_us": ("of a delete", 2),
    "wal_without": ("WAL B/row without", 0),
    "wal_with": ("WAL B/row with", 0),
}


def _figure(column: str, value: Any) -> str:
    return f"{value:,.{_COLUMNS[column][1]}f}"


def show(results: Results, cases: list[str]) -> None:
    """The one table: a line for each measurement, then one for each target."""
    table = Table("case", "what", "figures", "s", title="cdc_worker, measured")
    for case in cases:
        for number, row in enumerate(results.cases.get(case, ())):
            figures = ", ".join(
                f"{_figure(column, row[column])} {heading}"
                for column, (heading, _) in _COLUMNS.items()
                if column in row
            )
            seconds = f"{results.seconds.get(case, 0):.0f}" if number == 0 else ""
            table.add_row(case if number == 0 else "", Text(row["what"]), figures, seconds)
        table.add_section()
    for target in targets(results):
        if target.value is not None:
            met = Text("met", style="green") if target.met else Text("missed", style="bold red")
            table.add_row("target", target.text, f"{target.value:,.2f} ({target.sense} {target.bound:,g})", met)
    Console().print(table)


def _markdown(results: Results, name: str) -> str:
    if name == "machine":
        said = results.machine
        return (
            f"{said['cores']} cores ({said['processor']}), {said['system']}, PostgreSQL {said['postgres']},"
            f" Python {said['python']}."
        )
    if name == "targets":
        lines = ["| target | asked | measured | |", "| --- | --- | --- | --- |"]
        for target in targets(results):
            word = {True: "met", False: "**missed**", None: "not measured"}[target.met]
            value = "" if target.value is None else f"{target.value:,.2f}"
            lines.append(f"| {target.text} | {target.sense} {target.bound:,g} | {value} | {word} |")
        return "\n".join(lines)
    if name == "durations":
        total = sum(results.seconds.values())
        each = ", ".join(f"{case} {seconds:.0f}" for case, seconds in results.seconds.items())
        return f"{total / 60:.0f} minutes in all; seconds by case: {each}."
    rows = results.cases[name]
    columns = [column for column in _COLUMNS if any(column in row for row in rows)]
    lines = [
        "| | " + " | ".join(_COLUMNS[column][0] for column in columns) + " |",
        "| --- | " + " | ".join("---:" for _ in columns) + " |",
    ]
    for row in rows:
        values = (_figure(column, row[column]) if column in row else "" for column in columns)
        lines.append(f"| {row['what']} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def write(results: Results) -> None:
    """Puts the figures into docs/performance.md; what was not measured is left as it is."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name not in {"machine", "targets", "durations"} and name not in results.cases:
            return found[0]
        return f"<!-- figures: {name} -->\n{_markdown(results, name)}\n<!-- end -->"

    text = PAGE.read_text()
    PAGE.write_text(re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL))
