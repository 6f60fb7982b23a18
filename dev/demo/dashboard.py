"""A dashboard without a screen: watches both public queries for every user, and notes when what appeared."""

import asyncio
import time
from collections.abc import Sequence

from dev.demo.convex_reads import Subscriptions, content, slot_of
from dev.demo.rows import STATUS_MIRROR, Document, Slot
from dev.demo.sightings import Sightings

MOST_ACTIVITIES = 100
"""What getRecentActivities gives at most. The application keeps each user below it, so that a page shows all."""


class Dashboard:
    """The pages of all users; tells `sightings` what they show."""

    def __init__(self, subscriptions: Subscriptions, sightings: Sightings) -> None:
        self._subscriptions = subscriptions
        self._sightings = sightings
        self._user_of: dict[int, str] = {}
        self._queries: dict[str, list[int]] = {}
        self._slots: dict[int, set[Slot]] = {}

    async def open_pages(self, users: Sequence[str]) -> None:
        """Starts to watch these users."""
        queries = []
        for user in users:
            queries.append(("activities:getRecentActivities", {"userId": user, "limit": MOST_ACTIVITIES}))
            queries.append(("alerts:getUserStatus", {"userId": user}))
        numbers = await self._subscriptions.watch(queries)
        for place, user in enumerate(users):
            self._queries[user] = numbers[2 * place : 2 * place + 2]
            self._user_of |= dict.fromkeys(self._queries[user], user)

    async def close_page(self, user: str) -> None:
        """Stops watching a user who is gone."""
        numbers = self._queries.pop(user)
        for number in numbers:
            del self._user_of[number]
            self._slots.pop(number, None)
        await self._subscriptions.unwatch(numbers)

    async def run(self) -> None:
        """Watches until cancelled. Raises ConvexReadError when there is nothing more to watch."""
        async for updates in self._subscriptions.updates():
            now = time.monotonic()
            for update in updates:
                user = self._user_of.get(update.query)
                if user is None:
                    continue  # the page was closed while this was on its way
                documents = _status(user, update.value) if not isinstance(update.value, list) else _page(update.value)
                before = self._slots.get(update.query, set())
                self._slots[update.query] = set(documents)
                self._sightings.shown(before, documents, now)
            # The application must get its turn even while Convex has much to say.
            await asyncio.sleep(0)


def _page(activities: Sequence[Document]) -> dict[Slot, Document]:
    return {slot_of(activity): content(activity) for activity in activities}


def _status(user: str, status: Document | None) -> dict[Slot, Document]:
    return {} if status is None else {(STATUS_MIRROR, user): content(status)}
