"""Counts what a client says to Postgres, on the wire: exact, whatever driver and however it is wrapped.

    with Wire(dsn) as wire:
        ... a client that connects to wire.dsn ...
        wire.counts.statements

A statement is one round trip that executes something (several statements in one simple query are one). It is known by
its first three words. A transaction is counted when the server says that it is outside of one again.
"""

import asyncio
import contextlib
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from psycopg.conninfo import conninfo_to_dict

_START_SECONDS: Final = 10.0
_STARTUP: Final = b""


@dataclass
class WireCounts:
    statements: int = 0
    transactions: int = 0
    bytes_to_postgres: int = 0
    bytes_from_postgres: int = 0
    by_words: Counter[str] = field(default_factory=Counter)


class Wire:
    """A proxy in front of the database of `dsn`, in a thread of its own."""

    def __init__(self, dsn: str) -> None:
        to = conninfo_to_dict(dsn)
        self._target = (str(to["host"]), int(str(to["port"])))
        self._login = f"{to['user']}:{to['password']}"
        self._dbname = str(to["dbname"])
        self.counts = WireCounts()
        self.dsn = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(_START_SECONDS)
        port = self._server.sockets[0].getsockname()[1]
        # In plain text: an encrypted startup would say nothing.
        self.dsn = f"postgresql://{self._login}@127.0.0.1:{port}/{self._dbname}?sslmode=disable&gssencmode=disable"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(_START_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def reset(self) -> None:
        self.counts = WireCounts()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _end(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        session = _Session(self)
        to_reader, to_writer = await asyncio.open_connection(*self._target)
        try:
            await asyncio.gather(
                _pump(reader, to_writer, session.from_client), _pump(to_reader, writer, session.from_server)
            )
        except (ConnectionError, asyncio.CancelledError):
            return
        finally:
            for each in (writer, to_writer):
                each.close()
                with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                    await each.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, see: Callable[[bytes], None]) -> None:
    while chunk := await reader.read(65_536):
        see(chunk)
        writer.write(chunk)
        await writer.drain()
    writer.close()


class _Session:
    """One connection's two streams of messages."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        # The first message of a client has no type.
        self._client = _Messages(self._said, typed=False)
        self._server = _Messages(self._answered, typed=True)
        self._text = ""
        self._asked = False

    def from_client(self, chunk: bytes) -> None:
        self._wire.counts.bytes_to_postgres += len(chunk)
        self._client.feed(chunk)

    def from_server(self, chunk: bytes) -> None:
        self._wire.counts.bytes_from_postgres += len(chunk)
        self._server.feed(chunk)

    def _said(self, kind: bytes, payload: bytes) -> None:
        if kind == b"P":
            self._text = payload.split(b"\0", 2)[1].decode()
        elif kind == b"Q":
            self._text = payload.split(b"\0", 1)[0].decode()
        if kind in b"QE" and kind:
            self._asked = True
            self._wire.counts.statements += 1
            self._wire.counts.by_words[" ".join(self._text.split()[:3]).lower()] += 1

    def _answered(self, kind: bytes, payload: bytes) -> None:
        if kind == b"Z" and payload == b"I" and self._asked:
            self._asked = False
            self._wire.counts.transactions += 1


class _Messages:
    """Cuts a stream into messages: a type, a length that counts itself, and the rest."""

    def __init__(self, handle: Callable[[bytes, bytes], None], *, typed: bool) -> None:
        self._handle = handle
        self._typed = typed
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> None:
        self._buffer += chunk
        at = 0
        while True:
            head = 1 if self._typed else 0
            if len(self._buffer) - at < head + 4:
                break
            (length,) = struct.unpack_from("!i", self._buffer, at + head)
            end = at + head + length
            if len(self._buffer) < end:
                break
            kind = bytes(self._buffer[at : at + head]) or _STARTUP
            self._handle(kind, bytes(self._buffer[at + head + 4 : end]))
            self._typed = True
            at = end
        del self._buffer[:at]
