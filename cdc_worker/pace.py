"""How much at once: batches in flight and keys in a batch, found by additive increase and multiplicative decrease.

Both rise while there is more to send than is under way and the deployment keeps up, and halve when it says
that it is too much (429, a conflict that its own retries did not solve, a batch beyond a limit). Nothing here
knows the deployment's plan.
"""

# A mutation may run 1 s: one that takes so long, queueing and network included, is not made larger.
_SLOW_SECONDS = 0.5
# Keys added to a batch after a full one that went well.
_KEYS_STEP = 25


class Pace:
    """The present bounds, between 1 and those given."""

    def __init__(self, *, keys: int, most_keys: int, most_in_flight: int) -> None:
        self._keys = float(min(keys, most_keys))
        self._most_keys = most_keys
        self._in_flight = float(min(4, most_in_flight))
        self._most_in_flight = most_in_flight
        self._sent = 0
        self._cut_at = -1

    @property
    def keys(self) -> int:
        return int(self._keys)

    @property
    def in_flight(self) -> int:
        return int(self._in_flight)

    def sent(self) -> int:
        """A batch is sent: its number, to be given back with what became of it."""
        self._sent += 1
        return self._sent

    def good(self, *, full: bool, took_seconds: float) -> None:
        """A batch went well; `full`: it had as many keys as it might."""
        if full:
            # By one for each round of all batches in flight.
            self._in_flight = min(self._in_flight + 1 / self._in_flight, self._most_in_flight)
            if took_seconds < _SLOW_SECONDS:
                self._keys = min(self._keys + _KEYS_STEP / self._in_flight, self._most_keys)

    def too_much(self, number: int) -> None:
        """The deployment had too much while batch `number` was under way: half of all, once for all sent before."""
        if number > self._cut_at:
            self._cut_at = self._sent
            self._in_flight = max(self._in_flight / 2, 1.0)

    def too_large(self) -> None:
        """A batch is beyond what one mutation may do."""
        self._keys = max(self._keys / 2, 1.0)
