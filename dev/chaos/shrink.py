"""A schedule that fails, made smaller: steps are left out as long as what remains still fails."""

from collections.abc import Callable

from dev.chaos.campaign import Campaign
from dev.chaos.schedule import Schedule

# Timing is part of a failure: what fails once in a few times is worth a few tries.
_TRIES = 3


async def smaller(campaign: Campaign, name: str, schedule: Schedule, say: Callable[[str], None]) -> Schedule | None:
    """The smallest that was found, or None if even the whole does not fail."""
    if not await _fails(campaign, name, schedule):
        return None
    chunk = max(len(schedule) // 2, 1)
    while chunk:
        start = 0
        while start < len(schedule):
            shorter = schedule[:start] + schedule[start + chunk :]
            if shorter and await _fails(campaign, name, shorter):
                schedule = shorter
                say(f"fails with {len(schedule)} steps")
            else:
                start += chunk
        chunk //= 2
    return schedule


async def _fails(campaign: Campaign, name: str, schedule: Schedule) -> bool:
    result = await campaign.play([(name, schedule)] * _TRIES)
    return bool(result.findings)
