"""A TCP link that goes wrong on demand: cut, slow, or deaf, which is what dead routers and full firewalls are.

    async with link_to("127.0.0.1", 5432) as link:
        ... connect to link.port ...
        link.deaf()

A deaf link keeps its connections and forwards nothing, not even that one side has hung up; what was said meanwhile
arrives when it hears again, as after a while of lost packets.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

_CHUNK: Final = 65_536


class _Connection:
    """Two ends, and what passes between them."""

    def __init__(self) -> None:
        self.writers: list[asyncio.StreamWriter] = []
        # A connection that was forgotten stays deaf for ever.
        self.forgotten = False

    def cut(self) -> None:
        """At once, with a reset: as a process that is killed, or a firewall that answers."""
        for writer in self.writers:
            writer.transport.abort()


class Link:
    """All connections over one link."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._hears = asyncio.Event()
        self._hears.set()
        self._delay_seconds = 0.0

    @property
    def port(self) -> int:
        assert self._server is not None
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    @property
    def connections(self) -> int:
        return len(self._connections)

    def cut(self) -> None:
        """Ends every connection; new ones are taken."""
        for connection in self._connections:
            connection.cut()

    def deaf(self) -> None:
        """Takes connections, keeps those that are there, and forwards nothing."""
        self._hears.clear()

    def forget(self) -> None:
        """Those that are there are deaf for ever; new ones are well. A router that was started anew does this."""
        for connection in self._connections:
            connection.forgotten = True

    def lead_to(self, host: str, port: int) -> None:
        """New connections go there, as those to a name that stands for another machine now."""
        self._to = (host, port)

    def slow(self, seconds: float) -> None:
        """Each piece takes that long, one after the other."""
        self._delay_seconds = seconds

    def normal(self) -> None:
        self._delay_seconds = 0.0
        self._hears.set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection()
        connection.writers.append(writer)
        self._connections.add(connection)
        try:
            await self._hears.wait()
            there, there_writer = await asyncio.open_connection(*self._to)
            connection.writers.append(there_writer)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._pass(connection, reader, there_writer))
                ways.create_task(self._pass(connection, there, writer))
        except* OSError:
            pass  # one side is gone, so the other goes
        finally:
            connection.cut()
            self._connections.discard(connection)

    async def _pass(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            data = await reader.read(_CHUNK)
            if self._delay_seconds:
                await asyncio.sleep(self._delay_seconds)
            await self._hears.wait()
            if connection.forgotten:
                await asyncio.Event().wait()  # to the end of the link
            if not data:
                # One side has nothing more to say: in these protocols the other has not, either.
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()


@contextlib.asynccontextmanager
async def link_to(host: str, port: int) -> AsyncIterator[Link]:
    """A link to that address, in this loop, closed on leaving."""
    link = Link(host, port)
    await link.open()
    try:
        yield link
    finally:
        await link.close()
