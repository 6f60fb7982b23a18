"""What an error of Postgres is about: the database, a mirror's query, or one row; and what of it may be said."""

from collections.abc import Iterable, Sequence

import psycopg

from cdc_worker.database import GONE, Connection, fetch
from cdc_worker.keys import join_key, key_arrays
from cdc_worker.plan import Plan

# How a lock of somebody else shows. None of them says anything against the statement.
LOCKED = (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled, psycopg.errors.DeadlockDetected)
# Errors of a statement that are not its own: a deadlock, no memory or disk left, an operator, the machine.
_OF_THE_SERVER = ("40", "53", "57", "58")
# But these are: it was cut off; it passed a limit that is set (temp_file_limit); it calls what an extension has lost.
_OF_THE_STATEMENT = ("57014", "53400", "58P01")
# And these are either's: memory, or room for locks, ran out; a file cannot be read.
_OF_EITHER = ("53200", "58030")


def is_gone(error: psycopg.Error) -> bool:
    """It is the database, rather than the statement, which would fail again.

    By what Postgres says, where it says something: the driver's classes also hold limits that were passed, a function's
    own error, and a foreign server that is away.
    """
    severity = error.diag.severity_nonlocalized
    if severity is None:
        return isinstance(error, GONE)
    code = error.sqlstate or ""
    return severity != "ERROR" or (code.startswith(_OF_THE_SERVER) and code not in _OF_THE_STATEMENT)


def is_surely_gone(error: psycopg.Error) -> bool:
    """It cannot have been one query that asks for too much, or a damaged table: from those it looks the same."""
    return is_gone(error) and not (error.diag.severity_nonlocalized == "ERROR" and error.sqlstate in _OF_EITHER)


def first_lines(error: psycopg.Error) -> str:
    """What Postgres says, without DETAIL and CONTEXT: those can quote rows."""
    return error.diag.message_primary or type(error).__name__


# Classes of errors that are about statements, rights and resources. Of others the message can quote a value: data that
# cannot be cast, a constraint, what a function raises.
_QUOTES_NOTHING = ("08", "0A", "25", "28", "3F", "40", "42", "53", "54", "55", "57", "58")


def cause(error: psycopg.Error) -> str:
    """What Postgres says of a statement that has seen rows, as far as that may stand in a log."""
    code = error.sqlstate or ""
    # A name or a syntax that stands at no place of a statement is a row's own text, read as a tsquery or a regclass.
    in_a_statement = error.diag.statement_position or error.diag.internal_position or code == "42501"
    if code.startswith(_QUOTES_NOTHING) and (in_a_statement or not code.startswith("42")):
        return first_lines(error)
    return f"{type(error).__name__} ({error.sqlstate})"


# A server that is away, a table that is locked, a library that is gone, a function that writes: no row's fault.
_SURROUNDINGS = ("08", "25", "55", "58", "HV")
# A column, table, function, schema or right that is gone; or a row's text that a type (tsquery, ltree) cannot read.
_NAMES_AND_SYNTAX = ("0A", "3F", "42")
# So many rows are tried.
_SAMPLE = 5


async def is_of_the_database(error: psycopg.Error, connection: Connection, others: Iterable[Plan]) -> bool:
    """No query would run; if one of the `others`' runs at this moment, its mirror need not wait."""
    if is_gone(error) and not is_surely_gone(error):
        for plan in others:
            try:
                await _first_keys(connection, plan, 1)
            except psycopg.Error as another:
                if is_surely_gone(another):
                    raise
            else:
                return False
    return is_gone(error)


async def is_of_the_query(error: psycopg.Error, connection: Connection, plan: Plan, keys: Sequence[str]) -> bool:
    """The mirror's query, which failed on these keys, fails as a whole, rather than on a row."""
    code = error.sqlstate or ""
    if isinstance(error, psycopg.errors.OutOfMemory):
        return len(keys) == 1  # fewer may need less
    if code.startswith(_NAMES_AND_SYNTAX):
        return not await _reads_any(connection, plan, keys)
    return code.startswith(_SURROUNDINGS)


async def _reads_any(connection: Connection, plan: Plan, failed: Sequence[str]) -> bool:
    """A row can be read by itself: of those that failed together, or of the first ones."""
    try:
        first = await _first_keys(connection, plan, _SAMPLE)
    except psycopg.Error as error:
        if is_gone(error):
            raise
        return False
    for key in dict.fromkeys((*failed[:1], *failed[-1:], *first)):
        if len(failed) == 1 and key == failed[0]:
            continue  # that is known
        try:
            if await try_key(connection, plan, key):
                return True
        except psycopg.Error as error:
            if is_gone(error):
                raise
    return False


async def _first_keys(connection: Connection, plan: Plan, count: int) -> list[str]:
    async with connection.transaction():
        return [join_key(row) for row in await fetch(connection, plan.first_keys, count)]


async def try_key(connection: Connection, plan: Plan, key: str) -> bool:
    """Makes a key's document for nothing, and says if there is one; raises what that fails with."""
    async with connection.transaction():
        cursor = await connection.execute(plan.documents, (*key_arrays([key], plan.key_types), 0), binary=True)
        return await cursor.fetchone() is not None
