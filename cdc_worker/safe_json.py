"""The rule by which any JSON becomes a value that Convex can hold, and back again without loss.

`~{` marks everything that was changed:

- In a string or a key, a character that Convex refuses is written `~{hex}`: U+0000, lone surrogates, and in
  keys also every character that is not printable ASCII, a leading `$`, and the first of `__proto__` (which
  JavaScript takes for something else). An empty key is `~{}`. A `~` that stands before a `{` is itself written
  `~{7e}`, so that nothing else reads as a mark.
- A value that Convex cannot hold as it is (a number that a Float64 would change, or -0, an object or array that is
  too large or too deep, a key that is too long) becomes a string: `~{json}` and its JSON text.

Limits: facts of Convex' values; the documents' nesting of 16 is counted from the document itself.
"""

import io
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

# A field of the document is one level down; two more are left for what a reader wraps it in.
DEEPEST = 13
MOST_FIELDS = 1_024
MOST_ITEMS = 8_192
LONGEST_KEY = 1_024

_JSON = "~{json}"
_BAD_IN_TEXT = re.compile("\x00|[\ud800-\udfff]|~(?=\\{)")
_BAD_IN_KEY = re.compile("[^\x20-\x7e]|^\\$|^_(?=_proto__$)|~(?=\\{)")
_MARK = re.compile(r"~\{([0-9a-f]*)\}")


class _Number(str):
    """A number's JSON text, which a Float64 would change."""

    __slots__ = ()


def _integer(text: str) -> float | _Number:
    # Asked for its length first: Python refuses to read an integer of many thousand digits.
    return float(text) if len(text) <= 17 and abs(int(text)) <= 2**53 and text != "-0" else _Number(text)


def _decimal(text: str) -> float | _Number:
    number = float(text)
    try:
        # repr is the shortest text that gives this very double: if it says something else, digits would be lost.
        exact = (
            math.isfinite(number) and Decimal(text) == Decimal(repr(number)) and not (number == 0 and text[0] == "-")
        )
    except ArithmeticError:  # an exponent beyond even Decimal
        exact = False
    return number if exact else _Number(text)


def _constant(text: str) -> _Number:
    raise ValueError(f"{text} is not JSON")


# Made once: json.loads() with hooks would build one for each text.
_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_decimal, parse_constant=_constant)


# What a JSON text must not have to be certain to be its own safe JSON, so that nobody need parse it: escapes, marks, a
# key that is empty, reserved or not ASCII, a number with an exponent, -0, or more digits than a Float64 holds; and so
# many brackets that it might be too deep. Patterns for Postgres (plan.py) and Python alike. They are cautious: much
# that `parse` would leave as it is has one. They are two, since as one they take Postgres three times as long.
UNPLAIN: Final = r"""\\|~\{|"\$|""\s*:|__proto__|[^ -~][^"]*"\s*:|(^|[\[,:\s])(-0|-?([0-9.]{16}|[0-9.]+[eE]))"""
MANY_BRACKETS: Final = rf"([{{\[][^{{\[]*){{{DEEPEST}}}"
# It must also be short, which bounds fields, items and keys.
PLAIN_BYTES: Final = 1_000


def parse(text: str) -> Any:
    """The value of a JSON text as Postgres prints it, made safe. Raises ValueError if it is not JSON.

    What comes out is its own Convex JSON: str, float, bool, None, and lists and dicts of them, and no -0,
    infinity or NaN.
    """
    try:
        return _safe(_DECODER.decode(text), DEEPEST)
    except RecursionError:
        return _JSON + _text(text)  # deeper than Python reads, or writes: as a whole


def restore(value: Any) -> str:
    """The JSON text that `parse` was given, up to white space and the order of keys."""
    if isinstance(value, str):
        if value.startswith(_JSON):
            return _unmark(value[len(_JSON) :])
        return json.dumps(_unmark(value))
    if isinstance(value, list):
        return f"[{', '.join(map(restore, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(_unmark(key))}: {restore(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def _safe(value: Any, levels: int) -> Any:
    if isinstance(value, _Number):
        return _JSON + value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        if levels == 0 or len(value) > MOST_FIELDS:
            return _JSON + _text(_dump(value))
        fields = {_key(key): _safe(item, levels - 1) for key, item in value.items()}
        return fields if all(len(key) <= LONGEST_KEY for key in fields) else _JSON + _text(_dump(value))
    if isinstance(value, list):
        if levels == 0 or len(value) > MOST_ITEMS:
            return _JSON + _text(_dump(value))
        return [_safe(item, levels - 1) for item in value]
    return value


def _text(text: str) -> str:
    return _BAD_IN_TEXT.sub(_escape, text)


def _key(key: str) -> str:
    return _BAD_IN_KEY.sub(_escape, key) or "~{}"


def _escape(found: re.Match[str]) -> str:
    return f"~{{{ord(found[0]):x}}}"


def _unmark(text: str) -> str:
    return _MARK.sub(lambda found: chr(int(found[1], 16)) if found[1] else "", text)


def _dump(value: Any) -> str:
    """JSON text of a parsed value, numbers as they were written. ASCII, so that nothing in it needs a mark but `~{`."""
    text = io.StringIO()
    _write(value, text.write)
    return text.getvalue()


def _write(value: Any, write: Callable[[str], Any]) -> None:
    # Piece by piece: a list of the pieces would need many times what the text does.
    if isinstance(value, _Number):
        write(value)
    elif isinstance(value, dict):
        before = "{"
        for name, item in value.items():
            write(f"{before}{json.dumps(name)}: ")
            _write(item, write)
            before = ", "
        write("}" if value else "{}")
    elif isinstance(value, list):
        before = "["
        for item in value:
            write(before)
            _write(item, write)
            before = ", "
        write("]" if value else "[]")
    else:
        write(json.dumps(value))
