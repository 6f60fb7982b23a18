"""Waits of the worker that a schedule would wait out, made short, and bounds made small: the same code, sooner.

Only waits that decide when somebody looks again, and bounds that decide when there is a next page. What each is for
is said where it stands. tests/chaos/test_failpoints.py says when a name no longer fits.
"""

import importlib
from typing import Final

CONSTANTS: Final = {
    "backfill._PAGE_KEYS": 2,
    "care._MENDING_SECONDS": 0.1,
    "care._RESCAN_SECONDS": 0.05,
    "care._SELDOM_SECONDS": 0.3,
    "database._GRACE_SECONDS": 0.5,
    "listener._DEADLINE_SECONDS": 0.5,
    "listener._ECHO_SECONDS": 0.5,
    "reader._MOST_WAITING_KEYS": 8,
    "reader._LOOKOUT_SECONDS": 0.5,
    "session._UNMOVED_HEARTBEATS": 0.2,
    "shards._STANDBY_SECONDS": 0.1,
}


def make_quick() -> None:
    """In this process. Raises AttributeError if the worker has no such constant."""
    for place, value in CONSTANTS.items():
        module_name, name = place.split(".")
        module = importlib.import_module(f"cdc_worker.{module_name}")
        getattr(module, name)
        setattr(module, name, value)
