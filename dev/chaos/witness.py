"""Looks at Convex and at Postgres all the while, past the worker and its links, and says what is wrong."""

import asyncio
import contextlib
from typing import Any, Final, LiteralString

import aiohttp
import psycopg
from psycopg import AsyncConnection

from dev.chaos import application
from dev.chaos.comparison import Difference, History, differences
from dev.chaos.servers import ConvexServer

_ANSWER_SECONDS: Final = 10.0
# By what the table means (migrations/), not by the worker's code.
_PARKED: LiteralString = "select m.name, p.key from cdc.parked_key p join cdc.mirror m on m.id = p.mirror"


class Witness:
    """For one world. `begin` with each schedule."""

    def __init__(self, convex: ConvexServer) -> None:
        self._convex = convex
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Convex {convex.admin_key}"},
            timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS),
        )
        # One look after the other: what is seen later was true later.
        self._looking = asyncio.Lock()
        self._ran = asyncio.Event()
        self.history = History()
        self._state: dict[str, application.Documents] = {}
        self.states_missing = False

    async def close(self) -> None:
        await self._http.close()

    def begin(self) -> None:
        self.history = History()

    def ran(self) -> None:
        """A batch has run: look."""
        self._ran.set()

    async def watch(self) -> None:
        """Looks after each batch, or after several. For a task; a Convex that is down shows nothing."""
        while True:
            await self._ran.wait()
            self._ran.clear()
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                await self.look()

    async def look(self) -> dict[str, list[dict[str, Any]]]:
        async with self._looking:
            dump: dict[str, list[dict[str, Any]]] = await self._ask("query", "probe:dump")
            self.history.saw(dump)
        return dump

    async def note_state(self, connection: AsyncConnection) -> None:
        """The application has committed: another state that Convex may show.

        A table that somebody is about to truncate cannot be read. The worker, who waits for it longer than we do, reads
        in the end what was when he began to wait: a state that we may never see. `connection` gives up soon.
        """
        unread = []
        for mirror in application.MIRROR_NAMES:
            try:
                self._state[mirror], _ = await application.expected_documents(connection, mirror)
            except psycopg.errors.LockNotAvailable:
                unread.append(mirror)
        self.states_missing = bool(unread)
        state = {key: each for documents in self._state.values() for key, each in documents.items()}
        self.history.committed(state, unread)

    def note_truncation(self) -> None:
        """A TRUNCATE has committed. Older snapshots see the empty table, and nothing of what came after it."""
        self.history.committed({}, application.MIRROR_NAMES)

    async def empty(self) -> None:
        """Makes the deployment what it was before anybody used it."""
        async with self._looking:
            await self._ask("mutation", "probe:wipe")
            self.history.emptied()

    async def kill(self) -> None:
        async with self._looking:
            await self._convex.kill()
            self.history.emptied()

    async def compare(self, connection: AsyncConnection) -> list[Difference]:
        """What differs now, at rest."""
        wanted: application.Documents = {}
        unfit: set[application.Key] = set()
        for mirror in application.MIRROR_NAMES:
            documents, parked_instead = await application.expected_documents(connection, mirror)
            wanted |= documents
            unfit |= parked_instead
        found, doubled = application.dumped_documents(await self.look())
        parked = {application.key_of(*row) for row in await (await connection.execute(_PARKED)).fetchall()}
        return differences(wanted, unfit, found, doubled, parked)

    async def _ask(self, kind: str, path: str) -> Any:
        if not self._convex.runs:
            raise aiohttp.ClientConnectionError("Convex is down")
        request = {"path": path, "args": {}, "format": "json"}
        async with self._http.post(f"{self._convex.url}/api/{kind}", json=request) as response:
            answer = await response.json()
        if answer.get("status") != "success":
            raise RuntimeError(f"{path}: {answer}")
        return answer["value"]
