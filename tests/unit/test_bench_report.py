"""The figures of a run become a page and pictures."""

from xml.etree import ElementTree as ET

from dev.bench import pictures, report, stations, targets
from dev.bench.__main__ import CASES
from dev.bench.results import Results, percentile


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
    for name in (*CASES, "machine", "targets", "durations"):
        assert f"<!-- figures: {name} -->" in page


def test_stations_are_modules_that_exist() -> None:
    folder = report.PAGE.parents[1] / "cdc_worker"
    known = {*stations._FILES, *(name for name, _ in stations._FUNCTIONS)}
    assert {name for name in known if not (folder / name).exists()} == set()
