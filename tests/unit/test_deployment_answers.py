"""Whatever bytes Convex, or somebody between us and Convex, answers: one of the closed set of outcomes."""

import json
import math
import ssl
from typing import Any

import aiohttp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_worker.deployment import _decode, _why
from cdc_worker.errors import FunctionFailed, Misconfigured, Overloaded, Transient
from convex import ConvexError

CLOSED = (Transient, Misconfigured, FunctionFailed, ConvexError)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.sampled_from(["$integer", "$bytes", "$float", "$x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
answers = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["success", "error", "other"]) | json_values,
        "value": json_values,
        "errorMessage": json_values,
        "errorData": json_values,
        "code": json_values,
        "message": json_values,
    },
)
statuses = st.sampled_from([200, 201, 204, 301, 302, 400, 401, 403, 404, 408, 421, 429, 500, 502, 503, 524, 560])


def decode(status: int, body: bytes) -> Any:
    try:
        return _decode(status, body)
    except CLOSED as outcome:
        return type(outcome)


@given(statuses | st.integers(100, 599), st.binary())
@example(200, b"")
@example(200, b"\xff\xfe")
@example(200, b"[" * 100_000)
@example(200, b'{"status":"success","value":' + b"[" * 980 + b"]" * 980 + b"}")
@example(200, b'{"status":"error","errorMessage":' + b"[" * 980 + b"]" * 980 + b"}")
@example(200, b'{"status":"success","value":' + b"1" * 5000 + b"}")
@example(503, b"<html>")
def test_any_bytes(status: int, body: bytes) -> None:
    decode(status, body)


@given(statuses, answers)
@example(200, {"status": "error", "errorData": {"$integer": "x"}})
@example(200, {"status": "error", "errorData": 5})
@example(200, {"status": "error", "errorData": {"$x": 1}, "errorMessage": ["a"]})
@example(200, {"status": "success", "value": {"$float": "AAAA"}})
def test_any_answer(status: int, answer: dict[str, Any]) -> None:
    decode(status, json.dumps(answer).encode())


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (200, '{"status":"success","value":{"a":1.5}}', {"a": 1.5}),
        (200, '{"status":"success","value":null}', None),
        (200, '{"status":"error","errorMessage":"Server Error"}', FunctionFailed),
        (560, '{"status":"error","errorMessage":"Server Error"}', FunctionFailed),
        (200, '{"status":"error","errorMessage":"x","errorData":{"code":"y"}}', ConvexError),
        (
            200,
            '{"status":"success","value":["\\ud800","\\ud83d\\ude00","a\\u0000","\\\\u0000"]}',
            ["?", "\U0001f600", "a?", "\\u0000"],
        ),
        (200, "<html>", Transient),
        (200, "{}", Transient),
        (302, "", Misconfigured),
        (400, '{"code":"BadJsonBody","message":"x"}', FunctionFailed),
        (400, '{"code":"InvalidAdminKey","message":"x"}', Misconfigured),
        (400, '{"code":["x"]}', FunctionFailed),
        (413, "<html>", FunctionFailed),
        (401, '{"code":"BadAdminKey"}', Misconfigured),
        (403, '{"code":"BadDeployKey"}', Misconfigured),
        (403, "<html>", FunctionFailed),
        (404, "", Misconfigured),
        (408, "", Transient),
        (429, '{"code":"TooManyWrites"}', Overloaded),
        (429, "<html>", Overloaded),
        (500, '{"code":"InternalServerError"}', Transient),
        (503, '{"code":"OptimisticConcurrencyControlFailure"}', Overloaded),
        (502, "<html>", Transient),
    ],
)
def test_the_table_of_facts(status: int, body: str, outcome: object) -> None:
    found = decode(status, body.encode())
    assert found == outcome or (isinstance(found, type) and isinstance(outcome, type) and issubclass(found, outcome))


@pytest.mark.parametrize(
    ("status", "code", "cure"),
    [
        (401, "BadAdminKey", "CONVEX_DEPLOY_KEY does not belong to this deployment"),
        (403, "BadDeployKey", "CONVEX_DEPLOY_KEY does not belong to this deployment"),
        (403, "OperationNotPermitted", "CONVEX_DEPLOY_KEY needs the permissions .*runInternalMutations"),
        (403, "Unauthorized", "CONVEX_DEPLOY_KEY may not do this"),
        (404, "FunctionPathNotFound", "deploy the convex/ folder"),
        (404, "", "there is no deployment at CONVEX_URL"),
    ],
)
def test_what_to_do_about_an_answer(status: int, code: str, cure: str) -> None:
    with pytest.raises(Misconfigured, match=f"^HTTP {status} ?{code}: {cure}"):
        _decode(status, json.dumps({"code": code}).encode())


def test_a_503_without_a_code_may_have_run() -> None:
    with pytest.raises(Transient) as caught:
        _decode(503, b"upstream connect error or disconnect/reset before headers")
    assert not isinstance(caught.value, Overloaded)


def test_special_floats() -> None:
    assert math.isnan(_decode(200, b'{"status":"success","value":{"$float":"AAAAAAAA+H8="}}'))


def test_a_message_is_one_line_without_arguments() -> None:
    body = {"status": "error", "errorMessage": "ArgumentValidationError: Object: {secret}\nline two"}
    with pytest.raises(FunctionFailed) as caught:
        _decode(200, json.dumps(body).encode())
    assert str(caught.value) == "ArgumentValidationError: "


def test_a_certificate_that_is_not_accepted_is_named() -> None:
    """Not "no connection", of which nobody would think of a proxy, or of an image without certificates."""
    where = aiohttp.client_reqrep.ConnectionKey("example.com", 443, True, True, None, None, None)
    refused = ssl.SSLCertVerificationError(1, "certificate verify failed")
    refused.verify_message = "self-signed certificate"
    url = "https://example.com"
    said = _why(aiohttp.ClientConnectorCertificateError(where, refused), url)
    assert "certificate of CONVEX_URL" in said
    assert "self-signed certificate" in said
    assert "TLS" in _why(aiohttp.ClientConnectorSSLError(where, ssl.SSLError(1, "wrong version number")), url)
    assert _why(aiohttp.ClientConnectorError(where, OSError(111, "refused")), url) == "no connection"
