"""Several workers side by side: what they drain together, and how long a change among them takes."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Final

from dev.bench.draining import Drained
from dev.bench.living import waits_ms, write
from dev.bench.results import Bench, Results, Row, median, middle
from dev.bench.stage import Cost, Running, Stage, stage

_LONGEST_SECONDS: Final = 60.0
# Every shard has a reader that lives, and nobody has more than an even part.
_SPREAD: Final = """
select max(shards) = %s and bool_and(read) from (
    select count(*) as shards, bool_and(holder_pid is not null and not cdc.is_dead(holder_pid)) as read
    from cdc.checkpoint group by holder) as each
"""
_SHARDS: Final = 4
# Enough to see how long a key waits, and little enough for two cores.
_WRITES_PER_SECOND: Final = 200
_WRITING_SECONDS: Final = 5.0


def shards(bench: Bench, results: Results) -> list[Row]:
    """CDC_SHARDS = 1, 2 and 4, with as many workers that wait for a backlog, which is committed at once."""
    del results
    rows = []
    for number in (1, 2, 4) if not bench.quick else (2,):
        with stage(bench.server, shards=number) as on, _workers(on, number) as workers:
            on.add(bench.size(20_000, 1_000))
            on.sink.wait(keys=on.rows, seconds=_LONGEST_SECONDS)
            on.execute("vacuum analyze")
            done = [_drain(on, workers, bench.size(200_000, 2_000)) for _ in range(bench.size(3, 1))]
        rows.append(middle(done, "keys_per_second"))
    for row in rows:
        row["ratio"] = row["keys_per_second"] / rows[0]["keys_per_second"]
    return rows


@contextlib.contextmanager
def _workers(on: Stage, number: int) -> Iterator[list[Running]]:
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(on.worker()) for _ in range(number)]
        on.until(_SPREAD, on.shards // number)
        yield workers


def _drain(on: Stage, workers: list[Running], keys: int) -> Row:
    """From the commit of them all to the last key's answer."""
    on.sink.control()
    with on.connection.transaction():
        on.add(keys)
        before = Cost.of(workers)
    start = time.monotonic()
    counts = on.sink.wait(keys=keys, seconds=_LONGEST_SECONDS)
    cost = Cost.of(workers).since(before)
    done = Drained(
        counts.keys,
        counts.last_at - start,
        cost,
        counts.requests,
        counts.bytes,
        counts.refused,
        counts.most_at_once,
        counts.keys >= keys,
        [],
    )
    # A checkpoint is noted within a tenth of a second; the next drain begins from there.
    time.sleep(0.3)
    largest = max(counts.by_shard.values()) / (counts.keys / on.shards)
    what = "1 worker" if on.shards == 1 else f"{on.shards} workers, {on.shards} shards"
    return done.row(what) | {"largest_part": largest}


def rebalance(bench: Bench, results: Results) -> list[Row]:
    """4 shards: a second worker joins, is killed, joins again, and is told to stop; meanwhile writers write."""
    del results
    changes: dict[str, list[Row]] = {}
    with stage(bench.server, shards=_SHARDS) as on, _workers(on, 1):
        on.execute("vacuum analyze")
        for _ in range(bench.size(3, 1)):
            for what, number in (("it is killed (SIGKILL)", signal.SIGKILL), ("it is told to stop", signal.SIGTERM)):
                with contextlib.ExitStack() as stack:
                    with _change(on, even=_SHARDS // 2) as row:
                        second = stack.enter_context(on.worker())
                    changes.setdefault("a second worker joins", []).append(row)
                    with _change(on, even=_SHARDS) as row:
                        second.process.signal(number)
                    changes.setdefault(what, []).append(row)
    return [
        {"what": what} | {column: median(row[column] for row in rows) for column in rows[0]}
        for what, rows in changes.items()
    ]


@contextlib.contextmanager
def _change(on: Stage, *, even: int) -> Iterator[Row]:
    """A change among the workers is the block: the row says how long it takes until all shards are read again, `even`
    each, and how long keys waited that were written around it.
    """
    row: Row = {}
    on.sink.control(trace_keys=True)
    committed: dict[str, float] = {}
    writing = threading.Thread(target=lambda: committed.update(write(on, _WRITES_PER_SECOND, _WRITING_SECONDS)))
    writing.start()
    time.sleep(0.5)
    began = time.monotonic()
    yield row
    on.until(_SPREAD, even)
    # Convex has opened what has moved.
    on.sink.wait(opens=_SHARDS // 2, seconds=_LONGEST_SECONDS)
    row["read_again_ms"] = (time.monotonic() - began) * 1_000
    writing.join()
    waited = waits_ms(committed, on.sink.wait(keys=len(committed), seconds=_LONGEST_SECONDS))
    row |= {"longest_wait_ms": max(waited), "writes": len(committed)}
