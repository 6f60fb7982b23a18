"""The demo's own way of reading Convex, over HTTP and over the WebSocket: none of the worker's code is trusted.

Convex' own clients for Python cannot be used in an event loop (facts: they block it, and have no time limit).
"""

import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from convex.values import convex_to_json, json_to_convex

from dev.demo.rows import ACTIVITY_MIRRORS, Document, Slot


class ConvexReadError(Exception):
    """Convex did not answer a read; says what it answered instead."""


def slot_of(activity: Document) -> Slot:
    """The slot of an activity. The mirrors put the row's id into the metadata, as a page that links to it wants."""
    metadata = activity.get("metadata")
    key = metadata.get("id") if isinstance(metadata, dict) else None
    # What has no id is none of the demo's: under its own id it will be missed by nobody, and found by the comparison.
    return ACTIVITY_MIRRORS[activity["type"]], key if isinstance(key, str) else f"document {activity['_id']}"


def content(shown: Document) -> Document:
    """A document without what Convex adds: `_id`, `_creationTime`."""
    return {name: value for name, value in shown.items() if not name.startswith("_")}


class ConvexReads:
    """Queries by HTTP; with the admin key internal ones, too."""

    def __init__(self, session: aiohttp.ClientSession, url: str, admin_key: str) -> None:
        self._session = session
        self._url = url
        self._admin = {"Authorization": f"Convex {admin_key}"}

    async def query(self, path: str, args: Mapping[str, Any], *, admin: bool = False) -> Any:
        """The value of a query. Raises ConvexReadError."""
        body = {"path": path, "args": convex_to_json(dict(args)), "format": "convex_encoded_json"}
        headers = self._admin if admin else {}
        try:
            async with self._session.post(f"{self._url}/api/query", json=body, headers=headers) as response:
                answer = await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ConvexReadError(f"{path}: {str(error) or type(error).__name__}") from error
        if answer.get("status") != "success":
            raise ConvexReadError(f"{path}: {answer.get('errorMessage') or answer}")
        return json_to_convex(answer["value"])


@dataclass(frozen=True)
class Update:
    """A watched query has a new value."""

    query: int
    value: Any


class Subscriptions:
    """A client of the sync protocol that watches queries, as ConvexReactClient does in a browser.

    It does not reconnect: a link that breaks on one machine is a fault that the demo should show.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._version = 0
        self._last_query = 0

    async def watch(self, queries: Sequence[tuple[str, Mapping[str, Any]]]) -> list[int]:
        """Starts to watch queries (path, arguments), and returns their numbers. Their values come as updates."""
        numbers = [self._last_query + place for place in range(1, len(queries) + 1)]
        self._last_query += len(queries)
        await self._modify(
            [
                {"type": "Add", "queryId": number, "udfPath": path, "args": [convex_to_json(dict(args))]}
                for number, (path, args) in zip(numbers, queries, strict=True)
            ]
        )
        return numbers

    async def unwatch(self, numbers: list[int]) -> None:
        await self._modify([{"type": "Remove", "queryId": number} for number in numbers])

    async def _modify(self, modifications: list[dict[str, Any]]) -> None:
        base, self._version = self._version, self._version + 1
        await self._socket.send_json(
            {
                "type": "ModifyQuerySet",
                "baseVersion": base,
                "newVersion": self._version,
                "modifications": modifications,
            }
        )

    async def updates(self) -> AsyncIterator[list[Update]]:
        """All that changed at one moment, again and again. Raises ConvexReadError when the connection is gone."""
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            said = json.loads(message.data)
            if said["type"] == "FatalError":
                raise ConvexReadError(f"the subscription was refused: {said.get('error')}")
            if said["type"] != "Transition":
                continue
            changed = said["modifications"]
            failed = [each for each in changed if each["type"] == "QueryFailed"]
            if failed:
                raise ConvexReadError(f"a watched query fails: {failed[0].get('errorMessage')}")
            updated = [each for each in changed if each["type"] == "QueryUpdated"]
            yield [Update(each["queryId"], json_to_convex(each["value"])) for each in updated]
        raise ConvexReadError("Convex has closed the subscription")


@asynccontextmanager
async def subscriptions(session: aiohttp.ClientSession, url: str) -> AsyncIterator[Subscriptions]:
    # No limit for a message: the page of a busy user is larger than a chat message, and comes from our own server.
    async with session.ws_connect(f"{url}/api/sync", max_msg_size=0) as socket:
        await socket.send_json(
            {
                "type": "Connect",
                "sessionId": str(uuid.uuid4()),
                "connectionCount": 0,
                "lastCloseReason": "InitialConnect",
            }
        )
        yield Subscriptions(socket)
