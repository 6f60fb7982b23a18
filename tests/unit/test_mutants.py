"""The mutants of dev/mutants.py still fit the source. That they are noticed: `make mutants`."""

import pytest

from dev.mutants import MUTANTS, Mutant, changed


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_finds_the_words_that_it_changes(mutant: Mutant) -> None:
    assert changed(mutant)
