"""What may happen, as plain data: a schedule is a list of steps that prints as Python and is played by `World.play`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dev.chaos.link import Mode


@dataclass(frozen=True)
class Do:
    """A statement of the application (application.STATEMENTS). A writer's first statement begins its transaction."""

    writer: int
    statement: str
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Savepoint:
    writer: int


@dataclass(frozen=True)
class RollbackTo:
    """To the writer's last savepoint, if it has one."""

    writer: int


@dataclass(frozen=True)
class Commit:
    writer: int


@dataclass(frozen=True)
class Rollback:
    writer: int


@dataclass(frozen=True)
class Kill:
    """SIGKILL to the worker."""

    start: bool = True


@dataclass(frozen=True)
class Stop:
    """SIGTERM to the worker, and wait for its end."""

    start: bool = True


@dataclass(frozen=True)
class Start:
    """A worker, if none runs."""


@dataclass(frozen=True)
class Replace:
    """The worker falls asleep (SIGSTOP) for longer than its lease, and another takes over."""


@dataclass(frozen=True)
class Awake:
    """Whoever sleeps goes on where it was (SIGCONT), and knows nothing of what happened."""


@dataclass(frozen=True)
class Link:
    """The network between worker and Convex, from now on (link.Mode)."""

    mode: Mode


@dataclass(frozen=True)
class Replay:
    """Requests kept by the link run now: once more, or for the first time."""


@dataclass(frozen=True)
class Release:
    """Requests that the link holds go on."""


@dataclass(frozen=True)
class Reopen:
    """The worker's last `cdc:open` arrives once more: its epoch is no longer the shard's, and it has not been told."""


@dataclass(frozen=True)
class Pause:
    """A moment for what nobody sees: a page is read, the checkpoint is written."""


@dataclass(frozen=True)
class Reach:
    """Wait until the worker's next batch has come as far as the link lets it; a moment at the most."""


@dataclass(frozen=True)
class Settle:
    """Wait until all that is committed is acknowledged, if nothing stands in the way; a moment at the most."""


Step = (
    Do
    | Savepoint
    | RollbackTo
    | Commit
    | Rollback
    | Kill
    | Stop
    | Start
    | Replace
    | Awake
    | Link
    | Replay
    | Release
    | Reopen
    | Pause
    | Reach
    | Settle
)
Schedule = tuple[Step, ...]
WRITERS = 3


def printed(schedule: Iterable[Step]) -> str:
    """The schedule as Python, a step a line: to be read, and to be pasted into a test."""
    return "(\n" + "".join(f"    {step!r},\n" for step in schedule) + ")"
