"""Programs that end with us: started through a keeper, stopped under a deadline, never left running."""

import contextlib
import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

KEEPER: Final = Path(__file__).with_name("keeper.py")

Ladder = Sequence[tuple[signal.Signals, float]]
"""Signals to try one after the other, each with the seconds that it is given; SIGKILL follows the last."""

TERM: Final[Ladder] = ((signal.SIGTERM, 10.0),)


class ProcessError(Exception):
    """A program could not be started, or did not do in time what was expected of it."""


def unprivileged() -> tuple[int, int] | None:
    """(uid, gid) for programs that refuse to run as root; None when we are not root anyway."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise ProcessError("running as root, and there is neither a user `postgres` nor `nobody` to drop to")


def stands_still(pid: str) -> bool:
    """Whether SIGSTOP has reached the program: through the keeper it takes its way."""
    return subprocess.check_output(["ps", "-o", "state=", "-p", pid]).startswith(b"T")


class Process:
    """One running program. Leaving the `with` block stops it; so does our own death.

    `stdout` and `stderr` are files: a program that prints a lot never blocks on a pipe nobody reads,
    and what it said is still there after a failure.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        stdout: Path,
        stderr: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        ladder: Ladder = TERM,
        user: tuple[int, int] | None = None,
        remove: Sequence[Path] = (),
    ) -> None:
        """Start it. Files are appended to; `env` replaces the environment; without `stderr` it goes to `stdout`.

        `remove` names folders to delete when the program is made to stop (by `stop` or by our death), not
        when it ends by itself.
        """
        self.name = Path(argv[0]).name
        self.stdout = stdout
        self.stderr = stderr or stdout
        self._patience = sum(seconds for _, seconds in ladder) + 15.0
        uid, gid = user or (None, None)
        order = {
            "ladder": [(int(number), seconds) for number, seconds in ladder],
            "remove": [str(folder) for folder in remove],
            "uid": uid,
            "gid": gid,
        }
        with stdout.open("ab") as out, self.stderr.open("ab") as err:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), json.dumps(order), *map(str, argv)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env=env,
                cwd=cwd,
                start_new_session=True,
                bufsize=0,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def keeper_pid(self) -> int:
        """The process that holds it: the program is its child, from a moment after the start on."""
        return self._keeper.pid

    @property
    def returncode(self) -> int | None:
        """As `subprocess.Popen` has it: None while it runs, -n when signal n ended it."""
        code = self._keeper.poll()
        return code if code is None or code <= 128 else 128 - code

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has ended."""
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.write(bytes([number]))

    def wait(self, timeout: float) -> int:
        """Wait for it to end. Raises ProcessError after `timeout` seconds."""
        try:
            self._keeper.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessError(f"{self.name} still runs after {timeout:g} s\n{self.tail()}") from None
        code = self.returncode
        assert code is not None
        return code

    def stop(self) -> int:
        """Climb the ladder and wait; idempotent."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        return self.wait(self._patience)

    def first_line(self, timeout: float) -> str:
        """The first whole line on its stdout, which must have been empty when it was started.

        Raises ProcessError with the end of its output if it ends before that, or after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            ended = self.returncode is not None
            line, newline, _ = self.stdout.read_bytes().partition(b"\n")
            if newline:
                return line.decode()
            if ended:
                raise ProcessError(f"{self.name} ended with {self.returncode}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ProcessError(f"{self.name} said nothing within {timeout:g} s\n{self.tail()}")
            time.sleep(0.01)

    def tail(self, lines: int = 30) -> str:
        """The end of what it printed, for an error message."""
        text = "".join(path.read_text(errors="replace") for path in {self.stdout: 0, self.stderr: 0} if path.exists())
        return "\n".join(text.splitlines()[-lines:])
