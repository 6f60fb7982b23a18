"""A key has one spelling, and gives back its parts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_worker.keys import join_key, key_parts, split_key

# What a text of Postgres can be.
parts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))


@given(st.lists(parts, min_size=1, max_size=8))
def test_round_trip(key: list[str]) -> None:
    assert split_key(join_key(key), len(key)) == tuple(key)


@given(st.lists(parts, min_size=2, max_size=3), st.lists(parts, min_size=2, max_size=3))
def test_two_keys_never_share_a_spelling(one: list[str], other: list[str]) -> None:
    assert (join_key(one) == join_key(other)) == (one == other)


def test_a_single_part_is_written_as_it_is() -> None:
    assert join_key(['["a", "b"]']) == '["a", "b"]'


@given(st.text())
def test_what_is_no_key_is_a_value_error(text: str) -> None:
    try:
        found = split_key(text, 2)
    except ValueError:
        return
    assert len(found) == 2


@pytest.mark.parametrize(
    "text", ["", "a", "1", "[]", '["a"]', '["a", 1]', '["a", null]', '{"a": "b"}', '["a", "b", "c"]', "[" * 5000]
)
def test_examples_of_what_is_no_key(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # whose text nobody reads
        split_key(text, 2)


@pytest.mark.parametrize("text", ["", "-", "+1", "1.0", " 1", "1\n", "\u0661\u0662", "9223372036854775808"])
def test_what_postgres_reads_as_no_integer_is_no_key_of_that_type(text: str) -> None:
    """The query would fail, and the key be parked, whose document has to go."""
    assert key_parts(text, ["bigint"]) is None
