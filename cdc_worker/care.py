"""What can wait, beside reading and sending: rotation, bare or changed tables, broken mirrors, rescans."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import psycopg
import structlog

from cdc_worker import backfill
from cdc_worker.checkpoint import Checkpoint
from cdc_worker.database import Database
from cdc_worker.functions import Functions
from cdc_worker.mirrors import Mirror
from cdc_worker.outage import Outage
from cdc_worker.outbox import Shard
from cdc_worker.plan import Plan
from cdc_worker.postgres_errors import cause, is_surely_gone
from cdc_worker.reader import Reader
from cdc_worker.registry import Registry
from cdc_worker.rotation import rotate
from cdc_worker.settings import Settings
from cdc_worker.tables import look_at_tables
from cdc_worker.triggers import Gaps, find_gaps

log = structlog.get_logger()
T = TypeVar("T")

# Between two rounds: long, since an idle worker is to cost next to nothing; short if a mirror is broken.
_SELDOM_SECONDS = 120.0
_MENDING_SECONDS = 15.0
# A mirror whose capture is broken asks for a rescan with each write: at most one begins in this time.
_RESCAN_SECONDS = 1.0
# And at most one line in this time says that it asks.
_RESCAN_REMINDER_SECONDS = 60.0
# So long, and for two answers at least, one thing waits for Convex before other care comes first.
_PATIENCE_SECONDS = 120.0
# Tables without triggers are named again after this time: nothing else tells of the changes that are not seen.
_MISSING_REMINDER_SECONDS = 300.0


class _OtherCareFirst(Exception):
    """What waits for Convex has waited long enough. It is taken up again in the next round."""


class Care:
    """One loop, one thing after the other, so that none of them ever competes with the mirror itself."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        functions: Functions,
        outage: Outage,
        registry: Registry,
        *,
        checkpoint: Checkpoint,
        shard: Shard,
        epoch: int,
        config: Sequence[Mirror],
    ) -> None:
        self._settings = settings
        self._database = database
        self._functions = functions
        self._outage = outage
        self._registry = registry
        self._checkpoint = checkpoint
        self._shard = shard
        self._epoch = epoch
        # As Convex was told last: when the shard was opened.
        self._config = config
        self._soon = asyncio.Event()
        # What failed, so that each is said once.
        self._said: set[str] = set()
        # When a mirror's log was last said to ask for a rescan (monotonic).
        self._rescan_said: dict[int, float] = {}
        # Tables last seen without triggers, or with some that had been off.
        self._gaps = Gaps([], [])
        # When the bare ones were said (monotonic).
        self._missing_said = -math.inf
        # What Convex is told of saves, perhaps without an answer, and its first answer: the same until all is noted.
        self._telling: int | None = None
        self._heard: int | None = None

    async def note_rescans(self, mirror_ids: set[int]) -> None:
        """The log asks for rescans: noted in the database, so that the log's rows may be acknowledged."""
        for mirror_id in mirror_ids:
            state = self._registry.states[mirror_id]
            if state.retired:
                continue
            now = time.monotonic()
            if now - self._rescan_said.get(mirror_id, -math.inf) > _RESCAN_REMINDER_SECONDS:
                self._rescan_said[mirror_id] = now
                log.warning(
                    "capture.rescan",
                    mirror=state.name,
                    cause="a source was truncated, or lost a column that capture needs",
                    cure="none needed if truncated; otherwise mend cdc_worker.toml, run migrate, restart the worker",
                )
            await backfill.request(self._database, mirror_id, "source truncated or changed")
        self._soon.set()

    async def run(self, reader: Reader) -> None:
        while True:
            # Before the round: what is asked for while it runs is for the next one.
            self._soon.clear()
            for duty in self._duties(reader):
                try:
                    await duty()
                except psycopg.Error as error:
                    self._note_failure(error, "")
                except _OtherCareFirst:
                    self._soon.set()
            await self._rest()

    def _note_failure(self, error: psycopg.Error, what: str) -> None:
        """Raises it if the database is gone. None else of this is worth the mirror's standing still."""
        if is_surely_gone(error):
            raise error
        said = f"{what}{cause(error)}"
        if said not in self._said:
            self._said.add(said)
            log.error("care.failed", cause=said, cure="tried again; the mirror itself goes on")

    async def _rest(self) -> None:
        for _ in range(round(_SELDOM_SECONDS / _MENDING_SECONDS)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_MENDING_SECONDS):
                    await self._soon.wait()
            if self._soon.is_set():
                return await asyncio.sleep(_RESCAN_SECONDS)
            if self._registry.broken:
                return None
        return None

    def _duties(self, reader: Reader) -> Sequence[Callable[[], Awaitable[object]]]:
        """In their order. One that fails, a rotation in a database that refuses DDL, keeps none of the others."""
        common = self._shard.number == 0  # what all shards have in common is the first one's
        return (
            *((self._rotate, self._look_at_triggers) if common else ()),
            self._registry.mend,
            *((self._look_at_tables,) if common else ()),
            self._note_saves,
            lambda: self._rescan(reader),
        )

    async def _rotate(self) -> None:
        try:
            await rotate(
                self._database,
                retention_hours=self._settings.retention_hours,
                partition_bytes=self._settings.partition_bytes,
            )
        except psycopg.Error as error:
            self._note_failure(error, "turning the log: ")

    async def _look_at_tables(self) -> None:
        plans = self._registry.plans
        await look_at_tables(self._database, {number: plan.mirror for number, plan in plans.items()})

    async def _look_at_triggers(self) -> None:
        """A table that was made anew, or a new partition, has none: said when seen, when it changes, and seldom."""
        gaps = await find_gaps(self._database, self._config)
        now = time.monotonic()
        if gaps.bare and (gaps.bare != self._gaps.bare or now - self._missing_said > _MISSING_REMINDER_SECONDS):
            self._missing_said = now
            log.error(
                "capture.missing",
                tables=gaps.bare,
                cure="run `cdc-worker migrate`: it brings them back, and has every row looked at again",
            )
        again = {*self._gaps.bare, *gaps.reenabled} - {*gaps.bare, *self._gaps.reenabled}
        if again:
            # Nobody captured what was written before: a restore makes triggers last, or disables them meanwhile.
            log.warning(
                "capture.restored",
                tables=sorted(again),
                cure="every row is looked at again; unless `cdc-worker migrate` brought them back, run it, so that the"
                " next time is noticed, too",
            )
            await backfill.request_all(self._database, "a source had no triggers")
        self._gaps = gaps

    async def _note_saves(self) -> None:
        """Tells each side now and then how far the other was: so a side that is set back later is found out."""
        saves = self._telling or self._checkpoint.saves
        told = self._checkpoint.told_saves
        if saves == told:
            return
        self._telling = saves
        if self._heard is None:
            self._heard = await self._insist(lambda: self._functions.note_saves(self._epoch, saves))
        if self._heard is None:
            return  # another epoch: the next batch is told, too
        # A call that was repeated finds its own note.
        if self._heard not in {saves, told}:
            reason = "the deployment was set back to an older state"
            log.warning("session.rescan", cause=reason, cure="none needed: every row and document is looked at again")
            await backfill.request_all(self._database, reason)
        await self._checkpoint.note_told(saves)
        self._telling = self._heard = None

    async def _rescan(self, reader: Reader) -> None:
        plans = self._registry.plans
        until = time.monotonic() + _SELDOM_SECONDS
        try:
            await self._rescan_pages(reader, plans, until)
        except psycopg.Error as error:
            if is_surely_gone(error):
                raise
            # The oldest request comes first, and one whose query fails must not hold up the others: each by itself.
            for mirror_id, plan in plans.items():
                try:
                    await self._rescan_pages(reader, {mirror_id: plan}, until)
                except psycopg.Error as own:
                    self._note_failure(own, f'rescan of mirror "{plan.mirror.name}": ')

    async def _rescan_pages(self, reader: Reader, plans: dict[int, Plan], until: float) -> None:
        """Page by page, each when all before is read: live changes do not queue behind a million old rows. Nor does
        other care: from `until` on it comes first, and then this goes on.
        """
        while (step := await backfill.step(self._database, plans, self._list_documents)) is not None:
            reader.caught_up.clear()
            reader.wake()
            if step.done:
                log.info("backfill.done", mirror=self._registry.states[step.mirror_id].name, keys=step.total_marked)
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await reader.caught_up.wait()
            except TimeoutError:
                self._soon.set()
                return

    async def _list_documents(self, plan: Plan, after: str | None, limit: int) -> Sequence[str]:
        return await self._insist(lambda: self._functions.keys(plan.mirror, after, limit))

    async def _insist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Its outcome. Raises _OtherCareFirst if Convex is away for long."""
        try:
            async with asyncio.timeout(max(_PATIENCE_SECONDS, 2 * self._settings.convex_timeout_seconds)):
                return await self._outage.insist(attempt)
        except TimeoutError:
            raise _OtherCareFirst from None
