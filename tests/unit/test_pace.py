"""Additive increase, multiplicative decrease."""

from cdc_worker.pace import Pace


def settled(pace: Pace, batches: int, *, took_seconds: float = 0.1) -> None:
    for _ in range(batches):
        pace.good(full=True, took_seconds=took_seconds)


def test_it_rises_to_what_is_allowed_and_no_further() -> None:
    pace = Pace(keys=250, most_keys=500, most_in_flight=12)
    assert (pace.keys, pace.in_flight) == (250, 4)
    settled(pace, 500)
    assert (pace.keys, pace.in_flight) == (500, 12)


def test_what_is_not_full_raises_nothing() -> None:
    pace = Pace(keys=250, most_keys=500, most_in_flight=12)
    for _ in range(500):
        pace.good(full=False, took_seconds=0.1)
    assert (pace.keys, pace.in_flight) == (250, 4)


def test_a_slow_batch_is_not_made_larger() -> None:
    pace = Pace(keys=250, most_keys=500, most_in_flight=12)
    settled(pace, 500, took_seconds=0.9)
    assert (pace.keys, pace.in_flight) == (250, 12)


def test_too_much_halves_what_is_in_flight_once_for_all_that_was_sent_before() -> None:
    pace = Pace(keys=250, most_keys=500, most_in_flight=12)
    settled(pace, 500)
    sent = [pace.sent() for _ in range(12)]
    for number in sent:
        pace.too_much(number)
    assert pace.in_flight == 6
    pace.too_much(pace.sent())
    assert pace.in_flight == 3
    for _ in range(9):
        pace.too_much(pace.sent())
    assert pace.in_flight == 1


def test_too_large_halves_the_batch_down_to_one() -> None:
    pace = Pace(keys=250, most_keys=500, most_in_flight=12)
    pace.too_large()
    assert pace.keys == 125
    for _ in range(20):
        pace.too_large()
    assert pace.keys == 1
