"""pgqueuer on asyncpg: a hundred jobs a claim, all of them at once."""

import asyncio
import json
import sys
from typing import Any

import aiohttp
import asyncpg  # type: ignore[import-not-found, unused-ignore]
from pgqueuer import PgQueuer  # type: ignore[import-not-found, unused-ignore]
from pgqueuer.db import AsyncpgDriver  # type: ignore[import-not-found, unused-ignore]
from pgqueuer.queries import Queries  # type: ignore[import-not-found, unused-ignore]

from dev.bench.peers.payload import HEADERS, body, events

_BATCH = 100


async def setup(dsn: str, jobs: int) -> None:
    connection: Any = await asyncpg.connect(dsn)
    queries: Any = Queries(AsyncpgDriver(connection))
    await queries.install()
    texts = [row["event"] for row in await connection.fetch(events(jobs))]
    for start in range(0, jobs, 1_000):
        payloads = [text.encode() for text in texts[start : start + 1_000]]
        await queries.enqueue(["send"] * len(payloads), payloads, [0] * len(payloads))
    await connection.close()


async def work(dsn: str, url: str) -> None:
    connection: Any = await asyncpg.connect(dsn)
    worker: Any = PgQueuer(AsyncpgDriver(connection))
    async with aiohttp.ClientSession(headers=HEADERS) as web:

        async def send(job: Any) -> None:
            async with web.post(f"{url}/api/mutation", data=body(json.loads(job.payload))) as response:
                await response.read()

        worker.entrypoint("send")(send)
        await worker.run(batch_size=_BATCH)


if __name__ == "__main__":
    if sys.argv[1] == "setup":
        asyncio.run(setup(sys.argv[2], int(sys.argv[3])))
    else:
        asyncio.run(work(sys.argv[2], sys.argv[3]))
