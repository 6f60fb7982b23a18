"""Breaks the worker on purpose, one way at a time, and shows that the fault suite notices.

    python -m dev.mutants                    all of them
    python -m dev.mutants id_cursor          these
    python -m dev.mutants --seeds 200        that many schedules at the most for each

A mutant is a change of text in a copy of this project: words that stand in one file exactly once, and what stands
there instead. When they no longer do, that is said, and fails: a mutant that changes nothing proves nothing.

What each one does to the protocol is in the model of the design; taking out the lease must not be noticed.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
SEEDS: Final = 150
_COPIED: Final = ("cdc_worker", "convex", "dev", "migrations", "pyproject.toml")
_NOT_COPIED: Final = shutil.ignore_patterns("node_modules", "__pycache__", ".*")
_MINUTES: Final = 10
# What Convex shows. The list of parked keys is kept in Postgres by the lease's holder, as the checkpoint is.
_SHOWN: Final = ("lost", "doubled", "stale")
# A mutant that only breaks the worker proves nothing: something must be wrong while the worker is content.
_NOTICED: Final = (*_SHOWN, "misparked")
# Without leases workers of several shards may take them from each other for ever. If more get stuck, a mutant that must
# not be noticed has shown nothing.
_MOST_STUCK: Final = 0.1


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
        return ["stale"] * len(events)

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
            Change(
                "migrations/0011_ids_without_a_sequence.sql",
                '(coalesce(hashtextextended(key collate "C", mirror), mirror) & 144115188075855871) << 6',
                "nextval('cdc.outbox_id')",
            ),
            Change(
                "migrations/0011_ids_without_a_sequence.sql",
                '(hash_array_extended(keys collate "C", mirror) & 144115188075855871) << 6',
                "nextval('cdc.outbox_id')",
            ),
            Change("cdc_worker/capture.py", "operator(pg_catalog.#) cdc.row_id(o.{key}, 0) as id", "as id"),
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
            Change(
                "cdc_worker/sender.py",
                "await self._outage.insist(attempt, repeating=self._repeating)",
                "await self._once(events, attempt)",
            ),
            Change("cdc_worker/sender.py", "    async def _deliver_whole(", f"{_ONCE}    async def _deliver_whole("),
        ),
    ),
    Mutant(
        "no_lease",
        "everybody gets the lease of every shard, and whoever had it may still write the checkpoint",
        (
            Change(
                "cdc_worker/allotment.py",
                "return least if lacking or not over else least + 1",
                "return shards if lacking or not over else shards",
            ),
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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the suite found in a mutant, if anything, and how many schedules it took."""

    schedules: int
    seed: str | None = None
    what: str = ""
    # Schedules in which nothing was wrong but that it did not come to rest, or what is kept in Postgres.
    stuck: int = 0


def tried(
    mutant: Mutant, *, first: int = 0, seeds: int = SEEDS, jobs: int | None = None, verbose: bool = False
) -> Outcome:
    """Plays schedules, made from seeds alone, on the mutant until something is found. Raises Misfit.

    Begins with the seed `first`, and plays `jobs` at once (as many as `make chaos`, unless told otherwise).
    """
    with tempfile.TemporaryDirectory(prefix=f"cdc-{mutant.name}-") as name:
        folder = Path(name)
        make(mutant, folder)
        report = folder / "report.json"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "dev.chaos", f"--from={first}", f"--seeds={seeds}"),
                f"--report={report}",
                *(["--stop"] if mutant.noticed else []),
                *([] if jobs is None else [f"--jobs={jobs}"]),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_MINUTES * 60,
            check=False,
        )
        said = done.stdout.decode(errors="replace")
        if verbose:
            print(said)
        if not report.exists():
            raise Misfit(f"{mutant.name}: the suite did not come to its end\n{said[-3000:]}")
        return _outcome(mutant, json.loads(report.read_text(encoding="utf-8")))


def _outcome(mutant: Mutant, figures: Mapping[str, Any]) -> Outcome:
    stuck = 0
    for finding in figures["findings"]:
        for kind, what in finding["found"]:
            if kind in (_NOTICED if mutant.noticed else _SHOWN):
                said = " ".join(f"{kind} {finding['when']}: {what}".split())
                return Outcome(figures["schedules"], finding["name"], said)
        stuck += 1
    if stuck and (mutant.noticed or stuck > figures["schedules"] * _MOST_STUCK):
        raise Misfit(f"{mutant.name}: nothing moves any more, which proves nothing: {figures['findings'][0]}")
    return Outcome(figures["schedules"], stuck=stuck)


def main() -> int:
    """Exit 0 if every mutant was noticed that must be, and no other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MUTANT", help=", ".join(mutant.name for mutant in MUTANTS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"schedules at the most for each (default: {SEEDS})")
    parser.add_argument("--verbose", action="store_true", help="print what the suite says")
    asked = parser.parse_args()
    unknown = set(asked.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not asked.names or mutant.name in asked.names]
    print(f"{len(chosen)} mutants, each until it is noticed or {asked.seeds} schedules have been played\n")
    return int(sum(not _judged(mutant, asked) for mutant in chosen) > 0)


def _judged(mutant: Mutant, asked: argparse.Namespace) -> bool:
    """Prints what became of it; whether that is as it should be."""
    started = time.monotonic()
    try:
        outcome = tried(mutant, seeds=asked.seeds, verbose=asked.verbose)
        as_it_should = (outcome.seed is not None) == mutant.noticed
        found = f"{outcome.seed}: {outcome.what[:150]}" if outcome.seed is not None else "not noticed"
        found += f"; {outcome.stuck} did not come to rest, or parked in vain" if outcome.stuck else ""
        schedules = f"{outcome.schedules:4} schedules"
    except Misfit as misfit:
        as_it_should, found, schedules = False, str(misfit), ""
    took = f"{time.monotonic() - started:5.1f} s"
    print(f"{'ok   ' if as_it_should else 'WRONG'} {mutant.name:22} {schedules} {took}  {mutant.what}")
    print(f"      {found}", flush=True)
    return as_it_should


if __name__ == "__main__":
    sys.exit(main())
