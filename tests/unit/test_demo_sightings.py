"""The demo's clock: which change counts as seen, and since when."""

from dev.demo.rows import Document, Slot
from dev.demo.sightings import Change, Sightings

NOTE: Slot = ("check-ins", "c1")
STATUS: Slot = ("status", "u1")
OLD: Document = {"userId": "u1", "description": "old"}
NEW: Document = {"userId": "u1", "description": "new"}


def change(effects: dict[Slot, Document | None], *, at: float) -> Change:
    return Change("CheckIn", "c1", "", 1, effects=effects, committed=at)


def test_a_change_is_seen_with_the_last_of_its_documents() -> None:
    seen: list[Change] = []
    sightings = Sightings(seen.append)
    both = change({NOTE: NEW, STATUS: {"userId": "u1"}}, at=10.0)
    sightings.committed(both)
    sightings.shown(set(), {NOTE: NEW}, 10.010)
    assert seen == []
    assert sightings.unseen == [both]
    sightings.shown(set(), {STATUS: {"userId": "u1"}}, 10.020)
    assert seen == [both]
    assert round(both.took_ms) == 20


def test_another_content_is_not_the_change() -> None:
    sightings = Sightings(lambda _: None)
    wanted = change({NOTE: NEW}, at=10.0)
    sightings.committed(wanted)
    sightings.shown(set(), {NOTE: OLD}, 10.010)
    assert sightings.unseen == [wanted]


def test_a_delete_is_seen_when_the_document_is_not_shown_any_more() -> None:
    seen: list[Change] = []
    sightings = Sightings(seen.append)
    sightings.shown(set(), {NOTE: OLD}, 9.0)
    gone = change({NOTE: None}, at=10.0)
    sightings.committed(gone)
    assert seen == []
    sightings.shown({NOTE}, {}, 10.005)
    assert seen == [gone]
    assert not gone.overtaken


def test_the_newest_state_settles_the_older_changes() -> None:
    seen: list[Change] = []
    sightings = Sightings(seen.append)
    first, second = change({NOTE: OLD}, at=10.0), change({NOTE: NEW}, at=10.001)
    sightings.committed(first)
    sightings.committed(second)
    sightings.shown(set(), {NOTE: NEW}, 10.010)
    assert seen == [first, second]
    assert (round(first.took_ms), round(second.took_ms)) == (10, 9)


def test_what_was_undone_before_it_could_be_seen_has_no_time() -> None:
    seen: list[Change] = []
    sightings = Sightings(seen.append)
    sightings.shown(set(), {NOTE: OLD}, 9.0)
    there, back = change({NOTE: NEW}, at=10.0), change({NOTE: OLD}, at=10.001)
    sightings.committed(there)
    sightings.committed(back)
    assert seen == [there, back]
    assert there.overtaken
    assert back.overtaken


def test_a_change_without_documents_is_not_waited_for() -> None:
    sightings = Sightings(lambda _: None)
    sightings.committed(change({}, at=10.0))
    assert sightings.unseen == []
