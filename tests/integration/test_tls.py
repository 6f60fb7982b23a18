"""Postgres over TLS, as every hosted one is reached: bytes may wait in the library while the socket has nothing."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from cdc_worker.mirrors import Mirror
from dev import local_convex as convex
from dev import postgres
from dev.processes import unprivileged
from tests.conftest import missing
from tests.integration.application import CHECK_INS, TABLES, Database, check_in, renamed
from tests.integration.mirrored import Mirrored, eventually
from tests.integration.running import quick_settings, worker_at_work

pytestmark = pytest.mark.one_postgres

CONNECTIONS = """
select bool_and(s.ssl) from pg_stat_ssl s join pg_stat_activity a using (pid) where a.application_name = 'cdc_worker'
"""


@pytest.fixture
def mirrors() -> tuple[Mirror, ...]:
    return renamed(CHECK_INS)


@pytest.fixture
def server(postgres_flavour: postgres.Flavour) -> Iterator[postgres.Server]:
    """One that speaks TLS, with a certificate of its own for 127.0.0.1."""
    if shutil.which("openssl") is None:
        missing("openssl")
    with postgres.start(postgres_flavour) as started:
        key, certificate = started.folder / "key", started.folder / "certificate"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
                *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
            ],
            check=True,
            capture_output=True,
            timeout=30,
        )
        key.chmod(0o600)
        if (owner := unprivileged()) is not None:
            os.chown(key, *owner)
            os.chown(certificate, *owner)
        with started.admin() as superuser:
            for name, value in (("ssl_key_file", str(key)), ("ssl_cert_file", str(certificate)), ("ssl", "on")):
                superuser.execute(f"alter system set {name} = '{value}'")
            superuser.execute("select pg_reload_conf()")
        yield started


async def test_over_tls_a_change_rings_and_a_restart_is_waited_out(
    server: postgres.Server, mirrors: Sequence[Mirror], local_convex: convex.LocalConvex, mirrored: Mirrored, user: str
) -> None:
    name = postgres.create_database(server)
    dsn = server.dsn(name, parameters={"sslmode": "verify-full", "sslrootcert": str(server.folder / "certificate")})
    with Database(dsn, TABLES, mirrors) as db:
        # Polling would take longer than this waits.
        settings = quick_settings(dsn, local_convex, CDC_POLL_SECONDS=60)
        async with worker_at_work(settings, mirrors) as running:
            await running.said("backfill.done")
            await eventually(db.gate_is_kept, expected=True)
            check_in(db, user, "1", "x" * 100_000)
            await eventually(lambda: [len(text) for text in mirrored.descriptions(user)], [100_000])
            with server.admin() as superuser:
                assert superuser.execute(CONNECTIONS).fetchall() == [(True,)]
            server.restart("immediate")
            await running.said("database.recovered")
            with Database(dsn) as again:
                check_in(again, user, "2", "after")
            await eventually(lambda: "after" in mirrored.descriptions(user), expected=True)
