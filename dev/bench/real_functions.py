"""The local Convex instead of the sink: real functions, schema and validators take the keys."""

import contextlib
import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import LiteralString

from dev import local_convex
from dev.bench.results import Bench, Results, Row
from dev.bench.stage import Stage, stage

_LONGEST_SECONDS = 150.0
# When, keys, seconds it took.
_Batch = tuple[float, int, float]
_FILLED: LiteralString = "select not exists (select from cdc.backfill where phase <> 'done')"


def rate(bench: Bench, keys: int) -> float:
    """Keys a second of the same drain, when real Convex functions take them."""
    with stage(bench.server, captured=False) as on, local_convex.start() as convex:
        on.migrate()
        settings = _to(convex)
        with on.worker(settings):
            on.until(_FILLED)
        on.add(keys)
        on.execute("vacuum analyze")
        with on.worker(settings):
            return _rate(_applied(on, keys, _LONGEST_SECONDS))


def local(bench: Bench, results: Results) -> list[Row]:
    """The local Convex instead of the sink: a first drain, and one when it holds 100,000 documents."""
    del results
    rows: list[Row] = []
    few, many = bench.size(5_000, 300), bench.size(95_000, 0)
    with stage(bench.server, captured=False) as on, local_convex.start() as convex:
        on.migrate()
        seen, expected = 0, 0
        with on.worker(_to(convex)):
            on.until(_FILLED)
            for what, keys in (("documents from 0 on", few), ("filling it", many), ("documents from 100,000 on", few)):
                on.add(keys)
                expected += keys
                lines = _applied(on, expected, 120.0)
                batches, seen = lines[seen:], len(lines)
                if batches:
                    done = sum(number for _, number, _ in batches)
                    rows.append({"what": what, "keys": done, "keys_per_second": _rate(batches)})
    return rows


def _to(convex: local_convex.LocalConvex) -> dict[str, str]:
    """The settings of a worker that drains to it, and tells of each batch."""
    return {"CONVEX_URL": convex.url, "CONVEX_DEPLOY_KEY": convex.admin_key, "LOG_LEVEL": "DEBUG"}


def _rate(batches: Sequence[_Batch]) -> float:
    took = max(at for at, _, _ in batches) - min(at - seconds for at, _, seconds in batches)
    return sum(number for _, number, _ in batches) / took


def _applied(on: Stage, keys: int, seconds: float) -> list[_Batch]:
    """Each batch that the worker's log tells of, once they sum up to `keys`."""
    deadline = time.monotonic() + seconds
    while True:
        lines = []
        for line in (on.folder / "worker.log").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError):
                said = json.loads(line)
                if said["event"] == "batch.applied":
                    lines.append(
                        (
                            datetime.fromisoformat(said["timestamp"]).timestamp(),
                            int(said["applied"]),
                            float(said["took_ms"]) / 1e3,
                        )
                    )
        if sum(number for _, number, _ in lines) >= keys or time.monotonic() > deadline:
            return lines
        time.sleep(0.5)
