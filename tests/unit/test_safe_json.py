"""Any JSON becomes a value that Convex holds, and comes back the same."""

import json
import re
import sys
from decimal import Decimal
from typing import Any

import pytest
from convex.values import convex_to_json
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_worker.safe_json import (
    DEEPEST,
    LONGEST_KEY,
    MANY_BRACKETS,
    MOST_FIELDS,
    MOST_ITEMS,
    PLAIN_BYTES,
    UNPLAIN,
    parse,
    restore,
)

# Every code unit that JSON can name, lone surrogates and NUL among them, and what the rule itself is written with.
characters = st.characters() | st.sampled_from("\x00\ud800\udfff~{}$_json7e\x7fü")
texts = st.text(characters, max_size=12) | st.sampled_from(
    ["~{json}", "~{", "~~{7e}", "~{}", "", "$", "_id", "__proto__"]
)
numbers = (
    st.integers()
    | st.integers(-(2**53) - 2, -(2**53) + 2)
    | st.integers(2**53 - 2, 2**53 + 2)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.decimals(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


class _Raw(str):
    """A number as it was written."""

    __slots__ = ()


def written(value: Any) -> str:
    """JSON text with every number in full."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return str(value) if isinstance(value, Decimal) else json.dumps(value)


def is_plain(text: str) -> bool:
    """The question that plan.py lets Postgres answer."""
    return len(text.encode()) <= PLAIN_BYTES and not re.search(UNPLAIN, text) and not re.search(MANY_BRACKETS, text)


def exact(text: str) -> Any:
    """What a JSON text says, to the last digit."""
    return json.loads(text, parse_int=Decimal, parse_float=Decimal)


def fits(value: Any, levels: int) -> bool:
    """Whether Convex takes it, by the limits in facts and nothing of the rule's own."""
    if isinstance(value, str):
        return "\x00" not in value and value.encode(errors="replace").decode() == value
    if isinstance(value, dict):
        return (
            levels > 0
            and len(value) <= MOST_FIELDS
            and all(0 < len(key) <= LONGEST_KEY and key.isascii() and key.isprintable() for key in value)
            and not any(key.startswith("$") for key in value)
            and all(fits(item, levels - 1) for item in value.values())
        )
    if isinstance(value, list):
        return levels > 0 and len(value) <= MOST_ITEMS and all(fits(item, levels - 1) for item in value)
    return value is None or isinstance(value, bool | float)


def check(text: str) -> None:
    value = parse(text)
    assert fits(value, DEEPEST)
    convex_to_json(value)
    json.dumps(value, ensure_ascii=False).encode()
    assert exact(restore(value)) == exact(text)


@given(values)
@example({"": {"~{}": "~{7e}", "$": "\x00", "\ud800": "~{json}1"}})
@example([2**53, 2**53 + 1, Decimal("0.1"), Decimal("0.10000000000000001"), 1e308, Decimal("1e400"), Decimal("1E-400")])
def test_nothing_is_lost(value: Any) -> None:
    check(written(value))


NUMBERS = [
    "0", "-0", "-0.0", "0e0", "-0e-5", "1e308", "1e309", "-1e309", "5e-324", "1e-324", "9007199254740993", "0.1",
    "0.10000000000000000555", "1" * 5000, "-" + "9" * 400, "1." + "0" * 5000 + "1", "1e" + "9" * 30, "1e-" + "9" * 30,
    "0e" + "9" * 30,
]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:24])
def test_numbers(text: str) -> None:
    value = parse(f'{{"n": {text}}}')
    assert fits(value, DEEPEST)
    restored = restore(value)
    if len(text) < 30:
        assert exact(restored) == exact(f'{{"n": {text}}}')
    else:
        # Beyond what Decimal compares in a life-time: then it is to the letter.
        assert text in restored or Decimal(text) == Decimal(restored.split(": ")[1].rstrip("}"))


@pytest.mark.parametrize("depth", [1, DEEPEST, DEEPEST + 1, 64, 200, 450, 600, 900, 1100, 6000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"ü":', "}"), ('[{"~{":', "}]")])
def test_depth(depth: int, opening: str, closing: str) -> None:
    text = opening * depth + "1" + closing * depth
    value = parse(text)
    assert fits(value, DEEPEST)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(60_000)
    try:
        if depth < 5000:
            assert exact(restore(value)) == exact(text)
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("width", [MOST_ITEMS, MOST_ITEMS + 1, 50_000])
def test_wide_arrays(width: int) -> None:
    check(json.dumps(list(range(width))))


@pytest.mark.parametrize("width", [MOST_FIELDS, MOST_FIELDS + 1, 20_000])
def test_wide_objects(width: int) -> None:
    check(json.dumps({f"k{n}": [n] for n in range(width)}))


@pytest.mark.parametrize("length", [LONGEST_KEY, LONGEST_KEY + 1])
@pytest.mark.parametrize("character", ["k", "ü", "~{"])
def test_long_keys(length: int, character: str) -> None:
    check(json.dumps({character * length: 1, "other": {"ü": 2}}))


@pytest.mark.parametrize("text", ["", "NaN", "Infinity", "-Infinity", "[1,]", "{", '"', "nul", "01"])
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # whose text nobody reads
        parse(text)


@given(st.text(max_size=30))
def test_any_text_is_taken_or_a_value_error(text: str) -> None:
    try:
        value = parse(text)
    except ValueError:
        return
    assert fits(value, DEEPEST)


def test_what_convex_can_hold_stays_as_it_is() -> None:
    value = {"a": [1.0, 0.5, True, None, "text ~ with ü"], "_under": {"b c": {}}}
    assert parse(json.dumps(value)) == value


@given(values)
@example({"a": 1, "b": [True, None, "x"], "c": {"d": 0.1}})
def test_what_is_plain_is_what_parse_makes_of_it(value: Any) -> None:
    text = written(value)
    if is_plain(text):
        assert json.loads(text, parse_int=float) == parse(text)
        assert exact(restore(parse(text))) == exact(text)
        assert "~{" not in json.dumps(parse(text))


def test_common_metadata_is_plain_and_what_the_rule_looks_at_is_not() -> None:
    assert is_plain('{"mood": "ok", "level": 3, "at": 1795390120109, "tags": ["a", "b"], "ratio": 0.25, "note": null}')
    assert is_plain('{"id": "0cc175b9c0f1b6a8", "on": "2026-01-05", "cost": "5 $", "of": "é, 1", "every": ["~", "e"]}')
    for text in NUMBERS[1:]:
        if parse(f"[{text}]") != [float(text)] or "-0" in text:
            assert not is_plain(f"[{text}]"), text
    unplain = (
        '{"": 1}',
        '{"$a": 1}',
        '["~{json}1"]',
        '{"\\u00e9": 1}',
        '{"\u00e9": 1}',
        '{"a \u00e9 b"  : 1}',
        '{""\t: 1}',
        '{"__proto__": 1}',
        "[" * DEEPEST + "]" * DEEPEST,
        json.dumps("x" * PLAIN_BYTES),
    )
    for text in unplain:
        assert not is_plain(text), text
