"""A server that answers the worker's POSTs at once, or as slowly and unwillingly as it is told, and counts them.

    with sink.start() as convex:
        convex.control(delay_ms=200, limit=16, refusal=429)
        convex.wait(keys=1000).requests

It is a process of its own, so that what it costs is not taken for the worker's. It keeps no documents: every key is
"applied". Of the protocol it knows the shapes (docs/protocol.md), and epochs as far as a worker checks them.

Keys are counted by the text `"target":`, which inside a JSON string would have a backslash before its quote; a metadata
field of that name would be miscounted, and the benchmark's rows have none.
"""

import argparse
import asyncio
import contextlib
import json
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from dev.processes import Process

KEY: Final = "bench|0123456789abcdef"
ROOT: Final = Path(__file__).parents[2]

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_KEY = re.compile(rb'"key":"[^":]*:([^"]*)"')
_SHARD = re.compile(rb'"shard": *"([^"]*)"')
_REFUSALS: Final = {429: "TooManyConcurrentRequests", 503: "OptimisticConcurrencyControlFailure"}


@dataclass
class Options:
    """How it behaves from now on."""

    # Each answer to a batch is held back for so long, and for so much more for each of its keys.
    delay_ms: float = 0.0
    delay_us_per_key: float = 0.0
    # More batches than this at once are refused with this status. 0: no limit.
    limit: int = 0
    refusal: int = 429
    # `cdc:open` waits for `release`: the start of a measurement, with the worker's own start-up behind it.
    hold_open: bool = False
    # Keep a line for each batch, and the time at which each key was first answered.
    trace: bool = False
    trace_keys: bool = False


@dataclass
class Counts:
    """What has come in since the last `control`. Times are of the monotonic clock, which processes share."""

    requests: int = 0
    keys: int = 0
    bytes: int = 0
    refused: int = 0
    opens: int = 0
    most_at_once: int = 0
    released_at: float = 0.0
    first_at: float = 0.0
    last_at: float = 0.0
    # [seconds, keys, batches at once, 1 if it was answered and 0 if refused]
    trace: list[tuple[float, int, int, int]] = field(default_factory=list)
    answered: dict[str, float] = field(default_factory=dict)
    # Keys by the shard that sent them.
    by_shard: dict[str, int] = field(default_factory=dict)


class Client:
    """The other end of a running sink: its address, and what a measurement asks of it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def control(self, **options: float) -> None:
        """Takes new options (all others as by default) and begins to count anew."""
        self._ask("control", asdict(Options(**options)))  # type: ignore[arg-type]

    def release(self) -> float:
        """Lets a held `cdc:open` through; the time at which that was."""
        return float(self._ask("release")["released_at"])

    def wait(self, *, keys: int = 0, opens: int = 0, seconds: float = 60.0) -> Counts:
        """The counts as soon as so many keys, or openings, have come; or after so long as they are."""
        return Counts(**self._ask("wait", {"keys": keys, "opens": opens, "seconds": seconds}, seconds + 10))

    def counts(self) -> Counts:
        return self.wait(seconds=0)

    def _ask(self, what: str, body: Any = None, timeout: float = 10.0) -> Any:
        # Its own address, as `start` read it.
        address = f"{self.url}/bench/{what}"
        with urllib.request.urlopen(address, json.dumps(body).encode(), timeout) as answer:  # noqa: S310
            return json.load(answer)


@contextlib.contextmanager
def start() -> Iterator[Client]:
    """A sink of one's own, which ends with the block, or with us."""
    folder = Path(tempfile.mkdtemp(prefix="cdc-sink-"))
    try:
        with Process(
            [sys.executable, "-m", "dev.bench.sink"],
            stdout=folder / "stdout",
            stderr=folder / "stderr",
            cwd=ROOT,
            ladder=((signal.SIGTERM, 2.0),),
            remove=[folder],
        ) as process:
            yield Client(process.first_line(20.0))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _response(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        status,
        len(body),
        body,
    )


def _success(value: Any) -> bytes:
    return _response(json.dumps({"status": "success", "value": value, "logLines": []}).encode())


@lru_cache(maxsize=2_000)
def _applied(keys: int) -> bytes:
    return _success({"outcome": "applied", "verdicts": ["applied"] * keys})


class _Server:
    def __init__(self) -> None:
        self.options = Options()
        self.counts = Counts()
        self._epoch = 0
        # By shard: the epoch, and what the worker said of its saves; the worker takes less for a deployment set back.
        self._shards: dict[str, tuple[float, float]] = {}
        self._at_once = 0
        self._held: list[Callable[[], None]] = []
        self._waiting: list[tuple[int, int, Callable[[], None]]] = []

    def take(self, path: bytes, body: bytes, size: int, write: Callable[[bytes], None]) -> None:
        """One request; `write` is called with the response, now or later."""
        if path.startswith(b"/bench/"):
            self._steer(path[7:], json.loads(body), write)
        elif b'"cdc:apply"' in body[:80]:
            self._apply(body, size, write)
        elif b'"cdc:open"' in body[:80]:
            args = json.loads(body)["args"]
            self.counts.opens += 1
            self._held.append(lambda: write(self._open(args)))
            if not self.options.hold_open:
                self._let_through()
            self._tell()
        elif b'"cdc:noteSaves"' in body[:80]:
            write(self._note_saves(json.loads(body)["args"]))
        else:
            write(_success([]))  # cdc:keys: it holds no documents

    def _apply(self, body: bytes, size: int, write: Callable[[bytes], None]) -> None:
        options, counts = self.options, self.counts
        keys = body.count(b'"target":')
        shard = _SHARD.search(body, 0, 200)
        now = time.monotonic()
        counts.requests += 1
        counts.bytes += size
        counts.first_at = counts.first_at or now
        refused = 0 < options.limit <= self._at_once
        if options.trace:
            counts.trace.append((now, keys, self._at_once + 1, int(not refused)))
        if refused:
            counts.refused += 1
            code = {"code": _REFUSALS[options.refusal], "message": "as the benchmark wants it"}
            write(_response(json.dumps(code).encode(), options.refusal))
            return
        self._at_once += 1
        counts.most_at_once = max(counts.most_at_once, self._at_once)

        def answer() -> None:
            self._at_once -= 1
            write(_applied(keys))
            # Batches that began before a `control` count for the time before it.
            counts.keys += keys
            counts.last_at = time.monotonic()
            if shard is not None:
                name = shard[1].decode()
                counts.by_shard[name] = counts.by_shard.get(name, 0) + keys
            if options.trace_keys:
                counts.answered = {key.decode(): counts.last_at for key in _KEY.findall(body)} | counts.answered
            self._tell()

        delay = options.delay_ms / 1e3 + keys * options.delay_us_per_key / 1e6
        if delay:
            asyncio.get_running_loop().call_later(delay, answer)
        else:
            answer()

    def _open(self, args: dict[str, Any]) -> bytes:
        epoch, saves = self._shards.get(args["shard"], (None, 0.0))
        self._epoch = max(self._epoch, int(args["atLeast"])) + 1
        self._shards[args["shard"]] = (float(self._epoch), float(args["saves"]))
        answer = {"deployment": "bench", "epoch": float(self._epoch), "previous": epoch, "previousSaves": saves}
        return _success(answer)

    def _note_saves(self, args: dict[str, Any]) -> bytes:
        epoch, saves = self._shards[args["shard"]]
        self._shards[args["shard"]] = (epoch, float(args["saves"]))
        return _success(saves)

    def _let_through(self) -> None:
        self.counts.released_at = time.monotonic()
        held, self._held = self._held, []
        for let in held:
            let()

    def _steer(self, what: bytes, body: Any, write: Callable[[bytes], None]) -> None:
        if what == b"control":
            self.options, self.counts = Options(**body), Counts()
            write(_response(b"{}"))
        elif what == b"release":
            self.options.hold_open = False
            self._let_through()
            write(_response(json.dumps({"released_at": self.counts.released_at}).encode()))
        elif what == b"wait":
            # A look that is not answered yet is answered once: by what it waits for, or by the clock.
            timer: list[asyncio.TimerHandle] = []

            def tell() -> None:
                timer[0].cancel()
                self._waiting.remove(entry)
                write(_response(json.dumps(asdict(self.counts)).encode()))

            entry = (body["keys"] or sys.maxsize, body["opens"] or sys.maxsize, tell)
            self._waiting.append(entry)
            timer.append(asyncio.get_running_loop().call_later(body["seconds"], tell))
            self._tell()

    def _tell(self) -> None:
        for keys, opens, tell in list(self._waiting):
            if self.counts.keys >= keys or self.counts.opens >= opens:
                tell()


class _Connection(asyncio.Protocol):
    """HTTP as far as these clients speak it: one request at a time, with a length."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._buffer = bytearray()
        self._need = 0
        self._head = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._need == 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head = end + 4
            found = _LENGTH.search(self._buffer, 0, self._head)
            self._need = self._head + (int(found[1]) if found is not None else 0)
        if len(self._buffer) < self._need:
            return
        request = bytes(self._buffer)
        self._buffer.clear()
        body, size = request[self._head :], self._need
        self._need = 0
        self._server.take(request.split(b" ", 2)[1], body, size, self._write)

    def _write(self, response: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(response)


async def _serve(port: int) -> None:
    served = _Server()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(served), "127.0.0.1", port)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    asyncio.run(_serve(parser.parse_args().port))
