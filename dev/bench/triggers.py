"""Triggers on the benchmark's tables: capture's own, changed ones, and the least there can be."""

from typing import Final

from cdc_worker.capture import Feed, create_function, create_trigger, function_body
from cdc_worker.mirrors import Source
from dev.bench.stage import Stage

_EVENTS: Final = ("insert", "update", "delete")

# The floor of any log that triggers write: one row with the key, nothing compared, nobody rung for.
ONLY_THE_KEY: Final = """
begin
    if tg_op = 'DELETE' then insert into cdc.outbox_0 (mirror, key) select 1, cdc_old.id::text from cdc_old;
    else insert into cdc.outbox_0 (mirror, key) select 1, cdc_new.id::text from cdc_new;
    end if;
    return null;
end
"""


def captured(table: str) -> str:
    """The body of capture's function for a table with the key `id`."""
    return function_body([Feed(1, Source(table=table, key=("id",)))])


def add_triggers(on: Stage, table: str, body: str) -> str:
    """Statement triggers that call a function with this body; its name in the schema cdc."""
    name = f"bench_{table}"
    on.execute(create_function(name, body).as_string())
    for event in _EVENTS:
        on.execute(create_trigger(name, "public", table, event).as_string())
    return name
