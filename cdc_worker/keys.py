"""How a key is written: the text of its column, or the JSON array of the texts of several."""

import json
import re
from collections.abc import Sequence


def join_key(parts: Sequence[str]) -> str:
    """As Postgres' json_build_array writes it (capture.py), so that one key has one spelling."""
    return parts[0] if len(parts) == 1 else json.dumps(list(parts), ensure_ascii=False)


# What a text must be like to be of a type at all: others find no row, and must not make the query fail.
_LIKE = {
    "bigint": re.compile(r"-?[0-9]{1,19}"),
    "uuid": re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
}


def key_arrays(keys: Sequence[str], types: Sequence[str]) -> list[str]:
    """Those keys that a row can have, as array literals, one for each column of the key; empty if there is no such key.

    The driver's own arrays cost more than all else that is done to a key: each text is looked at in Python.
    """
    if len(types) == 1:
        columns: list[Sequence[str]] = [[key for key in keys if _is_like(key, types[0])]]
    else:
        possible = [parts for key in keys if (parts := key_parts(key, types)) is not None]
        columns = [[parts[n] for parts in possible] for n in range(len(types))]
    return [_array(column) for column in columns]


def _array(texts: Sequence[str]) -> str:
    """Postgres' literal for an array of texts, none of which has a NUL: no text of Postgres' has."""
    if not texts:
        return "{}"
    quoted = "\0".join(texts).replace("\\", "\\\\").replace('"', '\\"').replace("\0", '","')
    return f'{{"{quoted}"}}'


def key_parts(key: str, types: Sequence[str]) -> tuple[str, ...] | None:
    """The parts of a key of these types (text, uuid, bigint); None for a text that no row's key can be.

    Such texts are in the log, or in Convex, from before the mirror's key was changed.
    """
    try:
        parts = split_key(key, len(types))
    except ValueError:
        return None
    return parts if all(map(_is_like, parts, types)) else None


def _is_like(part: str, kind: str) -> bool:
    if kind == "text" or (kind == "bigint" and len(part) < 19 and part.isascii() and part.isdecimal()):
        return True  # as nearly all are
    return _LIKE[kind].fullmatch(part) is not None and (kind != "bigint" or -(2**63) <= int(part) < 2**63)


def split_key(key: str, width: int) -> tuple[str, ...]:
    """The parts of a key of `width` columns. Raises ValueError for a text that is no such key."""
    if width == 1:
        return (key,)
    try:
        parts = json.loads(key)
    except RecursionError:
        raise ValueError("not a key") from None
    if not isinstance(parts, list) or len(parts) != width or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"not a key of {width} parts")
    return tuple(parts)
