"""Cases of a worker that keeps up: latency at several rates, and what it costs when nothing happens."""

import random
import threading
import time
from collections.abc import Mapping
from typing import LiteralString

import psycopg

from dev.bench.results import Bench, Results, Row, percentile
from dev.bench.sink import Counts
from dev.bench.stage import ROWS, Stage, stage
from dev.bench.wire import Wire

INSERT: LiteralString = f"insert into bench_event {ROWS} from (select %s::bigint as i) as one"


def latency(bench: Bench, results: Results) -> list[Row]:
    """Case 2: from the commit, as the application sees it, to the answer of Convex."""
    del results
    rows: list[Row] = []
    with stage(bench.server) as on, on.worker() as running:
        on.until("select count(*) > 0 from cdc.checkpoint where holder is not null")
        time.sleep(1.0)
        for rate, seconds in ((1, 30), (50, 20), (500, 20)) if not bench.quick else ((50, 1),):
            on.sink.control(trace_keys=True)
            before = running.cost()
            committed = write(on, rate, seconds)
            counts = on.sink.wait(keys=len(committed), seconds=10.0)
            cost = running.cost().since(before)
            waited = waits_ms(committed, counts)
            rows.append(
                {
                    "what": f"{rate} write{'s' * (rate > 1)}/s",
                    "writes": len(committed),
                    "p50_ms": percentile(waited, 0.5),
                    "p99_ms": percentile(waited, 0.99),
                    "max_ms": max(waited, default=float("nan")),
                    "requests": counts.requests,
                    "worker_core_percent": cost.worker_seconds / seconds * 100,
                }
            )
    return rows


def waits_ms(committed: Mapping[str, float], counts: Counts) -> list[float]:
    """From commit to answer, of the keys that were answered (the sink has to trace keys)."""
    return [(counts.answered[key] - at) * 1_000 for key, at in committed.items() if key in counts.answered]


def write(on: Stage, rate: int, seconds: float) -> dict[str, float]:
    """Single-row inserts at a rate, for so long; when each key's commit had returned, by the monotonic clock."""
    committed: dict[str, float] = {}
    # One connection commits some hundred times a second.
    threads = max(1, rate // 125)
    total = int(rate * seconds)
    first = on.rows + 1
    on.rows += total
    begin = time.monotonic() + 0.05

    def work(offset: int) -> None:
        with psycopg.connect(on.dsn, autocommit=True) as connection:
            for number in range(offset, total, threads):
                # Not in step with any timer of the worker.
                due = begin + (number + random.random()) / rate  # noqa: S311
                time.sleep(max(0.0, due - time.monotonic()))
                connection.execute(INSERT, (first + number,))
                committed[str(first + number)] = time.monotonic()

    workers = [threading.Thread(target=work, args=(offset,)) for offset in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return committed


def idle(bench: Bench, results: Results) -> list[Row]:
    """Case 3: nothing happens, with LISTEN, for a minute."""
    del results
    seconds = bench.size(60, 2)
    with stage(bench.server) as on, Wire(on.dsn) as wire:
        on.sink.control()
        with on.worker(dsn=wire.dsn) as running:
            on.sink.wait(opens=1, seconds=30)
            on.add(1_000)
            on.sink.wait(keys=1_000, seconds=30)
            time.sleep(bench.size(3, 1))
            wire.reset()
            before, began = running.cost(), time.monotonic()
            time.sleep(seconds)
            took = time.monotonic() - began
            cost, counts = running.cost().since(before), wire.counts
            return [
                {
                    "what": "with LISTEN",
                    "seconds": took,
                    "worker_core_percent": cost.worker_seconds / took * 100,
                    "postgres_core_percent": cost.postgres_seconds / took * 100,
                    "statements_per_minute": counts.statements / took * 60,
                    "peak_mib": cost.peak_bytes / 2**20,
                }
            ]
