"""Tokens: what the page says holds, in Chromium too; and what it says of logs."""

import io
import logging
import os
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator, Callable, Collection, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from fastapi import HTTPException
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from tests.docs.test_browsers import Paced, chromium, text_of
from tests.engines.process import free_port
from tests.http.servers import http_to, serving, until
from tests.network.proxy import End, Fate, Network, bad_network
from tests.network.readers import chromium_page
from tests.test_docs import ROOT, blocks

from streamkeep import StreamManager
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.clock import FakeClock

__all__ = ["chromium"]

PAGE: Final = ROOT / "docs/how-to/tokens.md"
ANN: Final = {"Authorization": "Bearer s3ss10n"}


def shown_program(manager: StreamManager, origin: str = "https://app.example") -> dict[str, Any]:
    """Run the program with the app, over a manager, and give what it defines."""
    program = blocks(PAGE)[0].replace('"sqlite:///streams.db"', "manager").replace("https://app.example", origin)
    shown: dict[str, Any] = {"manager": manager}
    exec(compile(program, str(PAGE), "exec", dont_inherit=True), shown)
    return shown


@asynccontextmanager
async def shown_house() -> AsyncGenerator[tuple[httpx.AsyncClient, Any]]:
    async with MemoryStorage() as storage:
        shown = shown_program(StreamManager(storage))
        async with http_to(shown["app"]) as http:
            yield http, shown["streams_http"]


async def test_the_endpoint_gives_tokens_to_who_owns_a_stream_and_to_nobody_else() -> None:
    async with shown_house() as (http, serve):
        stream = (await http.post("/ask", params={"question": "Nothing is lost"}, headers=ANN)).json()["stream"]
        tokens = (await http.post(f"/ask/{stream}/tokens", headers=ANN)).json()
        refused = await http.post(f"/ask/{stream}/tokens")
        unknown = await http.post("/ask/unknown/tokens", headers=ANN)
        async with serve.streams.open("bobs", owner="bob"):
            of_bob = await http.post("/ask/bobs/tokens", headers=ANN)
        read = await http.get(f"/streams/{stream}", params={"token": tokens["read"]})
        unread = await http.get(f"/streams/{stream}", params={"token": tokens["stop"]})
        unasked = await http.post("/ask", params={"question": "Nothing is lost"})
    assert [answer.status_code for answer in (refused, unknown, of_bob, unasked)] == [401, 404, 404, 401]
    assert [answer.status_code for answer in (read, unread)] == [200, 404]
    assert re.fullmatch(r"skt1\.read\.\d{10}\.[\w-]{43}", tokens["read"])


# In Chromium, from another origin


def page_of(api: str) -> str:
    """Give the page's program as a page."""
    (program,) = re.findall(r"^```js\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return f"""<!doctype html><output></output><button>Stop</button><script type="module">
        const text = document.querySelector("output"), question = "Nothing is lost", session = "s3ss10n";
        const show = (chunk) => text.append(chunk.text + " "), failed = (error) => text.append(error.status);
        {program.replace("https://api.example", api)}
        document.querySelector("button").onclick = stop;
        addEventListener("pagehide", stop);
        </script>"""


@asynccontextmanager
async def followed(
    executable: str, *, failing: Collection[int] = ()
) -> AsyncGenerator[tuple[Any, Paced, Network, FakeClock, list[str], StreamManager]]:
    """Serve the page from one origin and its streams from another, over a network; and note what tokens were asked for, of which some
    cannot be given.
    """
    clock, pages, asked = FakeClock(), dict[str, str](), list[str]()

    async def page_html(_: object) -> Response:
        return Response(pages["html"], media_type="text/html")

    async with MemoryStorage(clock=clock) as storage, serving(Starlette(routes=[Route("/page.html", page_html)])) as site:
        manager = StreamManager(storage)
        shown, paced = shown_program(manager, site), Paced()
        paced.may_begin.set()
        shown["answer"] = paced.answer
        token = shown["streams_http"].token

        async def noted(stream: str, **options: Any) -> str:
            asked.append(options["can"])
            if len(asked) in failing:
                raise HTTPException(503, "the storage cannot be reached")
            given: str = await token(stream, **options)
            return given

        shown["streams_http"].token = noted
        async with serving(shown["app"]) as url, bad_network(url) as network:
            pages["html"] = page_of(network.path())
            async with chromium_page(executable, f"{site}/page.html") as page:
                await text_of(page, "Nothing")
                yield page, paced, network, clock, asked, manager


async def test_an_event_source_of_another_origin_reads_by_a_token_and_comes_back_with_a_new_one(chromium: str) -> None:
    async with followed(chromium) as (page, paced, network, clock, asked, _):
        assert asked == ["read", "stop"]
        clock.advance(301)
        network.meet(Fate(End.FIN, b"data: {"))
        paced.may_go_on.set()
        await text_of(page, "Nothing is lost")
        await until(lambda: network.struck)
        assert asked == ["read", "stop"] * 2
    assert paced.runs == 1


async def test_the_page_asks_again_for_a_token_where_the_server_could_give_none(chromium: str) -> None:
    async with followed(chromium, failing={3}) as (page, paced, network, clock, asked, _):
        clock.advance(301)
        network.meet(Fate(End.FIN, b"data: {"))
        paced.may_go_on.set()
        await text_of(page, "Nothing is lost")
        assert asked == ["read", "stop", "read", "read", "stop"]


@pytest.mark.parametrize("how", ["button", "leave"])
async def test_a_beacon_stops_by_a_token_also_as_the_page_is_left(chromium: str, how: str) -> None:
    async with followed(chromium) as (page, _, _, _, _, manager):
        if how == "button":
            await page.click("button")
            await text_of(page, "Nothing CANCELLED")
        else:
            await page.goto("about:blank")
        (info,) = await manager.list()
        with anyio.fail_after(10):
            while info.status == "open":
                await anyio.sleep(0.01)
                info = await manager.info(info.id)
        assert info.error == "CANCELLED"


# In logs


@contextmanager
def access_log() -> Generator[io.StringIO]:
    """Give what uvicorn's access log has, filtered as the page says."""
    written, logger = io.StringIO(), logging.getLogger("uvicorn.access")
    handler, level = logging.StreamHandler(written), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield written
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.filters.clear()


async def test_the_filter_leaves_tokens_out_of_uvicorns_access_log() -> None:
    with access_log() as written:
        async with MemoryStorage() as storage:
            app = shown_program(StreamManager(storage))["app"]
            async with serving(app, access_log=True) as url, httpx.AsyncClient(base_url=url) as http:
                await http.get("/streams/s", params={"token": "skt1.read.1.before", "after": "1"})
                exec(compile(blocks(PAGE)[2], str(PAGE), "exec", dont_inherit=True), {})
                await http.get("/streams/s", params={"token": "skt1.read.1.A_-b", "after": "1"})
                await http.get("/streams/s?token=skt1%2Eread%2E1%2EA_-b&after=1")  # as what rewrites links may write it
        lines = written.getvalue().splitlines()
    assert "before" in lines[0]
    assert all('"GET /streams/s?token=skt…&after=1 HTTP/1.1" 404' in line for line in lines[1:3])


def shown_settings(language: str) -> str:
    settings: str
    (settings,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return settings


def nginx(directory: Path, port: int, upstream: str, log: Path) -> list[str]:
    """Write the configuration of an nginx with the page's log, and give its command."""
    configuration = directory / "nginx.conf"
    places = "".join(f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    configuration.write_text(
        f"daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log; events {{}}\n"
        f"http {{ {places}\n{shown_settings('nginx').replace('/var/log/nginx/access.log', str(log))}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {upstream}; }} }} }}\n"
    )
    return ["-c", str(configuration), "-p", str(directory), "-e", "stderr"]


def caddy(directory: Path, port: int, upstream: str, log: Path) -> list[str]:
    """The same, of a Caddy."""
    configuration = directory / "Caddyfile"
    settings = shown_settings("caddyfile").replace("/var/log/caddy/access.log", str(log))
    configuration.write_text(
        f"{{\nadmin off\nauto_https off\nstorage file_system {directory}\n}}\n"
        f"http://127.0.0.1:{port} {{\nbind 127.0.0.1\n{settings}\nreverse_proxy {upstream}\n}}\n"
    )
    return ["run", "--config", str(configuration), "--adapter", "caddyfile"]


async def first_code(http: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> int:
    """Give the code of a request with tokens, as soon as a server answers. AssertionError: it has ended."""
    headers = {"Referer": "http://h/?token=skt1.read.1.b"}
    with anyio.fail_after(20):
        while process.poll() is None:
            with suppress(httpx.ConnectError):
                return (await http.get("/streams/s", params={"token": "skt1.read.1.a"}, headers=headers)).status_code
            await anyio.sleep(0.05)
    raise AssertionError("the proxy has ended")


@pytest.mark.parametrize("proxy", [nginx, caddy], ids=["nginx", "Caddy"])
async def test_the_settings_leave_tokens_out_of_a_proxys_access_log(
    proxy: Callable[[Path, int, str, Path], list[str]], tmp_path: Path
) -> None:
    name, log, port = proxy.__name__, tmp_path / "access.log", free_port()
    program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        assert name == "caddy" or not os.environ.get("CI"), f"{name} is not installed"
        pytest.skip(f"{name} is not installed")
    async with MemoryStorage() as storage, serving(shown_program(StreamManager(storage))["app"]) as url:
        command = [program, *proxy(tmp_path, port, url, log)]
        env = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
        process = subprocess.Popen(command, env=env)  # noqa: ASYNC220
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
                code = await first_code(http, process)
            await until(lambda: log.exists() and "/streams/s" in log.read_text())
        finally:
            process.terminate()
            process.wait()
    assert code == 404
    assert "skt1" not in log.read_text()


@pytest.mark.parametrize("conventions", ["", "http", "http/dup"])
async def test_the_hook_leaves_tokens_out_of_the_spans_of_requests(conventions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", conventions)
    monkeypatch.setattr("opentelemetry.instrumentation._semconv._OpenTelemetrySemanticConventionStability._initialized", False)
    (program,) = [block for block in blocks(PAGE) if "server_request_hook" in block]
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrument = FastAPIInstrumentor.instrument_app
    monkeypatch.setattr(
        FastAPIInstrumentor, "instrument_app", lambda app, **options: instrument(app, tracer_provider=provider, **options)
    )
    shown: dict[str, Any] = {}
    exec(compile(program, str(PAGE), "exec", dont_inherit=True), shown)
    async with http_to(shown["app"]) as http:
        await http.get(
            "/streams/s", params={"token": "skt1.read.1795983761.w-JbhkHF7NBA5hs1NxMgFnyR7mSrfG5mAiWC9rJ7pxg", "last": "3"}
        )
        await http.get("/streams/s?token=skt1%2Eread%2E1%2EA_-b&last=3")
    for span in exporter.get_finished_spans():
        assert "token=skt" in str(dict(span.attributes or {}))
        assert "last=3" in str(dict(span.attributes or {}))
        assert "skt1" not in str(dict(span.attributes or {}))
