"""The property behind everything else: whatever happens, Convex ends equal to Postgres, and is never back in time.

A slice of what `make chaos` does, the same schedules in every run: some seeds, others on each Postgres, and on the
first of them those that were written down: they are about the protocol. That it can fail is shown by dev/mutants.py.
"""

from typing import Final

import pytest

from dev.chaos.campaign import Campaign, Case
from dev.chaos.generator import schedule_of
from dev.chaos.schedule import printed
from dev.chaos.written import WRITTEN
from dev.postgres import flavours
from dev.postgres_programs import Flavour

SEEDS: Final = 12
FIRST: Final[dict[Flavour, int]] = {"installed": 0, "wheel": 500}
WORLDS: Final = 4


@pytest.mark.chaos
@pytest.mark.timeout(600)
async def test_convex_converges_to_postgres(postgres_flavour: Flavour) -> None:
    first = FIRST[postgres_flavour]
    written = WRITTEN if postgres_flavour == next(iter(flavours())) else {}
    cases: list[Case] = [*written.items(), *((f"seed {n}", schedule_of(n)) for n in range(first, first + SEEDS))]
    result = await Campaign(postgres_flavour, jobs=WORLDS).play(cases)
    assert not result.findings, "\n\n".join(
        f"{each.name}, {each.when}:\n{each.found}\n{printed(each.schedule)}\n{each.story}" for each in result.findings
    )
    assert result.schedules == len(cases)
    assert result.tally["transactions committed"] > len(cases)


def test_a_seed_is_a_schedule() -> None:
    assert schedule_of(7) == schedule_of(7)
    assert len({printed(schedule_of(seed)) for seed in range(50)}) == 50


def test_a_schedule_prints_as_what_it_is() -> None:
    from dev.chaos import schedule as language  # noqa: PLC0415  # its names are those of the text

    made = schedule_of(11)
    assert eval(printed(made), vars(language)) == made
