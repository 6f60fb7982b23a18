"""Breaks the worker on purpose, one way at a time, and shows that the property test notices.

    python -m dev.mutants                    all of them
    python -m dev.mutants id_cursor          these
    python -m dev.mutants --generated-only   without the schedules that are written down in the test

A mutant is a change of text in a copy of this project: words that stand in one file exactly once, and what stands
there instead. When they no longer do, that is said, and fails: a mutant that changes nothing proves nothing.

What each one does to the protocol is in the model of the design; taking out the lease must not be noticed.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
TEST: Final = "tests/integration/test_convergence.py"
_COPIED: Final = ("cdc_worker", "convex", "dev", "migrations", "tests", "pyproject.toml")
_NOT_COPIED: Final = shutil.ignore_patterns("node_modules", "__pycache__", ".*")
_MINUTES: Final = 10


@dataclasses.dataclass(frozen=True)
class Change:
    file: str
    old: str
    new: str


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    what: str
    changes: tuple[Change, ...]
    noticed: bool = True


class Misfit(Exception):
    """The source has moved on, and the mutant with it."""


_ONCE: Final = """
    async def _once(self, events, attempt):
        try:
            return await attempt()
        except Exception as error:
            if "Transient" not in {kind.__name__ for kind in type(error).__mro__}:
                raise
        await asyncio.sleep(0.02)
        for event in events:
            await self._parking._database.execute(
                "insert into cdc.outbox (slot, mirror, key) values (cdc.written(), $1, $2)", event.mirror_id, event.key
            )
        await self._parking._database.execute("select pg_notify('cdc_outbox', '')")
        return {"outcome": "applied", "verdicts": ["stale"] * len(events)}

"""

MUTANTS: Final = (
    Mutant(
        "id_cursor",
        "the cursor is `id > last_id`: the highest id that was visible before; ids are given out one by one",
        (
            Change(
                "cdc_worker/outbox.py",
                "where xid >= pg_snapshot_xmax($1::pg_snapshot) and xid < pg_snapshot_xmax($2::pg_snapshot)",
                "where id > (select coalesce(max(id), 0) from cdc.outbox"
                " where pg_visible_in_snapshot(xid, $1::pg_snapshot))",
            ),
            Change(
                "cdc_worker/outbox.py",
                "where xid = was_open and pg_visible_in_snapshot(xid, $2::pg_snapshot)",
                "where false",
            ),
            Change("migrations/0002_cheaper_capture.sql", "increment 64 cache 32", "increment 64"),
        ),
    ),
    Mutant(
        "no_version",
        "Convex takes every content, however old its number",
        (
            Change(
                "convex/cdc.ts",
                'if (!versions.every((older) => isAbove(version, older))) return "stale";',
                "",
            ),
        ),
    ),
    Mutant(
        "no_epoch",
        "no fence, and the version is the number alone",
        (
            Change("convex/cdc.ts", "if (opened?.epoch !== epoch)", "if (opened === null)"),
            Change("convex/cdc.ts", "const version = { epoch, number };", "const version = { epoch: 1, number };"),
        ),
    ),
    Mutant(
        "no_fence",
        "Convex lets batches of an older epoch in; the version still counts the epoch",
        (Change("convex/cdc.ts", "if (opened?.epoch !== epoch)", "if (opened === null)"),),
    ),
    Mutant(
        "no_tombstone",
        "a delete leaves nothing behind",
        (Change("convex/cdc.ts", "await bury(ctx, tombstone, key, version);", ""),),
    ),
    Mutant(
        "checkpoint_early",
        "a page counts as acknowledged once it is read",
        (Change("cdc_worker/lanes.py", "while self._pages and self._pages[0].left == 0:", "while self._pages:"),),
    ),
    Mutant(
        "fence_ignored",
        "a batch that was refused for its epoch counts as delivered",
        (Change("cdc_worker/sender.py", 'raise Fenced("Convex gave this shard another epoch")', "return"),),
    ),
    Mutant(
        "rejection_ignored",
        "a key that was rejected counts as delivered",
        (Change("cdc_worker/sender.py", "await self._parking.park(refused)", ""),),
    ),
    Mutant(
        "no_lane",
        "a key may be in flight twice",
        (
            Change(
                "cdc_worker/lanes.py",
                "lane = self._behind if key in self._in_flight else self._waiting",
                "lane = self._waiting",
            ),
            # The first of the two to be settled then settles both.
            Change(
                "cdc_worker/lanes.py",
                "self._in_flight[key] = self._owed.pop(key)",
                "self._in_flight[key] = [*self._in_flight.get(key, ()), *self._owed.pop(key)]",
            ),
            Change("cdc_worker/lanes.py", "self._in_flight.pop(key)", "self._in_flight.pop(key, ())"),
        ),
    ),
    Mutant(
        "new_number_on_unknown",
        "a request whose outcome is unknown is given up, and its keys are read anew",
        (
            Change("cdc_worker/sender.py", "await self._outage.insist(", "await self._once(events, "),
            Change("cdc_worker/sender.py", "    async def _deliver_whole(", f"{_ONCE}    async def _deliver_whole("),
        ),
    ),
    Mutant(
        "no_lease",
        "everybody gets the lease, and whoever had it may still write the checkpoint",
        (
            Change("migrations/0003_shards.sql", "select holder is null or", "select true or holder is null or"),
            Change("cdc_worker/allotment.py", "if token != held[shard]:", "if token < held[shard]:"),
            Change("cdc_worker/checkpoint.py", "        if not rows:", "        if len(rows) > 1:"),
            Change(
                "cdc_worker/checkpoint.py",
                "where shard = $1 and token = $2 returning saves",
                "where shard = $1 and $2::int8 > 0 returning saves",
            ),
        ),
        noticed=False,
    ),
)


def make(mutant: Mutant, folder: Path) -> None:
    """A copy of the project in `folder`, changed. Raises Misfit if the source is not as the mutant knows it."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=_NOT_COPIED)
        else:
            shutil.copy(source, folder / name)
    for link in ("node_modules", "dev/node_modules"):
        (folder / link).symlink_to(ROOT / "dev/node_modules")
    for file, text in changed(mutant).items():
        (folder / file).write_text(text, encoding="utf-8")


def changed(mutant: Mutant) -> dict[str, str]:
    """The files of the mutant as they become, by name. Raises Misfit if the source is not as the mutant knows it."""
    texts: dict[str, str] = {}
    for change in mutant.changes:
        text = texts.get(change.file) or (ROOT / change.file).read_text(encoding="utf-8")
        times = text.count(change.old)
        if times != 1:
            raise Misfit(f"{mutant.name}: {change.file} has {times} times, not once:\n{change.old}")
        texts[change.file] = text.replace(change.old, change.new)
    return texts


def noticed(mutant: Mutant, *, generated_only: bool = False, verbose: bool = False) -> str | None:
    """Runs the property test on the mutant: what it found, in a line, or None if it passed. Raises Misfit."""
    with tempfile.TemporaryDirectory(prefix=f"cdc-{mutant.name}-") as name:
        folder = Path(name)
        make(mutant, folder)
        environment = {**os.environ, "PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1", "CI": ""}
        if generated_only:
            environment["CDC_GENERATED_ONLY"] = "1"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", TEST, "--postgres", "wheel", "-x", "-q", "-p", "no:cacheprovider"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_MINUTES * 60,
            check=False,
        )
    said = done.stdout.decode(errors="replace")
    if verbose:
        print(said)
    if done.returncode == 0:
        return None
    # A mutant that only breaks the worker shows nothing: Convex must be wrong while the worker is content.
    found = re.search(r"AssertionError: (schedule \d+: .*Convex is not as Postgres:(?:\n(?!E +\n).*){0,3})", said)
    if done.returncode != 1 or found is None:
        raise Misfit(f"{mutant.name}: the test fails, and not because Convex differs from Postgres\n{said[-3000:]}")
    return re.sub(r"\s*\nE\s+", " ", found[1])[:300]


def main() -> int:
    """Exit 0 if every mutant was noticed that must be, and no other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MUTANT", help=", ".join(mutant.name for mutant in MUTANTS))
    parser.add_argument("--generated-only", action="store_true", help="only what Hypothesis makes")
    parser.add_argument("--verbose", action="store_true", help="print what pytest says")
    asked = parser.parse_args()
    unknown = set(asked.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    wrong = 0
    for mutant in MUTANTS:
        if asked.names and mutant.name not in asked.names:
            continue
        started = time.monotonic()
        try:
            found = noticed(mutant, generated_only=asked.generated_only, verbose=asked.verbose)
            as_it_should = (found is not None) == mutant.noticed
        except Misfit as misfit:
            found, as_it_should = str(misfit), False
        wrong += not as_it_should
        print(
            "ok   " if as_it_should else "WRONG", f"{mutant.name:22} {time.monotonic() - started:5.1f} s  {mutant.what}"
        )
        print(f"      {found or 'not noticed'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
