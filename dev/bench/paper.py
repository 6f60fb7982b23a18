"""What a deployment can take, on paper: Convex' limits, and the measured figures of a worker 200 ms away."""

import math
from dataclasses import dataclass
from typing import Final

from dev.bench.results import Results, Row

_MIB: Final = 2**20
# The measured drain that it is worked out from: each of its calls took so long.
_FAR: Final = ("distance", "200 ms")
_CALL_SECONDS: Final = 0.2


@dataclass(frozen=True)
class Plan:
    """Limits of a whole deployment (docs.convex.dev/production/state/limits); the application has its share of them."""

    name: str
    written_bytes_per_second: float
    concurrent_mutations: int


PLANS: Final = (
    Plan("smallest plan: 4 MiB/s written, 16 mutations at once", 4 * _MIB, 16),
    Plan("largest plan: 64 MiB/s written, 1,024 mutations at once", 64 * _MIB, 1_024),
)


def paper(results: Results) -> list[Row]:
    """A row for each plan; none if a drain with 200 ms a call was not measured, or was over before it was steady.

    What is written for a key is taken to be what is sent for it: the document, its key and its version.
    """
    far = results.row(*_FAR)
    if not far.get("steady_keys_per_second"):
        return []
    return [_row(plan, far["bytes_per_key"], far["keys_per_request"], far["steady_keys_per_second"]) for plan in PLANS]


def _row(plan: Plan, bytes_per_key: float, keys_per_request: float, worker_keys_per_second: float) -> Row:
    by_bytes = plan.written_bytes_per_second / bytes_per_key
    by_calls = plan.concurrent_mutations * keys_per_request / _CALL_SECONDS
    most = min(by_bytes, by_calls)
    return {
        "what": plan.name,
        "keys_by_bytes": by_bytes,
        "keys_by_calls": by_calls,
        "binds": "bytes written" if by_bytes <= by_calls else "mutations at once",
        "in_flight": math.ceil(most * _CALL_SECONDS / keys_per_request),
        "workers": math.ceil(most / worker_keys_per_second),
    }
