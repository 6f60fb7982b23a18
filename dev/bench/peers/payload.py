"""The job that all peers do: POST one event, as our worker's batch of one."""

import json
from collections.abc import Sequence
from typing import Any, LiteralString

HEADERS = {"Content-Type": "application/json", "Authorization": "Convex bench|0123456789abcdef"}

# The same document as the worker makes of the benchmark's row (dev/bench/stage.py); $1: how many.
EVENTS: LiteralString = """
select jsonb_build_object('key', 'events:' || i, 'number', 1.0, 'target', 'activity', 'document', jsonb_build_object(
    'userId', 'user-' || mod(i, 2000), 'type', 'check-in',
    'description', 'Note ' || i || ' ' || repeat(md5(i::text), 4), 'timestamp', 1763855000000.0,
    'metadata', jsonb_build_object('mood', 'good', 'score', mod(i, 10), 'device', md5((i + 1)::text),
        'place', jsonb_build_object('lat', 52.5, 'lon', 13.4), 'tags', jsonb_build_array('a', 'b')))) as event
from generate_series(1, {jobs}) as i
"""


def events(jobs: int) -> str:
    """SQL that yields that many events."""
    return EVENTS.format(jobs=int(jobs))


def body_of_texts(events: Sequence[str]) -> bytes:
    """The request for events that are JSON already."""
    head = '{"path":"cdc:apply","format":"convex_encoded_json","args":{"shard":"0","epoch":1.0,"events":['
    return (head + ",".join(events) + "]}}").encode()


def body(event: Any) -> bytes:
    """The request for one event."""
    args = {"shard": "0", "epoch": 1.0, "events": [event]}
    return json.dumps({"path": "cdc:apply", "format": "convex_encoded_json", "args": args}).encode()
