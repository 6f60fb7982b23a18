"""The Procfile as the platform runs it: `release` to its end, then `worker`, here by honcho."""

import signal
import sys
import time
from pathlib import Path

import pytest
from honcho.environ import parse_procfile  # type: ignore[import-untyped]

from dev import local_convex as convex
from dev.processes import Process
from tests.integration.application import CHECK_INS, STATUS, TABLES, Database, toml
from tests.integration.mirrored import Mirrored
from tests.integration.running import ROOT, environment, honcho

MIRRORS = (CHECK_INS, STATUS)


def test_what_it_says() -> None:
    assert parse_procfile((ROOT / "Procfile").read_text()).processes == {
        "release": "python -m cdc_worker migrate",
        "worker": "python -m cdc_worker run",
    }


@pytest.mark.one_postgres
def test_release_then_worker(database: str, fresh_convex: convex.LocalConvex, tmp_path: Path) -> None:
    config = tmp_path / "cdc_worker.toml"
    config.write_text(toml(MIRRORS))
    env = environment(database, fresh_convex, config)
    # `python` is the one of these tests, as it is the only one on a dyno; there is no .env, as on a dyno.
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env["PYTHONUNBUFFERED"] = "1"
    mirrored = Mirrored(fresh_convex.url, fresh_convex.admin_key)
    with Database(database, TABLES) as db:
        with Process(honcho("run", *_words("release")), stdout=tmp_path / "release", env=env, cwd=ROOT) as release:
            assert release.wait(60) == 0, release.tail()
        db.execute("""insert into "CheckIn" values ('1', 'someone', 'through the Procfile', null, now())""")
        with Process(honcho("start", "worker"), stdout=tmp_path / "worker", env=env, cwd=ROOT) as worker:
            deadline = time.monotonic() + 60
            while mirrored.descriptions("someone") != ["through the Procfile"]:
                assert time.monotonic() < deadline, worker.tail()
                assert worker.returncode is None, worker.tail()
                time.sleep(0.02)
            worker.signal(signal.SIGTERM)
            worker.wait(45)
            text = worker.stdout.read_text()
        for event in ("session.open", "worker.stop_requested", "session.drained", "worker.stopped"):
            assert f'"event": "{event}"' in text, text
        assert "worker.1 stopped" in text  # the code is the shell's in between, which the same signal ends
        assert db.one("select holder is null from cdc.checkpoint") is True


def _words(name: str) -> list[str]:
    command = parse_procfile((ROOT / "Procfile").read_text()).processes[name]
    assert isinstance(command, str)
    return command.split()
