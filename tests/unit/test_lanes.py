"""The rules of the lanes, against random walks of a reader and a sender that answers late and in any order."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cdc_worker.documents import Event
from cdc_worker.lanes import Lanes
from cdc_worker.outbox import Position

KEYS = [(mirror, key) for mirror in (1, 2) for key in "abc"]
Reading = tuple[int, tuple[int, str]]


class LanesUnderWay(RuleBasedStateMachine):
    """What was read, what is in flight and what is settled, kept apart from the lanes' own books."""

    @initialize()
    def start(self) -> None:
        self.lanes = Lanes()
        self.page = 0
        self.keys_of_page: dict[int, list[tuple[int, str]]] = {}
        self.newest: dict[tuple[int, str], int] = {}
        self.in_flight: list[list[Event]] = []
        self.settled: dict[tuple[int, str], int] = {}
        self.acknowledged = 0

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=4))
    def read_a_page(self, keys: list[tuple[int, str]]) -> None:
        self.page += 1
        self.keys_of_page[self.page] = keys
        for key in keys:
            self.newest[key] = self.page
        events = [Event(mirror, key, b"%d" % self.page) for mirror, key in keys]
        self.lanes.add(Position(str(self.page)), events, since=float(self.page))

    @rule(most_keys=st.integers(1, 4), most_bytes=st.integers(1, 6))
    def take(self, most_keys: int, most_bytes: int) -> None:
        flying = {(event.mirror_id, event.key) for batch in self.in_flight for event in batch}
        could = [key for key, page in self.newest.items() if key not in flying and self.settled.get(key, 0) < page]
        batch = list(self.lanes.take(most_keys, most_bytes))
        assert bool(batch) == bool(could), "what waits is given out, and nothing else"
        assert len(batch) <= most_keys
        assert len(batch) == 1 or sum(len(event.text) for event in batch) <= most_bytes
        for event in batch:
            key = (event.mirror_id, event.key)
            assert key not in flying, "two in flight for one key"
            flying.add(key)
            assert int(event.text) == self.newest[key], "an older reading went out though there is a newer one"
        if batch:
            self.in_flight.append(batch)

    @precondition(lambda self: bool(self.in_flight))
    @rule(data=st.data())
    def settle(self, data: Any) -> None:
        batch = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        self.lanes.settle(batch)
        for event in batch:
            self.settled[event.mirror_id, event.key] = int(event.text)

    def _may_be_acknowledged(self) -> int:
        """The last page before the first that has a key whose reading, or a newer one, is not settled."""
        for page in range(1, self.page + 1):
            if any(self.settled.get(key, 0) < page for key in self.keys_of_page[page]):
                return page - 1
        return self.page

    @rule()
    def acknowledge(self) -> None:
        position = self.lanes.acknowledged()
        if position is None:
            return
        assert int(position.snapshot) > self.acknowledged, "said once"
        assert int(position.snapshot) <= self._may_be_acknowledged(), "acknowledged before it was settled"
        self.acknowledged = int(position.snapshot)

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "lanes"):
            return
        flying = {(event.mirror_id, event.key) for batch in self.in_flight for event in batch}
        waiting = {key for key, page in self.newest.items() if self._waits(key, page)}
        assert self.lanes.keys == len(waiting | flying)
        assert self.lanes.bytes == sum(len(str(self.newest[key])) for key in waiting)

    def _waits(self, key: tuple[int, str], page: int) -> bool:
        out = [int(e.text) for batch in self.in_flight for e in batch if (e.mirror_id, e.key) == key]
        return max([self.settled.get(key, 0), *out]) < page

    def teardown(self) -> None:
        """Nothing is lost: what was read comes out to the end, and all of it is acknowledged."""
        if not hasattr(self, "lanes"):
            return
        while True:
            for batch in self.in_flight:
                self.lanes.settle(batch)
                for event in batch:
                    self.settled[event.mirror_id, event.key] = int(event.text)
            self.in_flight = []
            if not (batch := list(self.lanes.take(3, 100))):
                break
            self.in_flight.append(batch)
        self.acknowledge()
        assert self.settled == self.newest
        assert self.acknowledged == self.page
        assert self.lanes.idle
        assert (self.lanes.keys, self.lanes.bytes) == (0, 0)


TestLanes = LanesUnderWay.TestCase
TestLanes.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def page(lanes: Lanes, number: int, *keys: str) -> None:
    lanes.add(Position(str(number)), [Event(1, key, b"%d" % number) for key in keys], since=0.0)


def test_the_newest_reading_wins_and_keeps_its_place() -> None:
    lanes = Lanes()
    page(lanes, 1, "a", "b")
    page(lanes, 2, "a")
    assert [(event.key, event.text) for event in lanes.take(9, 99)] == [("a", b"2"), ("b", b"1")]


def test_pages_without_keys_are_acknowledged_in_their_turn() -> None:
    lanes = Lanes()
    page(lanes, 1, "a")
    page(lanes, 2)
    assert lanes.acknowledged() is None
    lanes.settle(lanes.take(9, 99))
    assert lanes.acknowledged() == Position("2")
    assert lanes.acknowledged() is None


def test_a_key_that_changes_all_the_time_does_not_hold_up_the_position() -> None:
    # As the rule says: a page is acknowledged when its own reading is settled. A row that is written every few
    # milliseconds would otherwise keep the checkpoint where it is for ever, and the log from ever being emptied.
    lanes = Lanes()
    acknowledged = 0
    page(lanes, 1, "hot")
    for number in range(2, 50):
        batch = lanes.take(9, 99)
        page(lanes, number, "hot")
        lanes.settle(batch)
        if (position := lanes.acknowledged()) is not None:
            acknowledged = int(position.snapshot)
    assert acknowledged >= 40
