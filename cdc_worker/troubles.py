"""Troubles that end a session: each is said when it begins and then seldom, and has its pause."""

import math
import random
import time

import structlog

log = structlog.get_logger()

_REMINDER_SECONDS = 300.0
_FIRST_PAUSE_SECONDS = 0.2


class Troubles:
    """Backoff between tries, of all sessions of a process: mostly it is the same database that is away."""

    def __init__(self, longest_seconds: float) -> None:
        self._longest = longest_seconds
        # By name: where a dead server and a read-only one take turns behind an address, each trouble is said once.
        self._said: dict[str, float] = {}
        self._since = 0.0
        self._tries = 0

    def note(self, name: str, cause: str) -> float:
        """Says it if it is new; returns the pause in seconds, with full jitter."""
        now = time.monotonic()
        if self._tries == 0:
            self._since = now
        self._tries += 1
        if now - self._said.get(name, -math.inf) > _REMINDER_SECONDS:
            self._said[name] = now
            log.error(
                name,
                cause=cause,
                tries=self._tries,
                since_seconds=round(now - self._since),
                cure="nothing is lost; trying on",
            )
        longest = min(self._longest, _FIRST_PAUSE_SECONDS * 2.0 ** min(self._tries, 16))
        return random.uniform(0.05, longest)  # noqa: S311  # spreads tries, hides nothing

    def say_recovered(self) -> None:
        if self._tries:
            log.info("database.recovered", tries=self._tries, after_seconds=round(time.monotonic() - self._since, 1))
            self._said.clear()

    def over(self, before: float) -> None:
        """What began before that time (monotonic) is over; what began later, with another shard's session, is not."""
        if self._since < before:
            self._said.clear()
            self._tries = 0
