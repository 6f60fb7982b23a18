"""The application whose rows are mirrored, and, by SQL of its own, which documents those rows are.

Small on purpose: two or three ids for each table, so that random writes meet each other. Nasty on purpose: ids with
quotes and colons, keys that change, a table that feeds two mirrors, times before 1970, a time zone that is not
UTC. Nothing here is shared with cdc_worker: what it says is compared with what the worker does.
"""

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, LiteralString

from psycopg import AsyncConnection

from dev.chaos.network import POISON

TABLES: Final = ('"Note"', "app.visit", "member", '"Alert"')
SCHEMA: Final = """
create table "Note" (
    id text primary key, "userId" text not null, kind text not null, body text, "createdAt" timestamp(6) not null,
    meta jsonb
);
create schema app;
create table app.visit (
    place text, seq int, member text not null, remark text not null, at timestamptz not null,
    seen int not null default 0, raw json, primary key (place, seq)
);
create table member (id text primary key, "lastSeen" timestamptz, due date);
create table "Alert" (
    id int primary key, member text not null, level text not null, raised timestamp(3), open bool not null
);
"""
# `timestamp` without zone means UTC whatever the session's zone is; this one has a half hour and summer time.
TIME_ZONE: Final = "America/St_Johns"

# `seen` is not watched: its changes must be ignored, and nothing of the documents may depend on it.
MIRRORS: Final = """
[[mirror]]
name = "notes"
target = "activity"
key = ["id"]
query = '''
  select id, "userId" as user_id, kind as type, coalesce(body, '(empty)') as description, "createdAt" as timestamp,
         meta as metadata
  from "Note"
'''
sources = [{ table = '"Note"', key = ["id"] }]

[[mirror]]
name = "visits"
target = "activity"
key = ["place", "seq"]
query = '''
  select place, seq, member as user_id, 'check-in' as type, remark as description, at as timestamp, raw as metadata
  from app.visit
'''
sources = [{ table = "app.visit", key = ["place", "seq"], watch = ["member", "remark", "at", "raw"] }]

[[mirror]]
name = "status"
target = "status"
key = ["user_id"]
query = '''
  select m.id as user_id, greatest(m."lastSeen", v.at) as last_check_in, m.due as next_due,
         a.level as alert_level, a.raised as alert_triggered_at
  from member m
  left join lateral (select max(at) as at from app.visit where member = m.id) v on true
  left join lateral (select level, raised from "Alert" where member = m.id and open
                     order by level desc, id limit 1) a on true
'''
sources = [
  { table = "member", key = ["id"] },
  { table = "app.visit", key = ["member"], watch = ["at"] },
  { table = '"Alert"', key = ["member"] },
]
"""

STATEMENTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "add_note": """insert into "Note" values (%s, %s, %s, %s, %s, %s)""",
        "put_note": """insert into "Note" values (%s, %s, %s, %s, %s, %s) on conflict (id) do update set
            "userId" = excluded."userId", kind = excluded.kind, body = excluded.body,
            "createdAt" = excluded."createdAt", meta = excluded.meta""",
        "edit_note": """update "Note" set body = %s where id = %s""",
        "edit_notes": """update "Note" set body = %s""",
        "touch_notes": """update "Note" set body = body""",
        "move_note": """update "Note" set id = %s where id = %s""",
        "drop_note": """delete from "Note" where id = %s""",
        "put_visit": """insert into app.visit (place, seq, member, remark, at, raw) values (%s, %s, %s, %s, %s, %s)
            on conflict (place, seq) do update set
            member = excluded.member, remark = excluded.remark, at = excluded.at, raw = excluded.raw""",
        "see_visits": """update app.visit set seen = seen + 1""",
        "move_visit": """update app.visit set place = %s, seq = %s where place = %s and seq = %s""",
        "hand_over_visits": """update app.visit set member = %s where member = %s""",
        "drop_visits": """delete from app.visit where place = %s""",
        "put_member": """insert into member values (%s, %s, %s) on conflict (id) do update set
            "lastSeen" = excluded."lastSeen", due = excluded.due""",
        "move_member": """update member set id = %s where id = %s""",
        "drop_member": """delete from member where id = %s""",
        "put_alert": """insert into "Alert" values (%s, %s, %s, %s, %s) on conflict (id) do update set
            member = excluded.member, level = excluded.level, raised = excluded.raised, open = excluded.open""",
        "close_alerts": """update "Alert" set open = false where member = %s""",
        "drop_alerts": """delete from "Alert" where member = %s""",
        "add_note_or_not": """insert into "Note" values (%s, %s, %s, %s, %s, %s) on conflict do nothing""",
        "merge_note": """merge into "Note" n using (values (%s, %s, %s)) as new (id, body, kind) on n.id = new.id
            when matched and new.body is null then delete
            when matched then update set body = new.body, kind = new.kind
            when not matched then
                insert (id, "userId", kind, body, "createdAt") values (new.id, 'u1', new.kind, new.body, '2021-05-05')
            """,
        "give_notes_away": """with gone as (delete from "Note" where "userId" = %s returning *)
            insert into "Note" select 'of ' || id, %s, kind, body, "createdAt", meta from gone""",
        "fill_notes": """insert into "Note" select 'f' || n, %s, 'alert', %s, '2022-02-22', null
            from generate_series(1, 12) as n on conflict (id) do update set body = excluded.body""",
        "drop_filled_notes": """delete from "Note" where id like 'f%%' and id <> all (%s)""",
        "truncate_notes": """truncate "Note" """,
        "truncate_visits": """truncate app.visit""",
        "truncate_alerts": """truncate "Alert", member""",
    }
)

# Statements whose values are the rows of a COPY.
COPIES: Final[Mapping[str, str]] = MappingProxyType({"copy_notes": """copy "Note" from stdin"""})

# What Convex knows: an activity of any other type is rejected, and its key must end parked. So must the key of one that
# the network lets pass in no batch.
TYPES: Final = ("check-in", "alert", "conversation")

# Another way to the milliseconds than the worker's: date_trunc rounds down, before 1970 too.
_NOTES = """
select id, "userId", kind, case when body is null then '(empty)' else body end,
       extract(epoch from date_trunc('milliseconds', "createdAt" at time zone 'UTC')) * 1000, meta::text
from "Note"
"""
_VISITS = """
select place, seq::text, member, 'check-in', remark, extract(epoch from date_trunc('milliseconds', at)) * 1000,
       raw::text
from app.visit
"""
_STATUS = """
select m.id,
       (select extract(epoch from date_trunc('milliseconds', max(t))) * 1000
        from (select m."lastSeen" as t union all select at from app.visit where member = m.id) as times),
       (m.due - date '1970-01-01') * 86400000::numeric,
       (select max(level) from "Alert" where member = m.id and open),
       (select extract(epoch from date_trunc('milliseconds', raised at time zone 'UTC')) * 1000 from "Alert" a
        where member = m.id and open and not exists (
            select from "Alert" b where b.member = m.id and b.open
                and (b.level > a.level or b.level = a.level and b.id < a.id)))
from member m
"""
_ROWS: Final[Mapping[str, LiteralString]] = MappingProxyType({"notes": _NOTES, "visits": _VISITS, "status": _STATUS})
MIRROR_NAMES: Final = tuple(_ROWS)

Key = tuple[str, ...]
"""The mirror's name, and the parts of the key."""
Content = dict[str, Any]
"""Numbers are Decimals, an absent field has no entry."""
Documents = dict[Key, Content]


async def expected_documents(connection: AsyncConnection, mirror: str) -> tuple[Documents, set[Key]]:
    """What Convex must hold for the rows that are committed now, and the keys that must be parked instead."""
    rows = await (await connection.execute(_ROWS[mirror])).fetchall()
    if mirror == "status":
        return dict(_expected_status(*row) for row in rows), set()
    width = 2 if mirror == "visits" else 1
    documents: Documents = {}
    parked: set[Key] = set()
    for row in rows:
        key, (user, kind, description, milliseconds, metadata) = (mirror, *row[:width]), row[width:]
        if kind not in TYPES or POISON in description:
            parked.add(key)
            continue
        documents[key] = {"userId": user, "type": kind, "description": description, "timestamp": milliseconds}
        if metadata is not None:
            documents[key]["metadata"] = _exact(metadata)
    return documents, parked


def _expected_status(
    user: str, seen: Decimal | None, due: Decimal | None, level: str | None, raised: Decimal | None
) -> tuple[Key, Content]:
    fields = {"userId": user, "lastCheckIn": seen, "nextDue": due, "alertLevel": level, "alertTriggeredAt": raised}
    return ("status", user), {name: value for name, value in fields.items() if value is not None}


def key_of(mirror: str, key: str) -> Key:
    """A key, from its text as the worker writes it."""
    return (mirror, *(json.loads(key) if mirror == "visits" else [key]))


def dumped_documents(dump: Mapping[str, list[dict[str, Any]]]) -> tuple[Documents, list[Key]]:
    """What Convex holds, in the same form, and the keys of which it holds more than one document."""
    documents: Documents = {}
    doubled = []
    for key, fields in [*_activities(dump["activities"]), *_statuses(dump["userStatus"])]:
        if key in documents:
            doubled.append(key)
        documents[key] = fields
    return documents, doubled


def _activities(stored: list[dict[str, Any]]) -> Iterator[tuple[Key, Content]]:
    for document in stored:
        mirror, _, key = document["key"].partition(":")
        yield key_of(mirror, key), _content(document)


def _statuses(stored: list[dict[str, Any]]) -> Iterator[tuple[Key, Content]]:
    for document in stored:
        yield ("status", document["userId"]), _content(document)


def _content(document: dict[str, Any]) -> Content:
    kept = {name: value for name, value in document.items() if name not in {"_id", "_creationTime", "key", "version"}}
    return {name: _restored(value) if name == "metadata" else _decimal(value) for name, value in kept.items()}


def _exact(text: str) -> Any:
    return json.loads(text, parse_int=Decimal, parse_float=Decimal)


def _decimal(value: Any) -> Any:
    return Decimal(repr(value)) if isinstance(value, float | int) and not isinstance(value, bool) else value


# The rule is written down in cdc_worker/safe_json.py; this is another reading of it.
_MARK = re.compile(r"~\{([0-9a-f]*)\}")


def _unmarked(text: str) -> str:
    return _MARK.sub(lambda mark: chr(int(mark[1] or "0", 16)) if mark[1] else "", text)


def _restored(value: Any) -> Any:
    """The JSON value that became this metadata."""
    if isinstance(value, str):
        return _exact(_unmarked(value.removeprefix("~{json}"))) if value.startswith("~{json}") else _unmarked(value)
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if isinstance(value, dict):
        return {_unmarked(name): _restored(item) for name, item in value.items()}
    return _decimal(value)
