"""Writing through: for what the application shows in Convex and keeps in no table.

    from cdc_worker.sync import sync_activity, sync_user_status_async

    sync_activity(user_id, "conversation", "Called the hotline", datetime.now(UTC), idempotency_key=f"call-{call.id}")
    await sync_user_status_async(user_id, next_due=None)

What has a table belongs in a mirror: this writes at once and to Convex alone, so a process that dies before
the call has written nothing. The transport, its deadlines and the rule for JSON are the worker's.
"""

import asyncio
import json
import uuid
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, Literal, get_args

import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from cdc_worker.background_loop import deployment_of, submit
from cdc_worker.errors import CdcError, ConfigError, FunctionFailed, Misconfigured, Transient
from cdc_worker.safe_json import parse
from cdc_worker.settings import ConvexSettings, load_settings
from convex import ConvexError

log = structlog.get_logger()

ActivityType = Literal["check-in", "alert", "conversation"]
AlertLevel = Literal["L1", "L2", "L3", "L4"]
# Types whose text is what Postgres would give for them.
Text = str | int | uuid.UUID
# An instant: a datetime (a naive one is taken as UTC), a date (its midnight in UTC), or milliseconds since 1970.
Instant = datetime | date | int | float


class Unset:
    """The type of UNSET: a field that stays as it is, while None clears it."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()


class SyncError(CdcError):
    """Convex did not take it within CDC_SYNC_SECONDS, or refused it; or an argument is nothing for it, or a setting
    cannot be used.

    Of the first two it may have arrived all the same, and the same call may be made again, an activity's with an
    `idempotency_key`.
    """


def sync_activity(  # noqa: PLR0917  # as it is published
    user_id: Text,
    type: ActivityType,  # noqa: A002  # the field's name
    description: Text,
    timestamp: Instant,
    metadata: Any = None,
    idempotency_key: Text | None = None,
) -> str | None:
    """Adds an activity and returns its id; the same id for the same `idempotency_key`, however often it is called.

    Without a key each call is an activity of its own (its retries are still one). Returns None, with one log line, if
    Convex is not configured. Raises SyncError.
    """
    return submit(_activity(user_id, type, description, timestamp, metadata, idempotency_key)).result()


async def sync_activity_async(  # noqa: PLR0917  # as it is published
    user_id: Text,
    type: ActivityType,  # noqa: A002  # the field's name
    description: Text,
    timestamp: Instant,
    metadata: Any = None,
    idempotency_key: Text | None = None,
) -> str | None:
    """`sync_activity` for callers with an event loop."""
    return await asyncio.wrap_future(
        submit(_activity(user_id, type, description, timestamp, metadata, idempotency_key))
    )


def sync_user_status(
    user_id: Text,
    *,
    last_check_in: Instant | Unset | None = UNSET,
    next_due: Instant | Unset | None = UNSET,
    alert_level: AlertLevel | Unset | None = UNSET,
    alert_triggered_at: Instant | Unset | None = UNSET,
) -> None:
    """Sets fields of a user's status: None clears one, an omitted one stays.

    Does nothing, with one log line, if Convex is not configured. Raises SyncError.
    """
    submit(_status(user_id, last_check_in, next_due, alert_level, alert_triggered_at)).result()


async def sync_user_status_async(
    user_id: Text,
    *,
    last_check_in: Instant | Unset | None = UNSET,
    next_due: Instant | Unset | None = UNSET,
    alert_level: AlertLevel | Unset | None = UNSET,
    alert_triggered_at: Instant | Unset | None = UNSET,
) -> None:
    """`sync_user_status` for callers with an event loop."""
    await asyncio.wrap_future(submit(_status(user_id, last_check_in, next_due, alert_level, alert_triggered_at)))


def _text(argument: str, value: object) -> str:
    """As the mirror has it of `user_id` and `description`: the text of a number or a UUID."""
    try:
        if isinstance(value, str):
            value.encode()
            return str.__str__(value)  # of an enum the value, not the member's name
        if isinstance(value, int) and not isinstance(value, bool):
            return int.__repr__(value)
    except ValueError:
        said = f"{argument} has half of a surrogate pair in it, or thousands of digits: take it out"
        raise SyncError(said) from None
    if isinstance(value, uuid.UUID):
        return str(value)
    raise _unfit(argument, value, "a str, an int or a UUID", "give its text, str(...)")


def _one_of(argument: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise _unfit(argument, value, f"one of {', '.join(allowed)}", "give one of these, as a str")
    return str.__str__(value)


def _milliseconds(argument: str, value: object) -> float:
    if isinstance(value, datetime):
        aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    elif isinstance(value, date):
        aware = datetime(value.year, value.month, value.day, tzinfo=UTC)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise SyncError(f"{argument} must be a finite number: give milliseconds since 1970") from None
    else:
        raise _unfit(argument, value, "a datetime, a date, or milliseconds since 1970", "give it as an int or a float")
    return float((aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1))


def _unfit(argument: str, value: object, wanted: str, cure: str) -> SyncError:
    """Names the type only: the value is what a row would have."""
    return SyncError(f"{argument} must be {wanted}, and is a {type(value).__name__}: {cure}")


def _json(metadata: Any) -> Any:
    """As the mirror has it of a column `metadata`. Raises SyncError for what is no JSON."""

    def other(value: object) -> str:
        if isinstance(value, uuid.UUID):
            return str(value)
        raise SyncError(
            f"metadata has a {type(value).__name__} in it, which is no JSON: give a number or a text of it,"
            " float(...), str(...), .isoformat()"
        )

    try:
        return parse(json.dumps(metadata, default=other, allow_nan=False))
    except TypeError:
        raise SyncError("metadata has a key that is no str: JSON has no other, give str(...)") from None
    except (ValueError, RecursionError):
        raise SyncError(
            "metadata is no JSON: it has NaN or infinity in it, an integer of thousands of digits, itself, or"
            " hundreds of levels: take that out, or give its text"
        ) from None


async def _activity(  # noqa: PLR0917  # as it is published
    user_id: Text, kind: str, description: Text, timestamp: Instant, metadata: Any, idempotency_key: Text | None
) -> str | None:
    if idempotency_key is None or idempotency_key == "":
        idempotency_key = uuid.uuid4()  # a retry must not be a second activity, also where the caller does not care
    args = {
        "userId": _text("user_id", user_id),
        "type": _one_of("type", kind, get_args(ActivityType)),
        "description": _text("description", description),
        "timestamp": _milliseconds("timestamp", timestamp),
        "idempotencyKey": _text("idempotency_key", idempotency_key),
    }
    if metadata is not None:
        args["metadata"] = _json(metadata)
    value = await _call("activities:addActivity", args)
    return str(value) if value is not None else None


async def _status(
    user_id: Text,
    last_check_in: Instant | Unset | None,
    next_due: Instant | Unset | None,
    alert_level: str | Unset | None,
    alert_triggered_at: Instant | Unset | None,
) -> None:
    args: dict[str, Any] = {"userId": _text("user_id", user_id)}
    for name, field, instant in (
        ("last_check_in", "lastCheckIn", last_check_in),
        ("next_due", "nextDue", next_due),
        ("alert_triggered_at", "alertTriggeredAt", alert_triggered_at),
    ):
        if not isinstance(instant, Unset):
            args[field] = None if instant is None else _milliseconds(name, instant)
    if not isinstance(alert_level, Unset):
        args["alertLevel"] = None if alert_level is None else _one_of("alert_level", alert_level, get_args(AlertLevel))
    await _call("alerts:updateUserStatus", args)


async def _call(path: str, args: dict[str, Any]) -> Any:
    try:
        settings = load_settings(ConvexSettings)
        if settings.missing_for_convex:
            log.warning("sync.skipped", function=path, missing=list(settings.missing_for_convex), cure="set it")
            return None
        deployment = await deployment_of(settings)
    except ConfigError as error:
        raise SyncError(f"{path}: {error}") from None
    last: Transient | None = None
    try:
        # Around all: the last try may not take its own deadline on top, nor a pause.
        async with asyncio.timeout(settings.sync_seconds):
            async for attempt in AsyncRetrying(
                wait=wait_random_exponential(multiplier=0.1, max=5.0), retry=retry_if_exception_type(Transient)
            ):
                with attempt:
                    try:
                        return await deployment.call("mutation", path, args)
                    except Transient as error:
                        last = error
                        raise
    except TimeoutError:
        raise SyncError(f"{path}: {last or 'no answer in time'}") from None
    except ConvexError as error:
        raise SyncError(f"{path}: {_reason(error)}") from None
    except (Misconfigured, FunctionFailed) as error:
        raise SyncError(f"{path}: {error}") from None
    except RuntimeError as error:  # Python is ending, in which it looks up no name
        raise SyncError(f"{path}: {error}") from None


def _reason(error: ConvexError) -> str:
    """What the function says of it: the message alone is "Server Error" on a production deployment."""
    said = error.data.get("message") if isinstance(error.data, dict) else None
    return said if isinstance(said, str) else str(error)
