"""procrastinate: ten jobs at once, finished ones deleted."""

import asyncio
import sys
from typing import Any

import aiohttp
import psycopg
from procrastinate import App, PsycopgConnector  # type: ignore[import-not-found, unused-ignore]

from dev.bench.peers.payload import HEADERS, body, events

_AT_ONCE = 10
_JOBS = "select 'default', 'send', jsonb_build_object('event', event) from ({}) as e"


async def setup(dsn: str, jobs: int) -> None:
    app: Any = App(connector=PsycopgConnector(conninfo=dsn))
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        # Its own deferring is not what is measured.
        statement: Any = f"insert into procrastinate_jobs (queue_name, task_name, args) {_JOBS.format(events(jobs))}"
        await connection.execute(statement)


async def work(dsn: str, url: str) -> None:
    app: Any = App(connector=PsycopgConnector(conninfo=dsn, max_size=_AT_ONCE + 2))
    async with aiohttp.ClientSession(headers=HEADERS) as web, app.open_async():

        async def send(event: Any) -> None:
            async with web.post(f"{url}/api/mutation", data=body(event)) as response:
                await response.read()

        app.task(send, name="send")
        await app.run_worker_async(concurrency=_AT_ONCE, delete_jobs="successful", wait=True)


if __name__ == "__main__":
    if sys.argv[1] == "setup":
        asyncio.run(setup(sys.argv[2], int(sys.argv[3])))
    else:
        asyncio.run(work(sys.argv[2], sys.argv[3]))
