"""How Convex is insisted upon: backoff with full jitter, for ever; said once when it begins, seldom while it lasts."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from cdc_worker.errors import Misconfigured, Transient
from cdc_worker.liveness import Liveness

log = structlog.get_logger()
T = TypeVar("T")

# While it lasts, one line in so many seconds.
_REMINDER_SECONDS = 300.0
_FIRST_PAUSE_SECONDS = 0.1
_CONVEX = "an answer from Convex"


class Outage:
    """The state of the link to one deployment, shared by all requests to it."""

    def __init__(self, *, longest_pause_seconds: float, liveness: Liveness) -> None:
        self._liveness = liveness
        self._asking = 0
        self._longest = longest_pause_seconds
        self._since: float | None = None
        self._said = 0.0
        self._tries = 0
        self._over = asyncio.Event()

    async def insist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The outcome of `attempt`, repeated while it is Transient or Misconfigured."""

        async def once() -> T:
            return await attempt()

        self._asking += 1
        self._liveness.moved(_CONVEX)
        try:
            value: T = await AsyncRetrying(
                wait=wait_random_exponential(multiplier=_FIRST_PAUSE_SECONDS, max=self._longest),
                retry=retry_if_exception_type((Transient, Misconfigured)),
                before_sleep=self._failed,
                sleep=self._sleep,
                reraise=True,
            )(once)
        finally:
            self._asking -= 1
            self._liveness.moved(_CONVEX) if self._asking else self._liveness.rests(_CONVEX)
        self._recovered()
        return value

    def _failed(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        assert isinstance(error, Transient | Misconfigured)
        self._liveness.moved(_CONVEX)
        self._say(error)

    async def _sleep(self, seconds: float) -> None:
        """As long as that, or until somebody else gets through."""
        try:
            async with asyncio.timeout(seconds):
                await self._over.wait()
        except TimeoutError:
            return

    def _say(self, error: Transient | Misconfigured) -> None:
        now = time.monotonic()
        self._tries += 1
        first = self._since is None
        if first:
            self._since = now
            self._over.clear()
        assert self._since is not None
        if first or now - self._said >= _REMINDER_SECONDS:
            self._said = now
            event = "convex.misconfigured" if isinstance(error, Misconfigured) else "convex.unreachable"
            say = log.error if isinstance(error, Misconfigured) else log.warning
            say(
                event,
                cause=str(error),
                since_seconds=round(now - self._since),
                tries=self._tries,
                cure="nothing is lost; trying on",
            )

    def _recovered(self) -> None:
        if self._since is not None:
            log.info("convex.recovered", after_seconds=round(time.monotonic() - self._since, 1), tries=self._tries)
            self._since, self._tries = None, 0
            self._over.set()
