"""Schedules that were written down: each is the smallest that shows what a part of the protocol is for.

The generator makes their like by itself (scenes); these are what to read first, and what fails first.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from dev.chaos.schedule import (
    Awake,
    Commit,
    Convex,
    Do,
    Kill,
    Link,
    Pause,
    Reach,
    Release,
    Reopen,
    Replace,
    Rollback,
    RollbackTo,
    Savepoint,
    Schedule,
    Settle,
    Start,
)

_NOTE: Final = ("n1", "u1", "check-in", "x", "2020-01-01", '{"$a": 1}')
_OTHER: Final = ("n2", "u1", "alert", "x", "2020-01-01", None)

# The id is taken, and the commit comes when a higher one was read long ago.
_LATE_COMMIT: Final[Schedule] = (
    Do(0, "put_note", _NOTE),
    Do(1, "put_note", _OTHER),
    Commit(1),
    Settle(),
    Commit(0),
)
# At the end of a schedule what the link has kept comes once more: a content that is no longer true, and a row that is
# gone.
_LATE_GHOSTS: Final[Schedule] = (
    Link("ghost"),
    Do(0, "put_note", _NOTE),
    Do(0, "put_note", _OTHER),
    Commit(0),
    Settle(),
    Do(0, "edit_note", ("y", "n1")),
    Do(0, "drop_note", ("n2",)),
    Commit(0),
    Settle(),
)
# The outcome of "y" is not known when the row is "x" again: what Convex holds already, at an older version than of "y".
_THERE_AND_BACK: Final[Schedule] = (
    Link("ghost"),
    Do(0, "put_note", _NOTE),
    Commit(0),
    Settle(),
    Link("lose"),
    Do(0, "edit_note", ("y", "n1")),
    Commit(0),
    Reach(),
    Do(0, "edit_note", ("x", "n1")),
    Commit(0),
    Pause(),
    Link("ghost"),
    Settle(),
)
# The same, and it is another worker that sees the "x".
_THERE_AND_BACK_IN_ANOTHER_EPOCH: Final[Schedule] = (
    Link("ghost"),
    Do(0, "put_note", _NOTE),
    Commit(0),
    Settle(),
    Link("lose"),
    Do(0, "edit_note", ("y", "n1")),
    Commit(0),
    Reach(),
    Kill(start=False),
    Do(0, "edit_note", ("x", "n1")),
    Commit(0),
    Link("ghost"),
    Start(),
    Settle(),
)
# A row that no document can be made of, and one that could not and now can.
_UNFIT: Final[Schedule] = (
    Do(0, "put_note", ("n1", "u1", "of no known type", "x", "2020-01-01", None)),
    Do(0, "put_note", ("", "u1", "of no known type", "x", "2020-01-01", None)),
    Commit(0),
    Settle(),
    Do(0, "put_note", _NOTE),
    Commit(0),
    Settle(),
)
# "y" is delivered when "z" has been read, and the worker dies before that is.
_NEWER_BEHIND: Final[Schedule] = (
    Do(0, "put_note", _NOTE),
    Commit(0),
    Settle(),
    Link("hold"),
    Do(0, "edit_note", ("y", "n1")),
    Commit(0),
    Reach(),
    Link("lose"),
    Do(0, "edit_note", ("z", "n1")),
    Commit(0),
    Pause(),
    Release(),
    Pause(),
    Kill(),
)
# Convex gives the shard another epoch, and nobody tells the worker.
_UNKNOWN_EPOCH: Final[Schedule] = (
    Do(0, "put_note", _NOTE),
    Commit(0),
    Settle(),
    Reopen(),
    Do(0, "edit_note", ("y", "n1")),
    Commit(0),
    Reach(),
)
# A deployment is emptied, and the first that it hears is the reader's own `cdc:open` of long ago: what it lacks is sent
# by a reader only who learns that it is another one.
_EMPTIED: Final[Schedule] = (
    Do(0, "put_note", _NOTE),
    Commit(0),
    Settle(),
    Convex("empty"),
    Reopen(),
    Do(0, "put_note", _OTHER),
    Commit(0),
    Reach(),
)
# A transaction of which only a part remains, and a worker that sleeps through another's work.
_SLEEPER: Final[Schedule] = (
    Link("ghost"),
    Do(0, "put_note", _NOTE),
    Savepoint(0),
    Do(0, "put_note", _OTHER),
    RollbackTo(0),
    Do(1, "put_member", ("u1", None, "2020-02-29")),
    Rollback(1),
    Do(2, "put_visit", ('b",é', 1, "u1", "x", "2020-01-01 00:00:00Z", '"\\u0000 \\ud800"')),
    Commit(0),
    Reach(),
    Replace(),
    Commit(2),
    Settle(),
    Do(0, "move_note", ("n2", "n1")),
    Commit(0),
    Awake(),
)

WRITTEN: Final[Mapping[str, Schedule]] = MappingProxyType(
    {
        "late commit": _LATE_COMMIT,
        "late ghosts": _LATE_GHOSTS,
        "there and back": _THERE_AND_BACK,
        "there and back in another epoch": _THERE_AND_BACK_IN_ANOTHER_EPOCH,
        "unfit": _UNFIT,
        "newer behind": _NEWER_BEHIND,
        "unknown epoch": _UNKNOWN_EPOCH,
        "emptied": _EMPTIED,
        "sleeper": _SLEEPER,
    }
)
