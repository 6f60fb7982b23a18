"""Log lines: JSON by the line, whatever the values; a level that is kept; and nothing of the libraries' own."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from cdc_worker.logs import configure_logs


@pytest.fixture
def stderr() -> Iterator[io.StringIO]:
    yield io.StringIO()
    structlog.reset_defaults()


def configured(stream: io.StringIO, level: str, form: Literal["console", "json"] | None) -> None:
    with contextlib.redirect_stderr(stream):
        configure_logs(level, form)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line(stderr: io.StringIO) -> None:
    configured(stderr, "INFO", "json")
    log = structlog.get_logger()
    log.info("batch.applied", keys=3, took_ms=1.5)
    log.debug("not said")
    (line,) = lines(stderr)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "batch.applied", "level": "info", "keys": 3, "took_ms": 1.5}


@given(
    st.dictionaries(
        st.sampled_from(["cause", "keys", "cure", "signal"]),
        st.text() | st.integers() | st.floats() | st.binary() | st.lists(st.text(), max_size=2),
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_is_one_line_of_json(stderr: io.StringIO, fields: dict[str, Any]) -> None:
    stderr.seek(0)
    stderr.truncate()
    configured(stderr, "INFO", "json")
    structlog.get_logger().warning("something.happened", **fields)
    text = stderr.getvalue()
    assert text.endswith("\n")
    assert len(text.split("\n")) == 2
    text.encode()
    assert json.loads(text)["event"] == "something.happened"


def test_a_secret_that_gets_into_a_line_is_hidden(stderr: io.StringIO) -> None:
    configured(stderr, "DEBUG", "json")
    structlog.get_logger().info("settings.read", key=SecretStr("deploy-s3cret"))
    assert "s3cret" not in stderr.getvalue()


def test_a_pipe_gets_json_and_a_terminal_a_line_for_people(
    stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(stderr, "INFO", None)
    structlog.get_logger().info("one.thing")
    assert lines(stderr)[0]["event"] == "one.thing"
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    configured(stderr, "INFO", None)
    structlog.get_logger().info("other.thing")
    with pytest.raises(ValueError):  # noqa: PT011  # json's own
        json.loads(stderr.getvalue().splitlines()[1])


def test_libraries_say_nothing() -> None:
    # In a process of its own: here pytest has been at the root logger already.
    program = """
import logging
from cdc_worker.logs import configure_logs
configure_logs("DEBUG", "json")
logging.getLogger("psycopg.pool").warning("error connecting, password=s3cret")
logging.getLogger("asyncio").error("Task exception was never retrieved")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True)
    assert (ran.stdout, ran.stderr) == (b"", b"")
