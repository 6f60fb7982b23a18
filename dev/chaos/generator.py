"""Random schedules, each from its seed alone: small domains, so that what is random still meets.

A schedule is made of moves. Most are a step or a transaction; some are scenes, a few steps which, left to chance, would
come together once in a million: a content that goes there and back while a request is lost, a worker that dies
at a given step of its work. Each schedule leaves out about half of the faults, so that those that remain meet quietly.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from dev.chaos.failpoints import POINTS
from dev.chaos.network import POISON, Mode
from dev.chaos.schedule import (
    WRITERS,
    Arm,
    Awake,
    Beside,
    Commit,
    Convex,
    Divide,
    Do,
    Hit,
    Kill,
    KillWriter,
    Link,
    Pause,
    Postgres,
    Reach,
    Release,
    Reopen,
    Replace,
    Replay,
    Rollback,
    RollbackTo,
    Rotate,
    Savepoint,
    Schedule,
    Server,
    Settle,
    Start,
    Step,
    Stop,
    Wire,
)

_FAULT_IS_IN = 0.5
_FEWEST_MOVES, _MOST_MOVES = 6, 24

_NOTES: Final = ("n1", 'n:"2"\\~{', "")
_USERS: Final = ("u1", "ü:2")
_PLACES: Final = ("a", 'b",\\"é')
_NUMBERS: Final = (1, -2)
_KINDS: Final = ("check-in", "alert", "conversation", "check-in", "alert", "of no known type")
_BODIES: Final = ("x", "y", None, "~{\u2028")
_REMARKS: Final = ("x", "y", "x", "y", "x", POISON)
_TIMES: Final = ("2020-03-08 02:30:00", "2024-02-29 23:59:59.999999", "1969-12-31 23:59:59.9999", "0999-01-01")
_DATES: Final = ("2020-03-08", None, "1900-01-01")
_LEVELS: Final = ("L1", "L2", "L4")
_METADATA: Final = (
    None,
    "null",
    '{"a": 1}',
    '{"$a": {"ключ": 9007199254740993, "": "~{7e}"}, "_id": 0.1}',
    "[1e400, -0.0, 12345678901234567890.5, 5]",
    "[" * 20 + "1" + "]" * 20,
    '"~{json}1"',
    '{"' + "k" * 1_030 + '": "\\ud83d\\ude00"}',
)
# The type json keeps what jsonb refuses.
_RAW: Final = (*_METADATA, '"\\u0000 \\ud800"', '{"a": 1, "a": 2}')

_ZONED: Final = tuple(f"{time}+05:30" for time in _TIMES)
_NOTE_COLUMNS: Final[Sequence[Sequence[Any]]] = (_NOTES, _USERS, _KINDS, _BODIES, _TIMES, _METADATA)

# What each value of a statement is taken from.
_VALUES: Final[Mapping[str, Sequence[Sequence[Any]]]] = {
    "put_note": _NOTE_COLUMNS,
    "add_note": _NOTE_COLUMNS,
    "add_note_or_not": _NOTE_COLUMNS,
    "edit_note": (_BODIES, _NOTES),
    "edit_notes": (_BODIES,),
    "drop_note": (_NOTES,),
    "move_note": (_NOTES, _NOTES),
    "merge_note": (_NOTES, _BODIES, _KINDS),
    "give_notes_away": (_USERS, _USERS),
    "fill_notes": (_USERS, _BODIES),
    "put_visit": (_PLACES, _NUMBERS, _USERS, _REMARKS, _ZONED, _RAW),
    "move_visit": (_PLACES, _NUMBERS, _PLACES, _NUMBERS),
    "hand_over_visits": (_USERS, _USERS),
    "drop_visits": (_PLACES,),
    "put_member": (_USERS, (None, *_ZONED), _DATES),
    "move_member": (_USERS, _USERS),
    "drop_member": (_USERS,),
    "put_alert": (_NUMBERS, _USERS, _LEVELS, _TIMES, (True, False)),
    "close_alerts": (_USERS,),
    "drop_alerts": (_USERS,),
}
# How often each statement comes.
_STATEMENTS: Final = {
    "put_note": 6,
    "add_note": 1,
    "add_note_or_not": 1,
    "edit_note": 4,
    "edit_notes": 2,
    "touch_notes": 1,
    "move_note": 1,
    "drop_note": 3,
    "merge_note": 2,
    "copy_notes": 1,
    "give_notes_away": 1,
    "fill_notes": 1,
    "drop_filled_notes": 1,
    "put_visit": 3,
    "see_visits": 1,
    "move_visit": 1,
    "hand_over_visits": 1,
    "drop_visits": 1,
    "put_member": 2,
    "move_member": 1,
    "drop_member": 1,
    "put_alert": 2,
    "close_alerts": 1,
    "drop_alerts": 1,
}
# Not "clear": "ghost" is the same to the worker, and keeps what the end of a schedule plays once more.
_MODES: Final[dict[Mode, int]] = {
    "ghost": 6,
    "lose": 5,
    "hold": 4,
    "mute": 3,
    "double": 2,
    "drip": 1,
    "503": 2,
    "429": 1,
    "500": 2,
    "400": 1,
    "401": 1,
    "403": 1,
    "404": 1,
    "408": 1,
    "page": 1,
    "garbage": 1,
    "paused": 2,
    "refused": 1,
}


def schedule_of(seed: int) -> Schedule:
    """The schedule of this seed: the same on every machine."""
    return _Maker(random.Random(seed)).schedule()  # noqa: S311  # nothing secret


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._one = chance.choice

    def schedule(self) -> Schedule:
        moves = {**self._ordinary(), **self._scenes()}
        moves |= {name: move for name, move in self._faults().items() if self._chance.random() < _FAULT_IS_IN}
        weights = [weight for _, weight in moves.values()]
        count = self._chance.randint(_FEWEST_MOVES, _MOST_MOVES)
        made = [make() for make, _ in self._chance.choices(list(moves.values()), weights, k=count)]
        for make, likelihood in self._dear():
            if self._chance.random() < likelihood:
                made.insert(self._chance.randrange(len(made) + 1), make())
        return (Link("ghost"), *(step for move in made for step in move))

    # Moves, each with how often it comes.

    def _ordinary(self) -> dict[str, "_Move"]:
        return {
            "statement": (lambda: [self._do(self._writer())], 8),
            "transaction": (self._transaction, 8),
            "commit": (lambda: [Commit(self._writer())], 4),
            "rollback": (lambda: [Rollback(self._writer())], 1),
            "savepoint": (lambda: [Savepoint(self._writer())], 1),
            "rollback to": (lambda: [RollbackTo(self._writer())], 1),
            "truncate": (self._truncate, 1),
            "reach": (lambda: [Reach()], 1),
            "settle": (lambda: [Settle()], 2),
            "pause": (lambda: [Pause()], 1),
            "start": (lambda: [Start()], 1),
        }

    def _faults(self) -> dict[str, "_Move"]:
        return {
            "link": (lambda: [Link(self._mode())], 5),
            "replay": (lambda: [Replay()], 1),
            "release": (lambda: [Release(self._one(("first", "last")))], 2),
            "reopen": (lambda: [Reopen()], 1),
            "kill": (lambda: [Kill(self._chance.random() < 0.7)], 2),
            "stop": (lambda: [Stop(self._chance.random() < 0.7)], 1),
            "replace": (lambda: [Replace()], 1),
            "awake": (lambda: [Awake()], 1),
            "beside": (lambda: [Beside()], 1),
            "kill writer": (lambda: [KillWriter(self._writer())], 1),
            "wire": (self._wire, 2),
            "terminate": (lambda: [Postgres("terminate")], 1),
            "rotate": (lambda: [Rotate()], 1),
            "empty": (lambda: [Convex("empty")], 1),
            "hang": (self._hang, 1),
            "failpoint": (self._failpoint, 4),
        }

    def _scenes(self) -> dict[str, "_Move"]:
        return {
            "late commit": (self._late_commit, 1),
            "there and back": (self._there_and_back, 2),
            "gone": (self._gone, 1),
            "newer behind": (self._newer_behind, 1),
            "unfit": (self._unfit, 1),
            "unknown epoch": (self._unknown_epoch, 1),
        }

    def _dear(self) -> list[tuple[Callable[[], list[Step]], float]]:
        """What costs a second or more, and how many schedules have it."""
        return [
            (lambda: [Postgres(self._one(("immediate", "fast")))], 0.06),
            (lambda: [Convex("kill"), *self._transaction(), Convex("start")], 0.03),
            (lambda: [*self._transaction(), Wire(self._one(("postgres", "convex")), "forget")], 0.03),
            (lambda: [*self._transaction()[:-1], Divide(self._one((1, 2, 3)))], 0.05),
        ]

    # The application.

    def _writer(self) -> int:
        return self._chance.randrange(WRITERS)

    def _do(self, writer: int, statement: str | None = None) -> Do:
        name = statement or self._chance.choices(list(_STATEMENTS), list(_STATEMENTS.values()))[0]
        return Do(writer, name, self._values(name))

    def _values(self, statement: str) -> tuple[Any, ...]:
        if statement == "copy_notes":
            names = self._chance.sample(range(5), 3)
            return tuple((f"c{number}", *self._each(_NOTE_COLUMNS[1:])) for number in names)
        if statement == "drop_filled_notes":
            return ([f"f{number}" for number in self._chance.sample(range(1, 13), 3)],)
        return self._each(_VALUES.get(statement, ()))

    def _each(self, columns: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        return tuple(self._one(column) for column in columns)

    def _transaction(self) -> list[Step]:
        """At once, and the worker gets to see it: without such ones nothing would ever be half delivered."""
        statements = [self._do(0) for _ in range(self._chance.randint(1, 3))]
        return [*statements, Commit(0), self._one((Reach(), Settle()))]

    def _truncate(self) -> list[Step]:
        return [Do(self._writer(), self._one(("truncate_notes", "truncate_visits", "truncate_alerts")))]

    # Faults.

    def _mode(self) -> Mode:
        return self._chance.choices(list(_MODES), list(_MODES.values()))[0]

    def _wire(self) -> list[Step]:
        to: Server = self._one(("postgres", "convex"))
        match self._one(("cut", "cut", "slow", "deaf")):
            case "cut":
                return [Wire(to, "cut")]
            case "slow":
                return [Wire(to, "slow"), *self._transaction(), Wire(to, "normal")]
            case _:
                return [Wire(to, "deaf"), *self._transaction(), Wire(to, "normal")]

    def _hang(self) -> list[Step]:
        return [Convex("hang"), *self._transaction(), Convex("resume")]

    def _failpoint(self) -> list[Step]:
        name = self._one(list(POINTS))
        act = self._one([act for act in POINTS[name].acts for _ in range(2 if act in {"kill", "freeze"} else 1)])
        steps: list[Step] = [Arm(name, self._one((1, 1, 2, 3)), act)]
        # What leads there, if an ordinary transaction does not.
        if name.startswith("lease"):
            steps.append(Stop() if "released" in name else Postgres("terminate"))
        elif name.startswith("epoch"):
            steps.append(Reopen())
        elif name.startswith("partition"):
            steps.append(Rotate())
        elif "rescan" in name:
            steps.append(Do(0, "truncate_visits"))
        elif "park" in name:
            steps.append(Do(0, "put_note", (self._one(_NOTES), "u1", "of no known type", "x", "2020-01-01", None)))
        steps += [*self._transaction()[:-1], Hit()]
        return steps if act != "freeze" else [*steps, *self._transaction(), Awake()]

    # Scenes.

    def _put(self, note: str, body: str, kind: str = "check-in") -> Do:
        return Do(0, "put_note", (note, "u1", kind, body, "2020-01-01", None))

    def _late_commit(self) -> list[Step]:
        """The id is taken, and the commit comes when a higher one was read long ago."""
        late, early = self._chance.sample(range(WRITERS), 2)
        return [self._do(late, "put_note"), self._do(early, "put_visit"), Commit(early), Settle(), Commit(late)]

    def _there_and_back(self) -> list[Step]:
        """The outcome of "y" is not known when the row is "x" again: what Convex holds already, at an older version."""
        note = self._one(_NOTES)
        steps: list[Step] = [Link("ghost"), self._put(note, "x"), Commit(0), Settle(), Link("lose")]
        steps += [Do(0, "edit_note", ("y", note)), Commit(0), Reach()]
        another = self._chance.random() < 0.4
        if another:
            steps.append(Kill(start=False))
        steps += [Do(0, "edit_note", ("x", note)), Commit(0)]
        return [*steps, *([] if another else [Pause()]), Link("ghost"), Start(), Settle()]

    def _gone(self) -> list[Step]:
        """What the network keeps of a row that is gone, and of one that is another now."""
        note, other = self._chance.sample(_NOTES, 2)
        steps: list[Step] = [Link("ghost"), self._put(note, "x"), self._put(other, "x"), Commit(0), Settle()]
        steps += [Do(0, "edit_note", ("y", note)), Do(0, "drop_note", (other,)), Commit(0), Settle()]
        return [*steps, Replay()] if self._chance.random() < 0.3 else steps

    def _newer_behind(self) -> list[Step]:
        """What is on its way is delivered when newer has been read, and the worker dies before that is."""
        note = self._one(_NOTES)
        steps: list[Step] = [Link("hold"), self._put(note, "y"), Commit(0), Reach(), Link("lose")]
        steps += [self._put(note, "z"), Commit(0), Pause(), Release(), Pause()]
        return [*steps, Kill(), Link("ghost")]

    def _unfit(self) -> list[Step]:
        """A row of which no document can be made, and which is mended or not."""
        note = self._one(_NOTES)
        steps: list[Step] = [Link("ghost"), self._put(note, "x", "of no known type"), Commit(0), Settle()]
        return [*steps, self._put(note, "x"), Commit(0), Settle()] if self._chance.random() < 0.5 else steps

    def _unknown_epoch(self) -> list[Step]:
        """Convex gives the shard another epoch, and nobody tells the worker; it may have been emptied just before."""
        note = self._one(_NOTES)
        emptied: list[Step] = [Convex("empty")] if self._chance.random() < 0.3 else []
        return [
            self._put(note, "x"),
            Commit(0),
            Settle(),
            *emptied,
            Reopen(),
            self._put(self._one(_NOTES), "y"),
            Commit(0),
            Reach(),
        ]


_Move = tuple[Callable[[], list[Step]], int]
