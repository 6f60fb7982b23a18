"""Where the worker's processor time goes: `python -m dev.bench.stations run` is `cdc-worker run`, looked at often.

A timer of the process' own processor time interrupts it each millisecond; the stack at that moment says which
station of the flow is at work. Time spent in C (the driver, the JSON codec) counts for the Python that called it. That
costs about 2 %, where a tracing profiler would double some stations and not others.
"""

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Final

from dev.bench.draining import drain
from dev.bench.results import Bench, Results, Row
from dev.bench.stage import stage

OUT: Final = "CDC_BENCH_SAMPLES"
_INTERVAL_SECONDS: Final = 0.001

# By file and, where one file has several stations, function; the innermost frame that is here decides.
_FUNCTIONS: Final = {
    ("outbox.py", "read_page"): "read the log",
    ("sender.py", "_apply"): "check the answer",
    ("deployment.py", "send"): "HTTP",
    ("deployment.py", "_decode"): "decode the answer",
}
_FILES: Final = {
    "late_read.py": "fetch the rows",
    "keys.py": "fetch the rows",
    "safe_json.py": "make metadata safe",
    "documents.py": "build events",
    "document_size.py": "build events",
    "lanes.py": "lanes",
    "sender.py": "settle verdicts",
    "parking.py": "settle verdicts",
    "checkpoint.py": "checkpoint",
    "outbox.py": "look for work",
    "listener.py": "look for work",
    "outage.py": "HTTP",
    "reader.py": "transactions of pages",
    # The driver's work belongs to whoever asked for it.
    "database.py": "",
}
# Modules that a drain hardly passes, and stations below this share of the time: one row for all of them.
_REST: Final = "everything else"
_SMALL_SHARE: Final = 0.01


def station(frame: FrameType | None) -> str:
    """The station that a stack stands at; "" for what comes before the worker's life."""
    aiohttp, worker, ours = False, False, False
    while frame is not None:
        path = frame.f_code.co_filename
        package, _, name = path.rpartition("/")
        if package.endswith("/cdc_worker"):
            found = _FUNCTIONS.get((name, _function(frame))) or _FILES.get(name)
            if found:
                return found
            # Above the loop there is always a module of ours, which is not at work.
            ours = ours or (found is None and not worker)
        aiohttp = aiohttp or "/aiohttp/" in path
        worker = worker or frame.f_code.co_name == "run_until_complete"
        frame = frame.f_back
    if aiohttp:
        return "HTTP"
    if not worker:
        return ""
    return _REST if ours else "event loop"


def _function(frame: FrameType) -> str:
    """The function or method that the frame is in; a comprehension or lambda is a part of it."""
    return frame.f_code.co_qualname.partition(".<locals>")[0].rpartition(".")[2]


def _innermost(frame: FrameType | None) -> str:
    assert frame is not None
    return f"{'/'.join(frame.f_code.co_filename.rsplit('/', 2)[1:])}:{frame.f_code.co_name}"


def main() -> None:
    """In the worker's process."""
    out = Path(os.environ.pop(OUT))
    stations: Counter[str] = Counter()
    lines: Counter[str] = Counter()

    def sample(_: int, frame: FrameType | None) -> None:
        at = station(frame)
        if at:
            stations[at] += 1
            lines[f"{at}: {_innermost(frame)}"] += 1

    # Here: its start-up is not what is looked at.
    import cdc_worker.worker  # noqa: F401, PLC0415
    from cdc_worker.__main__ import main as worker  # noqa: PLC0415

    signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, _INTERVAL_SECONDS, _INTERVAL_SECONDS)
    try:
        worker()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write_text(json.dumps({"stations": stations, "lines": dict(lines.most_common(25))}))


def profile(bench: Bench, results: Results) -> list[Row]:
    """A drain under the sampler: microseconds of the worker for each key, by station."""
    del results
    keys = bench.size(200_000, 2_000)
    with stage(bench.server) as on:
        on.add(keys)
        out = on.folder / "samples.json"
        done = drain(on, keys, {OUT: out}, module=("-m", "dev.bench.stations"))
        found = json.loads(out.read_text())
    for line, count in sorted(found["lines"].items(), key=lambda each: -each[1])[:15]:
        bench.say(f"{count / max(sum(found['stations'].values()), 1):6.1%}  {line}")
    whole = done.cost.worker_seconds / done.keys * 1e6
    return [
        {"what": name, "share": share, "us_per_key": share * whole} for name, share in shares(found["stations"]).items()
    ]


def shares(samples: Mapping[str, int]) -> dict[str, float]:
    """Of the whole, the largest first; small ones are one, and last."""
    total = sum(samples.values())
    large = {name: count / total for name, count in Counter(samples).most_common() if name != _REST}
    large = {name: share for name, share in large.items() if share >= _SMALL_SHARE}
    rest = 1 - sum(large.values())
    return large | ({_REST: rest} if rest > 0 else {})


if __name__ == "__main__":
    sys.argv[0] = "cdc-worker"
    main()
