"""What most of these tests begin with; one that needs another `db` or `mirrored` has its own."""

import uuid
from collections.abc import Iterator, Sequence

import pytest

from cdc_worker.mirrors import Mirror
from dev.local_convex import LocalConvex
from tests.integration.application import TABLES, Database
from tests.integration.mirrored import Mirrored


@pytest.fixture
def user() -> str:
    """The local Convex is shared: each test has a user of its own."""
    return f"user-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def mirrored(local_convex: LocalConvex) -> Mirrored:
    return Mirrored(local_convex.url, local_convex.admin_key)


@pytest.fixture
def db(database: str, mirrors: Sequence[Mirror]) -> Iterator[Database]:
    """The application's tables, with the test's own `mirrors` migrated."""
    with Database(database, TABLES, mirrors) as opened:
        yield opened
