"""One event loop in a thread of its own, for all callers of the process: it holds their connections to Convex, so that
each call does not pay for a new TLS session.
"""

import asyncio
import atexit
import contextlib
import ctypes
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from cdc_worker.deployment import Deployment
from cdc_worker.settings import ConvexSettings

T = TypeVar("T")


def submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Has the loop do it. Raises RuntimeError if the system gives no thread for the loop."""
    try:
        loop = _LOOP.get()
    except RuntimeError:
        work.close()
        raise
    return asyncio.run_coroutine_threadsafe(work, loop)


async def deployment_of(settings: ConvexSettings) -> Deployment:
    """The open connections to the deployment of these settings. For work that is submitted."""
    return await _LOOP.deployment(settings)


class _Loop:
    """The thread with the event loop, made at the first call, and made anew in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deployments: dict[ConvexSettings, Deployment] = {}

    @property
    def started(self) -> bool:
        return self._loop is not None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                try:
                    threading.Thread(target=loop.run_forever, name="cdc_worker.sync", daemon=True).start()
                except RuntimeError:  # the system gives no more threads
                    loop.close()
                    raise
                self._loop = loop  # not before it runs: whoever is given it waits for it without an end
            return self._loop

    async def deployment(self, settings: ConvexSettings) -> Deployment:
        """Runs in the loop, so calls never overlap half-way."""
        if settings not in self._deployments:
            assert settings.convex_url is not None
            # Those of other settings stay: calls may be under way there.
            self._deployments[settings] = await Deployment(
                settings.convex_url, settings.convex_deploy_key, timeout_seconds=settings.convex_timeout_seconds
            ).__aenter__()
        return self._deployments[settings]

    async def close(self) -> None:
        while self._deployments:
            _, opened = self._deployments.popitem()
            await opened.__aexit__(None, None, None)


_LOOP = _Loop()


def _hang_up() -> None:
    """At the end of the process: connections are closed in order, but nobody waits long for it."""
    if _LOOP.started:
        with contextlib.suppress(TimeoutError):
            submit(_LOOP.close()).result(timeout=1.0)


atexit.register(_hang_up)


def _forget() -> None:
    """In a forked child the thread is gone, and the connections are the parent's."""
    global _LOOP  # noqa: PLW0603  # the one place that replaces it
    # The parent's is never collected here, not even at the end of the process: that would close the connections, and
    # take them out of the epoll that child and parent share, so that the parent hears no answer any more.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_LOOP))
    _LOOP = _Loop()


os.register_at_fork(after_in_child=_forget)
