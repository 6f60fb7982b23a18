"""Writing through: the same calls that an application makes."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any
from unittest.mock import Mock

import pytest
from structlog.testing import capture_logs

from cdc_worker import background_loop, sync
from cdc_worker.sync import (
    SyncError,
    sync_activity,
    sync_activity_async,
    sync_user_status,
    sync_user_status_async,
)
from dev.local_convex import LocalConvex
from tests.integration.mirrored import Mirrored

NOON = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
NOON_MS = 1772366400250.0


@pytest.fixture
def mirrored(local_convex: LocalConvex, monkeypatch: pytest.MonkeyPatch) -> Mirrored:
    monkeypatch.setenv("CONVEX_URL", local_convex.url)
    monkeypatch.setenv("CONVEX_DEPLOY_KEY", local_convex.admin_key)
    return Mirrored(local_convex.url, local_convex.admin_key)


def test_an_activity_is_added_once_for_a_key(mirrored: Mirrored, user: str) -> None:
    key = f"call-{user}"
    first = sync_activity(user, "conversation", "Called", NOON, {"€": 2**60}, idempotency_key=key)
    again = sync_activity(user, "conversation", "Called", NOON, {"€": 2**60}, idempotency_key=key)
    assert first is not None
    assert first == again
    assert mirrored.activities(user) == [
        {
            "userId": user,
            "type": "conversation",
            "description": "Called",
            "timestamp": NOON_MS,
            "metadata": {"~{20ac}": "~{json}1152921504606846976"},
        }
    ]
    assert sync_activity(user, "conversation", "Called", NOON) != sync_activity(user, "conversation", "Called", NOON)


def test_times_are_milliseconds_whatever_their_zone(mirrored: Mirrored, user: str) -> None:
    elsewhere = NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))
    for instant in (elsewhere, NOON.replace(tzinfo=None), NOON_MS):
        sync_activity(user, "check-in", "x", instant)
    assert {each["timestamp"] for each in mirrored.activities(user)} == {NOON_MS}


def test_a_millisecond_is_not_lost_to_a_float(mirrored: Mirrored, user: str) -> None:
    # 541950522.813 * 1000 is a little less.
    instant = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=541_950_522_813)
    sync_activity(user, "check-in", "x", instant)
    assert [each["timestamp"] for each in mirrored.activities(user)] == [541_950_522_813]


async def test_a_status_field_stays_is_set_or_is_cleared(mirrored: Mirrored, user: str) -> None:
    await sync_user_status_async(user, last_check_in=NOON, alert_level="L2", alert_triggered_at=NOON)
    await asyncio.to_thread(sync_user_status, user, alert_level=None, next_due=NOON)
    status = mirrored.status(user)
    assert status is not None
    assert status.get("alertLevel") is None
    assert {name: value for name, value in status.items() if name != "alertLevel"} == {
        "userId": user,
        "lastCheckIn": NOON_MS,
        "alertTriggeredAt": NOON_MS,
        "nextDue": NOON_MS,
    }


async def test_many_at_once_from_one_loop(mirrored: Mirrored, user: str) -> None:
    added = await asyncio.gather(*(sync_activity_async(user, "check-in", str(n), NOON) for n in range(30)))
    assert len(set(added)) == 30
    assert len(mirrored.activities(user)) == 30


def test_without_convex_it_is_skipped_with_one_line(monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    for name in ("CONVEX_URL", "NEXT_PUBLIC_CONVEX_URL", "CONVEX_DEPLOY_KEY"):
        monkeypatch.delenv(name, raising=False)
    with capture_logs() as lines:
        assert sync_activity(user, "check-in", "secret words", NOON) is None
        sync_user_status(user, next_due=None)
    assert [line["event"] for line in lines] == ["sync.skipped", "sync.skipped"]
    assert "secret" not in str(lines)


def test_what_convex_refuses_or_cannot_be_reached_for_is_an_error(
    mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    with pytest.raises(SyncError, match="activities:addActivity"):
        sync_activity(user, "check-in", "x" * 2**20, NOON)
    assert mirrored.activities(user) == []
    monkeypatch.setenv("CONVEX_DEPLOY_KEY", "wrong|00")
    with pytest.raises(SyncError, match="CONVEX_DEPLOY_KEY does not belong"):
        sync_activity(user, "check-in", "x", NOON)
    monkeypatch.setenv("CONVEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("CDC_SYNC_SECONDS", "3")
    with pytest.raises(SyncError, match="no connection"):
        sync_user_status(user, next_due=NOON)


def test_a_setting_that_cannot_be_used_is_an_error_of_the_call(monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    monkeypatch.setenv("CONVEX_URL", "happy-otter-123.convex.cloud")
    with pytest.raises(SyncError, match="CONVEX_URL: must be an address like"):
        sync_activity(user, "check-in", "x", NOON)


# In a process of its own: its pool is still at work when the main thread is through, as at the end of a script.
_ENDS = """
import time
from concurrent.futures import ThreadPoolExecutor
from cdc_worker.sync import SyncError, sync_activity
def late():
    time.sleep(0.5)
    try:
        sync_activity("u", "check-in", "x", 1)
    except SyncError as error:
        print(error)
ThreadPoolExecutor().submit(late)
"""


def test_the_end_of_python_is_an_error_of_the_call() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ENDS],
        env={"CONVEX_URL": "http://localhost:9", "CONVEX_DEPLOY_KEY": "k"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.startswith("activities:addActivity: cannot schedule new futures"), done.stderr


class Kind(str, Enum):  # noqa: UP042  # whose str() is its name
    CALL = "conversation"


def test_what_a_mirror_would_take_is_taken_as_it_has_it(mirrored: Mirrored) -> None:
    number, some_uuid, of_a_user = uuid.uuid4().int, uuid.UUID(int=7), uuid.uuid4()
    for _ in range(2):
        sync_activity(number, Kind.CALL, some_uuid, date(2026, 3, 1), {"by": some_uuid}, idempotency_key=some_uuid)  # type: ignore[arg-type]
    assert mirrored.activities(str(number)) == [
        {
            "userId": str(number),
            "type": "conversation",
            "description": str(some_uuid),
            "timestamp": NOON_MS // 86_400_000 * 86_400_000,
            "metadata": {"by": str(some_uuid)},
        }
    ]
    sync_user_status(of_a_user, next_due=date(2026, 3, 1))
    assert mirrored.status(str(of_a_user)) is not None


_FIT = {"user_id": "u", "type": "check-in", "description": "x", "timestamp": 1}
_LONG = 10**5000
_HIMSELF: list[Any] = []
_HIMSELF.append(_HIMSELF)


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("user_id", None, "user_id must be a str, an int or a UUID, and is a NoneType: give its text, str(...)"),
        ("user_id", True, "is a bool"),
        pytest.param("user_id", _LONG, "thousands of digits", id="user_id-long"),
        ("user_id", b"secret", "is a bytes"),
        ("user_id", "secret\udfff", "half of a surrogate pair"),
        ("type", "secret", "type must be one of check-in, alert, conversation"),
        ("type", ["secret"], "type must be one of"),
        ("description", Decimal("1234.5"), "description must be a str, an int or a UUID, and is a Decimal"),
        ("timestamp", Decimal("1234.5"), "is a Decimal: give it as an int or a float"),
        ("timestamp", "secret", "timestamp must be a datetime, a date, or milliseconds since 1970, and is a str"),
        ("timestamp", None, "is a NoneType"),
        ("timestamp", True, "is a bool"),
        ("timestamp", 1234 * 10**400, "timestamp must be a finite number"),
        ("metadata", {"x": [Decimal("1234.5")]}, "metadata has a Decimal in it"),
        ("metadata", {"x": NOON}, "metadata has a datetime in it"),
        ("metadata", {"secret"}, "metadata has a set in it"),
        ("metadata", {("secret",): 1}, "metadata has a key that is no str"),
        ("metadata", {"secret": float("nan")}, "NaN"),
        ("metadata", _HIMSELF, "itself"),
        ("metadata", [_LONG], "thousands of digits"),
        ("idempotency_key", ["secret"], "idempotency_key must be a str, an int or a UUID, and is a list"),
    ],
)
def test_what_is_nothing_for_convex_is_named_and_not_quoted(argument: str, value: Any, said: str) -> None:
    with pytest.raises(SyncError, match=re.escape(said)) as caught:
        sync_activity(**{**_FIT, argument: value})
    logged = "".join(traceback.format_exception(caught.value))
    assert "secret" not in logged
    assert "1234" not in logged
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_what_is_nothing_for_a_status_is_named() -> None:
    with pytest.raises(SyncError, match=r"next_due must be a datetime.*is a str"):
        sync_user_status("u", next_due="tomorrow")  # type: ignore[arg-type]
    with pytest.raises(SyncError, match="alert_level must be one of L1, L2, L3, L4"):
        sync_user_status("u", alert_level=2)  # type: ignore[arg-type]


def test_what_the_function_refuses_it_for_is_said(mirrored: Mirrored, user: str) -> None:
    # The local Convex hides messages as a production deployment does.
    with pytest.raises(SyncError, match=r"activities:addActivity: timestamp must be a finite number\.$"):
        sync_activity(user, "check-in", "x", float("nan"))


def test_the_deadline_holds_against_a_server_that_is_silent(monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("CONVEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("CONVEX_DEPLOY_KEY", "key")
        monkeypatch.setenv("CDC_CONVEX_TIMEOUT_SECONDS", "60")
        monkeypatch.setenv("CDC_SYNC_SECONDS", "0.5")
        began = time.monotonic()
        with pytest.raises(SyncError, match="no answer in time"):
            sync_activity(user, "check-in", "x", NOON)
        assert time.monotonic() - began < 30


def test_a_thread_that_could_not_start_is_started_by_the_next_call(
    mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    monkeypatch.setattr(background_loop, "_LOOP", background_loop._Loop())
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="can't start"):
            sync_activity(user, "check-in", "x", NOON)
    later = background_loop.submit(sync._activity(user, "check-in", "x", NOON, None, None))
    assert later.result(timeout=30) is not None
    background_loop._hang_up()


# In a process of its own, since to fork one with threads is what must be survived. The child ends as gunicorn's do.
_FORKS = """
import os, sys, time
from cdc_worker.sync import sync_activity
user = sys.argv[1]
sync_activity(user, "check-in", "before", 1)
child = os.fork()
if child == 0:
    sync_activity(user, "check-in", "child", 2)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
began = time.monotonic()
sync_activity(user, "check-in", "after", 3)
print(time.monotonic() - began)
"""


def test_a_fork_leaves_the_connections_of_the_parent_alone(mirrored: Mirrored, user: str) -> None:
    ran = subprocess.run([sys.executable, "-c", _FORKS, user], capture_output=True, text=True, check=True, timeout=60)
    assert float(ran.stdout) < 5
    assert ran.stderr == ""
    assert {each["description"] for each in mirrored.activities(user)} == {"before", "child", "after"}


async def test_settings_that_change_leave_a_call_under_way_alone(
    mirrored: Mirrored, local_convex: LocalConvex, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as slow:
        slow.settimeout(30)
        monkeypatch.setenv("CONVEX_URL", f"http://127.0.0.1:{slow.getsockname()[1]}")
        under_way = asyncio.create_task(sync_activity_async(user, "check-in", "x", NOON))
        connection, _ = await asyncio.to_thread(slow.accept)
        monkeypatch.setenv("CONVEX_URL", local_convex.url)
        assert await sync_activity_async(user, "check-in", "x", NOON) is not None
        with connection:
            body = b'{"status":"success","value":"late"}'
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            assert await under_way == "late"
