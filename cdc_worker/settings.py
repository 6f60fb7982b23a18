"""Settings from the environment: read once, checked here, frozen."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from cdc_worker.errors import ConfigError

# What Prisma and node-postgres take out of a connection string for themselves, and Postgres' own library refuses.
_FOREIGN = {
    *("schema", "connection_limit", "pool_timeout", "pgbouncer", "socket_timeout", "statement_cache_size"),
    *("sslaccept", "sslidentity", "sslpassword"),
    *("uselibpqcompat", "max", "statement_timeout", "query_timeout", "lock_timeout"),
    "idle_in_transaction_session_timeout",
}


def _may_be_looked_up(host: str) -> bool:
    """Python fails to look up what can be no name with an error of its own, which nobody expects of a look-up."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def _may_be_port(port: str) -> bool:
    """None is the default one."""
    return re.fullmatch(r"\s*([0-9]{1,5}\s*)?", port) is not None and 0 < int(port.strip() or 1) < 65_536


def _conninfo(value: SecretStr) -> SecretStr:
    dsn = value.get_secret_value().strip()
    try:
        parameters = conninfo_to_dict(dsn)
    except psycopg.Error:
        # The driver's message quotes the string, which holds the password.
        given = {part.partition("=")[0] for part in dsn.rpartition("?")[2].split("&")}
        if found := sorted(given & _FOREIGN):
            raise ValueError(
                f"has what only Prisma or node-postgres knows: take {', '.join(found)} out of it"
            ) from None
        raise ValueError("is no connection string: give postgres://user:password@host:port/database") from None
    hosts = str(parameters.get("host", "")).split(",")
    if not all(_may_be_looked_up(host) for host in hosts if not host.startswith("/")):  # the folder of a socket
        raise ValueError("is no connection string: its host can be no name")
    # The driver finds out when it connects, and that would be tried for ever.
    if not all(_may_be_port(port) for port in str(parameters.get("port", "")).split(",")):
        raise ValueError(
            "is no connection string: its port is no number from 1 to 65535 (a `/` in a password is written %2F)"
        )
    if not re.fullmatch(r"\s*-?[0-9]+\s*", str(parameters.get("connect_timeout", "0"))):
        raise ValueError("has a connect_timeout that is no whole number of seconds")
    if parameters.get("sslmode") == "no-verify":
        raise ValueError(
            "has sslmode=no-verify, which only node-postgres knows: say sslmode=require, which is the same"
        )
    return SecretStr(dsn)


def _http_url(value: str) -> str:
    value = value.strip()
    parts = urlsplit(value)
    host = parts.hostname
    try:
        port = parts.port
    except ValueError:
        port = 0
    # The names of functions are put behind it.
    is_base = port != 0 and "?" not in value and "#" not in value
    if (
        parts.scheme not in {"http", "https"}
        or not host
        or "@" in parts.netloc
        or not is_base
        or not _may_be_looked_up(host)
    ):
        raise ValueError("must be an address like https://happy-otter-123.convex.cloud")
    if parts.scheme == "http" and host.rstrip(".").endswith(".convex.cloud"):
        raise ValueError("must begin with https://: otherwise the deploy key travels in the clear")
    return value.rstrip("/")  # a trailing slash would give 404


def _header(value: SecretStr) -> SecretStr:
    key = value.get_secret_value().strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("has a character that no HTTP header can hold: copy it anew from the dashboard")
    return SecretStr(key)


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


Dsn = Annotated[SecretStr, AfterValidator(_conninfo)]
DeployKey = Annotated[SecretStr, AfterValidator(_header)]
Url = Annotated[str, AfterValidator(_http_url)]


class ConvexSettings(BaseSettings):
    """Where Convex is: all that writing through (sync.py) needs."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    convex_url: Annotated[Url | None, Field(validation_alias=AliasChoices("CONVEX_URL", "NEXT_PUBLIC_CONVEX_URL"))] = (
        None
    )
    convex_deploy_key: DeployKey | None = None
    # The whole of one exchange with Convex, which itself gives up after 300 s.
    convex_timeout_seconds: Annotated[float, Field(validation_alias="CDC_CONVEX_TIMEOUT_SECONDS", ge=0.1, le=300)] = (
        15.0
    )
    # How long a write-through is tried before its caller is told that it failed.
    sync_seconds: Annotated[float, Field(validation_alias="CDC_SYNC_SECONDS", ge=0.1, le=300)] = 30.0

    @property
    def missing_for_convex(self) -> tuple[str, ...]:
        """The settings without which there is nothing to talk to."""
        given = {"CONVEX_URL": self.convex_url, "CONVEX_DEPLOY_KEY": self.convex_deploy_key}
        return tuple(name for name, value in given.items() if value is None)


class Settings(ConvexSettings):
    """All that can be set. Durations are seconds, sizes are bytes."""

    database_url: Dsn
    listen_database_url: Dsn | None = None
    config: Annotated[Path, Field(validation_alias="CDC_CONFIG")] = Path("cdc_worker.toml")
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = "INFO"
    log_format: Literal["console", "json"] | None = None

    # Keys in one mutation. A mutation may read 4,096 index ranges and run 1 s; a key costs up to three ranges.
    batch_keys: Annotated[int, Field(validation_alias="CDC_BATCH_KEYS", ge=1, le=500)] = 500
    # A mutation's arguments may have 16 MiB; 1 MiB keeps one well inside its second of JS time.
    batch_bytes: Annotated[int, Field(validation_alias="CDC_BATCH_BYTES", ge=65_536, le=8_388_608)] = 1_048_576
    # Readers side by side, each with its part of the keys; the same for `migrate` and for every worker.
    shards: Annotated[int, Field(validation_alias="CDC_SHARDS", ge=1, le=64)] = 1
    # Of all shards together. The smallest plan runs 16 mutations at once, and the application wants some of them; the
    # largest runs 1,024.
    in_flight: Annotated[int, Field(validation_alias="CDC_IN_FLIGHT", ge=1, le=1_024)] = 12
    # Log rows read in one snapshot.
    page_rows: Annotated[int, Field(validation_alias="CDC_PAGE_ROWS", ge=1, le=10_000)] = 1_000
    # How often to look where LISTEN does not work.
    poll_seconds: Annotated[float, Field(validation_alias="CDC_POLL_SECONDS", ge=0.01, le=60)] = 1.0
    # A holder that is silent for so long may be replaced.
    lease_seconds: Annotated[float, Field(validation_alias="CDC_LEASE_SECONDS", ge=3, le=600)] = 30.0
    # The longest pause between two tries.
    backoff_seconds: Annotated[float, Field(validation_alias="CDC_BACKOFF_SECONDS", ge=0.05, le=300)] = 30.0
    # One statement of the worker in Postgres.
    statement_seconds: Annotated[float, Field(validation_alias="CDC_STATEMENT_SECONDS", ge=0.1, le=600)] = 20.0
    # How long acknowledged changes stay in the log at least, for `cdc-worker replay`.
    retention_hours: Annotated[float, Field(validation_alias="CDC_RETENTION_HOURS", ge=0.01, le=720)] = 4.0
    # The log turns to its next partition early when one is larger than this; it has three.
    partition_bytes: Annotated[int, Field(validation_alias="CDC_PARTITION_BYTES", ge=65_536)] = 268_435_456
    # Between SIGTERM and giving up what is in flight; the platform kills after 30 s.
    drain_seconds: Annotated[float, Field(validation_alias="CDC_DRAIN_SECONDS", ge=0, le=25)] = 10.0
    # What is at work and comes to no end, good or bad, for so long is stuck: the process exits.
    stall_seconds: Annotated[float, Field(validation_alias="CDC_STALL_SECONDS", ge=60, le=7200)] = 600.0
    # Between two lines that say how things stand.
    heartbeat_seconds: Annotated[float, Field(validation_alias="CDC_HEARTBEAT_SECONDS", ge=1, le=3600)] = 60.0

    @field_validator("stall_seconds")
    @classmethod
    def _above_every_wait(cls, value: float, info: ValidationInfo) -> float:
        """Otherwise a wait that is allowed would pass for one without an end."""
        given = info.data
        waits = {
            # A statement, and what its deadline has on top (5 s).
            "CDC_STATEMENT_SECONDS": 5 + given.get("statement_seconds", 0.0),
            # A batch and its probe.
            "CDC_CONVEX_TIMEOUT_SECONDS": 2 * given.get("convex_timeout_seconds", 0.0),
            "CDC_BACKOFF_SECONDS": given.get("backoff_seconds", 0.0),
            "CDC_POLL_SECONDS": given.get("poll_seconds", 0.0),
        }
        name = max(waits, key=waits.__getitem__)
        if value < waits[name]:
            raise ValueError(f"must be at least {waits[name]:g}, since {name} allows a single wait of so many seconds")
        return value


Loaded = TypeVar("Loaded", bound=ConvexSettings)


def load_settings(kind: type[Loaded], **given: Any) -> Loaded:
    """The settings of this process.

    Raises ConfigError with a line for each setting that is missing or wrong; a secret's value is never in it.
    """
    try:
        return kind(**given)
    except ValidationError as error:
        lines = [_refusal(kind, dict(problem)) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def unknown_settings() -> list[str]:
    """What is set as if for the worker, and is none of its settings: misspelt, or of another version."""
    known = [field.validation_alias for field in Settings.model_fields.values()]
    return sorted(name for name in os.environ if name.startswith("CDC_") and name not in known)


def _refusal(kind: type[ConvexSettings], problem: Mapping[str, Any]) -> str:
    place = str(problem["loc"][0])
    field = kind.model_fields.get(place)
    alias = field.validation_alias if field is not None else None
    name = alias if isinstance(alias, str) else place.upper()
    if problem["type"] == "missing":
        return f"{name} is not set"
    given = str(problem.get("input"))
    # An address may have a password in it, too.
    secret = name.endswith(("DATABASE_URL", "KEY")) or "@" in given
    value = "" if secret else f" (it is {given!r})"
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}{value}"
