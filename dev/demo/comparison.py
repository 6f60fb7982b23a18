"""Every row against every document, by means of our own: SQL here, the public queries there, the worker not asked."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from dev.demo.convex_reads import ConvexReads, content, slot_of
from dev.demo.dashboard import MOST_ACTIVITIES
from dev.demo.rows import ACTIVITY_MIRRORS, STATUS_MIRROR, Connection, Document, Slot, documents

# What `cdc:keys` gives at once, at most.
_PAGE_KEYS: Final = 1000


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what differs: a sentence each."""

    activities: int
    statuses: int
    users: int
    # Rows of a user with more activities than a public query shows: their keys were compared, not their content.
    by_key_only: int
    differences: Sequence[str]


async def compare(connection: Connection, reads: ConvexReads, users: Collection[str]) -> Comparison:
    """Compare all rows with all documents. `users` are those there have ever been; Postgres and Convex add their own.

    Three readings of Convex: the keys of each mirror (`cdc:keys`, with the admin key), and for every user the
    activities and the status as the public queries show them.
    """
    async with connection.transaction():
        await connection.execute("set transaction isolation level repeatable read read only")
        wanted = await documents(connection)

    keys = {mirror: await _keys(reads, mirror, "activity") for mirror in ACTIVITY_MIRRORS.values()}
    keys[STATUS_MIRROR] = await _keys(reads, STATUS_MIRROR, "status")
    everybody = {*users, *(document["userId"] for document in wanted.values()), *keys[STATUS_MIRROR]}

    found: dict[Slot, Document] = {}
    times: Counter[Slot] = Counter()
    cut_off: set[str] = set()
    for user in sorted(everybody):
        activities = await reads.query("activities:getRecentActivities", {"userId": user, "limit": MOST_ACTIVITIES})
        if len(activities) == MOST_ACTIVITIES:
            cut_off.add(user)
        for activity in activities:
            slot = slot_of(activity)
            found[slot] = content(activity)
            times[slot] += 1
        status = await reads.query("alerts:getUserStatus", {"userId": user})
        if status is not None:
            found[STATUS_MIRROR, user] = content(status)

    unread = {
        slot
        for slot, row in wanted.items()
        if slot not in found and slot[0] != STATUS_MIRROR and row["userId"] in cut_off and slot[1] in keys[slot[0]]
    }
    differences = [
        *(
            _difference(slot, wanted.get(slot), found.get(slot))
            for slot in sorted(wanted.keys() | found.keys())
            if slot not in unread and wanted.get(slot) != found.get(slot)
        ),
        *(f"{_name(slot)}: Convex has {count} documents of it" for slot, count in times.items() if count > 1),
        *(
            f"{_name(slot)}: Convex has a document under this key, Postgres has no such row"
            for slot in sorted(
                {(mirror, key) for mirror in keys for key in keys[mirror]} - wanted.keys() - found.keys()
            )
        ),
        *(
            f"{_name(slot)}: Convex shows it, but not under its key"
            for slot in sorted(wanted.keys() & found.keys())
            if slot[1] not in keys[slot[0]]
        ),
    ]
    statuses = sum(mirror == STATUS_MIRROR for mirror, _ in wanted)
    return Comparison(len(wanted) - statuses, statuses, len(everybody), len(unread), differences)


async def _keys(reads: ConvexReads, mirror: str, target: str) -> set[str]:
    found: set[str] = set()
    after: str | None = None
    while True:
        args = {"mirror": mirror, "target": target, "after": after, "limit": _PAGE_KEYS}
        page = await reads.query("cdc:keys", args, admin=True)
        if not page:
            return found
        found.update(page)
        after = page[-1]


def _difference(slot: Slot, row: Document | None, document: Document | None) -> str:
    if document is None:
        return f"{_name(slot)}: missing in Convex"
    there = _flat(document)
    if row is None:
        return f"{_name(slot)}: Convex has it, Postgres does not ({_said(there, there.keys())})"
    here = _flat(row)
    fields = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    return f"{_name(slot)}: Postgres has {_said(here, fields)}; Convex has {_said(there, fields)}"


def _flat(document: Document) -> Document:
    """`metadata.mood` for what lies inside, so that only that is shown which differs."""
    flat = {name: value for name, value in document.items() if name != "metadata"}
    metadata = document.get("metadata")
    if isinstance(metadata, dict):
        return flat | {f"metadata.{name}": value for name, value in metadata.items()}
    return flat if metadata is None else flat | {"metadata": metadata}


def _name(slot: Slot) -> str:
    return f"{slot[0]} {slot[1]}"


def _said(document: Document, fields: Collection[str]) -> str:
    return ", ".join(f"{name} {_value(document[name])}" if name in document else f"no {name}" for name in fields)


def _value(value: object) -> str:
    # Every number is a float in Convex.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)
