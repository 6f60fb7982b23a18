"""How large a JSON text is to Convex: told from the text, since its values may need fifty times as much memory."""

import json
import re

# Possessive throughout: nothing is looked at twice, and nothing is kept to go back to.
_STRING = rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"'
# By the group that matched last: 1 a string, 2 a name, 3 a number, 4 true, false or null; an opening bracket without.
_TOKEN = re.compile(_STRING + rb"(\s*+:)?+|(-?[0-9][0-9.eE+-]*+)|([tfn][a-z]++)|[\[{]")


def convex_bytes(text: bytes, most: int, *, number: int = 9) -> int:
    """What a JSON text counts to Convex, all numbers being Float64 (`getConvexSize` of the package convex), or some
    figure above `most`. A name that an object repeats (in type json) counts each time. `number`: the most that a number
    counts.
    """
    size = 0
    for token in _TOKEN.finditer(text):
        match token.lastindex:
            case 1:
                size += 2 + len(_utf8(token[1]))
            case 2:
                size += 1 + len(_utf8(token[1]))
            case 3:
                size += number if number == 9 else min(number, token.end() - token.start())
            case 4:
                size += 1
            case _:
                size += 2
        if size > most:
            break
    return size


def least_bytes(text: bytes, most: int) -> int:
    """What any JSON text counts at the least once it is safe (safe_json.py), or some figure above `most`: a part may
    become a string, and its shortest numbers are `0` and `1.0` there.
    """
    return convex_bytes(text, most, number=3)


def _utf8(string: bytes) -> bytes:
    """What is between a JSON string's quotes, without escapes."""
    if b"\\" not in string:
        return string
    text: str = json.loads(f'"{string.decode()}"')
    return text.encode(errors="surrogatepass")
