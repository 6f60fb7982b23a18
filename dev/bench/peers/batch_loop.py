"""The naive loop's queue, drained by hand as quickly as that goes: claim 500 rows, one POST for all, delete them."""

import sys
from typing import LiteralString

import psycopg
import requests  # type: ignore[import-untyped, unused-ignore]

from dev.bench.peers.naive import setup
from dev.bench.peers.payload import HEADERS, body_of_texts

# As text: to parse what is only handed on would be the largest part of the work.
_CLAIM: LiteralString = """
select id, payload::text from naive_job where done_at is null order by id limit 500 for update skip locked
"""


def work(dsn: str, url: str) -> None:
    web = requests.Session()
    web.headers.update(HEADERS)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("listen naive")
        while True:
            with connection.transaction():
                rows = connection.execute(_CLAIM).fetchall()
                if rows:
                    request = body_of_texts([payload for _, payload in rows])
                    web.post(f"{url}/api/mutation", request, timeout=10).raise_for_status()
                    connection.execute("delete from naive_job where id = any(%s)", ([number for number, _ in rows],))
            if not rows:
                for _ in connection.notifies(timeout=1.0, stop_after=1):
                    pass


if __name__ == "__main__":
    if sys.argv[1] == "setup":
        setup(sys.argv[2], int(sys.argv[3]))
    else:
        work(sys.argv[2], sys.argv[3])
