"""Insisting: repeated until it is done, said once, and said again only as it lasts."""

import asyncio
import itertools
import math
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from cdc_worker import outage as outages
from cdc_worker import troubles
from cdc_worker.errors import FunctionFailed, Misconfigured, Transient
from cdc_worker.liveness import Liveness
from cdc_worker.outage import Outage
from cdc_worker.troubles import Troubles


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with capture_logs() as captured:
        yield captured


@pytest.fixture
def outage() -> Outage:
    return Outage(longest_pause_seconds=0.01, liveness=Liveness(60))


class Link:
    """Fails with each error in turn, then works."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    async def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def events(lines: list[Any]) -> list[str]:
    return [line["event"] for line in lines]


async def test_an_outage_is_said_when_it_begins_and_when_it_ends(outage: Outage, lines: list[Any]) -> None:
    assert await outage.insist(Link(*[Transient("no connection")] * 5)) == "done"
    assert events(lines) == ["convex.unreachable", "convex.recovered"]
    assert lines[1]["tries"] == 5


async def test_a_setting_that_is_wrong_is_an_error(outage: Outage, lines: list[Any]) -> None:
    await outage.insist(Link(Misconfigured("HTTP 401")))
    assert (lines[0]["event"], lines[0]["log_level"]) == ("convex.misconfigured", "error")
    # It does not go away by itself, as an outage does.
    assert "restart" in lines[0]["cure"]


async def test_a_failed_function_is_for_the_caller(outage: Outage) -> None:
    with pytest.raises(FunctionFailed):
        await outage.insist(Link(FunctionFailed("x")))


async def test_a_link_that_comes_and_goes_floods_no_log(outage: Outage, lines: list[Any]) -> None:
    for _ in range(40):
        await outage.insist(Link(Transient("no connection")))
    assert events(lines).count("convex.unreachable") < 8


async def test_an_outage_soon_after_another_is_said_if_it_lasts(
    outage: Outage, lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "_SILENCE_SECONDS", 0.2)
    await outage.insist(Link(Transient("no connection")))
    lasting = asyncio.Event()

    async def link() -> None:
        if not lasting.is_set():
            raise Transient("no connection")

    task = asyncio.create_task(outage.insist(link))
    for _ in range(500):
        if events(lines).count("convex.unreachable") == 2:
            break
        await asyncio.sleep(0.01)
    lasting.set()
    await task
    assert events(lines) == ["convex.unreachable", "convex.recovered"] * 2


HOURS = 24.0
LONGEST_SECONDS = 30.0


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        self.pauses: list[float] = []
        for module in (outages, troubles):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


# One alone comes to the tries at which a power of two is no float any more.
@pytest.mark.parametrize("in_flight", [1, 12])
@pytest.mark.parametrize("error", [Transient("no connection"), Misconfigured("HTTP 401")], ids=["away", "wrong key"])
async def test_hours_of_outage_are_a_line_in_five_minutes_and_one_try_in_half_a_minute(
    lines: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception, in_flight: int
) -> None:
    clock = Clock(monkeypatch)
    outage = Outage(longest_pause_seconds=LONGEST_SECONDS, liveness=Liveness(math.inf))
    monkeypatch.setattr(outage, "_sleep", clock.sleep)
    until = clock.now + HOURS * 3600

    async def link() -> str:
        if clock.now < until:
            raise error
        return "done"

    assert await asyncio.gather(*(outage.insist(link) for _ in range(in_flight))) == ["done"] * in_flight
    said = lines[:-1]
    assert HOURS * 3600 / (outages._REMINDER_SECONDS + LONGEST_SECONDS) <= len(said) <= HOURS * 12 + 1
    gaps = [later["since_seconds"] - earlier["since_seconds"] for earlier, later in pairwise(said)]
    assert all(outages._REMINDER_SECONDS - 1 <= gap <= outages._REMINDER_SECONDS + LONGEST_SECONDS for gap in gaps)
    assert lines[-1]["event"] == "convex.recovered"
    assert lines[-1]["after_seconds"] >= HOURS * 3600
    # It never waits for longer, and never gives up.
    assert max(clock.pauses) <= LONGEST_SECONDS
    assert sum(pause > LONGEST_SECONDS / 2 for pause in clock.pauses) > len(clock.pauses) / 3


@pytest.mark.parametrize("names", [("database.unreachable",), ("database.unreachable", "database.not_ready")])
def test_hours_without_postgres_are_a_line_in_five_minutes_for_each_way_in_which_it_shows(
    lines: list[Any], monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    clock = Clock(monkeypatch)
    trouble = Troubles(LONGEST_SECONDS)
    pauses = []
    for name in itertools.cycle(names):
        pauses.append(trouble.note(name, "no connection"))
        clock.now += pauses[-1]
        if clock.now > 1_000 + HOURS * 3600:
            break
    for name in names:
        assert HOURS * 10 < events(lines).count(name) <= HOURS * 12 + 1
    assert 0 < max(pauses) <= LONGEST_SECONDS
    assert max(pauses[:3]) < 2
    trouble.say_recovered()
    assert events(lines)[-1] == "database.recovered"
    # The next outage is said at once.
    trouble.note(names[0], "no connection")
    assert events(lines)[-1] == names[0]
