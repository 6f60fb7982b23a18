"""The fault suite finds what it must: the two mutants that would lose a row, or go back in time, without a word."""

import pytest

from dev.mutants import MUTANTS, Mutant, tried


@pytest.mark.chaos
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in MUTANTS if mutant.name in {"id_cursor", "no_version"}],
    ids=lambda mutant: mutant.name,
)
def test_the_suite_notices(mutant: Mutant) -> None:
    assert tried(mutant).seed is not None
