"""The network between the worker and Convex: an HTTP proxy that does to requests what networks and servers do."""

import asyncio
import contextlib
import json
from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Final, Literal, Self

import aiohttp
from aiohttp import web

Mode = Literal[
    "clear",
    "ghost",
    "double",
    "mute",
    "lose",
    "hold",
    "drip",
    "400",
    "401",
    "403",
    "404",
    "408",
    "429",
    "500",
    "503",
    "page",
    "garbage",
    "paused",
    "refused",
]
"""What happens to a request:

clear    it runs, and is answered
ghost    the same, and a copy is kept, which `replay` runs again
double   it runs twice, at once
mute     it runs; the connection breaks before the answer
lose     it does not run, the connection breaks, and it is kept: `replay` may run it yet
hold     it stands still until `release`, and runs then, whether or not anybody still waits for the answer
drip     it runs; the answer comes a byte at a time, for longer than anybody waits
400...   it does not run, and the answer has this status, as Convex gives it
page     it does not run, and the answer is 502 with a page of HTML
garbage  it runs, and the answer is 200 and no JSON
paused   it does not run, and the answer is a failed function without data; the probe that follows gets the same
refused  the same, with data

Batches are kept. A late `cdc:open` is a fault of its own (`reopen`): it fences the worker at work, which then compares
everything anew, and would hide what the others are made to show.
"""

Order = Literal["first", "last"]
"""Whether what has been held for longest goes first or last."""

POISON: Final = "poison"
"""A batch with this word in it never runs: Convex fails, and says not why. An empty batch passes."""

_MOST_KEPT = 16
_APPLY = b'"path":"cdc:apply"'
_OPEN = b'"path":"cdc:open"'
_EMPTY = b'"events":[]'
_DRIP_SECONDS = 0.1
_JSON = "application/json"
_HTML = "<html><body><h1>502 Bad Gateway</h1></body></html>"


def _coded(status: int, code: str) -> tuple[int, str, str]:
    return status, _JSON, json.dumps({"code": code, "message": "Something went wrong, and this says what."})


def _failed(data: object) -> tuple[int, str, str]:
    fields = {"status": "error", "errorMessage": "[Request ID: 1] Server Error", "logLines": []}
    return 200, _JSON, json.dumps(fields if data is None else {**fields, "errorData": data})


_ANSWERS: Final[Mapping[Mode, tuple[int, str, str]]] = MappingProxyType(
    {
        "400": _coded(400, "BadJsonBody"),
        "401": _coded(401, "BadAdminKey"),
        "403": _coded(403, "BadDeployKey"),
        "404": _coded(404, "DeploymentNotFound"),
        "408": _coded(408, "RequestTimeout"),
        "429": _coded(429, "TooManyConcurrentRequests"),
        "500": _coded(500, "InternalServerError"),
        "503": _coded(503, "OptimisticConcurrencyControlFailure"),
        "page": (502, "text/html", _HTML),
        "paused": _failed(None),
        "refused": _failed({"code": "no"}),
    }
)
# These happen to batches only.
_BATCHES: Final[frozenset[Mode]] = frozenset({"ghost", "double", "lose"})

_Request = tuple[str, bytes, dict[str, str]]


class Network:
    """A proxy in front of one deployment. `async with` starts and ends it."""

    def __init__(self, target: str, *, ran: Callable[[], None] = lambda: None) -> None:
        """`ran` is called whenever a batch has been answered by Convex."""
        self.target = target
        self._ran = ran
        self._mode: Mode = "clear"
        self._held: deque[asyncio.Future[None]] = deque()
        self._kept: deque[_Request] = deque(maxlen=_MOST_KEPT)
        self._last_open: _Request | None = None
        # Batches failed as by a paused deployment whose probe has yet to fail as well.
        self._probes_owed = 0
        self._client: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self.port = 0
        # Batches that came in, whatever became of them; and how many are on their way to Convex or held.
        self.arrived = 0
        self.under_way = 0
        # What was done to requests, and the verdicts that Convex gave, by name.
        self.counts: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20))
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.release("first")
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

    async def release(self, order: Order) -> None:
        """What is held goes on to run, one after the other."""
        while self._held:
            held = self._held.popleft() if order == "first" else self._held.pop()
            if not held.done():
                held.set_result(None)
                before = self.under_way
                for _ in range(20):
                    if self.under_way < before:
                        break
                    await asyncio.sleep(0.001)

    def forget(self) -> None:
        """The requests kept will never run."""
        self._kept.clear()

    async def replay(self, place: int) -> None:
        """Runs a kept request, counted from the oldest, and keeps it: what was doubled once may be doubled again."""
        self.counts["replayed"] += 1
        await self._run_alone(self._kept[place])

    async def reopen(self) -> None:
        """The last `cdc:open` comes once more: nobody knows the epoch that it is given."""
        if self._last_open is not None:
            self.counts["reopened"] += 1
            await self._run_alone(self._last_open)

    async def _run_alone(self, request: _Request) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await self._run("POST", *request)

    async def _take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        kept = (request.path, body, headers)
        is_batch = _APPLY in body[:200]
        mode = self._mode if is_batch or self._mode not in _BATCHES else "clear"
        if is_batch:
            self.arrived += 1
            self.counts[mode] += 1
        elif _OPEN in body[:200]:
            self._last_open = kept
        if (answer := self._answer_instead(mode, body, is_batch=is_batch)) is not None:
            status, kind, text = answer
            return web.Response(status=status, text=text, content_type=kind)
        if mode in {"ghost", "lose"}:
            self._kept.append(kept)
        if mode == "lose":
            return _cut(request)
        return await self._carry_out(request, mode, kept)

    async def _carry_out(self, request: web.Request, mode: Mode, kept: _Request) -> web.StreamResponse:
        self.under_way += 1
        try:
            if mode == "hold":
                held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._held.append(held)
                await held
            if mode == "double":
                (status, answer), _ = await asyncio.gather(
                    self._run(request.method, *kept), self._run(request.method, *kept)
                )
            else:
                status, answer = await self._run(request.method, *kept)
        except (aiohttp.ClientError, TimeoutError):
            return _cut(request)
        finally:
            self.under_way -= 1
        if mode == "mute":
            return _cut(request)
        if mode == "drip":
            return await _drip(request, answer)
        return web.Response(status=status, body=b"{" if mode == "garbage" else answer, content_type=_JSON)

    def _answer_instead(self, mode: Mode, body: bytes, *, is_batch: bool) -> tuple[int, str, str] | None:
        """What is said without asking Convex, if this is such a request."""
        if is_batch and _EMPTY in body[-40:]:
            if self._probes_owed:
                self._probes_owed -= 1
                return _ANSWERS["paused"]
        elif is_batch and POISON.encode() in body:
            self.counts[POISON] += 1
            return _ANSWERS["paused"]
        elif is_batch and mode in {"paused", "refused"}:
            # Until the probe has failed, too, this would be the batch's own fault.
            self._probes_owed += 1
        return _ANSWERS.get(mode)

    async def _run(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        assert self._client is not None, "use `async with`"
        async with self._client.request(method, self.target + path, data=body, headers=headers) as response:
            status, answer = response.status, await response.read()
        if _APPLY in body[:200]:
            self._count_verdicts(answer)
            self._ran()
        return status, answer

    def _count_verdicts(self, answer: bytes) -> None:
        self.verdicts["requests"] += 1
        value = json.loads(answer).get("value") or {}
        if value.get("outcome") == "fenced":
            self.verdicts["fenced requests"] += 1
        for verdict in value.get("verdicts", ()):
            self.verdicts[verdict if isinstance(verdict, str) else "rejected"] += 1


async def _drip(request: web.Request, answer: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": _JSON, "Content-Length": str(len(answer))})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        for byte in answer:
            await response.write(bytes([byte]))
            await asyncio.sleep(_DRIP_SECONDS)
    return response


def _cut(request: web.Request) -> web.Response:
    """The client sees a reset, and learns nothing of what became of its request."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=502)
