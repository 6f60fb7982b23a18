"""What may happen, as plain data: a schedule is a list of steps that prints as Python and is played by `World.play`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from dev.chaos.failpoints import Act
from dev.chaos.network import Mode, Order

Server = Literal["postgres", "convex"]
WRITERS = 3

# The application: three processes that write.


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
class KillWriter:
    """SIGKILL, in the middle of whatever transaction it has."""

    writer: int


# The worker. "The" worker is the one that has run for longest and is awake.


@dataclass(frozen=True)
class Kill:
    """SIGKILL to the worker."""

    start: bool = True


@dataclass(frozen=True)
class Stop:
    """SIGTERM to the worker, and wait for its end: a deploy."""

    start: bool = True


@dataclass(frozen=True)
class Start:
    """As many workers as there should be, if fewer run."""


@dataclass(frozen=True)
class Beside:
    """One worker more than there should be."""


@dataclass(frozen=True)
class Replace:
    """The worker falls asleep (SIGSTOP) for longer than its lease, and another takes over."""


@dataclass(frozen=True)
class Divide:
    """The keys are divided into another number of shards while the workers run, which are then replaced: a deploy."""

    shards: int


@dataclass(frozen=True)
class Awake:
    """Whoever sleeps goes on where it was (SIGCONT), and knows nothing of what happened."""


@dataclass(frozen=True)
class Arm:
    """The worker's next passages of a failpoint are counted, and at this one it acts (failpoints.POINTS)."""

    point: str
    passage: int
    act: Act


@dataclass(frozen=True)
class Hit:
    """Wait until an armed failpoint has acted; a moment at the most."""


# The two links.


@dataclass(frozen=True)
class Link:
    """What happens to requests between worker and Convex, from now on (network.Mode)."""

    mode: Mode


@dataclass(frozen=True)
class Replay:
    """Requests kept by the network run now: once more, or for the first time."""


@dataclass(frozen=True)
class Release:
    """Requests that the network holds go on, one after the other."""

    order: Order = "first"


@dataclass(frozen=True)
class Reopen:
    """The worker's last `cdc:open` arrives once more: its epoch is no longer the shard's, and it has not been told."""


@dataclass(frozen=True)
class Wire:
    """The TCP link from the worker to one of its servers, from now on (dev/link.py)."""

    to: Server
    state: Literal["cut", "deaf", "forget", "slow", "normal"]


# The servers.


@dataclass(frozen=True)
class Postgres:
    """Crash and recovery, an orderly restart, or the end of all connections of the worker."""

    fault: Literal["immediate", "fast", "terminate"]


@dataclass(frozen=True)
class Convex:
    """Killed until it is started again (with nothing in it), stopped until it is resumed, or emptied at once."""

    fault: Literal["kill", "start", "hang", "resume", "empty"]


@dataclass(frozen=True)
class Rotate:
    """The log's present partition is old: the worker may turn to the next one, and truncate it."""


# Waiting.


@dataclass(frozen=True)
class Pause:
    """A moment for what nobody sees: a page is read, the checkpoint is written."""


@dataclass(frozen=True)
class Reach:
    """Wait until the worker's next batch has come as far as the network lets it; a moment at the most."""


@dataclass(frozen=True)
class Settle:
    """Wait until all that is committed is acknowledged, if nothing stands in the way; a moment at the most."""


Write = Do | Savepoint | RollbackTo | Commit | Rollback | KillWriter
Supervise = Kill | Stop | Start | Beside | Replace | Divide | Awake | Arm
Disturb = Link | Replay | Release | Reopen | Wire
Serve = Postgres | Convex | Rotate
Wait = Pause | Reach | Settle | Hit
Step = Write | Supervise | Disturb | Serve | Wait
Schedule = tuple[Step, ...]


def printed(schedule: Iterable[Step]) -> str:
    """The schedule as Python, a step a line: to be read, and to be pasted into a test."""
    return "(\n" + "".join(f"    {step!r},\n" for step in schedule) + ")"
