"""Batches on their way to Convex: taken from the lanes, repeated until their outcome is known, settled key by key."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence

import structlog

from cdc_worker.documents import Event, Problem
from cdc_worker.errors import Fenced, FunctionFailed, Overloaded, Transient
from cdc_worker.functions import Functions, Verdict
from cdc_worker.lanes import Lanes
from cdc_worker.liveness import Liveness
from cdc_worker.outage import Outage
from cdc_worker.pace import Pace
from cdc_worker.parking import Parking

log = structlog.get_logger()

KEYS = "the outcome of a batch"
# By verdict: keys since the last heartbeat.
Tally = Counter[str]
# Is told of keys, with their mirrors, that were parked since their mirror is broken.
NoteParked = Callable[[Collection[tuple[int, str]]], Awaitable[None]]


class Sender:
    """Keeps as many batches under way as the pace allows. `run` returns when stopped; otherwise it only raises."""

    def __init__(
        self,
        functions: Functions,
        lanes: Lanes,
        parking: Parking,
        outage: Outage,
        *,
        note_parked: NoteParked,
        epoch: int,
        pace: Pace,
        batch_bytes: int,
        settled: Callable[[], None],
        tally: Tally,
        liveness: Liveness,
    ) -> None:
        self._liveness = liveness
        self._functions = functions
        self._lanes = lanes
        self._parking = parking
        self._note_parked = note_parked
        self._outage = outage
        self._epoch = epoch
        self._pace = pace
        self._batch_bytes = batch_bytes
        self._settled = settled
        self._tally = tally
        # Something to send came in, or a place became free: look again.
        self._wake = asyncio.Event()
        # Repeated all at once, batches that had no answer in time may never have one: Convex goes on with those before.
        self._repeating = asyncio.Lock()
        self._stopping = False
        self._under_way = 0

    def wake(self) -> None:
        if self._lanes.keys:
            self._liveness.works(KEYS)
        self._wake.set()

    def stop(self) -> None:
        """No new batch; `run` returns when those under way are done."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as batches:
            while True:
                self._wake.clear()
                while not self._stopping and self._under_way < self._pace.in_flight:
                    events = self._lanes.take(self._pace.keys, self._batch_bytes)
                    if not events:
                        break
                    self._under_way += 1
                    batches.create_task(self._deliver_whole(events))
                if self._stopping and self._under_way == 0:
                    return
                await self._wake.wait()

    async def _deliver_whole(self, events: Sequence[Event]) -> None:
        unfit = {event[:2]: event.problem for event in events if event.problem is not None}
        if unfit:
            self._tally["parked"] += len(unfit)
            await self._parking.park(unfit)
            await self._note_parked([key for key, (kind, _) in unfit.items() if kind == "mirror"])
        await self._deliver([event for event in events if event.problem is None])
        self._under_way -= 1
        self._lanes.settle(events)
        self._liveness.moved(KEYS) if self._lanes.keys else self._liveness.rests(KEYS)
        self._wake.set()
        self._settled()

    async def _deliver(self, events: Sequence[Event], *, suspect: bool = False) -> None:
        """Brings the events to Convex, or parks them. The same request again until its outcome is known.

        `suspect`: one that was refused by itself already.
        """
        if not events:
            return
        started = time.monotonic()
        full = len(events) >= self._pace.keys
        number = self._pace.sent()
        # An attempt whose outcome is unknown may still be carried out.
        unknown = False

        async def attempt() -> list[Verdict] | None:
            nonlocal unknown
            try:
                return await self._apply(events, number)
            except Transient as error:
                unknown = unknown or not isinstance(error, Overloaded)
                raise
            finally:
                self._liveness.moved(KEYS)

        try:
            verdicts = await self._outage.insist(attempt, repeating=self._repeating)
        except FunctionFailed as failure:
            if unknown:
                # These keys would get new numbers, and the ghost could come after them: a new epoch shuts it out.
                raise Fenced("a batch was refused after an attempt whose outcome is unknown") from None
            await self._bisect(events, str(failure), suspect=suspect)
            return
        self._pace.good(full=full, took_seconds=time.monotonic() - started)
        if verdicts is None:
            raise Fenced("Convex gave this shard another epoch")
        await self._note(events, verdicts, started)

    async def _apply(self, events: Sequence[Event], number: int) -> list[Verdict] | None:
        """Raises FunctionFailed only if these very events are at fault: an empty batch passes."""
        try:
            return await self._functions.apply(self._epoch, [event.text for event in events])
        except Overloaded:
            self._pace.too_much(number)
            raise
        except FunctionFailed:
            await self._functions.probe(self._epoch)
            raise

    async def _bisect(self, events: Sequence[Event], reason: str, *, suspect: bool) -> None:
        if len(events) > 1:
            if len(events) >= self._pace.keys:
                self._pace.too_large()
            middle = len(events) // 2
            await self._deliver(events[:middle])
            await self._deliver(events[middle:])
            return
        if not suspect:
            # Functions that were gone, and came back between its refusal and the probe, are no fault of the key's.
            await self._deliver(events, suspect=True)
            return
        (event,) = events
        self._tally["parked"] += 1
        await self._parking.park({event[:2]: ("refused", reason)})

    async def _note(self, events: Sequence[Event], verdicts: Sequence[Verdict], started: float) -> None:
        pairs = list(zip(events, verdicts, strict=True))
        refused: dict[tuple[int, str], Problem] = {
            event[:2]: ("rejected", verdict["rejected"]) for event, verdict in pairs if not isinstance(verdict, str)
        }
        counts = Counter(verdict if isinstance(verdict, str) else "parked" for verdict in verdicts)
        self._tally.update(counts)
        await self._parking.park(refused)
        await self._parking.settle(event[:2] for event, verdict in pairs if isinstance(verdict, str))
        log.debug("batch.applied", keys=len(events), took_ms=round((time.monotonic() - started) * 1000, 1), **counts)
