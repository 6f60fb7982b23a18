"""The comparison sees what is wrong, and calls it by its name."""

from typing import Any

from dev.chaos.application import Documents, Key
from dev.chaos.comparison import History, Kind, differences

KEY = ("notes", "n1")
X = {"userId": "u1", "type": "alert", "description": "x"}
Y = X | {"description": "y"}


def dump(content: dict[str, Any] | None, number: float = 1.0, times: int = 1) -> dict[str, list[dict[str, Any]]]:
    version = {"epoch": 1.0, "number": number}
    document = {**(content or {}), "key": "notes:n1", "version": version, "_id": "1", "_creationTime": 1.0}
    tombstones = [{"key": "notes:n1", "version": version}] if content is None else []
    return {"activities": [document] * (times if content else 0), "userStatus": [], "cdcTombstones": tombstones}


def kinds(history: History) -> list[str]:
    return [each.kind for each in history.check()]


def seen(*dumps: dict[str, list[dict[str, Any]]], states: tuple[dict[str, Any] | None, ...]) -> list[str]:
    history = History()
    for state in states:
        history.committed({} if state is None else {KEY: state})
    for each in dumps:
        history.saw(each)
    return kinds(history)


def test_at_rest() -> None:
    nothing: set[Key] = set()
    assert differences({KEY: X}, nothing, {KEY: X}, [], nothing) == []
    cases: list[tuple[Documents, set[Key], Documents, list[Key], set[Key], Kind]] = [
        ({KEY: X}, nothing, {}, [], nothing, "lost"),
        ({KEY: X}, nothing, {KEY: Y}, [], nothing, "lost"),
        ({}, nothing, {KEY: X}, [], nothing, "stale"),
        ({KEY: X}, nothing, {KEY: X}, [KEY], nothing, "doubled"),
        ({}, {KEY}, {KEY: X}, [], nothing, "lost"),
        ({KEY: X}, nothing, {KEY: X}, [], {KEY}, "misparked"),
    ]
    for wanted, unfit, found, doubled, parked, kind in cases:
        assert [each.kind for each in differences(wanted, unfit, found, doubled, parked)] == [kind]


def test_what_is_seen_follows_what_was_true() -> None:
    assert seen(dump(X), dump(Y, 2), dump(None, 3), states=(None, X, Y, None)) == []
    # What Convex does not show, nobody misses while it is played.
    assert seen(dump(Y, 2), states=(None, X, Y, X, Y)) == []
    assert seen(dump(X), dump(Y, 2), dump(X, 3), states=(None, X, Y)) == ["stale"]
    assert seen(dump(X), states=(None, Y)) == ["stale"]


def test_what_nobody_could_read_may_have_been_true() -> None:
    history = History()
    history.committed({KEY: X})
    history.committed({KEY: X}, ["notes"])
    history.committed({KEY: X})
    for number, content in enumerate((X, Y, X), start=1):
        history.saw(dump(content, number))
    assert kinds(history) == []
    # Only then, and only of that mirror.
    history.saw(dump(Y, 4))
    assert kinds(history) == ["stale"]
    other = History()
    other.committed({KEY: X}, ["visits"])
    other.saw(dump(Y))
    assert kinds(other) == ["stale"]


def test_a_version_never_falls() -> None:
    assert seen(dump(X, 2), dump(Y, 1), states=(None, X, Y)) == ["stale"]
    assert seen(dump(X, 2), dump(None, 1), states=(None, X, None)) == ["stale"]


def test_two_documents_are_seen() -> None:
    assert seen(dump(X, times=2), states=(None, X)) == ["doubled"]


def test_a_convex_that_was_emptied_may_begin_again() -> None:
    history = History()
    for state in (X, Y):
        history.committed({KEY: state})
    history.saw(dump(X, 5))
    history.emptied()
    history.saw({"activities": [], "userStatus": [], "cdcTombstones": []})
    history.saw(dump(Y, 1))
    assert kinds(history) == []
    history.saw(dump(X, 2))
    assert kinds(history) == ["stale"]
