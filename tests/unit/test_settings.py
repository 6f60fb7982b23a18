"""Settings: what is refused is named, with its bound and its value; secrets never are."""

import os
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_worker import database, session, shards
from cdc_worker.errors import ConfigError
from cdc_worker.settings import Settings, load_settings, unknown_settings

DSN = "postgres://someone:s3cret@localhost/application"


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)


def load(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    for name, value in {"DATABASE_URL": DSN, **environment}.items():
        monkeypatch.setenv(name, value)
    return load_settings(Settings)


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch)
    assert settings.database_url.get_secret_value() == DSN
    assert settings.convex_url is None
    assert str(settings.config) == "cdc_worker.toml"
    assert settings.log_level == "INFO"
    # What is read in one run must be noted well before the platform kills.
    assert settings.drain_seconds < 25


def test_the_longest_stop_is_over_before_the_platform_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    # Heroku waits 30 s. All that comes behind the drain has a deadline (test_links.py shows that they hold).
    longest = load(monkeypatch, CDC_DRAIN_SECONDS="25").drain_seconds
    assert session._LAST_SAVE_SECONDS + session._RELEASE_SECONDS <= shards._ENDING_SECONDS
    behind = 2 * shards._LAST_WORD_SECONDS + database._CLOSE_SECONDS
    assert longest + shards._ENDING_SECONDS + behind < 30
    assert shards._CUT_SHORT_SECONDS + session._RELEASE_SECONDS + behind < 30


def test_what_is_no_setting_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, CDC_SHARDS="2", CDC_SYNC_SECONDS="5", CDC_SHARD="2", CDC_BATCHKEYS="3", SHARDS="4")
    assert unknown_settings() == ["CDC_BATCHKEYS", "CDC_SHARD"]


def test_a_missing_database_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^DATABASE_URL is not set$"):
        load_settings(Settings)


def test_empty_is_as_good_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, CONVEX_URL="", CDC_BATCH_KEYS="", LISTEN_DATABASE_URL="")
    assert settings.convex_url is None
    assert settings.listen_database_url is None


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({"CONVEX_URL": "https://a.convex.cloud"}, "https://a.convex.cloud"),
        ({"CONVEX_URL": "https://a.convex.cloud/"}, "https://a.convex.cloud"),
        ({"NEXT_PUBLIC_CONVEX_URL": "https://b.convex.cloud"}, "https://b.convex.cloud"),
        (
            {"CONVEX_URL": "https://a.convex.cloud", "NEXT_PUBLIC_CONVEX_URL": "https://b.convex.cloud"},
            "https://a.convex.cloud",
        ),
        ({"CONVEX_URL": "", "NEXT_PUBLIC_CONVEX_URL": "https://b.convex.cloud"}, "https://b.convex.cloud"),
    ],
)
def test_where_convex_is(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str) -> None:
    assert load(monkeypatch, **environment).convex_url == url


def test_spaces_and_ends_of_lines_around_a_value_are_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, DATABASE_URL=f" {DSN}\n", CONVEX_URL=" https://a.convex.cloud/\n")
    assert settings.database_url.get_secret_value() == DSN
    assert settings.convex_url == "https://a.convex.cloud"


def test_what_only_prisma_and_its_driver_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match="has what only Prisma or node-postgres knows: take connection_limit, schema out"
    ):
        load(monkeypatch, DATABASE_URL=f"{DSN}?schema=public&connection_limit=5")
    with pytest.raises(ConfigError, match="knows: take statement_timeout, uselibpqcompat out"):
        load(monkeypatch, DATABASE_URL=f"{DSN}?uselibpqcompat=true&sslmode=require&statement_timeout=5000")
    with pytest.raises(ConfigError, match="has sslmode=no-verify, which only node-postgres knows: say sslmode=require"):
        load(monkeypatch, DATABASE_URL=f"{DSN}?sslmode=no-verify")
    with pytest.raises(ConfigError, match="is no connection string") as caught:
        load(monkeypatch, DATABASE_URL=f"{DSN}?cret=1")
    assert "cret" not in str(caught.value)


def test_an_address_with_a_password_is_refused_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="CONVEX_URL: must be an address like") as caught:
        load(monkeypatch, CONVEX_URL="https://someone:s3cret@a.convex.cloud")
    assert "s3cret" not in str(caught.value)


def test_the_deploy_key_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="CONVEX_URL: must begin with https://"):
        load(monkeypatch, CONVEX_URL="http://happy-otter-123.convex.cloud")
    # The dot of a full name leads there, too.
    with pytest.raises(ConfigError, match="CONVEX_URL: must begin with https://"):
        load(monkeypatch, CONVEX_URL="http://happy-otter-123.convex.cloud.")


@pytest.mark.parametrize("host", ["happy..otter.example", ".example", f"{'a' * 64}.example"])
def test_a_host_that_no_name_server_is_ever_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            monkeypatch,
            CONVEX_URL=f"https://{host}",
            DATABASE_URL=f"postgres://u:s3cret@{host}/d",
            LISTEN_DATABASE_URL=f"postgres://u:s3cret@db.example,{host}/d",
        )
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "CONVEX_URL",
        "DATABASE_URL",
        "LISTEN_DATABASE_URL",
    ]
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("dsn", "said"),
    [
        # What is meant for a password with a slash.
        ("postgres://u:s3cret/x@db.example:5432/d", "its port is no number from 1 to 65535 (a `/` in a password"),
        ("postgres://u@db.example:70000/d", "its port is no number from 1 to 65535"),
        ("host=a,b port=5432,x", "its port is no number from 1 to 65535"),
        ("postgres://u@db.example/d?connect_timeout=10s", "has a connect_timeout that is no whole number of seconds"),
    ],
)
def test_what_the_driver_would_refuse_again_and_again_is_refused(
    monkeypatch: pytest.MonkeyPatch, dsn: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        load(monkeypatch, DATABASE_URL=dsn)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("rest", [":port", ":99999", ":0", "/?deployment=a", "/#a"])
def test_an_address_that_no_function_s_name_can_follow_is_refused(monkeypatch: pytest.MonkeyPatch, rest: str) -> None:
    with pytest.raises(ConfigError, match="CONVEX_URL: must be an address like"):
        load(monkeypatch, CONVEX_URL=f"https://happy-otter-123.convex.cloud{rest}")


def test_hosts_that_are_names_addresses_or_folders_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("db.example.", "a_b", "::1", "10.0.0.1", "/tmp/../run", ""):  # no file is made
        load(monkeypatch, DATABASE_URL=f"host='{host}' dbname=d")
    for more in ("host=a,b port=5432,", "host=a port=' 5433 '", "host=a connect_timeout=-1"):
        load(monkeypatch, DATABASE_URL=more)
    for host in ("häppy.example", "[::1]", "localhost:3210"):
        load(monkeypatch, CONVEX_URL=f"http://{host}")


BOUNDS = [
    ("CDC_BATCH_KEYS", "0", "greater than or equal to 1"),
    ("CDC_BATCH_KEYS", "501", "less than or equal to 500"),
    ("CDC_BATCH_KEYS", "many", "valid integer"),
    ("CDC_BATCH_BYTES", "65535", "greater than or equal to 65536"),
    ("CDC_BATCH_BYTES", "8388609", "less than or equal to 8388608"),
    ("CDC_IN_FLIGHT", "1025", "less than or equal to 1024"),
    ("CDC_PAGE_ROWS", "10001", "less than or equal to 10000"),
    ("CDC_POLL_SECONDS", "0", "greater than or equal to 0.01"),
    ("CDC_POLL_SECONDS", "nan", "less than or equal to 60|finite"),
    ("CDC_LEASE_SECONDS", "2.9", "greater than or equal to 3"),
    ("CDC_CONVEX_TIMEOUT_SECONDS", "301", "less than or equal to 300"),
    ("CDC_BACKOFF_SECONDS", "inf", "less than or equal to 300|finite"),
    ("CDC_STATEMENT_SECONDS", "-1", "greater than or equal to 0.1"),
    ("CDC_DRAIN_SECONDS", "26", "less than or equal to 25"),
    ("CDC_HEARTBEAT_SECONDS", "0", "greater than or equal to 1"),
    ("CDC_STALL_SECONDS", "59", "greater than or equal to 60"),
    ("LOG_LEVEL", "LOUD", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ("LOG_FORMAT", "xml", "'console' or 'json'"),
    ("CONVEX_URL", "a.convex.cloud", "must be an address like https://"),
    ("CONVEX_URL", "ftp://a.convex.cloud", "must be an address like https://"),
    ("NEXT_PUBLIC_CONVEX_URL", "nonsense", "must be an address like https://"),
]


@pytest.mark.parametrize(("name", "value", "bound"), BOUNDS)
def test_a_refusal_names_setting_bound_and_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, bound: str
) -> None:
    with pytest.raises(ConfigError, match=bound) as caught:
        load(monkeypatch, **{name: value})
    (line,) = str(caught.value).splitlines()
    if not name.startswith("NEXT_"):
        assert line.startswith(f"{name}: ")
    assert value in line


WAITS = {
    "CDC_STATEMENT_SECONDS": ("600", "must be at least 605, since CDC_STATEMENT_SECONDS allows"),
    "CDC_CONVEX_TIMEOUT_SECONDS": ("300", "must be at least 600, since CDC_CONVEX_TIMEOUT_SECONDS allows"),
    "CDC_BACKOFF_SECONDS": ("300", "must be at least 300, since CDC_BACKOFF_SECONDS allows"),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_that_is_allowed_is_no_stall(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    value, words = WAITS[name]
    with pytest.raises(ConfigError, match=words):
        load(monkeypatch, CDC_STALL_SECONDS="299", **{name: value})
    # Least of all with the least of it, and all others as they are.
    assert load(monkeypatch, CDC_STALL_SECONDS="7200", **{name: value}).stall_seconds == 7200
    monkeypatch.delenv(name)
    assert load(monkeypatch, CDC_STALL_SECONDS="60").stall_seconds == 60


def test_all_refusals_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        load(monkeypatch, CDC_BATCH_KEYS="0", CDC_IN_FLIGHT="0", DATABASE_URL="postgres://u:s3cret@[h/d")
    named = {line.split(":")[0] for line in str(caught.value).splitlines()}
    assert named == {"DATABASE_URL", "CDC_BATCH_KEYS", "CDC_IN_FLIGHT"}
    assert "s3cret" not in str(caught.value)


def test_levels_are_taken_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, LOG_LEVEL="debug").log_level == "DEBUG"


@pytest.mark.parametrize("name", ["DATABASE_URL", "LISTEN_DATABASE_URL"])
@given(rest=st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])))
def test_a_connection_string_never_stands_in_a_refusal(name: str, rest: str) -> None:
    secret = "pa55word"
    said = ""
    with pytest.MonkeyPatch.context() as monkeypatch:
        try:
            settings = load(monkeypatch, **{name: f"postgres://user:{secret}@{rest}"})
        except ConfigError as error:
            said = str(error)
        else:
            assert secret not in repr(settings)
            return
    assert secret not in said
    assert said.startswith(f"{name}: is no connection string")


def test_what_is_loaded_hides_its_secrets_and_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, CONVEX_DEPLOY_KEY="prod:a|deploy-s3cret")
    assert "s3cret" not in f"{settings!r} {settings}"
    with pytest.raises(ValueError, match="frozen"):
        settings.__setattr__("batch_keys", 7)


@pytest.mark.parametrize("key", ["prod:a|secret\n", "prod:a|sécret"])
def test_a_deploy_key_that_no_header_can_hold_is_refused_or_mended(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    # A trailing newline is what a form, or a careless $(cat file), leaves behind.
    said = ""
    try:
        settings = load(monkeypatch, CONVEX_DEPLOY_KEY=key)
    except ConfigError as error:
        said = str(error)
    else:
        assert settings.convex_deploy_key is not None
        found = settings.convex_deploy_key.get_secret_value()
        assert found.isascii()
        assert found.isprintable()
        return
    assert said.startswith("CONVEX_DEPLOY_KEY: ")
    assert "secret" not in said


NAMES = [
    *("DATABASE_URL", "LISTEN_DATABASE_URL", "CONVEX_URL", "NEXT_PUBLIC_CONVEX_URL", "CONVEX_DEPLOY_KEY"),
    *("LOG_LEVEL", "LOG_FORMAT", "CDC_CONFIG", "CDC_BATCH_KEYS", "CDC_BATCH_BYTES", "CDC_SHARDS", "CDC_IN_FLIGHT"),
    *("CDC_PAGE_ROWS", "CDC_POLL_SECONDS", "CDC_LEASE_SECONDS", "CDC_BACKOFF_SECONDS", "CDC_STATEMENT_SECONDS"),
    *("CDC_RETENTION_HOURS", "CDC_PARTITION_BYTES", "CDC_DRAIN_SECONDS", "CDC_STALL_SECONDS", "CDC_SYNC_SECONDS"),
    *("CDC_HEARTBEAT_SECONDS", "CDC_CONVEX_TIMEOUT_SECONDS"),
]
# What an environment can hold: bytes that are no UTF-8 come as lone surrogates.
given_texts = (
    st.binary(max_size=20).map(lambda raw: raw.replace(b"\0", b"").decode(errors="surrogateescape"))
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(
        ["http://[", "https://:x", "http://a:99999999", "1e400", "0x10", "1_0", "٣", "-0", "postgres://", "//"]
    )
)


def test_the_names_are_all_that_there_are() -> None:
    aliases = {str(field.validation_alias or name).upper() for name, field in Settings.model_fields.items()}
    assert {name for name in aliases if "ALIASCHOICES" not in name} == set(NAMES) - {
        "CONVEX_URL",
        "NEXT_PUBLIC_CONVEX_URL",
    }


@given(environment=st.dictionaries(st.sampled_from(NAMES), given_texts, min_size=1, max_size=4))
@example({"CDC_CONFIG": "a\udc80"})
def test_any_environment_is_taken_or_refused_by_name(environment: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        try:
            load(monkeypatch, **environment)
        except ConfigError as error:
            named = [line.split(":")[0].split(" ")[0] for line in str(error).splitlines()]
            assert named
            assert set(named) <= {*environment, "CONVEX_URL", "CDC_STALL_SECONDS", "DATABASE_URL"}
            # It can be printed wherever it goes.
            str(error).encode()
