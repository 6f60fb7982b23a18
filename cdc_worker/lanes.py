"""What is read but not yet acknowledged: pages, the newest reading of each key, and which keys are on their way.

No input or output, no clock: the rules of the protocol that live in memory, and nothing else.

- A key is in flight once at a time. A newer reading of it waits, and replaces one that waits already.
- A page is acknowledged when each of its keys is: its own reading, or a newer one of the same key.
- Pages are acknowledged in order: the position is the end of the last page before the first open one.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from cdc_worker.documents import Event
from cdc_worker.outbox import Position

Key = tuple[int, str]


class _OpenPage:
    __slots__ = ("end", "left", "since")

    def __init__(self, end: Position, since: float) -> None:
        self.end = end
        self.since = since
        self.left = 0


class Lanes:
    """The keys of one reader under one epoch."""

    def __init__(self) -> None:
        self._pages: deque[_OpenPage] = deque()
        self._waiting: OrderedDict[Key, Event] = OrderedDict()
        # Waiting readings whose key is in flight: out of the way of `take`, so that it never searches.
        self._behind: dict[Key, Event] = {}
        # By key: the pages that the reading on its way acknowledges: its own, and those of readings it replaced.
        self._in_flight: dict[Key, list[_OpenPage]] = {}
        # The same, of the newest reading that is not on its way.
        self._owed: dict[Key, list[_OpenPage]] = {}
        self._bytes = 0

    @property
    def keys(self) -> int:
        """Keys read and not yet acknowledged."""
        return len(self._waiting) + len(self._in_flight)

    @property
    def bytes(self) -> int:
        """Bytes of all readings that wait."""
        return self._bytes

    @property
    def idle(self) -> bool:
        return not self._pages

    @property
    def oldest_since(self) -> float | None:
        """When the oldest change that is not acknowledged was made, by the clock of those who add."""
        return self._pages[0].since if self._pages else None

    def add(self, end: Position, events: Iterable[Event], *, since: float) -> None:
        """A page's readings, at most one for each key, newer than all before; its oldest change was made at `since`."""
        page = _OpenPage(end, since)
        for event in events:
            key = event[:2]
            lane = self._behind if key in self._in_flight else self._waiting
            older = lane.get(key)
            self._bytes += len(event.text) - (len(older.text) if older is not None else 0)
            lane[key] = event
            self._owed.setdefault(key, []).append(page)
            page.left += 1
        self._pages.append(page)

    def take(self, most_keys: int, most_bytes: int) -> Sequence[Event]:
        """The oldest waiting readings, at least one if there is any; their keys are in flight from here on."""
        batch: list[Event] = []
        size = 0
        while self._waiting and len(batch) < most_keys:
            key, event = self._waiting.popitem(last=False)
            if batch and size + len(event.text) > most_bytes:
                self._waiting[key] = event
                self._waiting.move_to_end(key, last=False)
                break
            self._in_flight[key] = self._owed.pop(key)
            size += len(event.text)
            batch.append(event)
        self._bytes -= size
        return batch

    def settle(self, events: Iterable[Event]) -> None:
        """The outcome of these readings is known, and noted where it has to be."""
        for event in events:
            key = event[:2]
            for page in self._in_flight.pop(key):
                page.left -= 1
            if self._behind and (newer := self._behind.pop(key, None)) is not None:
                self._waiting[key] = newer

    def acknowledged(self) -> Position | None:
        """How far everything is acknowledged now, if that is further than at the last call."""
        end = None
        while self._pages and self._pages[0].left == 0:
            end = self._pages.popleft().end
        return end
