"""The failpoints fit the worker, and are passed when it does its ordinary work; so that none rots without a word."""

from pathlib import Path

import pytest

from dev.chaos import world as worlds
from dev.chaos.failpoints import POINTS, Failpoints, Point
from dev.chaos.quick import CONSTANTS, make_quick
from dev.chaos.schedule import Commit, Do, Rotate, Schedule, Settle, Start, Stop
from dev.chaos.servers import probed_functions
from dev.chaos.world import World
from dev.postgres_programs import flavours

# Everything that a worker does: a rescan, a key that is parked and settled, a rotation, an end.
_ORDINARY: Schedule = (
    Do(0, "put_note", ("n1", "u1", "of no known type", "x", "2020-01-01", None)),
    Do(0, "put_visit", ("a", 1, "u1", "x", "2020-01-01 00:00:00Z", None)),
    Commit(0),
    Settle(),
    Do(0, "put_note", ("n1", "u1", "alert", "x", "2020-01-01", None)),
    Do(0, "truncate_visits"),
    Commit(0),
    Settle(),
    Rotate(),
    Stop(),
    Start(),
    Settle(),
    Stop(start=False),
)


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_each_failpoint_is_passed_by_ordinary_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # All of it is done, however long it takes: a schedule goes on after a moment.
    monkeypatch.setattr(worlds, "_SETTLE_SECONDS", 60.0)
    with probed_functions() as functions:
        async with World(next(iter(flavours())), functions) as world:
            await world.play(_ORDINARY)
    assert world.workers.passed == set(POINTS)


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_each_failpoint_is_at_a_function_of_the_worker(point: Point) -> None:
    holder, name = point.place()
    assert callable(getattr(holder, name))


@pytest.mark.parametrize("place", CONSTANTS)
def test_each_quickened_wait_is_one_of_the_worker(place: str) -> None:
    module, name = place.split(".")
    source = Path(__file__).parents[2] / f"cdc_worker/{module}.py"
    assert f"\n{name} = " in source.read_text()


async def test_an_armed_failpoint_acts_at_its_passage_and_once() -> None:
    reports: list[tuple[str, str]] = []
    failpoints = Failpoints(reports.append)
    calls: list[int] = []

    async def step(number: int) -> int:
        calls.append(number)
        return number

    point = Point("module", "step", "before", lambda: ValueError("armed"))
    around = failpoints._around(step, "name", point)
    failpoints.arm("name", 2, "raise")
    assert await around(1) == 1
    with pytest.raises(ValueError, match="armed"):
        await around(2)
    assert await around(3) == 3
    assert calls == [1, 3]
    assert reports == [("passed", "name"), ("raise", "name")]


def test_quickening_names_what_it_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONSTANTS, "care._NO_SUCH_SECONDS", 1.0)
    with pytest.raises(AttributeError, match="_NO_SUCH_SECONDS"):
        make_quick()
