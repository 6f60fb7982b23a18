"""Who is stuck is said, and ends the process; who fails, or rests, is not stuck."""

import threading
import time

from structlog.testing import capture_logs

from cdc_worker.liveness import Liveness

LIMIT_SECONDS = 0.2


def test_one_that_comes_to_no_end_is_said_and_given_up() -> None:
    gave_up = threading.Event()
    liveness = Liveness(LIMIT_SECONDS, give_up=gave_up.set)
    with capture_logs() as lines:
        liveness.moved("an answer")
        liveness.start()
        assert gave_up.wait(5)
    (line,) = [line for line in lines if line["event"] == "worker.stalled"]
    assert line["waits_for"] == "an answer"
    assert line["log_level"] == "critical"


def test_one_that_moves_or_rests_is_left_alone() -> None:
    gave_up = threading.Event()
    liveness = Liveness(LIMIT_SECONDS, give_up=gave_up.set)
    liveness.moved("rests")
    liveness.start()
    liveness.rests("rests")
    until = time.monotonic() + 4 * LIMIT_SECONDS
    while time.monotonic() < until:
        liveness.moved("moves")
        assert not gave_up.wait(LIMIT_SECONDS / 20)
    liveness.end()
