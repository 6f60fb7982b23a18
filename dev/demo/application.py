"""A small application that writes as one made with Prisma does: ids and times from the client, transactions, cascades.

It knows nothing of Convex or the worker. What it did is read back inside each transaction (rows.py), only to
know what to wait for.
"""

import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg

from dev.demo.rows import Connection, Document, Row, Slot, documents
from dev.demo.sightings import Change

FEWEST_USERS: Final = 3
MOST_USERS: Final = 7
MOST_ROWS_OF_A_USER: Final = 40
"""Then the account is closed. A public query shows 100 activities at most: so all of them can be compared."""

_NAMES = (
    *("Ada", "Alan", "Barbara", "Claude", "Dennis", "Donald", "Edith", "Edsger", "Frances", "Grace", "Hedy", "Ida"),
    *("Jean", "Joan", "John", "Karen", "Katherine", "Ken", "Leslie", "Lynn", "Margaret", "Mary", "Niklaus", "Radia"),
    *("Ruth", "Sophie", "Tim", "Tony", "Vera", "Wanda"),
)
_MOODS = ("calm", "cheerful", "tired", "worried", "proud", "restless", "grateful")
_NOTES = (
    "Slept well",
    "Took a walk",
    "Early night",
    "Called a friend",
    "Coffee helped ☕",
    "Too much news",
    "Read a bit",
)
_REASONS = ("no check-in", "asked for help", "low mood", "missed a call")
_TITLES = ("Sleeping better", "A plan for today", "Müde, but fine", "A good day", "Breathing", "After the exam")
_LEVELS = ("L1", "L2", "L3", "L4")


@dataclass(frozen=True)
class Person:
    id: str
    name: str


@dataclass
class Done:
    """What an action wrote, for people."""

    table: str
    key: str
    text: str
    users: Sequence[Person]
    rows: int = 1
    level: str = ""
    rolled_back: bool = False


Action = Callable[[], Awaitable[Done | None]]
"""One transaction's statements; None where there is nothing that they could be done to."""


class Application:
    """Writes one transaction at a time over one connection (autocommit)."""

    def __init__(self, connection: Connection, dice: random.Random) -> None:
        self._connection = connection
        self._dice = dice
        # Dealt to the end and shuffled anew: all kinds of writes come within a few seconds, in any order.
        self._cards: Mapping[Action, int] = {
            self._check_in: 6,
            self._start_conversation: 3,
            self._go_on_talking: 3,
            self._raise_alert: 3,
            self._alert_with_conversation: 1,
            self._escalate_alert: 1,
            self._resolve_alert: 2,
            self._edit_note: 2,
            self._delete_check_in: 1,
            self._move_everybodys_check_in: 1,
            self._change_its_mind: 2,
            self._sign_up: 1,
            self._close_an_account: 1,
        }
        self._deck: list[Action] = []
        self._known: dict[str, dict[Slot, Document]] = {}
        self._made_ids = 0
        # Every user there ever was, so that a comparison can look for what is left of those who are gone.
        self.users: set[str] = set()

    async def existing_rows(self) -> Change:
        """What an application that is older than its mirror has: some users with some rows."""

        async def seed() -> Done:
            count = 0
            people = []
            for _ in range(FEWEST_USERS):
                person = (await self._sign_up()).users[0]
                people.append(person)
                count += 1
                for _ in range(2):
                    count += (await self._check_in(person)).rows
                count += (await self._start_conversation(person)).rows
            count += (await self._raise_alert(people[0], "L2")).rows
            return Done("", "", "rows that were there before", people, count)

        return await self._transact(seed)

    async def write(self) -> Change:
        """The next transaction, committed (or, now and then, rolled back)."""
        return await self._transact(await self._next_action())

    async def _next_action(self) -> Action:
        crowded = await self._one(
            'select u.id, u.name from "User" u where (select count(*) from "CheckIn" where "userId" = u.id)'
            ' + (select count(*) from "Alert" where "userId" = u.id)'
            ' + (select count(*) from "Conversation" where "userId" = u.id) >= %s limit 1',
            MOST_ROWS_OF_A_USER,
        )
        if crowded is not None:
            return lambda: self._close_account(Person(*crowded))
        row = await self._one('select count(*) from "User"')
        assert row is not None
        if row[0] < FEWEST_USERS:
            return self._sign_up
        if not self._deck:
            self._deck = list(Counter(self._cards).elements())
            self._dice.shuffle(self._deck)
        card = self._deck.pop()
        if card == self._sign_up and row[0] >= MOST_USERS:
            return self._close_an_account
        if card == self._close_an_account and row[0] <= FEWEST_USERS:
            return self._sign_up
        return card

    async def _transact(self, action: Action) -> Change:
        async with self._connection.transaction():
            # Nothing that this could be done to: everybody can check in.
            done = await action() or await self._check_in()
            users = [person.id for person in done.users]
            after = await documents(self._connection, users)
            if done.rolled_back:
                raise psycopg.Rollback
        change = Change(done.table, done.key, done.text, done.rows, done.level, rolled_back=done.rolled_back)
        change.committed, change.committed_at = time.monotonic(), datetime.now().astimezone()
        if not done.rolled_back:
            change.effects = self._difference(users, after)
        return change

    def _difference(self, users: Sequence[str], after: Mapping[Slot, Document]) -> dict[Slot, Document | None]:
        """Which documents these users' rows make now, and did not before."""
        effects: dict[Slot, Document | None] = {}
        for user in users:
            before = self._known.pop(user, {})
            now = {slot: document for slot, document in after.items() if document["userId"] == user}
            effects |= {slot: document for slot, document in now.items() if before.get(slot) != document}
            effects |= dict.fromkeys(before.keys() - now.keys())
            if now:
                self._known[user] = now
        self.users |= set(users)
        return effects

    # The actions, which people do.

    async def _sign_up(self) -> Done:
        taken = {name for (name,) in await self._all('select name from "User"')}
        person = Person(self._cuid(), self._dice.choice([name for name in _NAMES if name not in taken]))
        now = _now()
        await self._run(
            'insert into "User" (id, email, name, "nextCheckInDue", "createdAt", "updatedAt")'
            " values (%s, %s, %s, %s, %s, %s)",
            *(
                person.id,
                f"{person.name.lower()}.{person.id}@example.com",
                person.name,
                now + timedelta(days=1),
                now,
                now,
            ),
        )
        return Done("User", person.id, f"{person.name} signed up", [person])

    async def _check_in(self, person: Person | None = None) -> Done:
        person = person or await self._somebody()
        key, now, mood = self._cuid(), _now(), self._dice.choice(_MOODS)
        note = self._dice.choice(_NOTES) if self._dice.random() < 0.4 else None
        await self._run(
            'insert into "CheckIn" (id, "userId", mood, note, "createdAt") values (%s, %s, %s, %s, %s)',
            *(key, person.id, mood, note, now),
        )
        await self._run(
            'update "User" set "lastCheckInAt" = %s, "nextCheckInDue" = %s, "updatedAt" = %s where id = %s',
            *(now, now + timedelta(days=1), now, person.id),
        )
        return Done("CheckIn", key, f"{person.name} checked in: {mood}", [person], 2)

    async def _edit_note(self) -> Done | None:
        row = await self._one(
            'select c.id, c.note, u.id, u.name from "CheckIn" c join "User" u on u.id = c."userId"'
            " order by random() limit 1"
        )
        if row is None:
            return None
        note = self._dice.choice([each for each in _NOTES if each != row[1]])
        await self._run('update "CheckIn" set note = %s where id = %s', note, row[0])
        return Done("CheckIn", row[0], f"{row[3]} notes: {note}", [Person(*row[2:])])

    async def _delete_check_in(self) -> Done | None:
        row = await self._one(
            'select c.id, u.id, u.name from "CheckIn" c join "User" u on u.id = c."userId" order by random() limit 1'
        )
        if row is None:
            return None
        await self._run('delete from "CheckIn" where id = %s', row[0])
        return Done("CheckIn", row[0], f"{row[2]} took a check-in back", [Person(*row[1:])])

    async def _start_conversation(self, person: Person | None = None) -> Done:
        person = person or await self._somebody()
        key, now, title = self._cuid(), _now(), self._dice.choice(_TITLES)
        await self._run(
            'insert into "Conversation" (id, "userId", title, "messageCount", "lastMessageAt", "createdAt")'
            " values (%s, %s, %s, 1, %s, %s)",
            *(key, person.id, title, now, now),
        )
        return Done("Conversation", key, f"{person.name} asks: {title}", [person])

    async def _go_on_talking(self) -> Done | None:
        row = await self._one(
            'select c.id, c."messageCount", u.id, u.name from "Conversation" c join "User" u on u.id = c."userId"'
            " order by random() limit 1"
        )
        if row is None:
            return None
        messages = row[1] + self._dice.randint(1, 3)
        await self._run(
            'update "Conversation" set "messageCount" = %s, "lastMessageAt" = %s where id = %s',
            *(messages, _now(), row[0]),
        )
        return Done("Conversation", row[0], f"{row[3]} goes on: {messages} messages", [Person(*row[2:])])

    async def _raise_alert(self, person: Person | None = None, level: str | None = None) -> Done:
        person = person or await self._somebody()
        level = level or self._dice.choice(_LEVELS)
        key, reason = self._cuid(), self._dice.choice(_REASONS)
        await self._run(
            'insert into "Alert" (id, "userId", level, reason, "triggeredAt")'
            ' values (%s, %s, %s::"AlertLevel", %s, %s)',
            *(key, person.id, level, reason, _now()),
        )
        return Done("Alert", key, f"{level} for {person.name}: {reason}", [person], level=level)

    async def _alert_with_conversation(self) -> Done:
        alert = await self._raise_alert(level=self._dice.choice(_LEVELS[2:]))
        await self._start_conversation(alert.users[0])
        alert.text += " + call"
        alert.rows += 1
        return alert

    async def _open_alert(self, below: str) -> tuple[str, str, Person] | None:
        row = await self._one(
            'select a.id, a.level::text, u.id, u.name from "Alert" a join "User" u on u.id = a."userId"'
            ' where a."resolvedAt" is null and a.level <= %s::"AlertLevel" order by random() limit 1',
            below,
        )
        return None if row is None else (row[0], row[1], Person(*row[2:]))

    async def _escalate_alert(self) -> Done | None:
        found = await self._open_alert("L3")
        if found is None:
            return None
        key, level, person = found
        higher = _LEVELS[_LEVELS.index(level) + 1]
        await self._run('update "Alert" set level = %s::"AlertLevel" where id = %s', higher, key)
        return Done("Alert", key, f"{person.name}: {level} becomes {higher}", [person], level=higher)

    async def _resolve_alert(self) -> Done | None:
        found = await self._open_alert("L4")
        if found is None:
            return None
        key, level, person = found
        await self._run('update "Alert" set "resolvedAt" = %s where id = %s', _now(), key)
        return Done("Alert", key, f"{level} of {person.name} resolved", [person])

    async def _move_everybodys_check_in(self) -> Done:
        """Prisma's updateMany: one statement, a document for each user."""
        people = [Person(*row) for row in await self._all('select id, name from "User"')]
        hours = self._dice.randint(1, 48)
        due = _now() + timedelta(hours=hours)
        await self._run('update "User" set "nextCheckInDue" = %s, "updatedAt" = %s', due, _now())
        return Done("User", "", f"all {len(people)} are due in {hours} h", people, len(people))

    async def _change_its_mind(self) -> Done:
        """Everything as usual, and then the transaction is rolled back: nobody may ever see any of it."""
        done = await self._raise_alert() if self._dice.random() < 0.5 else await self._check_in()
        done.rolled_back = True
        return done

    async def _close_an_account(self) -> Done:
        return await self._close_account(await self._somebody())

    async def _close_account(self, person: Person) -> Done:
        """The rows of the other tables go with the user's, by cascade."""
        rows = len(await documents(self._connection, [person.id]))
        await self._run('delete from "User" where id = %s', person.id)
        others = {1: "", 2: ", and 1 row"}.get(rows, f", and {rows - 1} rows")
        return Done("User", person.id, f"{person.name} left{others}", [person], rows)

    # What a client library does.

    async def _somebody(self) -> Person:
        row = await self._one('select id, name from "User" order by random() limit 1')
        assert row is not None, "there are always users: _next_action sees to it"
        return Person(*row)

    async def _run(self, statement: str, *parameters: Any) -> None:
        await self._connection.execute(statement.encode(), parameters)

    async def _all(self, statement: str, *parameters: Any) -> list[Row]:
        return await (await self._connection.execute(statement.encode(), parameters)).fetchall()

    async def _one(self, statement: str, *parameters: Any) -> Row | None:
        return await (await self._connection.execute(statement.encode(), parameters)).fetchone()

    def _cuid(self) -> str:
        """25 characters as cuid makes them: "c", the time, a counter, a fingerprint, chance."""
        self._made_ids += 1
        parts = (
            _base36(time.time_ns() // 1_000_000, 8),
            _base36(self._made_ids, 4),
            "demo",
            "".join(self._dice.choices("0123456789abcdefghijklmnopqrstuvwxyz", k=8)),
        )
        return "c" + "".join(parts)


def _now() -> datetime:
    """As Prisma sends it for timestamp(3): UTC, to the millisecond, without a zone."""
    now = datetime.now(UTC).replace(tzinfo=None)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def _base36(number: int, width: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits.rjust(width, "0")[-width:]
