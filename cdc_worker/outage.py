"""How Convex is insisted upon: backoff with full jitter, for ever; said once when it begins, seldom while it lasts."""

import asyncio
import contextlib
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
# An outage so soon after one that was said is not said. The time doubles for a link that comes and goes.
_SILENCE_SECONDS = 0.2
_FIRST_PAUSE_SECONDS = 0.1
_LEAST_SECONDS = 0.5
_CONVEX = "an answer from Convex"


class Outage:
    """The state of the link to one deployment, shared by all requests to it."""

    def __init__(self, *, longest_pause_seconds: float, liveness: Liveness) -> None:
        self._liveness = liveness
        self._longest = longest_pause_seconds
        self._since: float | None = None
        self._said = -_REMINDER_SECONDS
        self._silence = _SILENCE_SECONDS
        # The outage that lasts was said, so its end is said as well.
        self._said_this = False
        self._tries = 0
        self._over = asyncio.Event()

    async def insist(self, attempt: Callable[[], Awaitable[T]], *, repeating: asyncio.Lock | None = None) -> T:
        """The outcome of `attempt`, repeated while it is Transient or Misconfigured.

        `repeating`: of those that share it one at a time is repeated.
        """
        before: contextlib.AbstractAsyncContextManager[None] = contextlib.nullcontext()

        async def once() -> T:
            nonlocal before
            async with before:
                before = repeating or before
                with self._liveness.waits_for(_CONVEX):
                    return await attempt()

        value: T = await AsyncRetrying(
            wait=wait_random_exponential(multiplier=_FIRST_PAUSE_SECONDS, max=self._longest),
            retry=retry_if_exception_type((Transient, Misconfigured)),
            before_sleep=self._failed,
            sleep=self._sleep,
            reraise=True,
        )(once)
        self._recovered()
        return value

    def _failed(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        assert isinstance(error, Transient | Misconfigured)
        self._say(error)

    async def _sleep(self, seconds: float) -> None:
        """Sleeps so long, or until another request gets through; but a while at least, to keep its own backoff."""
        least = min(seconds, _LEAST_SECONDS)
        await asyncio.sleep(least)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds - least):
                await self._over.wait()

    def _say(self, error: Transient | Misconfigured) -> None:
        now = time.monotonic()
        self._tries += 1
        if self._since is None:
            self._since = now
            self._over.clear()
        # Of a link that comes and goes less and less is said; an outage that lasts is said in any case.
        if now - self._said >= _REMINDER_SECONDS:
            self._silence = _SILENCE_SECONDS
        if now - self._said >= (_REMINDER_SECONDS if self._said_this else self._silence):
            self._said = now
            self._said_this = True
            self._silence = min(self._silence * 2, _REMINDER_SECONDS)
            is_ours = isinstance(error, Misconfigured)
            say = log.error if is_ours else log.warning
            say(
                "convex.misconfigured" if is_ours else "convex.unreachable",
                cause=str(error),
                since_seconds=round(now - self._since),
                tries=self._tries,
                cure="nothing is lost; trying on" + ("; restart the worker if a setting changes" if is_ours else ""),
            )

    def _recovered(self) -> None:
        if self._since is None:
            return
        if self._said_this:
            log.info("convex.recovered", after_seconds=round(time.monotonic() - self._since, 1), tries=self._tries)
        self._since, self._tries, self._said_this = None, 0, False
        self._over.set()
