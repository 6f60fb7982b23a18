"""Case 4: what capture costs the application's writers.

The same table with its triggers, without any, with some that do nothing, and with the least that a trigger can write,
turn by turn.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from dev.bench.results import Bench, Results, Row, median
from dev.bench.stage import ROWS, Stage, altered, stage
from dev.bench.triggers import EVENTS, NOTHING, add_triggers, only_the_key
from dev.postgres import Server

Table = Literal["bench_plain", "bench_idle", "bench_floor", "bench_event"]
TABLES: Final[dict[Table, str]] = {
    "bench_plain": "without",
    "bench_idle": "nothing",
    "bench_floor": "floor",
    "bench_event": "with",
}
"""And what they are in the results."""

Way = Literal["", ", commits of 5 ms", ", pgbench's default"]
# What is left of a statement that was prepared, through the socket, is its work, so that ours shows most. Then the same
# where a commit takes its time, as with a disk in the network; and what pgbench does unless it is told otherwise.
_WAYS: Final[dict[Way, Sequence[int]]] = {
    "": (1, 16, 64),
    ", commits of 5 ms": (16, 64),
    ", pgbench's default": (16, 64),
}

_LOADED: Final = 100_000
_BULK: Final = 10_000


class NoPgbench(Exception):
    """Neither the server's own programs nor the PATH have pgbench."""


class _Turns:
    """Figures of the three tables, turn by turn, for one row of the results."""

    def __init__(self) -> None:
        self._figures: dict[Table, list[float]] = {table: [] for table in TABLES}
        self._wal: dict[Table, list[float]] = {table: [] for table in TABLES}

    def note(self, table: Table, figure: float, wal_bytes: float) -> None:
        self._figures[table].append(figure)
        self._wal[table].append(wal_bytes)

    def row(self, what: str) -> Row:
        return {
            "what": what,
            **{column: median(self._figures[table]) for table, column in TABLES.items()},
            "nothing_ratio": self._ratio("bench_idle"),
            "floor_ratio": self._ratio("bench_floor"),
            "ratio": self._ratio("bench_event"),
            "wal_without": median(self._wal["bench_plain"]),
            "wal_with": median(self._wal["bench_event"]),
        }

    def _ratio(self, table: Table) -> float:
        """Of neighbours in time, so that a noisy minute is in both."""
        return median(b / a for a, b in zip(self._figures["bench_plain"], self._figures[table], strict=True))


def writers(bench: Bench, results: Results) -> list[Row]:
    del results
    with stage(bench.server) as on:
        for table, body in (("bench_idle", lambda _: NOTHING), ("bench_floor", only_the_key)):
            on.execute(f"create table {table} (like bench_plain including all)")
            add_triggers(on, table, {event: body(event) for event in EVENTS})
        for table in TABLES:
            on.rows = 0
            on.add(bench.size(_LOADED, 1_000), table=table)
        on.execute(f"vacuum analyze {', '.join(TABLES)}")
        # First: what crowds leave behind keeps autovacuum and the disk busy for minutes.
        bulk = _bulk(bench, on)
        on.execute(f"vacuum analyze {', '.join(TABLES)}")
        return _single_rows(bench, on) + bulk


def _single_rows(bench: Bench, on: Stage) -> list[Row]:
    rows: list[Row] = []
    rounds, seconds = bench.size(4, 1), bench.size(2, 1)
    on.execute("create sequence bench_id start 10000000")
    for way, crowds in _WAYS.items():
        # Whoever writes the log to the disk, for all who commit just then, sleeps so long before.
        microseconds = 5_000 if way == ", commits of 5 ms" else 0
        with altered(on.server, {"commit_delay": microseconds, "commit_siblings": 0}):
            for what in ("insert", "update"):
                for clients in crowds if not bench.quick else (4,):
                    turns = _Turns()
                    for _ in range(rounds):
                        for table in TABLES:
                            before = on.wal()
                            script = _script(what, table, bench.size(_LOADED, 1_000))
                            rate, done = _pgbench(on, script, way, clients, seconds)
                            turns.note(table, rate, (on.wal() - before) / max(done, 1))
                    rows.append(turns.row(f"{what}, {clients} client{'s' * (clients > 1)}{way}"))
    return rows


def _script(what: str, table: Table, loaded: int) -> str:
    if what == "update":
        return f"\\set id random(1, {loaded})\nupdate {table} set note = 'Note ' || :id || now() where id = :id;\n"
    details = '{"mood": "good", "score": 7, "device": "0cc175b9c0f1b6a831c399e269772661", "tags": ["a", "b"]}'
    return (
        "\\set user random(1, 2000)\n"
        # Ids far above those of other cases.
        f"insert into {table} values (nextval('bench_id'), 'user-' || :user, 'check-in',"
        f" '{'Feeling well today. ' * 8}', '{details}', now());\n"
    )


def _bulk(bench: Bench, on: Stage) -> list[Row]:
    """Statements of 10,000 rows: microseconds and bytes of log for each row."""
    size = bench.size(_BULK, 500)
    turns = {what: _Turns() for what in ("insert", "update", "delete")}
    # Rows that are there already, so that making them up is not what takes the time.
    on.execute("create unlogged table bench_stock (like bench_plain)")
    on.execute(f"insert into bench_stock {ROWS} from generate_series(1, {size}) as i")
    on.execute("vacuum analyze bench_stock")
    columns = "user_id, kind, note, details, created_at"
    for number in range(bench.size(9, 1)):
        for table in TABLES:
            first = 20_000_000 + number * size
            place = f"id > {first} and id <= {first + size}"
            for what, statement in (
                ("insert", f"insert into {table} select {first} + id, {columns} from bench_stock"),  # noqa: S608  # our own text
                ("update", f"update {table} set note = note || '.' where {place}"),  # noqa: S608  # our own text
                ("delete", f"delete from {table} where {place}"),  # noqa: S608  # our own text
            ):
                before, began = on.wal(), time.perf_counter()
                on.execute(statement)
                took = time.perf_counter() - began
                turns[what].note(table, took * 1e6 / size, (on.wal() - before) / size)
    return [each.row(f"{what} of {size:,} rows") for what, each in turns.items()]


def _program(server: Server) -> Path:
    beside = server.bin_dir / "pgbench"
    if beside.exists():
        return beside
    found = shutil.which("pgbench")
    if found is None:
        raise NoPgbench("this Postgres has no pgbench (Debian: apt-get install postgresql)")
    return Path(found)


def _pgbench(on: Stage, script: str, way: Way, clients: int, seconds: int) -> tuple[float, int]:
    """Transactions per second, and how many there were."""
    file = on.folder / "script.sql"
    file.write_text(script)
    protocol, dsn = ("simple", on.dsn) if way == ", pgbench's default" else ("prepared", on.socket_dsn)
    done = subprocess.run(
        [
            *(_program(on.server), "--no-vacuum", f"--protocol={protocol}", f"--file={file}"),
            *(f"--client={clients}", f"--jobs={min(clients, 2)}", f"--time={seconds}", dsn),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 30,
    )
    rate = re.search(r"tps = ([\d.]+)", done.stdout)
    count = re.search(r"number of transactions actually processed: (\d+)", done.stdout)
    assert rate is not None
    assert count is not None
    return float(rate[1]), int(count[1])
