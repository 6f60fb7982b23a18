"""What a person sees: a banner, a line for each change, a summary. Plain lines where there is no terminal."""

import json
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
# Time, table and id with the gaps behind them.
_LEFT: Final = 8 + 2 + 12 + 2 + 7 + 2
# The longest of the outcomes.
_RIGHT: Final = 31
_MOST_DIFFERENCES: Final = 20


class Screen:
    """Everything that is printed."""

    def __init__(self, console: Console) -> None:
        self._console = console

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
            self._print(Text.assemble("  ", (name.ljust(13), "bold"), what, (f"   {remark}".rstrip(), "dim")))
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
            self._line(change, Text("→ rolled back: never to be seen", "dim"))
        elif change.overtaken:
            self._line(change, Text("→ overtaken by a later change", "dim"))
        else:
            self._line(change, Text.assemble("→ seen in Convex after ", (f"{_ms(change):>5}", "bold"), " ms"))

    def late(self, change: Change) -> None:
        self._line(change, Text("→ not seen yet", "yellow"))

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
        documents = f"{comparison.activities} activities and {_many(comparison.statuses, 'status', 'statuses')}"
        users = _many(comparison.users, "user")
        self._row("compared", f"{documents}: what the rows give, read by the demo's own SQL,")
        self._row("", f"with what the public queries show of {users}, past ones too, and with the")
        self._row("", "keys of all four mirrors; the worker was not asked")
        if comparison.by_key_only:
            self._row("", f"{comparison.by_key_only} by key only: the query shows a user's newest 100", "yellow")
        lines, warnings = _count_lines(log)
        self._row("worker", f"{_many(lines, 'log line')}, {_many(warnings, 'warning')}")
        self._print()
        if not comparison.differences and not unseen:
            self._print(Text.assemble(("✓ equal", "bold green"), ": every row and every status"))
            return
        for change in unseen[:_MOST_DIFFERENCES]:
            self._line(change, Text("→ never seen", "red"))
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
        self._print(Text.assemble("  ", (name.ljust(10), "dim"), (text, style)))

    def _line(self, change: Change, outcome: Text) -> None:
        at = "" if change.committed_at is None else f"{change.committed_at:%H:%M:%S}"
        key = f"{change.key[:4]}…{change.key[-2:]}" if change.key else ""
        text = Text(change.text)
        if self._console.is_terminal:
            text.truncate(max(16, self._console.width - _LEFT - 2 - _RIGHT), overflow="ellipsis", pad=True)
        else:
            text.align("left", 36)
        style = _LEVELS.get(change.level) or _STYLES.get(change.table, "")
        self._print(
            Text.assemble(
                *((at, "dim"), "  ", (change.table.ljust(12), style), "  ", (key.ljust(7), "dim"), "  "),
                *(text, "  ", outcome),
            )
        )

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
