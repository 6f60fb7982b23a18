"""Many schedules, played side by side: what was done in all, and what was found."""

import asyncio
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dev.chaos.comparison import Difference, Kind
from dev.chaos.schedule import Schedule
from dev.chaos.servers import probed_functions
from dev.chaos.world import Diverged, World
from dev.postgres_programs import Flavour

KINDS: Final[tuple[Kind, ...]] = ("lost", "doubled", "stale", "misparked", "stuck")
# Everything in a schedule has deadlines of its own; this is for one that we forgot.
_SCHEDULE_SECONDS = 180.0
# The local Convex never frees what its queries have returned.
_WORLD_SCHEDULES = 100

Case = tuple[str, Schedule]
"""A name to replay it by, and the schedule."""


@dataclass(frozen=True)
class Finding:
    """A schedule after which, or while which, Convex was not as Postgres."""

    name: str
    schedule: Schedule
    when: str
    found: list[Difference]
    # The ends of the workers' logs.
    story: str


@dataclass
class Result:
    schedules: int = 0
    findings: list[Finding] = field(default_factory=list)
    tally: "Counter[str]" = field(default_factory=Counter)
    # Failpoints that a worker has come by.
    passed: set[str] = field(default_factory=set)
    took_seconds: float = 0.0

    def count(self, kind: Kind) -> int:
        return sum(each.kind == kind for finding in self.findings for each in finding.found)


@dataclass(frozen=True)
class Campaign:
    flavour: Flavour
    # How many worlds there are at once.
    jobs: int = 1
    shards: int = 1
    # Whether the first finding is the last.
    stop: bool = False

    async def play(self, cases: Iterable[Case], progress: Callable[[Result], None] = lambda _: None) -> Result:
        """Plays all of them. `progress` is called after each."""
        result = Result()
        started = time.monotonic()
        left = iter(cases)
        with probed_functions() as functions:
            async with asyncio.TaskGroup() as lanes:
                for _ in range(self.jobs):
                    lanes.create_task(self._lane(left, functions, result, progress))
        result.took_seconds = time.monotonic() - started
        return result

    async def _lane(
        self, left: Iterator[Case], functions: Path, result: Result, progress: Callable[[Result], None]
    ) -> None:
        """World after world, until no case is left; one in which something was found is not used again."""
        while (case := self._next(left, result)) is not None:
            async with World(self.flavour, functions, shards=self.shards) as world:
                for count in range(1, _WORLD_SCHEDULES + 1):
                    finding = await _played(world, *case)
                    result.schedules += 1
                    if finding is not None:
                        result.findings.append(finding)
                    progress(result)
                    if finding is not None or count == _WORLD_SCHEDULES:
                        break
                    if (following := self._next(left, result)) is None:
                        break
                    case = following
                result.tally += world.tally
                result.passed |= world.workers.passed

    def _next(self, left: Iterator[Case], result: Result) -> Case | None:
        return None if self.stop and result.findings else next(left, None)


async def _played(world: World, name: str, schedule: Schedule) -> Finding | None:
    try:
        async with asyncio.timeout(_SCHEDULE_SECONDS):
            await world.play(schedule)
    except Diverged as error:
        return Finding(name, schedule, error.when, error.found, error.story)
    except Exception as error:  # noqa: BLE001  # one schedule must not end a night's run; it is a finding all the same
        stuck = Difference("stuck", f"it could not be played to its end: {error!r}\n{traceback.format_exc()}")
        return Finding(name, schedule, "while it was played", [stuck], world.workers.story())
    return None
