"""Insisting: repeated until it is done, said once, and said again only as it lasts."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from cdc_worker import outage as outages
from cdc_worker.errors import FunctionFailed, Misconfigured, Transient
from cdc_worker.liveness import Liveness
from cdc_worker.outage import Outage


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
