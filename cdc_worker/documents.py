"""Rows of a mirror's query become events: what Convex is told about one key (docs/protocol.md)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cdc_worker.catalog import Plan
from cdc_worker.safe_json import is_plain, parse

# A document may have 1 MiB in Convex' own count, which a JSON text is close to. What is nearer the limit than
# this estimate tells is refused by Convex itself, and parked all the same.
LARGEST_DOCUMENT = 1_048_576

_NAMES = {
    "user_id": "userId",
    "type": "type",
    "description": "description",
    "timestamp": "timestamp",
    "metadata": "metadata",
    "last_check_in": "lastCheckIn",
    "next_due": "nextDue",
    "alert_level": "alertLevel",
    "alert_triggered_at": "alertTriggeredAt",
}
_NEVER_NULL = {"user_id", "type", "description", "timestamp"}
_TIMES = {"timestamp", "last_check_in", "next_due", "alert_triggered_at"}


# mirror: the mirror's query does not run. row: this row breaks it, or makes no document.
# rejected: a verdict said so. refused: Convex fails on this key alone, while a probe passes.
Class = Literal["mirror", "row", "rejected", "refused"]
# Why a key is parked: the class, and a sentence that quotes nothing of the row.
Problem = tuple[Class, str]


# The package's codec is left out here: a document is made of texts, finite floats and what `parse` gives,
# which are their own Convex JSON (tests hold it to that), and the codec's check of each character of each name
# was half of the worker's CPU.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)


class UnfitRow(Exception):
    """A row that cannot be a document. The message says why, and quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class Event:
    """One reading of one key: JSON text, so that a repetition is the same to the letter, or what is wrong with it."""

    mirror_id: int
    key: str
    text: bytes
    # Not for Convex: the key is to be parked.
    problem: Problem | None = None


class _Spliced(str):
    """Metadata that is its own safe JSON: it goes into the event as the text that it is."""

    __slots__ = ()


def document(plan: Plan, values: Sequence[Any]) -> dict[str, Any]:
    """The document of a row; `values` are the plan's columns. Raises UnfitRow."""
    fields: dict[str, Any] = {}
    for name, value in zip(plan.columns, values, strict=True):
        if value is None:
            if name in _NEVER_NULL:
                raise UnfitRow(f"{name} is null: let the query leave such rows out, or give a value with coalesce()")
            continue
        if name in _TIMES and not math.isfinite(value):
            raise UnfitRow(f"{name} is infinite")
        fields[_NAMES[name]] = _metadata(value) if name == "metadata" else value
    return fields


def _metadata(text: str) -> Any:
    if is_plain(text):
        return _Spliced(text)
    try:
        return parse(text)
    except ValueError as error:
        raise UnfitRow(f"metadata cannot be read as JSON ({type(error).__name__})") from None


def event(plan: Plan, mirror_id: int, key: str, number: int, fields: dict[str, Any] | None) -> Event:
    """The event that sets a key's document, or deletes it (`fields` None). Raises UnfitRow for one that is too
    large.
    """
    spliced = fields.pop("metadata") if fields is not None and isinstance(fields.get("metadata"), _Spliced) else None
    value: dict[str, Any] = {
        "key": f"{plan.mirror.name}:{key}",
        "number": float(number),
        "target": plan.mirror.target,
        "document": fields,
    }
    text = _ENCODER.encode(value)
    if spliced is not None:
        # The document is the event's last field, and has others before this one.
        text = f'{text[:-2]},"metadata":{spliced}}}}}'
    encoded = text.encode()
    if len(encoded) > LARGEST_DOCUMENT:
        raise UnfitRow(f"the document has {len(encoded)} bytes, Convex holds {LARGEST_DOCUMENT}")
    return Event(mirror_id, key, encoded)
