"""No worker at all: the application calls Convex after each of its commits."""

import sys

import psycopg
import requests  # type: ignore[import-untyped, unused-ignore]
from psycopg.types.json import Jsonb

from dev.bench.peers.payload import HEADERS, body, events


def setup(dsn: str, jobs: int) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("create table wish (id bigint generated always as identity, event jsonb not null)")
        connection.execute("create table written (id bigint primary key, event jsonb not null)")
        connection.execute(f"insert into wish (event) {events(jobs)}")


def work(dsn: str, url: str) -> None:
    web = requests.Session()
    web.headers.update(HEADERS)
    with psycopg.connect(dsn, autocommit=True) as connection:
        for number, event in connection.execute("select id, event from wish order by id").fetchall():
            connection.execute("insert into written values (%s, %s)", (number, Jsonb(event)))
            web.post(f"{url}/api/mutation", body(event), timeout=10).raise_for_status()


if __name__ == "__main__":
    if sys.argv[1] == "setup":
        setup(sys.argv[2], int(sys.argv[3]))
    else:
        work(sys.argv[2], sys.argv[3])
