"""Case 4: what capture costs the application's writers. The same table with triggers and without, turn by turn."""

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Final, Literal

from dev.bench.results import Bench, Results, Row, median
from dev.bench.stage import ROWS, Stage, stage
from dev.postgres import Server

Table = Literal["bench_event", "bench_plain"]
TABLES: Final[tuple[Table, ...]] = ("bench_plain", "bench_event")
_LOADED: Final = 100_000
_BULK: Final = 10_000


class NoPgbench(Exception):
    """Neither the server's own programs nor the PATH have pgbench."""


def writers(bench: Bench, results: Results) -> list[Row]:
    rows: list[Row] = []
    with stage(bench.server) as on:
        for table in TABLES:
            on.rows = 0
            on.add(bench.size(_LOADED, 1_000), table=table)
        on.execute("vacuum analyze bench_event, bench_plain")
        rows += _single_rows(bench, on)
        rows += _bulk(bench, on)
    del results
    return rows


def _single_rows(bench: Bench, on: Stage) -> list[Row]:
    rows: list[Row] = []
    rounds, seconds = bench.size(4, 1), bench.size(3, 1)
    on.execute("create sequence bench_id start 10000000")
    for what in ("insert", "update"):
        for clients in (1, 16, 64) if not bench.quick else (4,):
            rates: dict[Table, list[float]] = {table: [] for table in TABLES}
            wal: dict[Table, list[float]] = {table: [] for table in TABLES}
            for _ in range(rounds):
                for table in TABLES:
                    before = on.wal()
                    rate, done = _pgbench(on, _script(what, table, bench.size(_LOADED, 1_000)), clients, seconds)
                    rates[table].append(rate)
                    wal[table].append((on.wal() - before) / max(done, 1))
            rows.append(
                {
                    "what": f"{what}, {clients} client{'s' * (clients > 1)}",
                    "without": median(rates["bench_plain"]),
                    "with": median(rates["bench_event"]),
                    # Of neighbours in time, so that a noisy minute is in both.
                    "ratio": median(b / a for a, b in zip(rates["bench_plain"], rates["bench_event"], strict=True)),
                    "wal_without": median(wal["bench_plain"]),
                    "wal_with": median(wal["bench_event"]),
                }
            )
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
    """Statements of 10,000 rows: how many times longer, and bytes of log for each row."""
    rows: list[Row] = []
    size = bench.size(_BULK, 500)
    took: dict[tuple[str, Table], list[float]] = {}
    wal: dict[tuple[str, Table], list[float]] = {}
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
                took.setdefault((what, table), []).append(time.perf_counter() - began)
                wal.setdefault((what, table), []).append((on.wal() - before) / size)
    for what in ("insert", "update", "delete"):
        without, with_ = took[what, "bench_plain"], took[what, "bench_event"]
        rows.append(
            {
                "what": f"{what} of {size:,} rows",
                "without": median(without) * 1e6 / size,
                "with": median(with_) * 1e6 / size,
                "ratio": median(b / a for a, b in zip(without, with_, strict=True)),
                "wal_without": median(wal[what, "bench_plain"]),
                "wal_with": median(wal[what, "bench_event"]),
            }
        )
    return rows


def _program(server: Server) -> Path:
    beside = server.bin_dir / "pgbench"
    if beside.exists():
        return beside
    found = shutil.which("pgbench")
    if found is None:
        raise NoPgbench("this Postgres has no pgbench (Debian: apt-get install postgresql)")
    return Path(found)


def _pgbench(on: Stage, script: str, clients: int, seconds: int) -> tuple[float, int]:
    """Transactions per second, and how many there were."""
    file = on.folder / "script.sql"
    file.write_text(script)
    # Prepared and through the socket: what is left of a statement is its work, so that ours shows most.
    done = subprocess.run(
        [
            *(_program(on.server), "--no-vacuum", "--protocol=prepared", f"--file={file}"),
            *(f"--client={clients}", f"--jobs={min(clients, 2)}", f"--time={seconds}", on.socket_dsn),
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
