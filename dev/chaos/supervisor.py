"""Keeps workers running, as a platform does, and does to them what a schedule says."""

import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from dev.chaos.failpoints import Act
from dev.chaos.workers import WorkerProcess

# Small pages and batches, so that a few rows make several of each; waits as short as the worker lets them be.
SETTINGS: Final[Mapping[str, str]] = {
    "CDC_BATCH_KEYS": "2",
    "CDC_IN_FLIGHT": "3",
    "CDC_PAGE_ROWS": "3",
    "CDC_BACKOFF_SECONDS": "0.05",
    "CDC_CONVEX_TIMEOUT_SECONDS": "0.5",
    "CDC_LEASE_SECONDS": "3",
    "CDC_DRAIN_SECONDS": "0.3",
    "CDC_STATEMENT_SECONDS": "1",
    "CDC_HEARTBEAT_SECONDS": "1",
    "LOG_FORMAT": "json",
    "LOG_LEVEL": "DEBUG",
}


class EndedByItself(Exception):
    """A worker is gone, and nobody has done anything to it."""


class Supervisor:
    """The workers, oldest first: the first one that is awake is the one at work, most of the time."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], *, wanted: int, expire_leases: Callable[[], Awaitable[None]]
    ) -> None:
        self._folder = folder
        self._environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            **SETTINGS,
            **environment,
        }
        self._wanted = wanted
        self._expire_leases = expire_leases
        self._workers: list[WorkerProcess] = []
        self._started = 0
        self._acts = 0
        self.counts: Counter[str] = Counter()
        self.passed: set[str] = set()

    @property
    def awake(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.alive and not worker.asleep]

    @property
    def complete(self) -> bool:
        return len(self.awake) >= self._wanted

    @property
    def acts(self) -> int:
        """How often a failpoint has acted so far."""
        return self._acts

    async def tidy(self) -> None:
        """Whoever a failpoint has killed or frozen is replaced. Raises EndedByItself."""
        for worker in list(self._workers):
            # Before its pipe is read: what it did before its end is in there.
            alive = worker.alive
            for act in worker.listen():
                self._acts += 1
                self.counts[f"failpoint: {act}"] += 1
                if act == "freeze":
                    await self._expire_leases()
                    self.start()
            self.passed |= worker.passed
            if not alive:
                if "kill" not in worker.acts and not (worker.stopping and worker.exit_code == 0):
                    raise EndedByItself(f"{worker.log.name} ended by itself, with {worker.exit_code}")
                self._drop(worker)
                self.start()

    def start(self) -> None:
        while not self.complete:
            self.add()

    def add(self) -> None:
        self._started += 1
        self._workers.append(WorkerProcess(self._environment, self._folder / f"worker-{self._started}.log"))

    def kill(self, *, start: bool) -> None:
        if self.awake:
            self.counts["worker: SIGKILL"] += 1
            self._drop(self.awake[0])
        if start:
            self.start()

    async def stop(self, seconds: float, poll: Callable[[Callable[[], bool], float], Awaitable[bool]]) -> None:
        """SIGTERM. Raises EndedByItself if that does not end it in order."""
        if not self.awake:
            return
        worker = self.awake[0]
        # One that a failpoint froze while it stopped is on its way again: a second signal would have it exit at once.
        if not worker.stopping:
            self.counts["worker: SIGTERM"] += 1
            worker.terminate()

        def ended() -> bool:
            worker.listen()
            return worker.asleep or not worker.alive

        # Drain and release have their own deadlines; a connection that is being made adds to them.
        if not await poll(ended, seconds):
            raise EndedByItself("a worker did not end after SIGTERM")
        if worker.alive:
            return  # a failpoint has frozen it
        # One that is still being imported has no handler yet, and nothing to put in order.
        if worker.exit_code != 0 and worker.said("worker.started") and "kill" not in worker.acts:
            raise EndedByItself(f"a worker ended with {worker.exit_code} after SIGTERM")
        self._drop(worker)

    async def replace(self) -> None:
        if self.awake:
            self.counts["worker: SIGSTOP, replaced"] += 1
            self.awake[0].sleep()
            await self._expire_leases()
        self.start()

    def divide(self, shards: int) -> None:
        """Other workers, as many as there are shards now. Those before were fenced when `migrate` divided the keys."""
        self.counts["shards divided anew"] += 1
        self._environment["CDC_SHARDS"] = str(shards)
        self._wanted = shards
        self.restart()

    def wake(self) -> list[WorkerProcess]:
        """Those that slept."""
        sleepers = [worker for worker in self._workers if worker.asleep]
        for worker in sleepers:
            worker.wake()
        return sleepers

    def arm(self, point: str, passage: int, act: Act) -> None:
        if self.awake:
            self.awake[0].arm(point, passage, act)

    def disarm(self) -> None:
        for worker in self._workers:
            worker.disarm()

    def thin_out(self) -> None:
        """Only the newest go on."""
        for worker in self._workers[: -self._wanted]:
            self._drop(worker)

    def restart(self) -> None:
        self.kill_all()
        self.start()

    def kill_all(self) -> None:
        for worker in list(self._workers):
            self._drop(worker)

    def story(self) -> str:
        """The ends of the latest logs."""
        parts = []
        for log in sorted(self._folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[-3:]:
            lines = log.read_text(errors="replace").splitlines()[-40:]
            parts.append(f"--- {log.name}, {time.time() - log.stat().st_mtime:.1f} s ago\n" + "\n".join(lines))
        return "\n".join(parts)

    def _drop(self, worker: WorkerProcess) -> None:
        worker.kill()
        self.passed |= worker.passed
        self._workers.remove(worker)
