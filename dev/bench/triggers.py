"""Triggers on the benchmark's tables: capture's own, changed ones, and the least there can be."""

from collections.abc import Mapping
from typing import Final

from cdc_worker.capture import Feed, create_function, create_trigger, function_body
from cdc_worker.mirrors import Source
from dev.bench.stage import Stage

EVENTS: Final = ("insert", "update", "delete")

NOTHING: Final = "begin return null; end"
"""What any trigger in plpgsql costs, with its transition tables, whatever it is for."""

_ONLY_THE_KEY: Final = """
begin
    insert into cdc.outbox_0 (id, mirror, key) select cdc.row_id({rows}.id::text, 1), 1, {rows}.id::text from {rows};
    return null;
end
"""


def only_the_key(event: str) -> str:
    """The floor of any log that triggers write: one row with the key, nothing compared, nobody rung for."""
    return _ONLY_THE_KEY.format(rows="cdc_old" if event == "delete" else "cdc_new")


def captured(table: str, event: str) -> str:
    """The body of capture's function for a table with the key `id`."""
    return function_body([Feed(1, Source(table=table, key=("id",)))], event)


def add_triggers(on: Stage, table: str, bodies: Mapping[str, str]) -> dict[str, str]:
    """Statement triggers that call functions with these bodies; by event, the function's name."""
    names = {event: f"bench_{table}_{event}" for event in bodies}
    for event, body in bodies.items():
        on.execute(create_function(names[event], body).as_string())
        on.execute(create_trigger(names[event], "public", table, event).as_string())
    return {event: f"cdc.{name}()" for event, name in names.items()}
