"""The local Convex as Python starts it. What it serves is tested in TypeScript, beside it."""

import json
import urllib.request
from pathlib import Path

import pytest

from dev import local_convex as convex


def test_it_says_where_it_is(local_convex: convex.LocalConvex) -> None:
    with urllib.request.urlopen(f"{local_convex.url}/version", timeout=30) as answer:
        assert answer.status == 200
    assert "|" in local_convex.admin_key


def test_each_fresh_one_is_another(local_convex: convex.LocalConvex, fresh_convex: convex.LocalConvex) -> None:
    assert fresh_convex.url != local_convex.url
    assert fresh_convex.admin_key != local_convex.admin_key


def test_a_folder_that_is_not_there_is_told_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(convex.LocalConvexError, match="nowhere"), convex.start(functions=tmp_path / "nowhere"):
        pass


def test_anyone_may_read_unless_told_otherwise(fresh_convex: convex.LocalConvex) -> None:
    body = json.dumps({"path": "alerts:getUserStatus", "args": {"userId": "nobody"}, "format": "convex_encoded_json"})
    request = urllib.request.Request(
        f"{fresh_convex.url}/api/query", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["value"] is None
