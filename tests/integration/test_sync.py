"""Writing through: the same calls that an application makes."""

import asyncio
import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest
from structlog.testing import capture_logs

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
def user() -> str:
    return f"u-{uuid.uuid4().hex}"


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
        sync_activity(user, "party", "x", NOON)  # type: ignore[arg-type]
    assert mirrored.activities(user) == []
    monkeypatch.setenv("CONVEX_DEPLOY_KEY", "wrong|00")
    with pytest.raises(SyncError, match="CONVEX_DEPLOY_KEY does not belong"):
        sync_activity(user, "check-in", "x", NOON)
    monkeypatch.setenv("CONVEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("CDC_SYNC_SECONDS", "0.3")
    with pytest.raises(SyncError, match="no connection"):
        sync_user_status(user, next_due=NOON)
