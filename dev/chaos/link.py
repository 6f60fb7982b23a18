"""The network between the worker and Convex: an HTTP proxy that does to requests what networks do."""

import asyncio
import contextlib
from collections import deque
from types import TracebackType
from typing import Literal, Self

import aiohttp
from aiohttp import web

Mode = Literal["clear", "ghost", "mute", "lose", "refuse", "hold"]
"""What happens to a request:

clear   it runs, and is answered
ghost   the same, and a copy is kept, which `replay` runs again
mute    it runs; the connection breaks before the answer
lose    it does not run, the connection breaks, and it is kept: `replay` may run it yet
refuse  it does not run, and the answer is 503
hold    it stands still until `release`, and runs then, whether or not anybody still waits for the answer

Batches are kept. A late `cdc:open` is a fault of its own (`reopen`): it fences the worker at work, which then compares
everything anew, and would hide what the others are made to show.
"""

_MOST_KEPT = 16
_APPLY = b'"path":"cdc:apply"'
_OPEN = b'"path":"cdc:open"'

_Request = tuple[str, bytes, dict[str, str]]


class Network:
    """A proxy in front of one deployment. `async with` starts and ends it."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._mode: Mode = "clear"
        self._released = asyncio.Event()
        self._kept: deque[_Request] = deque(maxlen=_MOST_KEPT)
        self._last_open: _Request | None = None
        self._client: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self.url = ""
        # Batches that came in, whatever became of them; and how many are on their way to Convex or held.
        self.arrived = 0
        self.under_way = 0
        self.counts: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20))
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._take)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._client is not None:
            await self._client.close()

    @property
    def mode(self) -> Mode:
        return self._mode

    @property
    def kept(self) -> int:
        return len(self._kept)

    def set(self, mode: Mode) -> None:
        """From now on. What is held stays held."""
        self._mode = mode

    def release(self) -> None:
        """What is held goes on to run."""
        released, self._released = self._released, asyncio.Event()
        released.set()

    def forget(self) -> None:
        """The requests kept will never run."""
        self._kept.clear()

    async def replay(self, place: int) -> None:
        """Runs a kept request, counted from the oldest, and keeps it: what was doubled once may be doubled again."""
        self._count("replayed")
        path, body, headers = self._kept[place]
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await self._run("POST", path, body, headers)

    async def reopen(self) -> None:
        """The last `cdc:open` comes once more: nobody knows the epoch that it is given."""
        if self._last_open is not None:
            self._count("reopened")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                await self._run("POST", *self._last_open)

    async def _take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        is_batch = _APPLY in body[:200]
        mode = self._mode if is_batch or self._mode not in {"ghost", "lose"} else "clear"
        if is_batch:
            self._count(mode)
            if mode in {"ghost", "lose"}:
                self._kept.append((request.path, body, headers))
            self.arrived += 1
        elif _OPEN in body[:200]:
            self._last_open = (request.path, body, headers)
        if mode == "refuse":
            return web.json_response({"code": "ExpiredInQueue", "message": "try again"}, status=503)
        if mode == "lose":
            return _cut(request)
        self.under_way += 1
        try:
            if mode == "hold":
                await self._released.wait()
            status, answer = await self._run(request.method, request.path, body, headers)
        except (aiohttp.ClientError, TimeoutError):
            return _cut(request)
        finally:
            self.under_way -= 1
        if mode == "mute":
            return _cut(request)
        return web.Response(status=status, body=answer, content_type="application/json")

    async def _run(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        assert self._client is not None, "use `async with`"
        async with self._client.request(method, self._target + path, data=body, headers=headers) as response:
            return response.status, await response.read()

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def _cut(request: web.Request) -> web.Response:
    """The client sees a reset, and learns nothing of what became of its request."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=502)
