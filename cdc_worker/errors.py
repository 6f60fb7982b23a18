"""The closed set of what can go wrong, each class tied to one reaction.

A message gives the cause and the cure, and quotes neither secrets nor row content.
"""


class CdcError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(CdcError):
    """A setting or cdc_worker.toml cannot be used. Reaction: say what, exit 2, change nothing."""


class SchemaError(CdcError):
    """The database lacks what `migrate` makes, or has moved on. Reaction: say so, wait, look again."""


READ_ONLY = "this database is read-only (a standby?): point DATABASE_URL at the primary"


class Fenced(CdcError):
    """Somebody else reads this shard now. Reaction: drop everything read, and ask for the lease again."""


class Transient(CdcError):
    """Convex may or may not have done it. Reaction: the same request again, with backoff and full jitter, for ever."""


class Overloaded(Transient):
    """Convex has too much at the moment. Reaction: as for Transient, and less at once."""


class Misconfigured(CdcError):
    """Convex refuses us as a whole (key, address, functions, paused). Reaction: say it loudly and seldom, keep
    all, try on.
    """


class FunctionFailed(CdcError):
    """A function answered `status: "error"`, and committed nothing.

    It proves nothing against any key of the call: the whole deployment may be paused. Reaction: probe, then bisect.
    """
