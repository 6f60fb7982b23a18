"""Real servers for the tests: a Postgres per session, a database per test, the local Convex, PgBouncer.

A test that asks for `database` (or `postgres_server`) runs once on every Postgres that this machine has: the
installed one and the wheel's. `--postgres` narrows that; the marker `one_postgres` is for a test that
is slow and says nothing about versions.

What a machine lacks is skipped on it, visibly. In continuous integration (CI=true) it is a failure.
"""

import os
from collections.abc import Iterator
from typing import NoReturn, cast

import psycopg
import pytest
from hypothesis import HealthCheck, settings

from dev import local_convex as convex
from dev import pgbouncer as bouncer
from dev import postgres

# What a machine is busy with beside the tests says nothing about them.
settings.register_profile("cdc_worker", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cdc_worker")

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres",
        choices=("all", "installed", "wheel"),
        default="all",
        help="which Postgres to test on: every one found (default), the installed one, the wheel's",
    )


def pytest_report_header(config: pytest.Config) -> str:
    found = ", ".join(f"{flavour} {version}" for flavour, version in postgres.flavours().items())
    return f"postgres: {config.getoption('--postgres')} of {found}"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_postgres: run on one Postgres only; slow, and versions do not matter")
    config.addinivalue_line("markers", "chaos: kills, cuts and hangs; slow")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "postgres_flavour" in metafunc.fixturenames:
        flavours = _wanted(metafunc.config)
        if metafunc.definition.get_closest_marker("one_postgres"):
            flavours = flavours[:1]
        # By session, so that pytest puts the tests of one server together and starts each server once.
        metafunc.parametrize("postgres_flavour", flavours, scope="session")


def _wanted(config: pytest.Config) -> list[postgres.Flavour]:
    chosen = cast("str", config.getoption("--postgres"))
    found = list(postgres.flavours())
    if IN_CI and chosen == "all" and found != ["installed", "wheel"]:
        pytest.exit(f"continuous integration tests on an installed Postgres and the wheel's, and found {found}", 1)
    wanted = [flavour for flavour in found if chosen in ("all", flavour)]
    if not wanted:
        pytest.exit(f"--postgres {chosen}: there is none of that kind here", 1)
    return wanted


def missing(what: str) -> NoReturn:
    """Skip a test for want of a program; in continuous integration fail it."""
    if IN_CI:
        pytest.fail(f"{what} is missing, and continuous integration must not skip this", pytrace=False)
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="session")
def postgres_server(postgres_flavour: postgres.Flavour) -> Iterator[postgres.Server]:
    """A running Postgres, shared by the tests of the session. A test that stops or kills one starts its own."""
    with postgres.start(postgres_flavour) as server:
        yield server


@pytest.fixture(scope="session")
def administrator(postgres_server: postgres.Server) -> Iterator[psycopg.Connection]:
    """Makes and drops the databases."""
    with postgres_server.admin() as connection:
        yield connection


@pytest.fixture
def database(postgres_server: postgres.Server, administrator: psycopg.Connection) -> Iterator[str]:
    """The URL of a fresh database, which a role without privileges owns. Dropped afterwards."""
    with postgres.database(postgres_server, admin=administrator) as dsn:
        yield dsn


@pytest.fixture
def pooled_database(database: str) -> Iterator[str]:
    """The URL of `database` through a PgBouncer of its own, in transaction mode."""
    if bouncer.program() is None:
        missing("pgbouncer")
    with bouncer.start(database) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def local_convex() -> Iterator[convex.LocalConvex]:
    """A local Convex with this project's functions, shared: a test keeps to users and shards with names of its own."""
    with convex.start() as running:
        yield running


@pytest.fixture
def fresh_convex() -> Iterator[convex.LocalConvex]:
    """A local Convex for this test alone, empty; it takes a second to start."""
    with convex.start() as running:
        yield running
