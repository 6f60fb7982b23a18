"""What most people write first: a queue table, NOTIFY from a trigger; claim one row, POST, mark it done."""

import sys
from typing import LiteralString

import psycopg
import requests  # type: ignore[import-untyped, unused-ignore]

from dev.bench.peers.payload import HEADERS, body, events

_SCHEMA: LiteralString = """
create table naive_job (
    id bigint generated always as identity primary key, payload jsonb not null, done_at timestamptz
);
create index on naive_job (id) where done_at is null;
create function naive_ring() returns trigger language plpgsql as
    $$ begin perform pg_notify('naive', new.id::text); return null; end $$;
create trigger naive_ring after insert on naive_job for each row execute function naive_ring();
"""
_CLAIM = "select id, payload from naive_job where done_at is null order by id limit 1 for update skip locked"


def setup(dsn: str, jobs: int) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(_SCHEMA)
        connection.execute(f"insert into naive_job (payload) {events(jobs)}")


def work(dsn: str, url: str) -> None:
    web = requests.Session()
    web.headers.update(HEADERS)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("listen naive")
        while True:
            with connection.transaction():
                row = connection.execute(_CLAIM).fetchone()
                if row is not None:
                    web.post(f"{url}/api/mutation", body(row[1]), timeout=10).raise_for_status()
                    connection.execute("update naive_job set done_at = now() where id = %s", (row[0],))
            if row is None:
                for _ in connection.notifies(timeout=1.0, stop_after=1):
                    pass


if __name__ == "__main__":
    if sys.argv[1] == "setup":
        setup(sys.argv[2], int(sys.argv[3]))
    else:
        work(sys.argv[2], sys.argv[3])
