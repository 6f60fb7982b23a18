"""Random schedules, as Hypothesis makes them: small domains, so that what is random still meets."""

from typing import Any, Final

from hypothesis import strategies as st

from dev.chaos.link import Mode
from dev.chaos.schedule import (
    WRITERS,
    Awake,
    Commit,
    Do,
    Kill,
    Link,
    Pause,
    Reach,
    Release,
    Reopen,
    Replace,
    Replay,
    Rollback,
    RollbackTo,
    Savepoint,
    Schedule,
    Settle,
    Start,
    Step,
    Stop,
)

_NOTES = st.sampled_from(["n1", 'n:"2"\\~{', ""])
_USERS = st.sampled_from(["u1", "ü:2"])
_PLACES = st.sampled_from(["a", 'b",\\"é'])
_NUMBERS = st.sampled_from([1, -2])
_KINDS = st.sampled_from(["check-in", "alert", "conversation", "check-in", "alert", "of no known type"])
_BODIES = st.sampled_from(["x", "y", None, "~{\u2028"])
_REMARKS = st.sampled_from(["x", "y"])
_TIMES = st.sampled_from(
    ["2020-03-08 02:30:00", "2024-02-29 23:59:59.999999", "1969-12-31 23:59:59.9999", "0999-01-01"]
)
_ZONED = _TIMES.map(lambda time: f"{time}+05:30")
_DATES = st.sampled_from(["2020-03-08", None, "1900-01-01"])
_LEVELS = st.sampled_from(["L1", "L2", "L4"])
_METADATA = st.sampled_from(
    [
        None,
        "null",
        '{"a": 1}',
        '{"$a": {"ключ": 9007199254740993, "": "~{7e}"}, "_id": 0.1}',
        "[1e400, -0.0, 12345678901234567890.5, 5]",
        "[" * 20 + "1" + "]" * 20,
        '"~{json}1"',
        '{"' + "k" * 1_030 + '": "\\ud83d\\ude00"}',
    ]
)
# The type json keeps what jsonb refuses.
_RAW = _METADATA | st.sampled_from(['"\\u0000 \\ud800"', '{"a": 1, "a": 2}'])

_VALUES: Final[dict[str, st.SearchStrategy[tuple[Any, ...]]]] = {
    "put_note": st.tuples(_NOTES, _USERS, _KINDS, _BODIES, _TIMES, _METADATA),
    "edit_note": st.tuples(_BODIES, _NOTES),
    "edit_notes": st.tuples(_BODIES),
    "drop_note": st.tuples(_NOTES),
    "move_note": st.tuples(_NOTES, _NOTES),
    "touch_notes": st.just(()),
    "add_note": st.tuples(_NOTES, _USERS, _KINDS, _BODIES, _TIMES, _METADATA),
    "put_visit": st.tuples(_PLACES, _NUMBERS, _USERS, _REMARKS, _ZONED, _RAW),
    "move_visit": st.tuples(_PLACES, _NUMBERS, _PLACES, _NUMBERS),
    "hand_over_visits": st.tuples(_USERS, _USERS),
    "drop_visits": st.tuples(_PLACES),
    "see_visits": st.just(()),
    "put_member": st.tuples(_USERS, _ZONED | st.none(), _DATES),
    "move_member": st.tuples(_USERS, _USERS),
    "drop_member": st.tuples(_USERS),
    "put_alert": st.tuples(_NUMBERS, _USERS, _LEVELS, _TIMES, st.booleans()),
    "close_alerts": st.tuples(_USERS),
    "drop_alerts": st.tuples(_USERS),
}
# How often, where not once.
_OFTEN = {
    "put_note": 6,
    "edit_note": 3,
    "edit_notes": 2,
    "drop_note": 2,
    "put_visit": 3,
    "put_member": 2,
    "put_alert": 2,
}

_WRITER = st.integers(0, WRITERS - 1)
_STATEMENT = st.sampled_from([name for name in _VALUES for _ in range(_OFTEN.get(name, 1))])
_DO = st.builds(
    lambda writer, named: Do(writer, *named),
    _WRITER,
    _STATEMENT.flatmap(lambda name: st.tuples(st.just(name), _VALUES[name])),
)
# Not "clear": "ghost" is the same to the worker, and keeps what the end of a schedule plays once more.
_MODES: Final[list[Mode]] = ["ghost", "lose", "ghost", "hold", "ghost", "mute", "refuse"]


def _one(step: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Step]]:
    return step.map(lambda made: [made])


def _transaction(statements: list[Do], wait: Step) -> list[Step]:
    return [*(Do(0, do.statement, do.values) for do in statements), Commit(0), wait]


# A transaction at once, and the worker gets to see it: without such ones nothing would ever be half delivered.
_SEEN = st.builds(_transaction, st.lists(_DO, min_size=1, max_size=3), st.sampled_from([Reach(), Settle()]))
_MOVES: Final[list[tuple[int, st.SearchStrategy[list[Step]]]]] = [
    (8, _one(_DO)),
    (1, _one(st.builds(Do, _WRITER, st.sampled_from(["truncate_notes", "truncate_visits", "truncate_alerts"])))),
    (8, _SEEN),
    (4, _one(st.builds(Commit, _WRITER))),
    (1, _one(st.builds(Rollback, _WRITER))),
    (1, _one(st.builds(Savepoint, _WRITER))),
    (1, _one(st.builds(RollbackTo, _WRITER))),
    (1, st.just([Reach()])),
    (2, st.just([Settle()])),
    (4, _one(st.builds(Link, st.sampled_from(_MODES)))),
    (1, st.just([Replay()])),
    (2, st.just([Release()])),
    (1, st.just([Reopen()])),
    (1, st.just([Pause()])),
    (2, _one(st.builds(Kill, st.sampled_from([True, True, False])))),
    (1, _one(st.builds(Stop, st.sampled_from([True, True, False])))),
    (1, st.just([Start()])),
    (1, st.just([Replace()])),
    (1, st.just([Awake()])),
]


def schedules(*, most_moves: int = 30) -> st.SearchStrategy[Schedule]:
    """Schedules of up to so many moves; a move is one step, or a few that belong together."""
    weighted = [move for weight, move in _MOVES for _ in range(weight)]
    return st.lists(st.sampled_from(weighted).flatmap(lambda move: move), min_size=8, max_size=most_moves).map(
        lambda moves: (Link("ghost"), *(step for move in moves for step in move))
    )
