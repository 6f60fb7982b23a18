"""Check-ins of many users, so that each has fewer than `activities` shows."""

from tests.integration.application import Database
from tests.integration.mirrored import Mirrored

_OF_A_USER = 50


def check_in_often(db: Database, user: str, rows: int) -> None:
    db.execute(
        """
        insert into "CheckIn" select %s || '-' || n, %s || '-' || n %% %s, 'first', null, now()
        from generate_series(1, %s) as n
        """,
        user, user, rows // _OF_A_USER, rows,
    )  # fmt: skip


def change_some(db: Database, user: str) -> None:
    db.execute("""update "CheckIn" set note = 'changed ' || id where id like %s || '%%7'""", user)
    db.execute("""delete from "CheckIn" where id like %s || '%%3'""", user)


def rows(db: Database) -> list[tuple[str, str]]:
    return sorted(db.execute("""select "userId", note from "CheckIn" """))


def documents(mirrored: Mirrored, user: str, rows: int) -> list[tuple[str, str]]:
    """Of the users of `check_in_often`, in the form of `rows`."""
    users = [f"{user}-{n}" for n in range(rows // _OF_A_USER)]
    return sorted((each["userId"], each["description"]) for name in users for each in mirrored.activities(name))
