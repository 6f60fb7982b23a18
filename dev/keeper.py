"""Runs one program and ends it when the process that asked for it is gone, however it went.

A throw-away server must not outlive a test run that was killed with SIGKILL. No handler runs then, and
Linux's PR_SET_PDEATHSIG is tied to the thread that forked and cleared for a program that changes its user,
which Postgres as root needs. What does work everywhere is a pipe: the kernel closes the other end of
this process's stdin when its writer dies. So the keeper stands between the two and reads:

- a byte is a signal number, passed on to the program;
- the end of the file means "enough": the ladder of signals, each with its deadline, SIGKILL after the last,
  and then the folders that were named are removed.

It is started by its path (see dev/processes.py), with nothing but the standard library, to be there
in some 20 ms. It exits with the program's code, 128 + n when signal n ended it, 127 when it could not
be started.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import NoReturn


def main() -> NoReturn:
    """argv: a JSON object (`ladder`, `remove`, `uid`, `gid`, see dev/processes.py), then the program."""
    order = json.loads(sys.argv[1])
    argv = sys.argv[2:]
    ladder = [(signal.Signals(number), float(seconds)) for number, seconds in order["ladder"]]

    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    # Handlers, not SIG_IGN: an ignored signal would stay ignored in the program.
    enough: list[int] = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for ending in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ending, lambda number, _: enough.append(number))

    drop = {} if order["uid"] is None else {"user": order["uid"], "group": order["gid"], "extra_groups": []}
    try:
        # Its own session: Ctrl-C in a terminal reaches the parent alone, which stops things in order,
        # and what the program leaves behind in its group can be found.
        program = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True, **drop)
    except OSError as error:
        print(f"cannot start {argv[0]}: {error}", file=sys.stderr)
        sys.exit(127)

    stdin_open = True
    deadline: float | None = None  # of the rung of the ladder that we stand on
    while program.poll() is None:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([wake_read, *([0] if stdin_open else [])], [], [], wait)
        if wake_read in readable:
            os.read(wake_read, 512)
        if 0 in readable:
            numbers = os.read(0, 512)
            for byte in numbers:
                program.send_signal(byte)
            if not numbers:
                stdin_open = False
        over = deadline is not None and time.monotonic() >= deadline
        if over or (deadline is None and (enough or not stdin_open)):
            number, seconds = ladder.pop(0) if ladder else (signal.SIGKILL, 10.0)
            program.send_signal(number)
            if number != signal.SIGKILL:
                # A stopped program would sleep through a signal that it could handle.
                program.send_signal(signal.SIGCONT)
            deadline = time.monotonic() + seconds

    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(program.pid, signal.SIGKILL)
    if deadline is not None:
        for folder in order["remove"]:
            shutil.rmtree(folder, ignore_errors=True)
    code = program.returncode
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
