"""cdc_worker.toml: which rows become which documents. Checked in form here; against the database in `catalog`."""

import hashlib
import tomllib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cdc_worker.errors import ConfigError

Target = Literal["activity", "status"]
Columns = Annotated[tuple[str, ...], Field(min_length=1, max_length=8)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Frozen):
    """A table whose changes make keys of the mirror dirty."""

    # As SQL writes it: `"CheckIn"`, `app.orders`.
    table: Annotated[str, Field(min_length=1)]
    # The columns that give the mirror's key, in its order.
    key: Columns
    # Only changes of these (or of the key) count; empty: of any column.
    watch: tuple[str, ...] = ()


class Mirror(_Frozen):
    """A query that yields documents by key, and the tables it depends on."""

    # Part of every document's key. `app` is what the application itself writes.
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
    target: Target
    key: Columns
    query: Annotated[str, Field(min_length=1)]
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name == "app":
            raise ValueError("'app' is reserved for what the application itself writes to Convex")
        return name

    @field_validator("query")
    @classmethod
    def _one_query(cls, query: str) -> str:
        stripped = query.strip().rstrip(";").rstrip()
        if not stripped:
            raise ValueError("is empty: give a select")
        return stripped

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if len(set(self.key)) < len(self.key):
            raise ValueError("key names a column twice")
        for source in self.sources:
            if len(source.key) != len(self.key):
                raise ValueError(
                    f"source {source.table} gives {len(source.key)} key column(s), the mirror's key has {len(self.key)}"
                )
        if self.target == "status" and self.key != ("user_id",):
            raise ValueError('a status is found by its user: key must be ["user_id"]')
        return self

    @property
    def definition(self) -> str:
        """A digest of all that the documents depend on, and when. Another digest means a rescan."""
        sources = [f"{source.table} {source.key} {source.watch}" for source in self.sources]
        text = "\x00".join((self.target, *self.key, self.query, *sources))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# How often a table may be a source. The time in which a connection's first UPDATE is planned grows with the square:
# 0.25 s for 100 times, 1.3 for 200; from 420 on Postgres refuses to, and the application's write fails.
_MOST_FEEDS = 100


class _File(_Frozen):
    mirror: Annotated[tuple[Mirror, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        doubled = [name for name, times in Counter(mirror.name for mirror in self.mirror).items() if times > 1]
        if doubled:
            raise ValueError(f"two mirrors are called {doubled[0]!r}")
        if sum(mirror.target == "status" for mirror in self.mirror) > 1:
            raise ValueError('there can be one mirror with target "status": join what it needs into one query')
        feeds = Counter(source.table for mirror in self.mirror for source in mirror.sources)
        ((table, times),) = feeds.most_common(1)
        if times > _MOST_FEEDS:
            raise ValueError(
                f"{table} is a source {times} times, and {_MOST_FEEDS} is the most, since each write to it pays for all"
                " of them: let one query yield what several do"
            )
        return self


def load_mirrors(path: Path) -> tuple[Mirror, ...]:
    """The mirrors in the file at `path`. Raises ConfigError that names the file, the mirror and the entry."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}: write one (README, 'Your own Postgres'), or set CDC_CONFIG") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not TOML that anybody wrote: it is nested too deep") from None
    try:
        return _File.model_validate(raw).mirror
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # Where single mirrors are wrong, the list of them is called too short as well: that helps nobody.
        inner = [problem for problem in problems if len(problem["loc"]) > 1] or problems
        lines = [
            f"{path}: there is no [[mirror]] in it"
            if problem["loc"] == ("mirror",) and problem["type"] in {"missing", "too_short"}
            else f"{path}: {_place(problem['loc'], raw)}{_said(problem['type'], problem['msg'])}"
            for problem in inner
        ]
        raise ConfigError("\n".join(lines)) from None


# Where pydantic's own words are about Python.
_WORDS = {
    "tuple_type": 'must be a list: ["id"], or [[mirror]] with two brackets',
    "string_pattern_mismatch": "must be small letters, digits, - and _, a letter first, at most 63",
    "extra_forbidden": "there is no such entry (docs/mirrors.md has them all)",
}


def _said(kind: str, message: str) -> str:
    return _WORDS.get(kind, message.removeprefix("Value error, "))


def _place(loc: tuple[int | str, ...], raw: dict[str, object]) -> str:
    """`mirror "check-ins", sources, 1, key: `: mirrors by name where they have one, counted from 1 otherwise."""
    words = [str(part + 1) if isinstance(part, int) else part for part in loc]
    if len(loc) > 1 and loc[0] == "mirror" and isinstance(loc[1], int):
        entries = raw.get("mirror")
        entry = entries[loc[1]] if isinstance(entries, list) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        words[:2] = [f'mirror "{name}"' if isinstance(name, str) else f"mirror {loc[1] + 1}"]
    return ", ".join(words) + ": " if words else ""
