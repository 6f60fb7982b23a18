"""How large a JSON text is to Convex, told from the text; and what that lets through."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_worker.document_size import convex_bytes, least_bytes
from cdc_worker.documents import LARGEST_DOCUMENT, Event, EventMaker
from cdc_worker.mirrors import Mirror, Source
from cdc_worker.plan import make_plan
from cdc_worker.safe_json import MOST_FIELDS, MOST_ITEMS, parse
from tests.unit.test_safe_json import values, written

NO_LIMIT = 1 << 40
spaces = st.text(" \t\n\r", max_size=2)
# What a string may have in it without being the end of it, or a name, a brace or a number.
tricky = st.lists(
    st.sampled_from(["\\\\", '\\"', "null", "é", "\U0001f600", "\ud800", "\0", *'"\\:{}[],1n']), max_size=6
).map("".join)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | tricky
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(tricky, inner, max_size=4), max_leaves=20
)


def counted(value: Any) -> int:
    """`getConvexSize` of the package convex, as it is written there."""
    if value is None or isinstance(value, bool):
        return 1
    if isinstance(value, int | float):
        return 9
    if isinstance(value, str):
        return 2 + utf8(value)
    if isinstance(value, list):
        return 2 + sum(counted(item) for item in value)
    return 2 + sum(utf8(name) + 1 + counted(item) for name, item in value.items())


def utf8(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def spelled(value: Any, draw: Any) -> str:
    """JSON text with white space and escapes wherever there may be some."""
    before, after = draw(spaces), draw(spaces)
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=draw(st.booleans()) or utf8(value) != len(value.encode(errors="ignore")))
        text = text.replace("n", "\\u006e") if "\\" not in text and draw(st.booleans()) else text
    elif isinstance(value, list):
        text = "[" + (",".join(spelled(item, draw) for item in value) or draw(spaces)) + "]"
    elif isinstance(value, dict):
        fields = ",".join(f"{spelled(name, draw)}:{spelled(item, draw)}" for name, item in value.items())
        text = "{" + (fields or draw(spaces)) + "}"
    else:
        text = json.dumps(value)
    return f"{before}{text}{after}"


@given(documents, st.data())
def test_a_text_counts_as_its_value_does(value: Any, data: st.DataObject) -> None:
    text = spelled(value, data.draw).encode()
    size = counted(value)
    assert counted(json.loads(text)) == size
    assert convex_bytes(text, NO_LIMIT) == size
    most = data.draw(st.integers(0, size + 1))
    assert (convex_bytes(text, most) > most) == (size > most)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "{}" + "}" * 100_000])
def test_depth_is_no_matter(text: str) -> None:
    assert convex_bytes(text.encode(), NO_LIMIT) == 2 * (text.count("[") + text.count("{")) + 2 * text.count('"a"')


def safe_bytes(text: str) -> int:
    return counted(parse(text))


@given(values.map(written))
@example("[1.5000000, -0, 1e2, 1.0, 0]")
@example('{"": "\\u0000", "\\ud800": "\\ud83d\\ude00~{"}')
def test_nothing_is_smaller_once_it_is_safe_than_it_is_said_to_be(text: str) -> None:
    for whole in (text, f"[{text}]", "[" * 20 + text + "]" * 20, f"[{', '.join([text] * 3)}]"):
        assert least_bytes(whole.encode(), NO_LIMIT) <= safe_bytes(whole)


@pytest.mark.parametrize("item", ["0", "1.0000", "1e5", "-0", "null", "[]", "{}", '""', '{"":0}', '"\\n"', "[1]"])
@pytest.mark.parametrize("wrapped", ["[{}]", "[[{}]]", '{{"a": [{}], "b": {{}}}}'])
def test_nor_is_what_becomes_one_string(item: str, wrapped: str) -> None:
    for text in (
        wrapped.format(",".join([item] * (MOST_ITEMS + 1))),
        wrapped.format("{" + ",".join(f'"{n:x}":{item}' for n in range(MOST_FIELDS + 1)) + "}"),
        wrapped.format("[" * 5_000 + item + "]" * 5_000),
    ):
        assert least_bytes(text.encode(), NO_LIMIT) <= safe_bytes(text)


MIRROR = Mirror(
    name="m",
    target="activity",
    key=("id",),
    query="select * from a",
    sources=(Source(table="a", key=("id",)),),
)
FIELDS = {"userId": "u", "type": "t", "description": "d", "timestamp": 1}


def put(metadata: str | None, fields: Mapping[str, Any] = FIELDS, plain: str = "") -> Event:
    """The event of a row as Postgres gives it."""
    start = json.dumps({"key": f'{MIRROR.name}:1,"document":{{', "target": "activity"}, separators=(",", ":"))
    document = json.dumps(fields)[:-1] + plain
    text = f'{start[1:-1]},"document":{document}}}}}'.encode()
    maker = EventMaker(make_plan(MIRROR, ("text",), frozenset()), 1, 1)
    return maker.put(("1", len(text) + len(metadata or ""), None, text, metadata))


def test_the_document_alone_is_counted_to_the_byte() -> None:
    room = LARGEST_DOCUMENT - counted(FIELDS) + len("d")
    assert put(None, FIELDS | {"description": "x" * room}).problem is None
    problem = put(None, FIELDS | {"description": "x" * (room + 1)}).problem
    assert problem is not None
    assert problem[0] == "row"
    assert problem[1].endswith(f"Convex holds {LARGEST_DOCUMENT}")


FILLED = {
    "spaces": "[" + " " * 3_000_000 + "]",
    "escapes": json.dumps("é" * 500_000),
    "null": json.dumps([[None] * 8_000] * 120),
}


@pytest.mark.parametrize("what", FILLED)
def test_a_long_text_of_a_small_value_fits(what: str) -> None:
    assert len(FILLED[what]) > 2 * LARGEST_DOCUMENT
    event = put(FILLED[what])
    assert event.problem is None
    assert json.loads(event.text)["document"]["metadata"] == json.loads(FILLED[what])


def test_a_name_counts_each_time_that_json_repeats_it() -> None:
    problem = put("{" + ",".join(['"a":[[],[],"xxxxxxxxxxx"]'] * 100_000) + "}").problem
    assert problem is not None
    assert problem[1].endswith(f"Convex holds {LARGEST_DOCUMENT}")


@pytest.mark.parametrize("item", ["[]", "{}", "0", "null", '"ab"', '{"a": {}}', '"\\n"'])
def test_what_cannot_fit_is_refused_before_it_is_parsed(item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc_worker.documents.parse", None)
    problem = put(f"[{', '.join([item] * (LARGEST_DOCUMENT + 1))}]").problem
    assert problem is not None
    assert problem[1].endswith(f"Convex holds {LARGEST_DOCUMENT}")
