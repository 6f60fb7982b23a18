"""A throw-away PgBouncer in transaction mode, as managed services put in front of a Postgres."""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from psycopg.conninfo import conninfo_to_dict

from dev.postgres import free_port
from dev.postgres_programs import new_folder
from dev.processes import Process, unprivileged

START_SECONDS: Final = 30.0


class PgBouncerError(Exception):
    """PgBouncer could not be started; prints what it said."""


def program() -> Path | None:
    """Where it is, or None. Debian keeps it where only root's PATH looks."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return None if found is None else Path(found)


@contextlib.contextmanager
def start(dsn: str, *, pool_mode: str = "transaction", pool_size: int = 10) -> Iterator[str]:
    """The URL of the same database through PgBouncer. `dsn` must name a host, port, user and password."""
    found = program()
    if found is None:
        raise PgBouncerError("there is no pgbouncer on this machine (Debian: apt-get install pgbouncer)")
    to = conninfo_to_dict(dsn)
    folder = new_folder(durable=False)
    try:
        port = free_port()
        ini = folder / "pgbouncer.ini"
        ini.write_text(
            f"""\
[databases]
{to["dbname"]} = host={to["host"]} port={to["port"]} user={to["user"]} password={to["password"]}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir = {folder}
auth_type = plain
auth_file = {folder}/users
pool_mode = {pool_mode}
default_pool_size = {pool_size}
max_client_conn = 200
# A stopped pool lets its clients go at once.
server_connect_timeout = 2
# A server that is back is taken soon; by itself PgBouncer waits 15 s after a vain attempt.
server_login_retry = 1
"""
        )
        (folder / "users").write_text(f'"{to["user"]}" "{to["password"]}"\n')
        if (user := unprivileged()) is not None:
            for path in folder.iterdir():
                os.chown(path, *user)
        with Process([found, ini], stdout=folder / "log", user=user, remove=[folder]) as process:
            deadline = time.monotonic() + START_SECONDS
            while not _listens(port):
                if process.returncode is not None or time.monotonic() > deadline:
                    raise PgBouncerError(f"PgBouncer did not start:\n{process.tail()}")
                time.sleep(0.01)
            yield f"postgresql://{to['user']}:{to['password']}@127.0.0.1:{port}/{to['dbname']}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
