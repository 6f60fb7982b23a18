"""Rows of a mirror's query become events: what Convex is told about one key (docs/protocol.md).

Postgres has made the JSON already (plan.py); what is left is the number, and metadata that is made safe first.
"""

import json
from typing import Literal, NamedTuple

from cdc_worker.document_size import convex_bytes, least_bytes
from cdc_worker.plan import Plan
from cdc_worker.safe_json import parse

# A document may have 1 MiB in Convex' own count. What passes it only with what is stored beside the content (the key,
# the version, some 150 bytes) is refused by Convex itself, and parked all the same.
LARGEST_DOCUMENT = 1_048_576
# Events so short are not counted: at the most, two bytes of JSON (a digit and its comma) are nine to Convex.
_NEVER_TOO_LARGE = LARGEST_DOCUMENT * 2 // 9

# mirror: the mirror's query does not run. row: this row breaks it, or makes no document.
# rejected: a verdict said so. refused: Convex fails on this key alone, while a probe passes.
Class = Literal["mirror", "row", "rejected", "refused"]
# Why a key is parked: the class, and a sentence that quotes nothing of the row.
Problem = tuple[Class, str]

# What the document follows: a key cannot have it, since its quotes are escaped.
_DOCUMENT = b',"document":'

# The package's codec is left out here: what `parse` gives is its own Convex JSON (tests hold it to that), and the
# codec looks at each character of each name in Python.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)


# A row of `Plan.documents`: the key as the log spells it; the bytes of the event and of metadata together; what makes
# it no document, if anything does; the event without its opening brace and its number, and without metadata if that
# is given apart (None for a row that is larger than was asked for); metadata that has to be made safe.
Row = tuple[str, int, str | None, bytes | None, str | None]


class Event(NamedTuple):
    """One reading of one key: JSON text, so that a repetition is the same to the letter, or what is wrong with it."""

    mirror_id: int
    key: str
    text: bytes
    # Not for Convex: the key is to be parked.
    problem: Problem | None = None


class EventMaker:
    """Makes the events of one reading of one mirror."""

    def __init__(self, plan: Plan, mirror_id: int, number: int) -> None:
        self._plan = plan
        self._mirror_id = mirror_id
        self._head = b'{"number":%d.0,' % number

    def put(self, row: Row) -> Event:
        """The event that sets the key's document to a row that is there whole, or says why it cannot."""
        key, size, problem, event, unplain = row
        if problem is not None:
            return self.unfit(key, problem)
        assert event is not None, "only measured"
        text = self._head + event
        if unplain is not None:
            # Before it is parsed, which takes much memory: whatever it becomes, it is too large.
            if size > LARGEST_DOCUMENT and least_bytes(unplain.encode(), LARGEST_DOCUMENT) > LARGEST_DOCUMENT:
                return self.too_large(key, size)
            try:
                metadata = _ENCODER.encode(parse(unplain)).encode()
            except ValueError as error:
                return self.unfit(key, f"metadata cannot be read as JSON ({type(error).__name__})")
            # The document is the event's last field, and has others before this one.
            text = b'%b,"metadata":%b}}' % (text[:-2], metadata)
        if len(text) > _NEVER_TOO_LARGE:
            document = text.partition(_DOCUMENT)[2][:-1]
            if convex_bytes(document, LARGEST_DOCUMENT) > LARGEST_DOCUMENT:
                return self.too_large(key, size)
        return Event(self._mirror_id, key, text)

    def delete(self, key: str) -> Event:
        """The event that deletes the key's document."""
        mirror = self._plan.mirror
        rest = _ENCODER.encode({"key": f"{mirror.name}:{key}", "target": mirror.target, "document": None})
        return Event(self._mirror_id, key, self._head + rest[1:].encode())

    def too_large(self, key: str, size: int) -> Event:
        """What is said of a key whose document has `size` bytes of JSON, and too many in Convex' own count."""
        said = f"the document ({size} bytes of JSON) is too large: by its own count, Convex holds {LARGEST_DOCUMENT}"
        return self.unfit(key, said)

    def unfit(self, key: str, reason: str) -> Event:
        """What is said of a key whose row can be no document."""
        return Event(self._mirror_id, key, b"", ("row", reason))
