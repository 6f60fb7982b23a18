"""The targets, each with the figure that answers it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from cdc_worker.rotation import LOCK_TIMEOUT_MS
from dev.bench.results import Results


@dataclass(frozen=True)
class Target:
    """What is asked; `value` is None where it was not measured."""

    text: str
    sense: Literal[">=", "<="]
    bound: float
    value: float | None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.sense == ">=" else self.value <= self.bound


def targets(results: Results) -> list[Target]:
    return [Target(text, sense, bound, _figure(find, results)) for text, sense, bound, find in _ALL]


def _figure(find: Callable[[Results], float], results: Results) -> float | None:
    try:
        return find(results)
    except (KeyError, ValueError, ZeroDivisionError):
        return None


def _at(case: str, what: str, column: str) -> Callable[[Results], float]:
    return lambda results: float(results.row(case, what)[column])


def _best_batch(results: Results) -> float:
    return max(float(row["keys_per_second"]) for row in results.cases["drain"])


def _flat(results: Results) -> float:
    """How many times longer a key takes in the largest backlog than in the smallest."""
    few, many = (results.row("drain", f"{size} keys") for size in ("20,000", "1,000,000"))
    return float(few["keys_per_second"] / many["keys_per_second"])


def _peer(*names: str) -> Callable[[Results], float]:
    return lambda results: min(
        float(row["ours_is_times"])
        for row in results.cases["peers"]
        if any(row["what"].startswith(name) for name in names)
    )


def _worst(case: str, column: str, *, skip: int = 0) -> Callable[[Results], float]:
    return lambda results: min(float(row[column]) for row in results.cases[case][skip:])


def _of_all(case: str, column: str) -> Callable[[Results], float]:
    return lambda results: max(float(row[column]) for row in results.cases[case])


def _clients(clients: int, way: str = "") -> Callable[[Results], float]:
    return lambda results: min(
        float(row["ratio"]) for row in results.cases["writers"] if row["what"].endswith(f", {clients} clients{way}")
    )


def _local(results: Results) -> float:
    few, many = (results.row("local", f"documents from {n} on")["keys_per_second"] for n in ("0", "100,000"))
    return float(many / few)


_ALL: Final[list[tuple[str, Literal[">=", "<="], float, Callable[[Results], float]]]] = [
    ("drain, default settings: keys/s", ">=", 18_000, _at("drain", "200,000 keys", "keys_per_second")),
    ("drain, best batch size: keys/s", ">=", 28_000, _best_batch),
    ("worker's processor time for a key: us", "<=", 40, _at("drain", "200,000 keys", "worker_us_per_key")),
    ("times the naive loop", ">=", 50, _peer("naive")),
    ("times the best Python peer", ">=", 8, _peer("procrastinate", "pgqueuer")),
    ("times the best Node peer", ">=", 4, _peer("graphile", "pg-boss")),
    ("time for a key, 1,000,000 against 20,000: times", "<=", 1.15, _flat),
    ("rate under a held snapshot or open writer: times", ">=", 0.9, _worst("held", "ratio", skip=1)),
    ("rotation: dead rows of the log", "<=", 0, _of_all("rotation", "dead_rows")),
    ("rotation: longest insert beside it: ms", "<=", LOCK_TIMEOUT_MS, _of_all("rotation", "rotating_ms")),
    ("latency p50 at 50 writes/s: ms", "<=", 8, _at("latency", "50 writes/s", "p50_ms")),
    ("latency p99 at 50 writes/s: ms", "<=", 30, _at("latency", "50 writes/s", "p99_ms")),
    ("latency p99 at 500 writes/s: ms", "<=", 50, _at("latency", "500 writes/s", "p99_ms")),
    ("200 ms a call, once sizes are found: keys/s", ">=", 10_000, _at("distance", "200 ms", "steady_keys_per_second")),
    ("200 ms a call: most batches in flight", "<=", 16, _at("distance", "200 ms", "most_in_flight")),
    ("idle: percent of a core", "<=", 0.5, _at("idle", "with LISTEN", "worker_core_percent")),
    ("idle: statements a minute", "<=", 10, _at("idle", "with LISTEN", "statements_per_minute")),
    ("peak memory at any backlog: MiB", "<=", 90, _of_all("drain", "peak_mib")),
    ("writers' rate with triggers, 16 clients: times", ">=", 0.65, _clients(16)),
    ("writers' rate with triggers, 64 clients: times", ">=", 0.88, _clients(64)),
    ("the same where a commit takes 5 ms: times", ">=", 0.88, _clients(64, ", commits of 5 ms")),
    ("insert of 10,000 rows: times longer", "<=", 2.1, _at("writers", "insert of 10,000 rows", "ratio")),
    ("update of 10,000 rows: times longer", "<=", 2.1, _at("writers", "update of 10,000 rows", "ratio")),
    ("delete of 10,000 rows: times longer", "<=", 2.1, _at("writers", "delete of 10,000 rows", "ratio")),
    ("local Convex: keys/s", ">=", 1_500, _at("local", "documents from 0 on", "keys_per_second")),
    ("local Convex at 100,000 documents, against none: times", ">=", 0.85, _local),
]
