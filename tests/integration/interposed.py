"""Something between the worker and Convex that misbehaves: a fault decides what becomes of each request."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web

from dev.local_convex import LocalConvex

# Carries the request out, and gives what Convex answered.
Run = Callable[[], Awaitable[tuple[int, bytes]]]
# What becomes of a request, by its body.
Fault = Callable[[web.Request, bytes, Run], Awaitable[web.StreamResponse]]


class Interposed:
    """A proxy in front of one deployment. `async with` starts and ends it."""

    def __init__(self, convex: LocalConvex) -> None:
        self._convex = convex
        self._client: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self._url = ""
        self.fault: Fault | None = None
        # Requests that the fault has met, and those of them that are not answered yet.
        self.met = 0
        self.open = 0

    async def __aenter__(self) -> Self:
        self._client = aiohttp.ClientSession()
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._client is not None:
            await self._client.close()

    @property
    def convex(self) -> LocalConvex:
        """The deployment as the worker sees it."""
        return LocalConvex(self._url, self._convex.admin_key, self._convex.process)

    async def _take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()

        async def run() -> tuple[int, bytes]:
            assert self._client is not None, "use `async with`"
            headers = {name: request.headers[name] for name in ("Authorization", "Content-Type")}
            async with self._client.post(self._convex.url + request.path, data=body, headers=headers) as answer:
                return answer.status, await answer.read()

        if self.fault is None:
            return _said(*await run())
        self.met += 1
        self.open += 1
        try:
            return await self.fault(request, body, run)
        finally:
            self.open -= 1


def _said(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json")


def answers(status: int, body: str) -> Fault:
    """Nothing runs."""

    async def fault(_request: web.Request, _body: bytes, _run: Run) -> web.Response:
        return web.Response(status=status, text=body)

    return fault


def answers_after(status: int, body: str) -> Fault:
    """It runs, and this is said of it."""

    async def fault(_request: web.Request, _body: bytes, run: Run) -> web.Response:
        await run()
        return web.Response(status=status, text=body)

    return fault


async def resets(request: web.Request, _body: bytes, _run: Run) -> web.Response:
    """Nothing runs, and the connection breaks."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def resets_after(request: web.Request, body: bytes, run: Run) -> web.Response:
    """It runs, and the connection breaks."""
    await run()
    return await resets(request, body, run)


async def drips(request: web.Request, _body: bytes, run: Run) -> web.StreamResponse:
    """It runs, and the answer comes byte by byte, so slowly that it never ends."""
    _, answer = await run()
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        for byte in answer:
            await response.write(bytes([byte]))
            await asyncio.sleep(0.05)
    return response


async def floods(request: web.Request, _body: bytes, _run: Run) -> web.StreamResponse:
    """Nothing runs, and the answer has no end."""
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(bytes(65_536))
    return response


async def hangs_after(_request: web.Request, _body: bytes, run: Run) -> web.Response:
    """It runs, and nothing is ever said of it."""
    await run()
    await asyncio.sleep(60)
    return web.Response()


async def twice(_request: web.Request, _body: bytes, run: Run) -> web.Response:
    """It runs, and runs again; the second answer is the one that is heard."""
    await run()
    return _said(*await run())


def held_until(released: asyncio.Event) -> Fault:
    """It runs when that is set, whether or not anybody waits for it still."""

    async def fault(_request: web.Request, _body: bytes, run: Run) -> web.Response:
        running = asyncio.ensure_future(_after(released, run))
        return _said(*await asyncio.shield(running))

    return fault


async def _after(released: asyncio.Event, run: Run) -> tuple[int, bytes]:
    await released.wait()
    return await run()
