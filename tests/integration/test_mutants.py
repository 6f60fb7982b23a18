"""The property test fails when it must: the two mutants that would lose a row, or go back in time, without a word."""

import pytest

from dev.mutants import MUTANTS, Mutant, noticed


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in MUTANTS if mutant.name in {"id_cursor", "no_version"}],
    ids=lambda mutant: mutant.name,
)
def test_property_test_notices(mutant: Mutant) -> None:
    assert noticed(mutant) is not None
