"""The figures of a run become a page and pictures."""

import io
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from dev.bench import paper, pictures, report, stations, targets
from dev.bench.__main__ import CASES
from dev.bench.results import Results, Row, percentile


def test_percentiles() -> None:
    assert percentile(range(100), 0.5) == 50
    assert percentile(range(100), 0.99) == 99
    assert percentile([7.0], 0.99) == 7.0
    assert str(percentile([], 0.5)) == "nan"


def test_a_target_without_a_figure_is_neither_met_nor_missed() -> None:
    assert {target.met for target in targets.targets(Results())} == {None}


def test_targets_read_the_figures() -> None:
    row = {"what": "with LISTEN", "worker_core_percent": 0.4, "statements_per_minute": 11.0}
    found = {target.text: target.met for target in targets.targets(Results(cases={"idle": [row]}))}
    assert found["idle: percent of a core"] is True
    assert found["idle: statements a minute"] is False


def test_pictures_are_xml_whatever_they_are_called() -> None:
    for picture in (
        pictures.bars("a < b", [("<one>", 1.0), ("none", 0.0)]),
        pictures.panels("a & b", [("flat", [(0.0, 0.0), (1.0, 0.0)]), ("up", [(0.0, 1.0), (9.0, 5.0)])]),
    ):
        assert ET.fromstring(picture).tag.endswith("svg")


def test_the_page_has_a_place_for_every_case_and_keeps_its_words() -> None:
    page = report.PAGE.read_text()
    for name in (*CASES, "paper", "machine", "targets", "durations"):
        assert f"<!-- figures: {name} -->" in page


def test_stations_are_modules_that_exist() -> None:
    folder = report.PAGE.parents[1] / "cdc_worker"
    known = {*stations._FILES, *(name for name, _ in stations._FUNCTIONS)}
    assert {name for name in known if not (folder / name).exists()} == set()
    for name, function in stations._FUNCTIONS:
        assert f"def {function}(" in (folder / name).read_text()


def test_stations_that_are_small_are_one_row() -> None:
    samples = {"HTTP": 500, "lanes": 490, "checkpoint": 6, "everything else": 4}
    shares = stations.shares(samples)
    assert list(shares) == ["HTTP", "lanes", "everything else"]
    assert list(shares.values()) == pytest.approx([0.5, 0.49, 0.01])


def far(**figures: float) -> Results:
    """A drain of which each call took 200 ms."""
    row: Row = {"what": "200 ms", "bytes_per_key": 400.0, "keys_per_request": 500.0, "steady_keys_per_second": 12_000.0}
    return Results(cases={"distance": [row | figures]})


def test_what_a_plan_can_take_is_worked_out_from_the_figures() -> None:
    smallest, largest = paper.paper(far())
    # 4 MiB / 400 bytes; 16 mutations of 500 keys in 0.2 s
    assert (round(smallest["keys_by_bytes"]), round(smallest["keys_by_calls"])) == (10_486, 40_000)
    assert (smallest["binds"], smallest["in_flight"], smallest["workers"]) == ("bytes written", 5, 1)
    assert (round(largest["keys_by_bytes"]), round(largest["keys_by_calls"])) == (167_772, 2_560_000)
    assert (largest["binds"], largest["in_flight"], largest["workers"]) == ("bytes written", 68, 14)


def test_small_requests_are_bound_by_the_number_of_mutations() -> None:
    smallest, _ = paper.paper(far(keys_per_request=50.0, steady_keys_per_second=1_500.0))
    assert (smallest["binds"], smallest["keys_by_calls"]) == ("mutations at once", 4_000)
    assert (smallest["in_flight"], smallest["workers"]) == (16, 3)


def test_nothing_is_worked_out_from_nothing() -> None:
    assert paper.paper(Results()) == []
    assert paper.paper(far(steady_keys_per_second=0.0)) == []


def test_the_page_gets_what_was_measured_and_keeps_the_rest() -> None:
    page = "Idle:\n<!-- figures: idle -->\n<!-- end -->\nwords\n<!-- figures: held -->\nold\n<!-- end -->\n"
    row = {"what": "with LISTEN", "worker_core_percent": 0.4, "seconds": 1_000.0}
    filled = report.fill(page, Results(cases={"idle": [row]}))
    assert filled == (
        "Idle:\n<!-- figures: idle -->\n| | worker % of a core | seconds |\n| --- | ---: | ---: |\n"
        "| with LISTEN | 0.40 | 1,000 |\n<!-- end -->\nwords\n<!-- figures: held -->\nold\n<!-- end -->\n"
    )
    assert "smallest plan" in report.fill("<!-- figures: paper -->\n<!-- end -->", far())


def test_a_wide_table_fits_a_terminal_and_breaks_no_figure() -> None:
    figures = {"keys": 1_000_000, "keys_per_second": 98_765.0, "local_keys_per_second": 9_876.0, "peak_mib": 72.0}
    costs = dict.fromkeys(("worker_us_per_key", "postgres_us_per_key", "statements_per_1000"), 12.3)
    more = dict.fromkeys(("keys_per_request", "bytes_per_key", "most_in_flight"), 499.0)
    row: Row = {"what": "so many keys"} | figures | costs | more
    results = Results(cases={"drain": [row, {"what": "`batches` of 500", "keys": 1_000_000}]})
    shown = io.StringIO()
    report.show(results, ["drain", "idle"], Console(file=shown, width=100))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    (line,) = (line for line in lines if "so many keys" in line)
    assert line.split()[3:] == ["1,000,000", "98,765", "9,876", "12.3", "12.3", "72", "499", "499", "12.3", "499"]
    assert any(line.startswith(" batches of 500") for line in lines)
    assert "idle" not in shown.getvalue()
