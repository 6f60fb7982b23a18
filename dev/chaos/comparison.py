"""Postgres and Convex compared, by nothing that the worker knows: at rest, and in the order of what was seen.

At rest both must hold the same. While a schedule is played, what Convex shows of a document may only be what Postgres
held at some time, in the order in which Postgres held it; and the version of a document never falls.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dev.chaos import application
from dev.chaos.application import Content, Documents, Key

Kind = Literal["lost", "doubled", "stale", "misparked", "stuck"]
"""Convex lacks what Postgres has; has it twice; has what Postgres has no more, or goes back; a key is parked whose row
is fit; or nothing moves."""

Version = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    kind: Kind
    what: str


def differences(
    wanted: Documents, unfit: set[Key], found: Documents, doubled: list[Key], parked: set[Key]
) -> list[Difference]:
    """What is wrong with what Convex holds and with what is parked, at rest."""
    wrong = []
    for key in sorted({*wanted, *found}):
        # A document of a key that is parked is as it was before the row became unfit.
        if key in unfit or found.get(key) == wanted.get(key):
            continue
        kind: Kind = "lost" if key in wanted else "stale"
        what = f"Convex has {found.get(key, 'nothing')}, and must have {wanted.get(key, 'nothing')}"
        wrong.append(Difference(kind, f"{_name(key)}: {what}"))
    wrong += [Difference("doubled", f"{_name(key)}: two documents") for key in doubled]
    wrong += [Difference("misparked", f"{_name(key)}: the row is fit") for key in sorted(parked - unfit)]
    wrong += [Difference("lost", f"{_name(key)}: not parked, and the row is unfit") for key in sorted(unfit - parked)]
    return wrong


@dataclass
class _Seen:
    """What was seen of one document, one after the other, each unlike the one before; None: nothing."""

    contents: list[Content | None] = field(default_factory=list)
    # The places where it is Convex that lost it.
    excused: set[int] = field(default_factory=set)


class History:
    """The states that Postgres went through, and what Convex showed meanwhile."""

    def __init__(self) -> None:
        # Each with the mirrors that could not be read then.
        self._states: list[tuple[Documents, frozenset[str]]] = []
        self._seen: dict[Key, _Seen] = {}
        self._versions: dict[str, Version] = {}
        self.wrong: list[Difference] = []

    def committed(self, documents: Documents, unread: Iterable[str] = ()) -> None:
        """Another state of Postgres. What is unfit is not in it: its document stays as it was, and nothing is seen.

        `unread`: mirrors with a table that somebody has locked. What they held then, nobody knows; the worker may.
        """
        self._states.append((documents, frozenset(unread)))

    def emptied(self) -> None:
        """Convex has lost all that it had, versions included: what is missing says nothing until it is there again."""
        for seen in self._seen.values():
            seen.excused.add(len(seen.contents))
            seen.contents.append(None)
        self._versions.clear()

    def saw(self, dump: Mapping[str, list[dict[str, Any]]]) -> None:
        """What Convex shows now."""
        documents, doubled = application.dumped_documents(dump)
        self.wrong += [Difference("doubled", f"{_name(key)}: two documents, for a while") for key in doubled]
        for key in {*documents, *self._seen}:
            content = documents.get(key)
            seen = self._seen.setdefault(key, _Seen())
            if (seen.contents[-1] if seen.contents else None) != content:
                seen.contents.append(content)
        self._look_at_versions(dump)

    def _look_at_versions(self, dump: Mapping[str, list[dict[str, Any]]]) -> None:
        now: dict[str, Version] = {}
        for table, documents in dump.items():
            for document in documents:
                name = document["key"] if table != "userStatus" else f"status:{document['userId']}"
                version = (document["version"]["epoch"], document["version"]["number"])
                now[name] = max(now.get(name, version), version)
        for name, version in now.items():
            if version < self._versions.get(name, version):
                before = self._versions[name]
                self.wrong.append(Difference("stale", f"{name}: from version {before} back to {version}"))
        # A tombstone that is gone must not hide a fall, so what was seen is kept.
        self._versions |= now

    def check(self) -> list[Difference]:
        """What went back in time, or was never true."""
        for key, seen in self._seen.items():
            place, before = 0, seen.contents[0]
            for number, content in enumerate(seen.contents):
                if number in seen.excused:
                    continue
                # A state that could not be read is one state: it held one content.
                used_up = content != before and key[0] in self._states[place][1]
                following = self._first_with(key, content, place + used_up)
                if following is None:
                    ever = self._first_with(key, content, 0) is not None
                    says = f"back to {content}" if ever else f"{content}, which Postgres never held"
                    self.wrong.append(Difference("stale", f"{_name(key)}: for a while {says}"))
                    break
                place, before = following, content
        return self.wrong

    def _first_with(self, key: Key, content: Content | None, start: int) -> int | None:
        for place in range(start, len(self._states)):
            documents, unread = self._states[place]
            if key[0] in unread or documents.get(key) == content:
                return place
        return None


def _name(key: Key) -> str:
    return "/".join(key)
