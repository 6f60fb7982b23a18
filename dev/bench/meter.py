"""What processes cost, as Linux counts it in /proc: seconds of processor time and bytes of memory."""

import os
from pathlib import Path

_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Of a process with its threads, and of its children that have ended and were waited for."""
    return sum(map(int, _stat(pid)[11:15])) * _TICK_SECONDS


def tree_cpu_seconds(pid: int) -> float:
    """Of a process and all below it. It never falls: a child that ends is counted by its parent from then on."""
    return sum(cpu_seconds(each) for each in (pid, *descendants(pid)) if Path(f"/proc/{each}").exists())


def peak_bytes(pid: int) -> int:
    """The most memory that was resident since it began."""
    return _status_bytes(pid, "VmHWM")


def _status_bytes(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found: list[int] = []
    left = [pid]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def program_of(keeper: int) -> int:
    """The program that a keeper (dev/processes.py) holds. Raises LookupError for one that does not run."""
    for each in descendants(keeper):
        return each
    raise LookupError("the program does not run")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/pid/stat from `state` on; the name before them may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
