"""Pictures of the results as SVG, by hand: bars and lines are all that is needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from dev.bench.results import Results

FOLDER: Final = Path(__file__).parents[2] / "docs/performance"

_WIDTH: Final = 760
_INK: Final = "#57606a"
_OURS: Final = "#0969da"
_OTHERS: Final = "#8c959f"
_COLOURS: Final = (_OURS, "#bc4c00", "#1a7f37", "#8250df")

Point = tuple[float, float]


def write(results: Results) -> list[Path]:
    """The pictures for which there are figures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    made: dict[str, str] = {}
    if results.cases.get("peers"):
        rows = sorted(results.cases["peers"], key=lambda row: -row["jobs_per_second"])
        made["peers"] = bars(
            "Changes (jobs) a second to a server that answers at once",
            [(row["what"], row["jobs_per_second"]) for row in rows],
            ours="cdc_worker",
        )
    if results.cases.get("profile"):
        made["stations"] = bars(
            "Processor time of the worker, microseconds for each key",
            [(row["what"], row["us_per_key"]) for row in results.cases["profile"]],
            digits=1,
        )
    if any("nothing_ratio" in row for row in results.cases.get("writers", ())):
        made["writers"] = bars(
            "Writers' rate with triggers, as a share of the rate without",
            [
                bar
                for row in results.cases["writers"]
                if "client" in row["what"]
                for bar in (
                    (row["what"], row["ratio"]),
                    ("the floor", row["floor_ratio"]),
                    ("a trigger that does nothing", row["nothing_ratio"]),
                )
            ],
            ours=("insert", "update"),
            digits=2,
            full=1.0,
        )
    for what, name in (
        ("200 ms", "distance"),
        ("200 ms, 429 above 6 at once", "refusals"),
        ("50 ms, conflict above 6 at once", "conflicts"),
    ):
        trace = results.traces.get(f"distance {what}")
        if trace:
            made[name] = panels(
                f"A deployment at {what}",
                [
                    ("keys a second", [(at, rate) for at, rate, *_ in trace]),
                    ("keys in a batch", [(at, size) for at, _, size, *_ in trace]),
                    ("batches in flight", [(at, flying) for at, _, _, flying, _ in trace]),
                    *([("refused", [(at, no) for at, *_, no in trace])] if any(no for *_, no in trace) else []),
                ],
            )
    for name, picture in made.items():
        (FOLDER / f"{name}.svg").write_text(picture)
    return [FOLDER / f"{name}.svg" for name in made]


def bars(
    title: str,
    values: Sequence[tuple[str, float]],
    *,
    ours: str | tuple[str, ...] = "",
    digits: int = 0,
    full: float = 0.0,
) -> str:
    """One horizontal bar for each value; `full` has the whole width, if no value is larger."""
    left, step, top = 250, 26, 44
    most = max([full, *(value for _, value in values)]) or 1.0
    room = _WIDTH - left - 90
    parts = [_text(0, 20, title, size=15)]
    for number, (label, value) in enumerate(values):
        y = top + number * step
        colour = _OURS if label.startswith(ours) else _OTHERS
        parts += [
            _text(left - 8, y + 14, label, anchor="end"),
            f'<rect x="{left}" y="{y}" width="{max(value / most * room, 1):.1f}" height="18" fill="{colour}"/>',
            _text(left + value / most * room + 6, y + 14, f"{value:,.{digits}f}"),
        ]
    return _svg(top + len(values) * step + 6, parts)


def panels(title: str, series: Sequence[tuple[str, Sequence[Point]]]) -> str:
    """One line over time for each series, one below the other."""
    left, height, gap, top = 60, 90, 34, 44
    end = max(x for _, points in series for x, _ in points) or 1.0
    room = _WIDTH - left - 20
    parts = [_text(0, 20, title, size=15)]
    for number, (label, points) in enumerate(series):
        y0 = top + number * (height + gap)
        most = max(y for _, y in points) or 1.0
        path = " ".join(f"{left + x / end * room:.1f},{y0 + height - y / most * height:.1f}" for x, y in points)
        parts += [
            _text(left, y0 - 5, label),
            _text(left - 6, y0 + 10, f"{most:,.0f}", anchor="end"),
            _text(left - 6, y0 + height, "0", anchor="end"),
            f'<path d="M{left} {y0}V{y0 + height}H{left + room}" fill="none" stroke="{_INK}"/>',
            f'<polyline points="{path}" fill="none" stroke="{_COLOURS[number % 4]}" stroke-width="2"/>',
        ]
    bottom = top + len(series) * (height + gap)
    parts += [_text(left, bottom - 14, "0 s"), _text(left + room, bottom - 14, f"{end:.0f} s", anchor="end")]
    return _svg(bottom, parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}"'
        f' font-family="system-ui, sans-serif" fill="{_INK}">'
    )
    return "\n".join([head, *parts, "</svg>", ""])
