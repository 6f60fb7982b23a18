"""The log turns and is emptied while writers write: what is left of it, and whom it keeps waiting."""

import asyncio
import contextlib
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import psycopg

from cdc_worker.database import Database
from cdc_worker.logs import configure_logs
from cdc_worker.rotation import LOCK_TIMEOUT_MS, rotate
from dev.bench.draining import open_writer
from dev.bench.living import INSERT
from dev.bench.results import Bench, Results, Row
from dev.bench.stage import Stage, stage

_WRITERS: Final = 4
_PAUSE_SECONDS: Final = 0.2
_LOG_BYTES: Final = (
    "select sum(pg_total_relation_size(inhrelid))::int8 from pg_inherits where inhparent = 'cdc.outbox'::regclass"
)
# What a session has counted is told when it has nothing to do, once a second at most.
_COUNTED_SECONDS: Final = 1.5
_DEAD_ROWS: Final = """
select sum(n_dead_tup)::int8 from pg_stat_user_tables where schemaname = 'cdc' and relname like 'outbox%'
"""

_Span = tuple[float, float]


@dataclass
class _Log:
    """What was seen while it turned."""

    turned: list[_Span] = field(default_factory=list)
    put_off: list[_Span] = field(default_factory=list)
    most_bytes: int = 0


def rotation(bench: Bench, results: Results) -> list[Row]:
    """A worker drains what writers write flat out, and the log turns five times a second instead of every few hours."""
    del results
    # What rotation says of itself is counted here.
    configure_logs("WARNING", "console")
    with stage(bench.server) as on, on.worker():
        on.add(1_000)
        on.sink.wait(keys=1_000)
        return [
            _row(bench, on, "writers", contextlib.nullcontext()),
            _row(bench, on, "and a transaction that stays open with rows in the log", open_writer(on)),
        ]


def _row(bench: Bench, on: Stage, what: str, beside: contextlib.AbstractContextManager[None]) -> Row:
    first_bytes = on.one(_LOG_BYTES)
    with beside, _inserting(on) as inserts:
        log = asyncio.run(_turn(on, seconds=bench.size(10, 2)))
    # What was written last has been read now: the log turns away from it.
    time.sleep(_COUNTED_SECONDS)
    asyncio.run(_turn(on, seconds=3 * _PAUSE_SECONDS))
    beside_turn, between = _longest_ms(inserts, [*log.turned, *log.put_off])
    return {
        "what": what,
        "inserts": len(inserts),
        "rotations": len(log.turned),
        "refused_rotations": len(log.put_off),
        "first_log_mib": first_bytes / 2**20,
        "most_log_mib": log.most_bytes / 2**20,
        "last_log_mib": on.one(_LOG_BYTES) / 2**20,
        "dead_rows": on.one(_DEAD_ROWS),
        "rotating_ms": beside_turn,
        "between_ms": between,
        "lock_timeout_ms": LOCK_TIMEOUT_MS,
    }


async def _turn(on: Stage, *, seconds: float) -> _Log:
    log = _Log()
    deadline = time.monotonic() + seconds
    async with Database(on.dsn, statement_seconds=20.0) as database:
        while time.monotonic() < deadline:
            began = time.monotonic()
            done = await rotate(database, retention_hours=0.0, partition_bytes=1)
            (log.turned if done else log.put_off).append((began, time.monotonic()))
            log.most_bytes = max(log.most_bytes, on.one(_LOG_BYTES))
            await asyncio.sleep(_PAUSE_SECONDS)
    return log


@contextlib.contextmanager
def _inserting(on: Stage) -> Iterator[list[_Span]]:
    """Writers that insert single rows, one after the other; when each insert began and had committed."""
    spans: list[_Span] = []
    enough = threading.Event()
    first = on.rows + 1

    def work(number: int) -> None:
        with psycopg.connect(on.dsn, autocommit=True) as connection:
            while not enough.is_set():
                began = time.monotonic()
                connection.execute(INSERT, (number,))
                spans.append((began, time.monotonic()))
                number += _WRITERS

    writers = [threading.Thread(target=work, args=(first + offset,)) for offset in range(_WRITERS)]
    for writer in writers:
        writer.start()
    try:
        yield spans
    finally:
        enough.set()
        for writer in writers:
            writer.join()
        on.rows = on.one("select max(id) from bench_event")


def _longest_ms(inserts: list[_Span], turns: list[_Span]) -> tuple[float, float]:
    """The longest insert that a turn fell into, or that fell into a turn; and the longest of the others."""
    turns = sorted(turns)
    ends = [end for _, end in turns]
    beside, between = [0.0], [0.0]
    for began, ended in inserts:
        following = bisect_left(ends, began)
        met = following < len(turns) and turns[following][0] <= ended
        (beside if met else between).append((ended - began) * 1_000)
    return max(beside), max(between)
