"""What a person sees: a banner, a line for each change, a summary. Plain lines where there is no terminal."""

import json
import textwrap
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.status import Status
from rich.text import Text

from dev.demo.comparison import Comparison
from dev.demo.sightings import Change
from dev.demo.stage import CONFIG, ROOT, Servers

_STYLES: Final = {"User": "magenta", "CheckIn": "green", "Conversation": "cyan", "Alert": "yellow"}
_LEVELS: Final = {"L1": "yellow", "L2": "yellow", "L3": "red", "L4": "bold red"}
# Below this, lines leave out what can be spared: the id, and a few words.
_WIDE: Final = 96
# A file has no width: lines are padded to this one, and not cut.
_PLAIN_WIDTH: Final = 100
_MOST_DIFFERENCES: Final = 20


class Screen:
    """Everything that is printed."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @property
    def _width(self) -> int:
        return self._console.width if self._console.is_terminal else _PLAIN_WIDTH

    def busy(self, what: str) -> "Status | _Quiet":
        """A spinner while something takes its time; nothing where there is no terminal."""
        return self._console.status(Text(what, "dim")) if self._console.is_terminal else _Quiet()

    def banner(self, servers: Servers, rate: float, seconds: float | None) -> None:
        rows = [
            ("Postgres", servers.database_url, f"{servers.postgres_version}, embedded"),
            ("Convex", servers.convex.url, "a local stand-in"),
            ("admin key", servers.convex.admin_key, ""),
            ("worker", "python -m cdc_worker run", f"mirrors of {CONFIG.relative_to(ROOT)}"),
            ("application", f"{rate:g} writes a second", "a dashboard watches two queries per user"),
        ]
        end = "Ctrl-C ends it" if seconds is None else f"It ends after {seconds:g} s, or on Ctrl-C"
        self._print()
        self._print(Text.assemble(("cdc_worker", "bold"), "  rows of an application in Postgres appear in Convex"))
        self._print()
        for name, what, remark in rows:
            line = Text.assemble("  ", (name.ljust(13), "bold"), what)
            if not self._console.is_terminal or line.cell_len + 3 + len(remark) <= self._console.width:
                line.append(f"   {remark}".rstrip(), "dim")
            self._print(line)
        self._print()
        self._print(Text(f"{end}, and every row is compared with every document.", "dim"))
        self._print()

    def filled(self, change: Change) -> None:
        """The rows that were there before the worker are in Convex."""
        text = f"{change.rows} rows were there before the worker: all in Convex {_ms(change)} ms after its start"
        self._print(Text(text, "dim"))
        self._print()

    def change(self, change: Change) -> None:
        """One line: written, and what became of it."""
        if change.rolled_back:
            self._line(change, "→ rolled back", ": never to be seen", style="dim")
        elif change.overtaken:
            self._line(change, "→ overtaken", " by a later change", style="dim")
        else:
            self._line(change, "→ seen", " in Convex", f" after {_ms(change):>5} ms")

    def late(self, change: Change) -> None:
        self._line(change, "→ not seen", "", " yet", style="yellow")

    def log(self, line: str) -> None:
        """A line of the worker's log (JSON): the same columns as a change's."""
        record = _record(line)
        if record is None:
            self._print(Text(line, "dim"))
            return
        at = datetime.fromisoformat(str(record.pop("timestamp"))).astimezone()
        level, event = (str(record.pop(name)) for name in ("level", "event"))
        fields = " ".join(f"{name}={value}" for name, value in record.items())
        text = Text.assemble(
            *((f"{at:%H:%M:%S}  ", "dim"), ("worker".ljust(12), "blue"), f"  {event.ljust(24)} ", (fields, "dim"))
        )
        if level != "info":
            text.stylize("red" if level == "error" else "yellow")
        if self._console.is_terminal:
            text.truncate(self._console.width, overflow="ellipsis")
        self._print(text)

    def trouble(self, error: BaseException) -> None:
        """What went wrong; behind the first line there may be lines of the worker's log."""
        first, *lines = (str(error) or type(error).__name__).splitlines()
        self._print(Text(f"demo: {first}", "red"))
        for line in lines:
            self.log(line)

    def summary(
        self,
        seconds: float,
        *,
        written: Sequence[Change],
        seen: Sequence[Change],
        unseen: Sequence[Change],
        comparison: Comparison,
        log: Path,
    ) -> None:
        committed = [change for change in written if not change.rolled_back]
        self._print()
        self._print(Text(f"{seconds:.1f} s", "bold"))
        self._row(
            "written",
            f"{_many(sum(change.rows for change in committed), 'row')} in {_many(len(committed), 'transaction')},"
            f" {len(written) - len(committed)} more rolled back",
        )
        times = sorted(change.took_ms for change in seen if not change.overtaken)
        self._row("seen", f"{len(seen)} of {len(committed)} changes{_percentiles(times)}")
        if len(times) < len(seen):
            self._row("", f"{len(seen) - len(times)} of them overtaken by later ones, before anybody could see them")
        self._row(
            "compared",
            f"{comparison.activities} activities and {_many(comparison.statuses, 'status', 'statuses')}: what the rows"
            " give, read by the demo's own SQL, with what the public queries show of"
            f" {_many(comparison.users, 'user')} (past ones too) and the keys of all four mirrors; the worker was not"
            " asked",
        )
        if comparison.by_key_only:
            self._row("", f"{comparison.by_key_only} by key only: the query shows a user's newest 100", "yellow")
        lines, warnings = _count_lines(log)
        self._row("worker", f"{_many(lines, 'log line')}, {_many(warnings, 'warning')}")
        self._print()
        if not comparison.differences and not unseen:
            self._print(Text.assemble(("✓ equal", "bold green"), ": every row and every status"))
            return
        for change in unseen[:_MOST_DIFFERENCES]:
            self._line(change, "→ never seen", "", style="red")
        for difference in comparison.differences[:_MOST_DIFFERENCES]:
            self._print(Text(f"  {difference}", "red"))
        if len(comparison.differences) > _MOST_DIFFERENCES:
            self._print(Text(f"  and {len(comparison.differences) - _MOST_DIFFERENCES} more", "red"))
        what = f"{_many(len(comparison.differences), 'difference')} between Postgres and Convex"
        if unseen:
            what += f", {_many(len(unseen), 'change')} that the dashboard never saw"
        self._print(Text.assemble(("✗ not equal", "bold red"), f": {what}. The worker's last lines:"))
        for line in log.read_text(errors="replace").splitlines()[-15:]:
            self.log(line)

    def _row(self, name: str, text: str, style: str = "") -> None:
        for line in textwrap.wrap(text, self._width - 12):
            self._print(Text.assemble("  ", (name.ljust(10), "dim"), (line, style)))
            name = ""

    def _line(self, change: Change, outcome: str, spare: str, rest: str = "", *, style: str = "") -> None:
        """`spare` stands between the two where there is room."""
        wide = self._width >= _WIDE
        at = "" if change.committed_at is None else f"{change.committed_at:%H:%M:%S}"
        key = f"{change.key[:4]}…{change.key[-2:]}" if change.key else ""
        left = Text.assemble((at.ljust(10), "dim"), (change.table.ljust(14), _style(change)))
        if wide:
            left.append(key.ljust(9), "dim")
        right = Text(f"  {outcome}{spare if wide else ''}{rest}", style)
        # The longest of the outcomes.
        room = self._width - left.cell_len - (33 if wide else 23)
        text = Text(change.text)
        if self._console.is_terminal:
            text.truncate(room, overflow="ellipsis", pad=True)
        else:
            text.pad_right(max(0, room - text.cell_len))
        self._print(Text.assemble(left, text, right))

    def _print(self, text: Text | str = "") -> None:
        # Never broken into lines of its own: a URL stays whole, and a terminal wraps by itself.
        self._console.print(text, soft_wrap=True)


class _Quiet:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def _style(change: Change) -> str:
    return _LEVELS.get(change.level) or _STYLES.get(change.table, "")


def _ms(change: Change) -> str:
    return f"{change.took_ms:,.0f}"


def _many(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def _percentiles(times: Sequence[float]) -> str:
    """Of a sorted list of milliseconds."""
    if not times:
        return ""
    p50, p99 = (times[min(len(times) - 1, int(len(times) * part))] for part in (0.5, 0.99))
    return f"; from COMMIT to the dashboard: p50 {p50:,.0f} ms, p99 {p99:,.0f} ms, slowest {times[-1]:,.0f} ms"


def _record(line: str) -> dict[str, object] | None:
    """A log line's fields; None for what is no log line, a stack trace for instance."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"timestamp", "level", "event"} <= record.keys() else None


def _count_lines(log: Path) -> tuple[int, int]:
    """All lines of the worker's log, and those that are worse than an information."""
    lines = log.read_text(errors="replace").splitlines()
    return len(lines), sum((_record(line) or {}).get("level") != "info" for line in lines)
