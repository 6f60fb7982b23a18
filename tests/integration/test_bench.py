"""The benchmark runs: its smallest sizes, and that its own instruments count right."""

import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psycopg
import pytest

from dev import postgres
from dev.bench import sink
from dev.bench.wire import Wire

ROOT = Path(__file__).parents[2]
# Long enough for a second request on a busy machine to come meanwhile.
DELAY_SECONDS = 3.0


def test_smoke() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dev.bench", "drain", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2,000 keys" in done.stdout


def test_a_case_that_is_not_there_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dev.bench", "nonsense"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr


@pytest.mark.one_postgres
def test_the_wire_counts_statements_and_transactions(database: str, postgres_server: postgres.Server) -> None:
    del postgres_server
    with Wire(database) as wire:
        with psycopg.connect(wire.dsn, autocommit=True) as connection:
            connection.execute("select 1")
            connection.execute("select %s::int", (2,))
            with connection.transaction():
                connection.execute("create table here (n int)")
                connection.execute("insert into here select generate_series(1, 10000)")
            assert connection.execute("select n from here order by n").fetchall()[-1] == (10_000,)
        assert wire.counts.by_words["select 1"] == 1
        assert wire.counts.by_words["select $1::int"] == 1
        assert wire.counts.statements == 7, wire.counts
        assert wire.counts.transactions == 4
        assert wire.counts.bytes_from_postgres > 10_000 * 10


def test_the_sink_counts_delays_and_refuses() -> None:
    event = '{"key":"rows:7","number":1.0,"target":"activity","document":{"description":"a \\"target\\": in a text"}}'
    body = '{"path":"cdc:apply","format":"x","args":{"events":[%s]}}'

    def post(client: sink.Client, keys: int) -> int:
        request = urllib.request.Request(f"{client.url}/api/mutation", (body % ",".join([event] * keys)).encode())
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    with sink.start() as client:
        assert post(client, 3) == 200
        assert (client.counts().requests, client.counts().keys) == (1, 3)
        client.control(delay_ms=DELAY_SECONDS * 1000, limit=1, refusal=503, trace_keys=True)
        slow = threading.Thread(target=post, args=(client, 1))
        began = time.monotonic()
        slow.start()
        while not client.counts().most_at_once:
            time.sleep(0.01)
        assert post(client, 1) == 503
        slow.join()
        counts = client.counts()
        assert counts.last_at - began >= DELAY_SECONDS
        assert (counts.keys, counts.refused, counts.most_at_once) == (1, 1, 1)
        assert list(counts.answered) == ["7"]
