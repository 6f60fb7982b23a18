"""The documentation says what the code does: settings, log events, examples, links, and the test command."""

import ast
import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
from pydantic import AliasChoices
from pydantic.fields import FieldInfo

from cdc_worker.mirrors import load_mirrors
from cdc_worker.safe_json import parse
from cdc_worker.settings import Settings
from dev.local_convex import node

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
OPERATING = ROOT / "docs/operating.md"
MIRRORS = ROOT / "docs/mirrors.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A log event, as the code and the documentation write it. Nothing else in the worker is a whole string of this form.
_EVENT = r"[a-z]+\.[a-z_]+"


def _rows(page: Path, first_cell: str) -> dict[str, list[str]]:
    """The rows of a page's tables whose first cell is of this form, by that cell."""
    rows: dict[str, list[str]] = {}
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and (found := re.fullmatch(first_cell, cells[0])):
            assert found[1] not in rows, f"{page.name} has two rows for {found[1]}"
            rows[found[1]] = cells[1:]
    return rows


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def _variables(name: str, field: FieldInfo) -> list[str]:
    match field.validation_alias:
        case str(alias):
            return [alias]
        case AliasChoices(choices=choices):
            return [str(choice) for choice in choices]
        case _:
            return [name.upper()]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:f}".rstrip("0").rstrip(".")


def _bounds(field: FieldInfo) -> str | None:
    """As the table writes them: `1 to 500`, `at least 65536`; None if there are none in numbers."""
    low: object = next((each.ge for each in field.metadata if isinstance(each, annotated_types.Ge)), None)
    high: object = next((each.le for each in field.metadata if isinstance(each, annotated_types.Le)), None)
    if low is None:
        assert high is None
        return None
    assert isinstance(low, int | float)
    assert isinstance(high, int | float | None)
    return f"at least {_number(low)}" if high is None else f"{_number(low)} to {_number(high)}"


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


SETTINGS = Settings.model_fields
TABLE = _rows(README, r"([A-Z_]+)")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_readme_has_each_setting_with_its_default_and_bounds(name: str) -> None:
    field = SETTINGS[name]
    variable, *others = _variables(name, field)
    default, bounds, meaning = TABLE[variable]
    if field.is_required():
        assert default == "required"
    elif field.default is None:
        assert default == "not set" or default in TABLE
    else:
        assert default == (_number(field.default) if isinstance(field.default, int | float) else str(field.default))
    if (wanted := _bounds(field)) is not None:
        assert bounds == wanted
    if choices := _choices(field.annotation):
        assert bounds == ", ".join(choices)
    assert all(other in meaning for other in others)


def test_the_readme_has_no_setting_that_is_gone() -> None:
    known = {variable for name, field in SETTINGS.items() for variable in _variables(name, field)}
    assert TABLE.keys() <= known
    for page in PAGES:
        assert set(re.findall(r"\bCDC_[A-Z_]+[A-Z]\b", page.read_text())) <= known, page.name


def _log_calls() -> Iterator[tuple[str, ast.Call]]:
    """The level and the call of each `log.level(...)` in the worker."""
    for path in (ROOT / "cdc_worker").glob("*.py"):
        for each in ast.walk(ast.parse(path.read_text())):
            match each:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=level)):
                    yield level, each


def _strings(expression: ast.AST) -> Iterator[str]:
    for each in ast.walk(expression):
        match each:
            case ast.Constant(value=str(text)) if re.fullmatch(_EVENT, text):
                yield text


def _events() -> Mapping[str, set[str]]:
    """All log events, and their levels so far as they stand in the call itself."""
    events: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "cdc_worker").glob("*.py"):
        for event in _strings(ast.parse(path.read_text())):
            events[event] = set()
    for level, call in _log_calls():
        for event in _strings(call.args[0]):
            events[event].add(level)
    return events


def test_each_log_event_is_explained_with_its_level() -> None:
    events, explained = _events(), _rows(OPERATING, rf"`({_EVENT})`")
    assert events.keys() == explained.keys()
    for event, levels in events.items():
        said = set(explained[event][0].split(", "))
        assert levels <= said, event
        assert said <= {"debug", "info", "warning", "error", "critical"}, event


def test_each_field_of_the_heartbeat_is_explained() -> None:
    (fields,) = (
        [keyword.arg for keyword in call.keywords if keyword.arg is not None]
        for _, call in _log_calls()
        if "worker.heartbeat" in _strings(call.args[0])
    )
    table = OPERATING.read_text().split("## Log events")[0]
    assert [field for field in fields if f"`{field}`" not in table] == []


EXAMPLES = [(page, block) for page in PAGES for block in _blocks(page, "toml")]


@pytest.mark.parametrize(("page", "text"), EXAMPLES, ids=[f"{page.name}-{n}" for n, (page, _) in enumerate(EXAMPLES)])
def test_examples_of_the_configuration_are_valid(page: Path, text: str, tmp_path: Path) -> None:
    config = tmp_path / "cdc_worker.toml"
    config.write_text(text)
    assert load_mirrors(config), page.name


@pytest.mark.parametrize("text", [block for page in PAGES for block in _blocks(page, "python")])
def test_examples_in_python_compile(text: str) -> None:
    compile(text, "example", "exec")


def test_the_typescript_that_undoes_the_rule_for_json(tmp_path: Path) -> None:
    deep = "[" * 20 + "1" + "]" * 20
    texts = [
        '{"$ref": 1, "größe": 2, "": 3, "a~{b": "~{x}", "~{json}": "~{json}1"}',
        '"\\u0000a\\ud800"',
        "0.12345678901234567890",
        f'{{"k": {{"$a": {deep}}}}}',
        json.dumps({"x" * 1_100: "ü~{"}),
        json.dumps(list(range(9_000))),
        '[1, 2.5, true, null, "Müde ☕"]',
    ]
    (snippet,) = _blocks(MIRRORS, "ts")
    program = tmp_path / "restore.mts"
    program.write_text(
        'import { readFileSync } from "node:fs";\n'
        + snippet
        + 'console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(restore)));\n'
    )
    done = subprocess.run(
        [node(), program], input=json.dumps([parse(text) for text in texts]), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [json.loads(text) for text in texts]


def test_examples_of_the_rule_for_json_are_what_it_gives() -> None:
    rows = re.findall(r"^\| `(\{.*?|\d+)` \| `(.*?)` \|", MIRRORS.read_text(), re.MULTILINE)
    assert len(rows) == 4
    assert [parse(given) for given, _ in rows] == [json.loads(wanted) for _, wanted in rows]


def _anchor(heading: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in map(_anchor, headings), link


def test_the_readme_names_the_command_that_continuous_integration_runs() -> None:
    commands = re.findall(r"^make \w+", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert "make test" in commands
    assert all(re.search(rf"^    {command}\b", README.read_text(), re.MULTILINE) for command in commands)


def test_the_readme_has_the_procfile() -> None:
    lines = (ROOT / "Procfile").read_text().splitlines()
    assert all(f"    {line}\n" in README.read_text() for line in lines)


def test_a_project_with_functions_of_its_own_is_told_every_file_that_it_needs() -> None:
    told = re.findall(r"`(\w+\.ts)`", README.read_text())
    assert set(told) == {path.name for path in (ROOT / "convex").glob("*.ts")}
