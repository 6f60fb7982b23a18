"""What is installed on a dyno: the migrations travel with the package, and nothing of dev/ or tests/ does."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


def test_the_wheel_has_the_worker_its_types_and_its_migrations(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith("cdc_worker-")}
    assert "cdc_worker/py.typed" in names
    assert {f"cdc_worker/migrations/{path.name}" for path in (ROOT / "migrations").glob("*.sql")} <= names
    assert {name.split("/")[0] for name in names} == {"cdc_worker"}


def test_heroku_reads_pins_that_install_the_project() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.lstrip().startswith("#")]
    assert pins[-1] == "."
    assert all("==" in pin for pin in pins[:-1])
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = {pin.split("==")[0] for pin in pins}
    assert {dependency.split(">")[0].split("=")[0].split("[")[0] for dependency in declared} <= pinned


def test_no_package_json_at_the_root_for_heroku_to_find() -> None:
    assert not (ROOT / "package.json").exists()


def test_no_pin_names_a_place_to_download_from() -> None:
    for path in ("requirements.txt", "dev/requirements-dev.txt", "dev/package-lock.json"):
        text = (ROOT / path).read_text()
        assert "--index-url" not in text
        assert "--find-links" not in text
        assert '"resolved"' not in text


def test_commands_start_without_what_only_the_worker_needs() -> None:
    loaded = "import sys, cdc_worker.__main__; print('aiohttp' in sys.modules, 'psycopg' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
