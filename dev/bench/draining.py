"""Cases that drain a backlog: its size, a held snapshot, coalescing, a distant deployment."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from dev.bench import real_functions
from dev.bench.results import Bench, Results, Row, median
from dev.bench.stage import Cost, Stage, stage
from dev.bench.wire import Wire

_LONGEST_SECONDS = 150.0


@dataclass(frozen=True)
class Drained:
    """One drain: from the answer to `cdc:open` to the last key's answer."""

    keys: int
    seconds: float
    cost: Cost
    requests: int
    request_bytes: int
    refused: int
    most_at_once: int
    # Until then; the deadline may have come first.
    whole: bool
    trace: list[tuple[float, int, int, int]]

    @property
    def rate(self) -> float:
        return self.keys / self.seconds

    def row(self, what: str) -> Row:
        return {
            "what": what,
            "keys": self.keys,
            "keys_per_second": self.rate,
            "worker_us_per_key": self.cost.worker_seconds / self.keys * 1e6,
            "postgres_us_per_key": self.cost.postgres_seconds / self.keys * 1e6,
            "peak_mib": self.cost.peak_bytes / 2**20,
            "keys_per_request": self.keys / max(self.requests - self.refused, 1),
            "bytes_per_key": self.request_bytes / self.keys,
            "most_in_flight": self.most_at_once,
        }


def drain(
    on: Stage,
    keys: int,
    settings: Mapping[str, Any] | None = None,
    *,
    dsn: str | None = None,
    seconds: float = _LONGEST_SECONDS,
    module: Sequence[str] = (),
    **sink_options: Any,
) -> Drained:
    """Starts a worker on a backlog of `keys` and waits until they are answered, or `seconds` have passed."""
    # As it is in a database that lives: with statistics, and nothing for autovacuum to do meanwhile.
    on.execute("vacuum analyze")
    on.sink.control(hold_open=True, **sink_options)
    with on.worker(settings, dsn=dsn, module=module) as running:
        if on.sink.wait(opens=1, seconds=60.0).opens == 0:
            raise RuntimeError(f"the worker did not come:\n{running.process.tail()}")
        before = running.cost()
        start = on.sink.release()
        counts = on.sink.wait(keys=keys, seconds=seconds)
        cost = running.cost().since(before)
        whole = counts.keys >= keys
        end = counts.last_at if whole else time.monotonic()
        # A checkpoint is noted within a tenth of a second; the next case begins from there.
        if whole:
            time.sleep(0.3)
    return Drained(
        counts.keys,
        end - start,
        cost,
        counts.requests,
        counts.bytes,
        counts.refused,
        counts.most_at_once,
        whole,
        [(at - start, *rest) for at, *rest in counts.trace],  # type: ignore[misc]
    )


# Larger ones would only measure Node for minutes.
_MOST_LOCAL_KEYS = 200_000


def backlogs(bench: Bench, results: Results) -> list[Row]:
    """Case 1: backlogs of three sizes with the default settings, to the sink and to the local Convex; batch sizes."""
    rows: list[Row] = []
    with stage(bench.server) as on:
        for keys, times in ((20_000, 5), (200_000, 3), (1_000_000, 1)) if not bench.quick else ((2_000, 1),):
            done = []
            for _ in range(times):
                on.add(keys)
                done.append(drain(on, keys))
            rows.append(_middle(done).row(f"{keys:,} keys"))
            if keys <= _MOST_LOCAL_KEYS:
                rows[-1]["local_keys_per_second"] = real_functions.rate(bench, keys)
        for batch in () if bench.quick else (100, 500):
            done = []
            for _ in range(3):
                on.add(100_000)
                done.append(drain(on, 100_000, {"CDC_BATCH_KEYS": batch, "CDC_PAGE_ROWS": max(1_000, 4 * batch)}))
            rows.append(_middle(done).row(f"batches of {batch}"))
        keys = bench.size(20_000, 1_000)
        on.add(keys)
        with Wire(on.dsn) as wire:
            drained = drain(on, keys, dsn=wire.dsn)
            counts = wire.counts
        for row in rows:
            # Counted in a drain of its own, since the count is in the way of the clock.
            row["statements_per_1000"] = counts.statements / drained.keys * 1_000
        del results
    return rows


def _middle(done: list[Drained]) -> Drained:
    return sorted(done, key=lambda each: each.rate)[len(done) // 2]


@contextlib.contextmanager
def _snapshot(dsn: str) -> Iterator[None]:
    with psycopg.connect(dsn) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("select pg_current_snapshot()")
        yield
        connection.rollback()


@contextlib.contextmanager
def open_writer(on: Stage) -> Iterator[None]:
    """A transaction that has changed a row and does not end: what comes after it is read, and it is not waited for."""
    with psycopg.connect(on.dsn) as connection:
        connection.execute("update bench_event set note = note || '!' where id = 1")
        yield
        connection.rollback()


def held(bench: Bench, results: Results) -> list[Row]:
    """Case 5: the same drain with nobody there, with a held snapshot, with a writer that does not end; interleaved."""
    del results
    keys = bench.size(200_000, 1_000)
    done: dict[str, list[Drained]] = {}
    with stage(bench.server) as on:
        for _ in range(bench.size(2, 1)):
            for what, blocker in (
                ("nobody", contextlib.nullcontext()),
                ("held snapshot", _snapshot(on.dsn)),
                ("open writing transaction", open_writer(on)),
            ):
                with blocker:
                    on.add(keys)
                    done.setdefault(what, []).append(drain(on, keys))
    rows = [_middle(drains).row(what) for what, drains in done.items()]
    for row, drains in zip(rows, done.values(), strict=True):
        row["keys_per_second"] = median(each.rate for each in drains)
        row["ratio"] = row["keys_per_second"] / rows[0]["keys_per_second"]
    return rows


def coalescing(bench: Bench, results: Results) -> list[Row]:
    """Case 6: 2,000 rows updated 25,000 times, as a backlog and while the worker runs."""
    del results
    updates = bench.size(25_000, 1_000)
    rows: list[Row] = []
    with stage(bench.server) as on:
        on.add(2_000)
        drain(on, 2_000)
        pause = 0.0
        for what in ("as a backlog", "while it runs"):
            on.sink.control()
            log_before = on.one("select count(*) from cdc.dirty_key")
            with contextlib.ExitStack() as stack:
                if pause:
                    stack.enter_context(on.worker())
                    on.sink.wait(opens=1, seconds=30)
                begun = time.monotonic()
                for number in range(0, updates, 50):
                    on.execute(
                        "update bench_event set note = %s where id in"
                        " (select 1 + (random() * 1999)::int from generate_series(1, 50))",
                        f"{what} {number}",
                    )
                took = time.monotonic() - begun
                logged = on.one("select count(*) from cdc.dirty_key") - log_before
                if not pause:
                    stack.enter_context(on.worker())
                begun = time.monotonic()
                counts = on.sink.wait(keys=logged, seconds=bench.size(4, 2))
            rows.append(
                {
                    "what": what,
                    "changes": logged,
                    "changes_per_second": logged / took,
                    "events_sent": counts.keys,
                    "requests": counts.requests,
                    "changes_per_event": logged / max(counts.keys, 1),
                    "drained_after_seconds": counts.last_at - begun,
                }
            )
            pause = 1.0
    return rows


def distance(bench: Bench, results: Results) -> list[Row]:
    """Case 7: each call takes 50 or 200 ms; then a deployment that refuses more than 6 batches at once."""
    rows: list[Row] = []
    keys = bench.size(150_000, 1_000)
    deployments: dict[str, dict[str, Any]] = {
        "0 ms": {},
        "50 ms": {"delay_ms": 50},
        "200 ms": {"delay_ms": 200},
        "200 ms, 429 above 6 at once": {"delay_ms": 200, "limit": 6},
        "50 ms, conflict above 6 at once": {"delay_ms": 50, "limit": 6, "refusal": 503},
    }
    with stage(bench.server) as on:
        for what, options in deployments.items():
            on.add(keys)
            done = drain(on, keys, seconds=bench.size(30, 5), trace=True, **options)
            row = done.row(what) | {"refused": done.refused, "steady_keys_per_second": _steady(done)}
            rows.append(row)
            results.traces[f"distance {what}"] = _buckets(done)
            if not done.whole:
                # What is left would be counted as the next one's.
                drain(on, keys - done.keys)
    return rows


def _steady(done: Drained) -> float:
    """The rate in the second half of the time, when sizes have been found."""
    half = done.seconds / 2
    late = sum(keys for at, keys, _, good in done.trace if at >= half and good)
    return late / half


def _buckets(done: Drained, width: float = 0.25) -> list[list[float]]:
    """By quarter of a second: seconds, keys/s, keys in a batch (mean), batches at once (most), refused."""
    buckets: dict[int, list[tuple[float, int, int, int]]] = {}
    for line in done.trace:
        buckets.setdefault(int(line[0] / width), []).append(line)
    return [
        [
            number * width,
            sum(keys for _, keys, _, good in lines if good) / width,
            sum(keys for _, keys, _, _ in lines) / len(lines),
            max(at_once for _, _, at_once, _ in lines),
            sum(not good for *_, good in lines),
        ]
        for number, lines in sorted(buckets.items())
    ]
