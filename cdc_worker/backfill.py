"""Rescans: every row of a mirror is marked dirty, page by page, and then every document that Convex holds for it.

Marking is all there is to it: the reader reads the rows late, as always, and a key without a row is a delete.
Where a rescan stands is one row of cdc.backfill, so whoever comes next goes on with it: the worker, or the command.
"""

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import LiteralString

from cdc_worker.database import Connection, Database, fetch
from cdc_worker.keys import join_key, key_parts
from cdc_worker.outbox import mark
from cdc_worker.parking import mark_parked
from cdc_worker.plan import Plan

_PAGE_KEYS = 1_000
_FOLLOWING = {"rows": "documents", "documents": "done"}

# If `migrate` has changed a mirror since this process read cdc_worker.toml, its rescan is left to the worker that comes
# with the new file: this one's query would give the documents as they were.
_NEXT = """
select b.mirror, b.phase, b.after, b.marked
from cdc.backfill b join cdc.mirror m on m.id = b.mirror
join unnest($1::int2[], $2::text[]) as known (mirror, definition) on known.mirror = m.id
where b.phase <> 'done' and m.definition = known.definition order by b.requested_at limit 1
"""
_TAKE = """
select again from cdc.backfill
where mirror = $1 and phase = $2 and after is not distinct from $3::text
  and exists (select from cdc.mirror where id = $1 and definition = $4) for update skip locked
"""
_MOVE = """
update cdc.backfill
set phase = $2, after = $3, marked = marked + $4, again = $5,
    finished_at = case when $2 = 'done' then clock_timestamp() end
where mirror = $1
"""
# `with_documents` has no reader any more: every rescan has both phases.
RESCAN = """
insert into cdc.backfill (mirror, phase, with_documents, reason) values ($1, 'rows', true, $2)
on conflict (mirror) do update set
    -- One that has begun to mark rows goes on to its end, and starts once more then: what it passed may have changed.
    again = cdc.backfill.phase = 'rows' and cdc.backfill.after is not null,
    phase = 'rows',
    after = case when cdc.backfill.phase = 'rows' then cdc.backfill.after end,
    marked = case when cdc.backfill.phase = 'rows' then cdc.backfill.marked else 0 end,
    reason = excluded.reason, requested_at = now(), finished_at = null
"""
_CONFIGURED = "select id from cdc.mirror where configured"
_STATE = "select phase, marked from cdc.backfill where mirror = $1"

# The keys behind `after` that Convex holds for a mirror, in order; at most as many as asked for, none at the end.
ListDocuments = Callable[[Plan, str | None, int], Awaitable[Sequence[str]]]


@dataclass(frozen=True)
class Step:
    """What one page of a rescan did."""

    mirror_id: int
    # The whole rescan is over.
    done: bool
    total_marked: int


async def request(database: Database, mirror_id: int, reason: str) -> None:
    """Asks for a rescan. One that is under way goes on, and starts once more at its end."""
    await database.execute(RESCAN, mirror_id, reason)


async def request_all(database: Database, reason: str) -> None:
    """Asks for a rescan of every configured mirror."""
    for (mirror_id,) in await database.execute(_CONFIGURED):
        await request(database, mirror_id, reason)


async def state(database: Database, mirror_id: int) -> tuple[str, int]:
    """The phase of a mirror's rescan, and how many keys it has marked."""
    rows = await database.execute(_STATE, mirror_id)
    return rows[0] if rows else ("done", 0)


async def estimate(database: Database, plan: Plan) -> int:
    """About how many rows the mirror's query has: the planner's guess, which costs nothing."""
    async with database.transaction("read only") as connection:
        ((explained,),) = await fetch(connection, _explain(plan), 1_000_000_000)
    plan_tree = explained if isinstance(explained, list) else json.loads(explained)
    return int(plan_tree[0]["Plan"]["Plan Rows"])


def _explain(plan: Plan) -> LiteralString:
    return f"explain (format json) {plan.first_keys}"


async def _next_rows(connection: Connection, plan: Plan, after: str | None) -> list[str]:
    # One that was under way when the mirror got another key starts anew.
    parts = None if after is None else key_parts(after, plan.key_types)
    if parts is None:
        found = await fetch(connection, plan.first_keys, _PAGE_KEYS)
    else:
        found = await fetch(connection, plan.next_keys, _PAGE_KEYS, *parts)
    return [join_key(row) for row in found]


async def step(database: Database, plans: dict[int, Plan], list_documents: ListDocuments | None) -> Step | None:
    """Marks one page of one rescan among those of `plans`; None if there is nothing to do.

    Without `list_documents` the second phase is left to the worker.
    """
    rows = await database.execute(_NEXT, list(plans), [plan.mirror.definition for plan in plans.values()])
    if not rows:
        return None
    mirror_id, phase, after, total = rows[0]
    plan = plans[mirror_id]
    documents: Sequence[str] = ()
    if phase == "documents":
        if list_documents is None:
            return None
        # Before the transaction: Convex may take its time.
        documents = await list_documents(plan, after, _PAGE_KEYS)
    async with database.transaction() as connection:
        still = await fetch(connection, _TAKE, mirror_id, phase, after, plan.mirror.definition)
        if not still:
            return Step(mirror_id, False, total)  # somebody else was quicker
        ((again,),) = still
        if phase == "documents":
            # They are listed by a query that may give fewer than asked for: only an empty page is the end.
            keys, finished = documents, not documents
        else:
            keys = await _next_rows(connection, plan, after)
            finished = len(keys) < _PAGE_KEYS
        await mark(connection, mirror_id, keys)
        if phase == "rows" and finished:
            # What is parked may have neither a row nor a document any more: only so does it come to be settled.
            await mark_parked(connection, mirror_id)
        upcoming, moved_to = (_FOLLOWING[phase], None) if finished else (phase, keys[-1])
        if upcoming == "done" and again:
            upcoming, again = "rows", False
        await connection.execute(_MOVE, (mirror_id, upcoming, moved_to, len(keys), again))
    return Step(mirror_id, upcoming == "done", total + len(keys))
