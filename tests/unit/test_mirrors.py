"""cdc_worker.toml: every rule of its form, and a text that names the file, the mirror and the entry."""

import contextlib
import json
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdc_worker.errors import ConfigError
from cdc_worker.mirrors import Mirror, load_mirrors

GOOD = """
[[mirror]]
name = "check-ins"
target = "activity"
key = ["id"]
query = "select 1;"
sources = [{ table = '"CheckIn"', key = ["id"], watch = ["note"] }]

[[mirror]]
name = "status"
target = "status"
key = ["user_id"]
query = "select 2"
sources = [{ table = "a", key = ["x"] }, { table = "b", key = ["y"] }]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cdc_worker.toml"


def test_a_good_one(path: Path) -> None:
    path.write_text(GOOD)
    check_ins, status = load_mirrors(path)
    assert (check_ins.name, check_ins.target, check_ins.key) == ("check-ins", "activity", ("id",))
    assert check_ins.query == "select 1"
    assert check_ins.sources[0].watch == ("note",)
    assert [source.table for source in status.sources] == ["a", "b"]


def test_a_mark_that_editors_put_first_is_passed_over(path: Path) -> None:
    path.write_text("\ufeff" + GOOD, encoding="utf-8")
    assert len(load_mirrors(path)) == 2


WRONG = {
    "not TOML": ("[[mirror", "is not TOML: "),
    "empty": ("", "there is no .*mirror.* in it"),
    "no mirror": ("mirror = []", "there is no .*mirror.* in it"),
    "mirror is no list": ("mirror = 5", r"mirror: must be a list: .* \[\[mirror\]\] with two brackets"),
    "key is no list": (GOOD.replace('["id"]\nquery', '"id"\nquery'), 'mirror "check-ins", key: must be a list: '),
    "mirror is no table": ("mirror = [5]", "mirror 1: "),
    "unknown entry": (GOOD + "\n[elsewhere]\nx = 1\n", "elsewhere: there is no such entry"),
    "unknown field": (GOOD.replace("query", "qeury", 1), 'mirror "check-ins", qeury: there is no such entry'),
    "no query": (GOOD.replace('query = "select 1;"', ""), 'mirror "check-ins", query: Field required'),
    "no name": (GOOD.replace('name = "check-ins"', ""), "mirror 1, name: Field required"),
    "unknown target": (GOOD.replace('"activity"', '"activities"'), "target: Input should be 'activity' or 'status'"),
    "capital in name": (GOOD.replace("check-ins", "CheckIns"), 'mirror "CheckIns", name: must be small letters'),
    "colon in name": (GOOD.replace("check-ins", "a:b"), "name: must be small letters"),
    "empty name": (GOOD.replace("check-ins", ""), "name: must be small letters"),
    "long name": (GOOD.replace("check-ins", "a" * 64), "name: must be small letters"),
    "newline in name": (GOOD.replace("check-ins", "a\\n"), "name: must be small letters"),
    "reserved name": (GOOD.replace("check-ins", "app"), "'app' is reserved"),
    "same name twice": (GOOD.replace('"status"\ntarget', '"check-ins"\ntarget'), "two mirrors are called 'check-ins'"),
    "a table with too many": (
        GOOD + "".join(GOOD.split("\n\n", maxsplit=1)[0].replace("check-ins", f"m{n}") for n in range(100)),
        "is a source 101 times, and 100 is the most",
    ),
    "two statuses": (
        GOOD.replace('"activity"\nkey = ["id"]', '"status"\nkey = ["user_id"]'),
        'one mirror with target "status"',
    ),
    "status by another key": (GOOD.replace('["user_id"]', '["id"]'), r'mirror "status": .*key must be \["user_id"\]'),
    "no key": (GOOD.replace('key = ["id"]\nquery', "key = []\nquery"), 'mirror "check-ins", key: .*at least 1 item'),
    "nine key columns": (GOOD.replace('["id"]\nquery', '["a","b","c","d","e","f","g","h","i"]\nquery'), "at most 8"),
    "the same key column twice": (
        GOOD.replace('["id"]\nquery', '["id", "id"]\nquery').replace('key = ["id"], w', 'key = ["id", "id"], w'),
        'mirror "check-ins"',
    ),
    "no source": (
        GOOD.replace('[{ table = \'"CheckIn"\', key = ["id"], watch = ["note"] }]', "[]"),
        "sources: .*1 item",
    ),
    "source without table": (GOOD.replace('table = "a", ', ""), 'mirror "status", sources, 1, table: Field required'),
    "source with other key": (
        GOOD.replace('key = ["id"], w', 'key = ["id", "x"], w'),
        r'mirror "check-ins": source "CheckIn" gives 2 key column\(s\), the mirror\'s key has 1',
    ),
    "empty query": (GOOD.replace("select 1;", ""), 'mirror "check-ins", query: .*at least 1 character'),
    "blank query": (GOOD.replace("select 1;", " ; "), 'mirror "check-ins", query'),
    "no bytes of UTF-8": ("\xff", "cannot be read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_one(path: Path, what: str) -> None:
    text, words = WRONG[what]
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=words) as caught:
        load_mirrors(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*set CDC_CONFIG"):
        load_mirrors(path)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_mirrors(tmp_path)


def test_a_definition_is_what_documents_depend_on(path: Path) -> None:
    def definition(text: str) -> str:
        path.write_text(text)
        return load_mirrors(path)[0].definition

    first = definition(GOOD)
    assert definition(GOOD) == first
    assert definition(GOOD.replace("select 1;", " select 1 ")) == first
    assert definition(GOOD.replace("select 1;", "select 3")) != first


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["activity", "status", "app", "id"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_names = st.sampled_from(["mirror", "name", "target", "key", "query", "sources", "table", "watch"]) | st.text(
    max_size=3
)


@given(raw=st.dictionaries(_names, st.lists(st.dictionaries(_names, _values, max_size=5), max_size=3) | _values))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_is_taken_or_refused_in_words(
    path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("")
    monkeypatch.setattr(tomllib, "loads", lambda _: raw)
    with contextlib.suppress(ConfigError):
        load_mirrors(path)


def in_toml(value: Any) -> str:
    """A value as TOML writes it inline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{in_toml(str(name))} = {in_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(in_toml, value)) + "]"
    if isinstance(value, date):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


_letters = st.characters(exclude_categories=["Cs"])
_anything = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.dates()
    | st.text(_letters, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(_letters, max_size=4), inner, max_size=3),
    max_leaves=5,
)
_words = st.text(_letters, min_size=1, max_size=8) | st.sampled_from(
    ["user_id", "id", '"CheckIn"', "a.b", "\0", "'''", "$1", "%s", "{}", "--", ";", " "]
)
_columns = st.lists(_words, min_size=1, max_size=2, unique=True) | st.just(["user_id"])
# Good as far as types go, but for one field, which may be anything at all.
_mirrors = st.lists(
    st.builds(
        lambda good, other: good | other,
        st.fixed_dictionaries(
            {
                "name": st.from_regex(r"[a-z][a-z0-9_-]{0,20}", fullmatch=True),
                "target": st.sampled_from(["activity", "status"]),
                "key": _columns,
                "query": _words,
                "sources": st.lists(
                    st.fixed_dictionaries({"table": _words, "key": _columns}, optional={"watch": _columns}),
                    min_size=1,
                    max_size=2,
                ),
            }
        ),
        st.just({}) | st.dictionaries(_names, _anything, max_size=1),
    ),
    min_size=1,
    max_size=2,
)


@given(mirrors=_mirrors)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_document_is_taken_as_it_is_or_refused_in_words(path: Path, mirrors: list[dict[str, Any]]) -> None:
    path.write_text(f"mirror = {in_toml(mirrors)}\n", encoding="utf-8")
    assert tomllib.loads(path.read_text(encoding="utf-8")) == {"mirror": mirrors}
    refusal = ""
    loaded: tuple[Mirror, ...] = ()
    try:
        loaded = load_mirrors(path)
    except ConfigError as error:
        refusal = str(error)
    assert refusal.startswith(f"{path}: ") or len(loaded) == len(mirrors)
    for found, wanted in zip(loaded, mirrors, strict=False):
        assert (found.name, found.target, list(found.key)) == (wanted["name"], wanted["target"], wanted["key"])
        assert found.query == wanted["query"].strip().rstrip(";").rstrip()
        assert len(found.sources) == len(wanted["sources"])
        for source, written in zip(found.sources, wanted["sources"], strict=True):
            assert source.table == written["table"]
            assert [*source.key, *source.watch] == [*written["key"], *written.get("watch", [])]


@given(at=st.integers(0, len(GOOD)), gone=st.integers(0, 40), put=st.text(max_size=10))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_good_document_with_a_slip_is_taken_or_refused_in_words(path: Path, at: int, gone: int, put: str) -> None:
    path.write_bytes((GOOD[:at] + put + GOOD[at + gone :]).encode(errors="surrogatepass"))
    with contextlib.suppress(ConfigError):
        load_mirrors(path)


@given(content=st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_taken_or_refused_in_words(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_mirrors(path)


@pytest.mark.parametrize("opening", ["[", "{a="])
def test_a_file_that_is_nested_too_deep_is_refused_in_words(path: Path, opening: str) -> None:
    path.write_text("x = " + opening * 3000)
    with pytest.raises(ConfigError):
        load_mirrors(path)
