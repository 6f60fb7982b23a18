"""What a run gives: rows of figures by case, and what they say about the targets."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dev import postgres

FILE: Final = Path(__file__).parents[2] / "docs/performance.json"

Row = dict[str, Any]
"""`what` names it; the other entries are figures, by the name of their column."""


@dataclass
class Bench:
    """One run: where it plays, how large it is, and who listens."""

    server: postgres.Server
    quick: bool
    say: Callable[[str], None]
    convex: bool = True

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass
class Results:
    """All cases of the committed file; a run of some cases replaces only those."""

    machine: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, list[Row]] = field(default_factory=dict)
    # Points of pictures: by name, lists of [x, y, ...].
    traces: dict[str, list[list[float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls) -> "Results":
        return cls(**json.loads(FILE.read_text())) if FILE.exists() else cls()

    def save(self) -> None:
        FILE.write_text(json.dumps(self.__dict__, indent=1, sort_keys=True) + "\n")

    def row(self, case: str, what: str) -> Row:
        """The row of that name; an empty one if it was not measured."""
        return next((row for row in self.cases.get(case, ()) if row["what"] == what), {})


def machine(server: postgres.Server) -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "postgres": f"{server.version} ({server.flavour})",
        "python": platform.python_version(),
        "system": f"Linux {platform.release().split('-')[0]}",
    }


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that is not below that share of them; nan for none."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def middle(rows: Sequence[Row], column: str) -> Row:
    """The row whose value in that column is the median."""
    return sorted(rows, key=lambda row: float(row[column]))[len(rows) // 2]


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values) or [float("nan")])
