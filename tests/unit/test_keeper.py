"""A program that was started through the keeper never outlives us, and ends as it was told to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dev.processes import Process, ProcessError, stands_still

SAY_PID_AND_SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SAY_PID_AND_SLEEP


def python(program: str, folder: Path, **options: object) -> Process:
    return Process([sys.executable, "-c", program], stdout=folder / "out", **options)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def soon(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_exit_code_and_output_are_the_program_s(tmp_path: Path) -> None:
    with python("import sys; print('said'); sys.exit(7)", tmp_path) as process:
        assert process.first_line(30) == "said"
        assert process.wait(30) == 7


def test_a_program_that_is_not_there_says_so(tmp_path: Path) -> None:
    with Process([tmp_path / "nothing"], stdout=tmp_path / "out") as process:
        assert process.wait(30) == 127
        assert "cannot start" in process.tail()


def test_first_line_of_a_program_that_ends_early_shows_what_it_said(tmp_path: Path) -> None:
    with (
        Process([sys.executable, "-c", "1/0"], stdout=tmp_path / "out", stderr=tmp_path / "err") as process,
        pytest.raises(ProcessError, match="ZeroDivisionError"),
    ):
        process.first_line(30)


def test_first_line_has_a_deadline(tmp_path: Path) -> None:
    with python("import time; time.sleep(60)", tmp_path) as process, pytest.raises(ProcessError, match="said nothing"):
        process.first_line(0.2)


def test_signals_are_passed_on(tmp_path: Path) -> None:
    with python(SAY_PID_AND_SLEEP, tmp_path) as process:
        process.first_line(30)
        process.signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL


def test_stop_ends_it_and_removes_the_folders(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    process = python(SAY_PID_AND_SLEEP, tmp_path, remove=[folder])
    process.first_line(30)
    assert process.stop() == -signal.SIGTERM
    assert not folder.exists()
    assert process.stop() == -signal.SIGTERM


@pytest.mark.parametrize("asleep", [False, True], ids=["deaf", "deaf and stopped"])
def test_a_program_that_ignores_the_ladder_is_killed(tmp_path: Path, *, asleep: bool) -> None:
    process = python(DEAF, tmp_path, ladder=((signal.SIGTERM, 0.2),))
    process.first_line(30)
    if asleep:
        process.signal(signal.SIGSTOP)
    assert process.stop() == -signal.SIGKILL


def test_a_stopped_program_can_still_end_in_order(tmp_path: Path) -> None:
    process = python(SAY_PID_AND_SLEEP, tmp_path)
    pid = process.first_line(30)
    process.signal(signal.SIGSTOP)
    soon(lambda: stands_still(pid))
    assert process.stop() == -signal.SIGTERM


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    mother = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {DEAF!r}])"
    with python(mother, tmp_path) as process:
        child = int(process.first_line(30))
    soon(lambda: not alive(child))


def test_nothing_is_left_when_we_are_killed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    us = f"""
import sys, time
from pathlib import Path
from dev.processes import Process
Process([sys.executable, "-c", {SAY_PID_AND_SLEEP!r}], stdout=Path({str(tmp_path / "out")!r}),
        remove=[Path({str(folder)!r})])
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", us])
    try:
        soon(lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text().endswith("\n"))
        pid = int((tmp_path / "out").read_text())
        assert alive(pid)
    finally:
        parent.kill()
        parent.wait()
    soon(lambda: not alive(pid))
    soon(lambda: not folder.exists())
