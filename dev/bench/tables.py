"""Rows of figures as headings and texts: the same in the terminal and on the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from dev.bench.results import Row
from dev.bench.targets import Target

# Column: heading, digits.
_COLUMNS: Final = {
    "keys": ("keys", 0),
    "jobs": ("jobs", 0),
    "writes": ("writes", 0),
    "changes": ("changes", 0),
    "keys_by_bytes": ("keys/s by bytes", 0),
    "keys_by_calls": ("keys/s by calls of 200 ms", 0),
    "binds": ("what binds", 0),
    "in_flight": ("in flight then", 0),
    "workers": ("workers that saturate it", 0),
    "keys_per_second": ("keys/s", 0),
    "local_keys_per_second": ("keys/s, local Convex", 0),
    "steady_keys_per_second": ("keys/s, second half", 0),
    "jobs_per_second": ("jobs/s", 0),
    "changes_per_second": ("changes/s", 0),
    "ours_is_times": ("cdc_worker is times", 1),
    "worker_us_per_key": ("worker us per key", 1),
    "postgres_us_per_key": ("Postgres us per key", 1),
    "cpu_us_per_job": ("us/job", 0),
    "us_per_key": ("us/key", 1),
    "share": ("share", 3),
    "peak_mib": ("peak MiB", 0),
    "keys_per_request": ("keys per request", 0),
    "bytes_per_key": ("bytes per key", 0),
    "statements_per_1000": ("SQL per 1,000 keys", 1),
    "most_in_flight": ("most in flight", 0),
    "refused": ("refused", 0),
    "events_sent": ("events sent", 0),
    "requests": ("requests", 0),
    "changes_per_event": ("changes per event", 2),
    "drained_after_seconds": ("drained after s", 2),
    "p50_ms": ("p50 ms", 1),
    "p99_ms": ("p99 ms", 1),
    "max_ms": ("max ms", 1),
    "worker_core_percent": ("worker % of a core", 2),
    "postgres_core_percent": ("Postgres % of a core", 2),
    "statements_per_minute": ("statements a minute", 1),
    "seconds": ("seconds", 0),
    "without": ("without", 1),
    "nothing": ("doing nothing", 1),
    "floor": ("floor", 1),
    "with": ("with", 1),
    "nothing_ratio": ("ratio of doing nothing", 2),
    "floor_ratio": ("ratio of the floor", 2),
    "ratio": ("ratio", 2),
    "largest_part": ("largest part, of an even one", 3),
    "read_again_ms": ("all read again after ms", 0),
    "longest_wait_ms": ("longest wait of a key, ms", 0),
    "rotations": ("rotations", 0),
    "refused_rotations": ("put off", 0),
    "inserts": ("inserts", 0),
    "first_log_mib": ("log MiB before", 1),
    "most_log_mib": ("at most", 1),
    "last_log_mib": ("at the end", 1),
    "dead_rows": ("dead rows", 0),
    "rotating_ms": ("longest insert beside one, ms", 1),
    "between_ms": ("between them, ms", 1),
    "lock_timeout_ms": ("lock timeout, ms", 0),
    "insert_together_us": ("insert, one transaction", 1),
    "insert_each_us": ("insert, each its own", 1),
    "update_each_us": ("update, each its own", 1),
    "first_update_us": ("a connection's first update", 0),
    "bulk_insert_us": ("a row of 10,000 inserted", 2),
    "bulk_update_us": ("updated", 2),
    "bulk_delete_us": ("deleted", 2),
    "wal_without": ("WAL B/row without", 0),
    "wal_with": ("WAL B/row with", 0),
}


@dataclass(frozen=True)
class Table:
    """Texts: the first column names the line, the others are figures."""

    headings: Sequence[str]
    lines: Sequence[Sequence[str]]


def of_rows(rows: Sequence[Row]) -> Table:
    """The columns that any of the rows has, in their usual order."""
    columns = [column for column in _COLUMNS if any(column in row for row in rows)]
    return Table(
        ["", *(_COLUMNS[column][0] for column in columns)],
        [[row["what"], *(_figure(column, row.get(column)) for column in columns)] for row in rows],
    )


def of_targets(targets: Sequence[Target]) -> Table:
    words = {True: "met", False: "**missed**", None: "not measured"}
    return Table(
        ["target", "asked", "measured", ""],
        [
            [
                target.text,
                f"{target.sense} {target.bound:,g}",
                "" if target.value is None else f"{target.value:,.2f}",
                words[target.met],
            ]
            for target in targets
        ],
    )


def _figure(column: str, value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:,.{_COLUMNS[column][1]}f}"
