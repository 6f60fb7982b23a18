"""When each change of the application was seen in Convex."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from dev.demo.rows import Document, Slot


@dataclass(eq=False)
class Change:
    """One transaction of the application: for people what it was, for us what it makes of which documents."""

    table: str
    key: str
    text: str
    rows: int
    # For the colour: an alert's level, "" for all else.
    level: str = ""
    # Documents that differ from before; None: the document goes. Empty if it was rolled back.
    effects: Mapping[Slot, Document | None] = field(default_factory=dict)
    rolled_back: bool = False
    committed_at: datetime | None = None
    # Monotonic seconds.
    committed: float = 0.0
    last_seen: float = 0.0
    # A later change has undone it before anybody could see it: it has no time of its own.
    overtaken: bool = False
    # Said to be late already.
    late: bool = False

    @property
    def took_ms(self) -> float:
        """From the answer to COMMIT until the last of its documents was seen."""
        return max(0.0, self.last_seen - self.committed) * 1000


class Sightings:
    """Holds what was committed against what the dashboard shows; `seen` is called for each change, when it is complete.

    A document that changes twice in a moment may be shown only in its last state: then both changes are seen.
    """

    def __init__(self, seen: Callable[[Change], None]) -> None:
        self._seen = seen
        # None: it was shown, and is not any more.
        self._shown: dict[Slot, tuple[Document | None, float]] = {}
        self._expected: dict[Slot, deque[tuple[Change, Document | None]]] = {}
        self._open: dict[Change, set[Slot]] = {}

    @property
    def unseen(self) -> list[Change]:
        """Changes that are committed and not shown (yet), oldest first."""
        return list(self._open)

    def committed(self, change: Change) -> None:
        """From now on the change is waited for."""
        if not change.effects:
            return
        self._open[change] = set(change.effects)
        for slot, wanted in change.effects.items():
            self._expected.setdefault(slot, deque()).append((change, wanted))
            self._match(slot)

    def shown(self, before: set[Slot], documents: Mapping[Slot, Document], at: float) -> None:
        """A query shows these documents since `at`; `before` are the slots that it showed until then."""
        now: dict[Slot, Document | None] = {**dict.fromkeys(before), **documents}
        touched = [slot for slot, document in now.items() if self._document(slot) != document]
        for slot in touched:
            self._shown[slot] = (now[slot], at)
        for slot in touched:
            self._match(slot)

    def forget(self, slots: set[Slot]) -> None:
        """Of a user who is gone, nothing is kept: the demo may run for days."""
        for slot in slots:
            self._shown.pop(slot, None)

    def _document(self, slot: Slot) -> Document | None:
        return self._shown.get(slot, (None, -math.inf))[0]

    def _match(self, slot: Slot) -> None:
        expected = self._expected.get(slot)
        if not expected:
            return
        document, since = self._shown.get(slot, (None, -math.inf))
        # From the newest back: a state that is older than what is shown will not be shown any more.
        for place in range(len(expected) - 1, -1, -1):
            if expected[place][1] == document:
                for _ in range(place + 1):
                    self._settle(expected.popleft()[0], slot, since)
                break
        if not expected:
            del self._expected[slot]

    def _settle(self, change: Change, slot: Slot, since: float) -> None:
        if since < change.committed:
            change.overtaken = True
        change.last_seen = max(change.last_seen, since)
        waiting = self._open[change]
        waiting.discard(slot)
        if not waiting:
            del self._open[change]
            self._seen(change)
