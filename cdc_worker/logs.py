"""Logs: stable event names, values as fields with their unit. One line for people on a terminal, JSON otherwise."""

import logging
import sys
from typing import Literal

import structlog


class LogGone(Exception):
    """Nobody takes the log. Reaction: none, so that the worker ends, and the platform starts it anew.

    An OSError would pass for a database that is away, which is waited out; and mostly in silence.
    """


class _Logger(structlog.PrintLogger):
    def msg(self, message: str) -> None:
        try:
            super().msg(message)
        except OSError as error:
            raise LogGone(str(error)) from error

    debug = info = warning = error = critical = msg


def _event_first(_: object, __: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """When, how grave, what; then the values."""
    first = ("timestamp", "level", "event")
    return {name: fields[name] for name in first} | {name: value for name, value in fields.items() if name not in first}


def configure_logs(level: str, form: Literal["console", "json"] | None) -> None:
    """Sets up structlog for this process; `form` None means: by what standard error is."""
    number = logging.getLevelNamesMapping()[level]
    console = form == "console" or (form is None and sys.stderr.isatty())
    # What the libraries have to say, we say ourselves, once: the pool alone writes a line for each failed attempt.
    logging.basicConfig(level=logging.CRITICAL)
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # it sets a level of its own
    stream = sys.stderr
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(pad_event_to=24, colors=sys.stderr.isatty())
        if console
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if console else "iso", utc=not console),
            _event_first,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: _Logger(stream),
        cache_logger_on_first_use=False,
    )
