"""How a key is written: the text of its column, or the JSON array of the texts of several."""

import json
from collections.abc import Sequence


def join_key(parts: Sequence[str]) -> str:
    """As Postgres' json_build_array writes it (capture.py), so that one key has one spelling."""
    return parts[0] if len(parts) == 1 else json.dumps(list(parts), ensure_ascii=False)


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
