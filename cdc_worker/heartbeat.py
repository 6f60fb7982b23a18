"""The heartbeat: a line now and then that says how things stand."""

import asyncio
import time

import psycopg
import structlog

from cdc_worker.database import Database
from cdc_worker.lanes import Lanes
from cdc_worker.outbox import Shard, backlog
from cdc_worker.pace import Pace
from cdc_worker.parking import Parking
from cdc_worker.reader import Reader
from cdc_worker.sender import Tally

log = structlog.get_logger()

# It counts no further: what is beyond is "many".
_BACKLOG_COUNTED = 100_000


async def beat(
    database: Database,
    shard: Shard,
    reader: Reader,
    lanes: Lanes,
    *,
    parking: Parking,
    pace: Pace,
    tally: Tally,
    seconds: float,
) -> None:
    """A line every so many `seconds`, for ever."""
    while True:
        await asyncio.sleep(seconds)
        since = lanes.oldest_since
        log.info(
            "worker.heartbeat",
            shard=str(shard),
            lag_seconds=round(time.monotonic() - since, 1) if since is not None else 0.0,
            backlog=await _backlog(database, shard, reader),
            keys_under_way=lanes.keys,
            parked_keys=await parking.in_database(),
            batch_keys=pace.keys,
            batches_in_flight=pace.in_flight,
            **tally,
        )
        tally.clear()


async def _backlog(database: Database, shard: Shard, reader: Reader) -> int:
    if reader.caught_up.is_set():
        return 0
    try:
        return await backlog(database, shard, reader.position, _BACKLOG_COUNTED)
    except psycopg.errors.QueryCanceled:  # many of other shards' to pass over
        return _BACKLOG_COUNTED
