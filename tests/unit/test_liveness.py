"""Who is stuck is said, and ends the process; who fails, or rests, is not stuck."""

import threading
import time

import pytest
from structlog.testing import capture_logs

from cdc_worker.liveness import Liveness

LIMIT_SECONDS = 0.2


def test_one_that_comes_to_no_end_is_said_and_given_up() -> None:
    gave_up = threading.Event()
    liveness = Liveness(LIMIT_SECONDS, give_up=gave_up.set)
    with capture_logs() as lines:
        liveness.moved("an answer")
        liveness.start()
        assert gave_up.wait(30)
    (line,) = [line for line in lines if line["event"] == "worker.stalled"]
    assert line["waits_for"] == "an answer"
    assert line["log_level"] == "critical"


def test_a_single_wait_is_seen_though_all_others_end() -> None:
    gave_up = threading.Event()
    liveness = Liveness(LIMIT_SECONDS, give_up=gave_up.set)
    with capture_logs() as lines, liveness.waits_for("one that hangs"):
        liveness.start()
        until = time.monotonic() + 30
        while not gave_up.is_set() and time.monotonic() < until:
            with liveness.waits_for("one that ends"):
                gave_up.wait(LIMIT_SECONDS / 20)
    assert [line["waits_for"] for line in lines] == ["one that hangs"]


def test_what_is_left_to_do_has_its_time_from_its_beginning() -> None:
    gave_up = threading.Event()
    liveness = Liveness(LIMIT_SECONDS, give_up=gave_up.set)
    with capture_logs():
        liveness.start()
        until = time.monotonic() + 30
        while not gave_up.is_set() and time.monotonic() < until:
            liveness.works("keys")
            gave_up.wait(LIMIT_SECONDS / 20)
    assert gave_up.is_set()


def test_it_gives_up_though_nobody_takes_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # A pipe that is full blocks whoever writes to it, and whoever wants the logger's lock.
    gave_up, read = threading.Event(), threading.Event()
    monkeypatch.setattr("cdc_worker.liveness._SAY_SECONDS", 0.1)
    monkeypatch.setattr("cdc_worker.liveness._say", lambda *_: read.wait(60))
    liveness = Liveness(LIMIT_SECONDS, give_up=gave_up.set)
    with liveness.waits_for("its log"):
        liveness.start()
        assert gave_up.wait(30)
    read.set()


def test_one_that_moves_or_rests_is_left_alone() -> None:
    gave_up = threading.Event()
    # Longer than this thread may stand still on a busy machine.
    limit = 2.0
    liveness = Liveness(limit, give_up=gave_up.set)
    liveness.moved("rests")
    liveness.start()
    liveness.rests("rests")
    until = time.monotonic() + 1.5 * limit
    while time.monotonic() < until:
        liveness.moved("moves")
        assert not gave_up.wait(LIMIT_SECONDS / 20)
    liveness.end()
