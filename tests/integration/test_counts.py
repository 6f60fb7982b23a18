"""What a thousand keys cost, counted: statements, transactions, requests, bytes, log. Not seconds.

The committed baseline is counts.json. A count may fall; it may not grow by more than its tolerance below, which is
what it varies by on a machine that is busy with other things. A change that is worth more takes the baseline along:

    CDC_COUNTS=write python -m pytest tests/integration/test_counts.py -s
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from cdc_worker.capture import GATE
from dev import postgres
from dev.bench.stage import Stage, stage
from dev.bench.wire import Wire, WireCounts

BASELINE: Final = Path(__file__).with_name("counts.json")
WRITE: Final = os.environ.get("CDC_COUNTS") == "write"

DRAINED: Final = 2_000
TRICKLED: Final = 20
IDLE_SECONDS: Final = 4.0
PATIENCE_SECONDS: Final = 60.0
# The checkpoint is renewed thrice in a lease, so that idleness can be counted in seconds instead of minutes.
LEASE_SECONDS: Final = 3.0

# By the end of the name: how much more than the baseline is noise. Over 12 runs, 6 of them beside three busy loops on
# two cores, everything was the same to 0.1 %. What comes with the time, however much there is to do, is counted apart:
# the renewals of the lease, and the checkpoints of a drain, of which there is one in a tenth of a second.
TOLERANCES: Final = {
    "requests": 0.0,
    "request_bytes": 0.01,
    "reading_statements": 0.02,
    "checkpoints": 0.10,
    "transactions": 0.10,
    "bytes_to_postgres": 0.10,
    "bytes_from_postgres": 0.02,
    "wal_bytes": 0.05,
    # By chance one more in the time that is looked at.
    "renewals_in_a_lease": 0.40,
}

# The look at the leases renews them as well (cdc_worker/allotment.py).
LEASES: Final = "with seen as"
CHECKPOINT: Final = "update cdc.checkpoint set"

Counts = dict[str, float]


def _asleep(on: Stage) -> None:
    """Waits until the worker has armed the gate, and taken its last look."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    question = (
        "select exists (select from pg_locks where locktype = 'advisory' and granted and mode = 'ExclusiveLock'"
        f" and classid = {GATE[0]} and database = (select oid from pg_database where datname = current_database()))"
    )
    while not on.one(question):
        assert time.monotonic() < deadline, "the worker does not go to sleep"
        time.sleep(0.005)
    # The last look, and a checkpoint that is due.
    time.sleep(0.15)


def _of(counts: WireCounts, *beginnings: str) -> int:
    """Statements that begin so."""
    return sum(number for words, number in counts.by_words.items() if words.startswith(beginnings))


class _Meter:
    """What is done between `begin` and `end`, less what renewing the lease has cost meanwhile."""

    def __init__(self, on: Stage, wire: Wire) -> None:
        self._on, self._wire = on, wire
        self.found = Counts()
        # By phase: rows, renewals, and what they have a part in.
        self._with_renewals: dict[str, tuple[int, int, dict[str, int]]] = {}

    def begin(self) -> None:
        self._on.sink.control()
        self._wire.reset()
        self._wal = self._on.wal()
        self._began = time.monotonic()

    def end_idle(self) -> None:
        """Of a time in which there was nothing to do but to renew: what one renewal costs."""
        took, counts, of_renewals = time.monotonic() - self._began, self._wire.counts, self._volumes()
        renewals = _of(counts, LEASES)
        self.found["idle.renewals_in_a_lease"] = round(renewals / took * LEASE_SECONDS, 1)
        self.found["idle.other_statements"] = counts.statements - renewals
        for name, (rows, meanwhile, volumes) in self._with_renewals.items():
            self._note(
                name, rows, {what: count - of_renewals[what] * meanwhile / renewals for what, count in volumes.items()}
            )

    def end(self, name: str, rows: int) -> None:
        counts, sent = self._wire.counts, self._on.sink.counts()
        renewals, checkpoints = _of(counts, LEASES), _of(counts, CHECKPOINT)
        measured = {
            "requests": sent.requests,
            "request_bytes": sent.bytes,
            "reading_statements": counts.statements - checkpoints - renewals,
            "checkpoints": checkpoints,
            # A statement each.
            "transactions": counts.transactions - checkpoints - renewals,
        }
        self._note(name, rows, measured)
        self._with_renewals[name] = rows, renewals, self._volumes()

    def _note(self, name: str, rows: int, measured: Mapping[str, float]) -> None:
        self.found |= {f"{name}.{what}": round(count * 1_000 / rows, 1) for what, count in measured.items()}

    def _volumes(self) -> dict[str, int]:
        counts = self._wire.counts
        return {
            "bytes_to_postgres": counts.bytes_to_postgres,
            "bytes_from_postgres": counts.bytes_from_postgres,
            "wal_bytes": self._on.wal() - self._wal,
        }


def _capture(on: Stage) -> Counts:
    """Bytes of log that capture adds to the application's own, for 1,000 rows."""
    added: dict[tuple[str, int], int] = {}
    for table in ("bench_plain", "bench_event"):
        for bulk in (1, 500):
            on.rows = bulk * 1_000
            before = on.wal()
            on.add(500, table=table, bulk=bulk)
            added[table, bulk] = on.wal() - before
    return {
        "capture.single_row_wal_bytes": (added["bench_event", 1] - added["bench_plain", 1]) * 2.0,
        "capture.bulk_wal_bytes": (added["bench_event", 500] - added["bench_plain", 500]) * 2.0,
    }


def _count(server: postgres.Server) -> Counts:
    with stage(server) as on, Wire(on.dsn) as wire:
        found = _capture(on)
        on.rows = 1_000_000
        meter = _Meter(on, wire)
        with on.worker({"CDC_LEASE_SECONDS": LEASE_SECONDS}, dsn=wire.dsn):
            on.sink.wait(keys=1_000, seconds=PATIENCE_SECONDS)
            _asleep(on)

            meter.begin()
            on.add(DRAINED)
            assert on.sink.wait(keys=DRAINED, seconds=PATIENCE_SECONDS).keys == DRAINED
            _asleep(on)
            meter.end("drain", DRAINED)
            del meter.found["drain.checkpoints"]

            meter.begin()
            for number in range(1, TRICKLED + 1):
                on.add(1)
                assert on.sink.wait(keys=number, seconds=PATIENCE_SECONDS).keys == number
                _asleep(on)
            meter.end("trickle", TRICKLED)

            meter.begin()
            time.sleep(IDLE_SECONDS)
            meter.end_idle()
        return found | meter.found


def _tolerance(name: str) -> float:
    return next((share for end, share in TOLERANCES.items() if name.endswith(end)), 0.0)


@pytest.mark.timeout(300)
def test_nothing_costs_more_than_the_baseline(postgres_flavour: postgres.Flavour) -> None:
    # Its own server, where nothing else writes log: no vacuum, no other test.
    settings = {"autovacuum": "off", "checkpoint_timeout": "1h"}
    with postgres.start(postgres_flavour, settings=settings) as server:
        major = server.version.partition(".")[0]
        found = _count(server)
    baseline: dict[str, Counts] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    if WRITE:
        _tell(baseline.get(major, {}), found)
        BASELINE.write_text(json.dumps(baseline | {major: found}, indent=1, sort_keys=True) + "\n")
        return
    if major not in baseline:
        pytest.skip(f"no baseline for PostgreSQL {major}: CDC_COUNTS=write makes one")
    expected = baseline[major]
    assert found.keys() == expected.keys(), "other counts than in the baseline: CDC_COUNTS=write"
    grown = {
        name: f"{count:g}, the baseline is {expected[name]:g} (+{_tolerance(name):.0%} is let pass)"
        for name, count in found.items()
        if count > expected[name] * (1 + _tolerance(name)) + 1e-9
    }
    assert not grown, "the worker does more than it did; if that is worth it: CDC_COUNTS=write\n" + json.dumps(
        grown, indent=1
    )


def _tell(before: Counts, now: Counts) -> None:
    for name, count in sorted(now.items()):
        was: Any = before.get(name)
        change = "new" if not was else f"{count / was - 1:+.1%}"
        if was != count:
            print(f"{name:40} {was or 0:>12g} -> {count:>12g}  {change}")
