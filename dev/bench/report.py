"""The results for people: tables in the terminal, and the tables inside docs/performance.md.

docs/performance.md is written by hand, except for what stands between `<!-- figures: NAME -->` and `<!-- end -->`.
"""

import re
import textwrap
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from dev.bench.paper import paper
from dev.bench.results import Results, Row
from dev.bench.tables import Table, of_rows, of_targets
from dev.bench.targets import targets

PAGE: Final = Path(__file__).parents[2] / "docs/performance.md"
# Of a terminal that does not say, or a pipe.
_WIDTH: Final = 100
_STYLES: Final = {"met": "green", "missed": "bold red"}


def show(results: Results, cases: list[str], console: Console | None = None) -> None:
    """A table for each case, and one of the targets."""
    console = console or Console(width=None if Console().is_terminal else _WIDTH)
    for case in cases:
        if results.cases.get(case):
            title = f"{case} ({results.seconds.get(case, 0):.0f} s)"
            console.print(_rich(title, of_rows(results.cases[case])))
    if rows := paper(results):
        console.print(_rich("on paper", of_rows(rows)))
    measured = [target for target in targets(results) if target.value is not None]
    if measured:
        console.print(_rich("targets", of_targets(measured)))


def _rich(title: str, table: Table) -> RichTable:
    made = RichTable(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    made.add_column(table.headings[0])
    for number, heading in enumerate(table.headings[1:], start=1):
        # As narrow as its figures: headings are broken between words, figures never; names have what is left.
        width = max(len(text) for text in [*heading.split(), *(line[number] for line in table.lines)])
        broken = "\n".join(textwrap.wrap(heading, width))
        made.add_column(broken, justify="right", vertical="bottom", width=width, no_wrap=True)
    for line in table.lines:
        made.add_row(*(_plain(text) for text in line))
    return made


def _plain(text: str) -> Text:
    """Without the marks that the page needs."""
    bare = text.replace("*", "").replace("`", "")
    return Text(bare, style=_STYLES.get(bare, ""))


def _markdown(table: Table) -> str:
    sides = ["---", *("---:" for _ in table.headings[1:])]
    return "\n".join(
        "|" + "".join(f" {text} |" if text else " |" for text in line) for line in (table.headings, sides, *table.lines)
    )


def _machine(results: Results) -> str:
    said = results.machine
    return (
        f"{said['cores']} cores ({said['processor']}), {said['system']}, PostgreSQL {said['postgres']},"
        f" Python {said['python']}."
    )


def _durations(results: Results) -> str:
    total = sum(results.seconds.values())
    each = ", ".join(f"{case} {seconds:.0f}" for case, seconds in results.seconds.items())
    return f"{total / 60:.0f} minutes in all; seconds by case: {each}."


def _filled(results: Results, name: str) -> str | None:
    """What stands under that name on the page; None if it was not measured."""
    if name == "machine":
        return _machine(results)
    if name == "targets":
        return _markdown(of_targets(targets(results)))
    if name == "durations":
        return _durations(results)
    rows: list[Row] = paper(results) if name == "paper" else results.cases.get(name, [])
    return _markdown(of_rows(rows)) if rows else None


def write(results: Results) -> None:
    """Puts the figures into docs/performance.md; what was not measured is left as it is."""
    PAGE.write_text(fill(PAGE.read_text(), results))


def fill(page: str, results: Results) -> str:
    def fill_one(found: re.Match[str]) -> str:
        text = _filled(results, found[1])
        return found[0] if text is None else f"<!-- figures: {found[1]} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", fill_one, page, flags=re.DOTALL)
