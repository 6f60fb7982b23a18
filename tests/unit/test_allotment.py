"""A fair part: whoever comes and goes, the shards end evenly spread, and nobody passes one to and fro for ever."""

from hypothesis import given
from hypothesis import strategies as st

from cdc_worker.allotment import fair_part

NAMES = [f"w{n}" for n in range(8)]


@given(
    st.integers(1, 64),
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 64), min_size=1),
    st.randoms(use_true_random=False),
)
def test_the_shards_end_evenly_spread(shards: int, had: dict[str, int], order: st.DataObject) -> None:
    parts, left = {}, shards
    for name, count in had.items():
        parts[name] = min(count, left)
        left -= parts[name]
    # Looks of the workers, one by one, in any order: each gives up what is too much, or takes what is free.
    for _ in range(3 * len(parts)):
        for name in order.sample(list(parts), len(parts)):  # type: ignore[attr-defined]  # a random.Random
            fair = fair_part(name, parts, shards)
            free = shards - sum(parts.values())
            parts[name] = min(fair, parts[name] + free)
    assert sum(parts.values()) == shards
    assert max(parts.values()) - min(parts.values()) <= 1
    assert [fair_part(name, parts, shards) >= count for name, count in parts.items()] == [True] * len(parts)


def test_who_is_alone_has_all() -> None:
    assert fair_part("w0", {"w0": 0}, 5) == 5


def test_of_more_workers_than_shards_the_rest_stands_by() -> None:
    assert fair_part("w1", {"w0": 1, "w1": 0, "w2": 0}, 1) == 1  # it may take one that is free: there is none
    assert fair_part("w0", {"w0": 1, "w1": 0, "w2": 0}, 1) == 1
