"""What Convex ought to hold: the application's rows, read and put together without the worker's mirrors.

Plain columns come out of Postgres, and Python makes the documents of them: the enum's order, the nulls, UTC and
the join of users with their alerts are all done a second time, so that a comparison with it means something.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from psycopg import AsyncConnection

Row = tuple[Any, ...]
Connection = AsyncConnection[Row]

Slot = tuple[str, str]
"""A mirror and a key in it: ("check-ins", "cm3…"), ("status", the user's id)."""

Document = dict[str, Any]
"""What Convex should show under a slot, less the fields that Convex adds itself."""

ACTIVITY_MIRRORS: Final[Mapping[str, str]] = {
    "check-in": "check-ins",
    "alert": "alerts",
    "conversation": "conversations",
}
STATUS_MIRROR: Final = "status"

# null stands for all users.
_USERS = """
select id, "lastCheckInAt", "nextCheckInDue" from "User"
where %(users)s::text[] is null or id = any(%(users)s)
"""
_CHECK_INS = """
select id, "userId", mood, note, "createdAt" from "CheckIn"
where %(users)s::text[] is null or "userId" = any(%(users)s)
"""
_ALERTS = """
select id, "userId", level::text, reason, "triggeredAt", "resolvedAt" from "Alert"
where %(users)s::text[] is null or "userId" = any(%(users)s)
"""
_CONVERSATIONS = """
select id, "userId", title, "messageCount", "lastMessageAt" from "Conversation"
where %(users)s::text[] is null or "userId" = any(%(users)s)
"""


async def documents(connection: Connection, users: Sequence[str] | None = None) -> dict[Slot, Document]:
    """The documents of these users (of all, if None), as the connection's transaction sees the rows."""
    of = {"users": None if users is None else list(users)}
    found: dict[Slot, Document] = {}
    for key, user, mood, note, created in await _fetch(connection, _CHECK_INS, of):
        text = "Checked in" if note is None else note
        found["check-ins", key] = _activity(user, "check-in", text, created, {"id": key, "mood": mood})
    for key, user, title, messages, last in await _fetch(connection, _CONVERSATIONS, of):
        found["conversations", key] = _activity(user, "conversation", title, last, {"id": key, "messages": messages})
    worst: dict[str, tuple[str, int]] = {}
    for key, user, level, reason, triggered, resolved in await _fetch(connection, _ALERTS, of):
        metadata = {"id": key, "level": level, "resolved": resolved is not None}
        found["alerts", key] = _activity(user, "alert", f"{level}: {reason}", triggered, metadata)
        if resolved is None:
            worst[user] = max(worst.get(user, ("", 0)), (level, _milliseconds(triggered)))
    for user, last_check_in, next_due in await _fetch(connection, _USERS, of):
        status: Document = {"userId": user}
        if last_check_in is not None:
            status["lastCheckIn"] = _milliseconds(last_check_in)
        if next_due is not None:
            status["nextDue"] = _milliseconds(next_due)
        if user in worst:
            status["alertLevel"], status["alertTriggeredAt"] = worst[user]
        found[STATUS_MIRROR, user] = status
    return found


async def _fetch(connection: Connection, statement: str, of: Mapping[str, Sequence[str] | None]) -> list[Row]:
    return await (await connection.execute(statement.encode(), of)).fetchall()


def _activity(user: str, kind: str, text: str, at: datetime, metadata: dict[str, Any]) -> Document:
    return {
        "userId": user,
        "type": kind,
        "description": text,
        "timestamp": _milliseconds(at),
        "metadata": metadata,
    }


def _milliseconds(at: datetime) -> int:
    """Since 1970, of a timestamp(3) that means UTC."""
    return round(at.replace(tzinfo=UTC).timestamp() * 1000)
