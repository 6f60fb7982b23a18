"""The clients of the PyPI package `convex`, unchanged, against the local Convex."""

import base64
import json
import subprocess
import sys
from typing import Any, Protocol

import pytest
from convex.http_client import ConvexHttpClient

from convex import ConvexError, ConvexInt64


class LocalConvex(Protocol):
    url: str
    admin_key: str


# The WebSocket client has no timeout and no close(), holds the GIL while it waits, and retries for ever: in a process
# of its own it can be given up.
WEBSOCKET_CLIENT = """
import json, sys
from convex import ConvexClient

url, admin_key, user, token = sys.argv[1:]
reader, writer = ConvexClient(url), ConvexClient(url)
reader.set_auth(token)
writer.set_admin_auth(admin_key)
updates = reader.subscribe("activities:getRecentActivities", {"userId": user})
seen = [len(next(updates))]
activity = {"userId": user, "type": "alert", "description": "over the WebSocket", "timestamp": 1}
added = writer.mutation("activities:addActivity", activity)
seen.append(len(next(updates)))
fetched = reader.query("activities:getRecentActivities", {"userId": user, "limit": 1})
print(json.dumps({"seen": seen, "same": fetched[0]["_id"] == added}), flush=True)
"""


def token_of(user: str) -> str:
    """An unsigned token, which the local Convex takes at its word."""
    parts = [{"alg": "none", "typ": "JWT"}, {"sub": user, "iss": "https://local.test"}]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, ""])


@pytest.fixture
def admin(local_convex: LocalConvex) -> ConvexHttpClient:
    client = ConvexHttpClient(local_convex.url)
    client.set_admin_auth(local_convex.admin_key)
    return client


@pytest.fixture
def reader(local_convex: LocalConvex, user: str) -> ConvexHttpClient:
    client = ConvexHttpClient(local_convex.url)
    client.set_auth(token_of(user))
    return client


def activity(user: str, **fields: Any) -> dict[str, Any]:
    return {"userId": user, "type": "check-in", "description": "Grüße 🙂", "timestamp": 1700000000000, **fields}


def test_http_client_writes_and_reads(admin: ConvexHttpClient, reader: ConvexHttpClient, user: str) -> None:
    metadata = {"whole": 5, "part": 0.5, "big": ConvexInt64(12), "bytes": b"\x00\xff", "none": None, "list": [1, "a"]}
    added = admin.mutation("activities:addActivity", activity(user, metadata=metadata))
    # A whole number printed as `1700000000000` and not as `1700000000000.0` would raise here.
    (read,) = reader.query("activities:getRecentActivities", {"userId": user})
    assert read["_id"] == added
    assert read["timestamp"] == 1700000000000.0
    assert read["description"] == "Grüße 🙂"
    assert read["metadata"] == metadata


def test_convex_error_carries_its_data(admin: ConvexHttpClient, user: str) -> None:
    with pytest.raises(ConvexError) as caught:
        admin.mutation("activities:addActivity", activity(user, timestamp=float("nan")))
    assert caught.value.data["code"] == "invalid_argument"


def test_internal_function_is_not_for_users(reader: ConvexHttpClient, user: str) -> None:
    with pytest.raises(Exception, match="Could not find public function"):
        reader.mutation("activities:addActivity", activity(user))
    assert reader.query("activities:getRecentActivities", {"userId": user}) == []


def test_wrong_key_is_401(local_convex: LocalConvex, user: str) -> None:
    client = ConvexHttpClient(local_convex.url)
    client.set_admin_auth("local-convex|00")
    with pytest.raises(Exception, match="401 BadAdminKey"):
        client.mutation("activities:addActivity", activity(user))


def test_websocket_client_is_told_of_changes(local_convex: LocalConvex, user: str) -> None:
    command = [sys.executable, "-c", WEBSOCKET_CLIENT, local_convex.url, local_convex.admin_key, user, token_of(user)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"seen": [0, 1], "same": True}
