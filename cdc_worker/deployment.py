"""One request to a Convex deployment, under a real deadline.

Why not the package's own clients (facts measured on convex 0.8.1): `ConvexClient` holds the GIL for the whole
of a call, has no time limit, retries for ever with a new session id (which defeats the server's own
deduplication), and blocks for ever on a wrong key; `ConvexHttpClient` has no time limit, opens a connection
for each call, and loses `errorMessage`. So the POST is ours, over kept-alive connections; the value codec and
the error class are the package's.

`aiohttp` because its total timeout covers the whole exchange: others count each read anew, and a server that
drips holds them for as long as it likes.
"""

import io
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from convex.values import convex_to_json, json_to_convex
from pydantic import SecretStr

from cdc_worker.errors import ConfigError, FunctionFailed, Misconfigured, Overloaded, Transient
from convex import ConvexError

Kind = Literal["query", "mutation"]

# By the code in the answer, where the status says less, or by the status.
_CURES: Mapping[str | int, str] = {
    "InvalidAdminKey": "is CONVEX_DEPLOY_KEY whole?",
    "BadDeployKey": "CONVEX_DEPLOY_KEY does not belong to this deployment",
    401: "CONVEX_DEPLOY_KEY does not belong to this deployment",
    "OperationNotPermitted": "CONVEX_DEPLOY_KEY needs the permissions deployment:functions:runInternalQueries and "
    "deployment:functions:runInternalMutations",
    "Unauthorized": "CONVEX_DEPLOY_KEY may not do this: make a new deploy key in the dashboard",
    # Some deployments say so of a function, in place of a failure.
    "FunctionPathNotFound": "deploy the convex/ folder of this worker's version",
    404: "there is no deployment at CONVEX_URL (in the cloud it ends in .convex.cloud, not in .convex.site or a path)",
}
# These may be about the one request, or about all of them: whoever sent it finds out.
_REFUSALS = {
    400: "the request is not as Convex wants it",
    # Convex itself says a code.
    403: "something in front of CONVEX_URL (a firewall?) forbids this request",
    413: "a proxy in front of CONVEX_URL takes no request of this size",
}
_LARGE_BODY_BYTES = 1_048_576
# Twice what a function can return. What is longer comes from something else, and might have no end.
_LONGEST_ANSWER_BYTES = 33_554_432


class Deployment:
    """The functions of one deployment, called with the deploy key. `async with` opens and closes its connections."""

    def __init__(
        self, url: str, deploy_key: SecretStr | None, *, timeout_seconds: float, connections: int = 16
    ) -> None:
        self._url = url
        self._key = deploy_key
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Convex {self._key.get_secret_value()}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=self._timeout,
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=60.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Not by `trust_env`: that looks at the environment, and into ~/.netrc, for each request.
            proxy=_proxy(self._url),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def call(self, kind: Kind, path: str, args: dict[str, Any]) -> Any:
        """The function's value. Raises as `send` does."""
        return await self.send(kind, path, json.dumps(convex_to_json(args)).encode())

    async def send(self, kind: Kind, path: str, args: bytes) -> Any:
        """POSTs arguments that are JSON text already; returns the function's value.

        Raises:
            Transient: it may or may not have run; the same again is right.
            Misconfigured: it did not run, and will not until somebody mends a setting.
            FunctionFailed: it ran and committed nothing, or could not run.
            ConvexError: the function itself refused, with data.
        """
        assert self._session is not None, "use `async with`"
        body = b'{"path":"%s","format":"convex_encoded_json","args":%s}' % (path.encode(), args)
        # A large body as bytes makes aiohttp warn, which a process that takes warnings for errors would die of.
        data = body if len(body) <= _LARGE_BODY_BYTES else io.BytesIO(body)
        try:
            async with self._session.post(f"{self._url}/api/{kind}", data=data, allow_redirects=False) as response:
                text = await _body(response)
                status = response.status
        except (aiohttp.InvalidURL, UnicodeError):
            # CONVEX_URL has been checked. A host that can be no name, or a password that no header can hold.
            raise Misconfigured("HTTPS_PROXY (or HTTP_PROXY) is no address: give http://host:port") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Transient(_why(error, self._url)) from None
        return _decode(status, text)


def _proxy(url: str) -> str | None:
    """What HTTPS_PROXY (HTTP_PROXY for an address with http) names; none to this machine, or to a host in NO_PROXY.

    Raises ConfigError for a proxy of another kind.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = getproxies().get(parts.scheme)
    if not proxy or host in {"localhost", "127.0.0.1", "::1"} or proxy_bypass(host):
        return None
    # As curl and others read it.
    kind, found, _ = proxy.partition("://")
    if not found:
        return f"http://{proxy}"
    if kind.lower() not in {"http", "https"}:
        raise ConfigError(f"{parts.scheme.upper()}_PROXY has to be an http:// or https:// address")
    return proxy


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > _LONGEST_ANSWER_BYTES:
            raise Transient(f"HTTP {response.status} whose body does not end: is there a proxy in front of CONVEX_URL?")
    return bytes(body)


def _why(error: BaseException, url: str) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return "no connection to the proxy that HTTPS_PROXY (or HTTP_PROXY) names"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy that HTTPS_PROXY names does not let us through (HTTP {error.status})"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        of = (
            "CONVEX_URL" if error.host == urlsplit(url).hostname else "the proxy that HTTPS_PROXY (or HTTP_PROXY) names"
        )
        return f"the host of {of} is not found"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        # OpenSSL's own words, such as "certificate has expired".
        said = getattr(error.certificate_error, "verify_message", "")
        return (
            f"the certificate of CONVEX_URL's host is not accepted ({said}): is there a proxy in front of it, or does"
            " this machine lack the certificates of authorities?"
        )
    if isinstance(error, aiohttp.ClientSSLError):
        return "the host of CONVEX_URL does not speak TLS as it should: is there a proxy in front of it?"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection"
    return f"the connection broke ({type(error).__name__})"


def _decode(status: int, text: bytes) -> Any:
    """The closed set of answers (facts: a function that fails is a 200 with `status: "error"`, or a 560)."""
    try:
        answer = _parse(text)
    except (ValueError, RecursionError):
        answer = None
    if status in {200, 560}:
        if not isinstance(answer, dict):
            raise Transient(f"HTTP {status} whose body is not JSON: is there a proxy in front of CONVEX_URL?")
        if answer.get("status") == "success":
            try:
                return json_to_convex(answer.get("value"))
            except Exception:  # noqa: BLE001  # the codec raises whatever its parts raise
                raise Transient("a value that cannot be decoded") from None
        if answer.get("status") == "error":
            message = _first_line(answer.get("errorMessage"))
            if answer.get("errorData") is not None:
                raise ConvexError(message, _error_data(answer["errorData"]))
            raise FunctionFailed(message)
        raise Transient(f"HTTP {status} with an unknown status field")
    code = answer.get("code") if isinstance(answer, dict) else None
    code = code if isinstance(code, str) and code.isalnum() else ""
    said = f"HTTP {status} {code}".strip()
    if cure := _CURES.get(code if code in _CURES else status):
        raise Misconfigured(f"{said}: {cure}")
    if status in _REFUSALS:
        raise FunctionFailed(f"{said}: {_REFUSALS[status]}")
    if 300 <= status < 400:
        raise Misconfigured(f"{said}: CONVEX_URL is redirected; give the deployment's own address")
    # Too many at once, or a conflict that Convex' own retries did not solve: it did not run. A proxy's 503 has no
    # code, and may be about a request that it has passed on.
    if status == 429 or (status == 503 and code):
        raise Overloaded(said)
    raise Transient(said)


def _parse(text: bytes) -> Any:
    """The JSON of an answer. NUL and halves of surrogate pairs become a `?`, since neither Postgres nor a log takes
    them. Convex itself sends none.
    """
    answer = json.loads(text)
    return _speakable(answer) if b"\\u0000" in text or b"\\ud" in text.lower() else answer


def _speakable(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "?").encode(errors="replace").decode()
    if isinstance(value, list):
        return [_speakable(item) for item in value]
    if isinstance(value, dict):
        return {_speakable(name): _speakable(item) for name, item in value.items()}
    return value


def _error_data(data: Any) -> Any:
    try:
        return json_to_convex(data)
    except Exception:  # noqa: BLE001  # the codec raises whatever its parts raise
        return None


def _first_line(message: object) -> str:
    """The line that names the failure. What follows can be a stack, or arguments: row content."""
    line = str(message or "no message").split("\n", 1)[0]
    return line.split("Object:", 1)[0][:200]
