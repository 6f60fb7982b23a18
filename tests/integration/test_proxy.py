"""The way to Convex leads through the proxy that the environment names."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from pydantic import SecretStr

from cdc_worker.deployment import Deployment
from cdc_worker.errors import ConfigError, Misconfigured, Transient
from cdc_worker.sync import SyncError, sync_activity_async
from dev import local_convex as convex
from tests.integration.interposed import Interposed, Run

# No resolver knows it: only a proxy leads there.
SOMEWHERE = "//deployment.invalid"


@pytest.fixture(autouse=True)
def _no_other_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


async def call(url: str, key: str = "local|00") -> object:
    async with Deployment(url, SecretStr(key), timeout_seconds=5) as deployment:
        return await deployment.call("query", "alerts:getUserStatus", {"userId": "nobody"})


async def test_a_proxy_of_the_environment_is_used(
    local_convex: convex.LocalConvex, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def passes(request: web.Request, _body: bytes, run: Run) -> web.Response:
        asked.append(request.headers["Host"])
        status, answer = await run()
        return web.Response(status=status, body=answer)

    async with Interposed(local_convex) as proxy:
        proxy.fault = passes
        monkeypatch.setenv("HTTP_PROXY", proxy.convex.url.removeprefix("http://"))
        assert await call(f"http:{SOMEWHERE}", local_convex.admin_key) is None
        assert asked == ["deployment.invalid"]
        # This machine itself is never reached by a proxy.
        assert await call(local_convex.url, local_convex.admin_key) is None
        assert asked == ["deployment.invalid"]
        monkeypatch.setenv("NO_PROXY", "localhost,.invalid")
        with pytest.raises(Transient, match="the host of CONVEX_URL is not found"):
            await call(f"http:{SOMEWHERE}", local_convex.admin_key)


@asynccontextmanager
async def refusing() -> AsyncIterator[str]:
    """A proxy that wants a password."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readline()).startswith(b"CONNECT deployment.invalid:443 ")
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_proxy_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with refusing() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        with pytest.raises(Transient, match=r"^the proxy that HTTPS_PROXY names does not let us through \(HTTP 407\)$"):
            await call(f"https:{SOMEWHERE}")
    with pytest.raises(Transient, match=r"^no connection to the proxy that HTTPS_PROXY \(or HTTP_PROXY\) names$"):
        await call(f"https:{SOMEWHERE}")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    with pytest.raises(
        Transient, match=r"^the host of the proxy that HTTPS_PROXY \(or HTTP_PROXY\) names is not found$"
    ):
        await call(f"https:{SOMEWHERE}")
    async with refusing() as proxy:
        for never in ("//user:secret@proxy:port", "//user:secret@proxy..example:1", f"//u:secret\u20ac@{proxy[7:]}"):
            monkeypatch.setenv("HTTPS_PROXY", f"http:{never}")
            with pytest.raises(Misconfigured, match=r"^HTTPS_PROXY") as refused:
                await call(f"https:{SOMEWHERE}")
            assert "secret" not in str(refused.value)
    monkeypatch.setenv("HTTPS_PROXY", "socks5://user:secret@proxy:1080")
    with pytest.raises(ConfigError, match=r"^HTTPS_PROXY has to be an http:// or https:// address") as unknown:
        await call(f"https:{SOMEWHERE}")
    assert "secret" not in str(unknown.value)
    monkeypatch.setenv("CONVEX_URL", f"https:{SOMEWHERE}")
    monkeypatch.setenv("CONVEX_DEPLOY_KEY", "key")
    with pytest.raises(SyncError, match="HTTPS_PROXY has to be"):
        await sync_activity_async("someone", "check-in", "Feeling well", 0)
