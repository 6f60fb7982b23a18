"""What Convex holds, read with the official client and nothing of the worker's."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convex.http_client import ConvexHttpClient

from dev import local_convex as convex
from tests.integration.running import SECONDS, pause


class Mirrored:
    """The documents of a deployment, without Convex' own bookkeeping."""

    def __init__(self, url: str, admin_key: str) -> None:
        self._client = ConvexHttpClient(url)
        self._client.set_admin_auth(admin_key)

    def status(self, user: str) -> dict[str, Any] | None:
        found = self._client.query("alerts:getUserStatus", {"userId": user})
        return None if found is None else _content(found)

    def activities(self, user: str) -> list[dict[str, Any]]:
        """The newest hundred, newest first."""
        found = self._client.query("activities:getRecentActivities", {"userId": user, "limit": 100})
        return [_content(each) for each in found]

    def descriptions(self, user: str) -> list[str]:
        return sorted(each["description"] for each in self.activities(user))

    def keys(self, mirror: str, target: str = "activity") -> list[str]:
        args: dict[str, Any] = {"mirror": mirror, "target": target, "after": None, "limit": 1000}
        found = self._client.query("cdc:keys", args)
        assert isinstance(found, list)
        return found

    def note_saves(self, shard: str, epoch: int, saves: int) -> None:
        """As the worker notes them."""
        self._client.mutation("cdc:noteSaves", {"shard": shard, "epoch": epoch, "saves": saves})

    def count(self, mirror: str, target: str = "activity", *, page: int = 1000) -> int:
        """How many keys there are, counted page by page; large documents need small pages."""
        counted, after = 0, None
        while True:
            args: dict[str, Any] = {"mirror": mirror, "target": target, "after": after, "limit": page}
            found = self._client.query("cdc:keys", args)
            if not found:
                return counted
            counted, after = counted + len(found), found[-1]


def _content(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if not name.startswith("_")}


async def eventually(look: Callable[[], object], expected: object, *, seconds: float = SECONDS) -> None:
    """Looks, in a thread, until that is what it sees."""
    started = asyncio.get_running_loop().time()
    while (seen := await asyncio.to_thread(look)) != expected:
        waited = asyncio.get_running_loop().time() - started
        assert waited < seconds, f"saw {seen!r} at last, expected {expected!r}"
        await asyncio.sleep(pause(waited))


@contextmanager
def convex_at(
    port: int, *, functions: Path = convex.ROOT / "convex", admin_key: str = "local-convex|00aa"
) -> Iterator[convex.LocalConvex]:
    """A local Convex that comes back at the same address with the same key, and has forgotten everything."""
    with convex.start(functions=functions, port=port, arguments=("--admin-key", admin_key)) as running:
        yield running
