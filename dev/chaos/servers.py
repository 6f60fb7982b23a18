"""The servers of one world: a Postgres and a Convex, which may be killed, hung, and started again."""

import asyncio
import contextlib
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from dev import local_convex, postgres
from dev.postgres_programs import Flavour

_GONE_SECONDS: Final = 10.0


@contextlib.contextmanager
def probed_functions() -> Iterator[Path]:
    """A folder with this project's Convex functions and, beside them, probe.ts."""
    with tempfile.TemporaryDirectory(prefix="cdc-probe-") as name:
        folder = Path(name)
        shutil.copytree(local_convex.ROOT / "convex", folder / "convex")
        shutil.copy(Path(__file__).with_name("probe.ts"), folder / "convex/probe.ts")
        (folder / "node_modules").symlink_to(local_convex.ROOT / "dev/node_modules")
        yield folder / "convex"


class ConvexServer:
    """A local Convex at changing addresses under one key. `async with` starts and ends it."""

    def __init__(self, functions: Path) -> None:
        self._functions = functions
        # The whole of a key is made up by whoever starts the server.
        self.admin_key = f"local-convex|{secrets.token_hex(16)}"
        self._stack = contextlib.ExitStack()
        self._running: local_convex.LocalConvex | None = None
        self._starting: asyncio.Task[None] | None = None
        self.hangs = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._starting is not None:
            await self._starting
        await asyncio.to_thread(self._stack.close)

    @property
    def url(self) -> str:
        assert self._running is not None, "it is not running"
        return self._running.url

    @property
    def runs(self) -> bool:
        return self._running is not None

    async def start(self) -> None:
        """With nothing in it, if it does not run."""
        if self._running is None:
            if self._starting is None:
                self._starting = asyncio.create_task(self._start())
            await self._starting
            self._starting = None

    async def _start(self) -> None:
        self._running = await asyncio.to_thread(
            self._stack.enter_context,
            local_convex.start(functions=self._functions, arguments=["--quiet", "--admin-key", self.admin_key]),
        )

    async def kill(self) -> None:
        """SIGKILL. What it held is gone."""
        running, self._running = self._running, None
        if running is not None:
            running.process.signal(signal.SIGKILL)
            await asyncio.to_thread(running.process.wait, _GONE_SECONDS)
        self.hangs = False

    def hang(self) -> None:
        """SIGSTOP."""
        if self._running is not None:
            self._running.process.signal(signal.SIGSTOP)
            self.hangs = True

    def resume(self) -> None:
        if self._running is not None and self.hangs:
            self._running.process.signal(signal.SIGCONT)
        self.hangs = False


class PostgresServer:
    """A Postgres with one database. `async with` starts and ends it."""

    def __init__(self, flavour: Flavour) -> None:
        self._flavour = flavour
        self._stack = contextlib.ExitStack()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.to_thread(self._stack.enter_context, postgres.start(self._flavour))
        self._database = await asyncio.to_thread(postgres.create_database, self._server)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._stack.close)

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def dsn(self) -> str:
        return self._server.dsn(self._database)

    def dsn_over(self, port: int) -> str:
        """The same by way of another port."""
        return self.dsn.replace(f":{self.port}/", f":{port}/")

    async def restart(self, mode: postgres.Mode) -> None:
        await asyncio.to_thread(self._server.restart, mode)
