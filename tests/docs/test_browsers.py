"""Browsers and CORS: what the page says of headers holds with Starlette's own middleware."""

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from playwright.async_api import Page
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from tests.clients.shown import shown_app as shown_app_over
from tests.http.servers import STREAM_ID, STREAMING, count, flow_of, http_to, server_process, serving, until
from tests.network.proxy import End, Fate, Network, bad_network
from tests.network.readers import chromium_page
from tests.test_docs import ROOT, blocks

from streamkeep import InMemoryStreamManager
from streamkeep.http import DurableStreaming, SSEFraming, StreamsHTTP
from streamkeep.http.response import ASGIApp
from streamkeep.integrations.fastapi import durable_flow

PAGE: Final = ROOT / "docs/how-to/browsers.md"
ORIGIN: Final = {"Origin": "https://app.example"}
SENT: Final = [
    "X-Genkit-Stream-Id",
    "X-Genkit-Stream-Offset",
    "Last-Event-ID",
    "Idempotency-Key",
    "Authorization",
    "Content-Type",
]


def shown_program() -> dict[str, Any]:
    """Run the program with the app, on memory, and give what it defines."""
    shown: dict[str, Any] = {}
    program = blocks(PAGE)[0].replace("sqlite:///streams.db", "memory://")
    exec(compile(program, str(PAGE), "exec", dont_inherit=True), shown)
    return shown


def shown_app() -> Any:
    """Give the page's first app."""
    return shown_program()["app"]


async def preflight(http: httpx.AsyncClient, method: str, path: str, headers: str) -> httpx.Response:
    asking = {**ORIGIN, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return await http.options(path, headers=asking)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/ask"), ("GET", "/streams/s"), ("DELETE", "/streams/s"), ("POST", "/streams/s/cancel")]
)
async def test_a_preflight_lets_through_what_clients_send(method: str, path: str) -> None:
    async with http_to(shown_app()) as http:
        allowed = await preflight(http, method, path, ", ".join(SENT))
        refused = await preflight(http, method, path, "X-Other")
    assert (allowed.status_code, refused.status_code) == (200, 400)
    names = {name.strip().lower() for name in allowed.headers["access-control-allow-headers"].split(",")}
    assert {name.lower() for name in SENT} <= names


async def test_a_page_of_another_origin_starts_reads_and_comes_back() -> None:
    async with http_to(shown_app()) as http:
        first = await http.post("/ask", params={"question": "Nothing is lost"}, headers=ORIGIN)
        cursor = next(line.removeprefix("id: ") for line in first.text.splitlines() if line.startswith("id: "))
        rest = await http.post("/ask", params={"question": "no"}, headers={**ORIGIN, "Last-Event-ID": cursor})
        read = await http.get(f"/streams/{first.headers[STREAM_ID]}", headers=ORIGIN)
        unknown = await http.get("/streams/unknown", headers=ORIGIN)
        stopped = await http.delete(f"/streams/{first.headers[STREAM_ID]}", headers=ORIGIN)
    for answer in (first, rest, read, unknown, stopped):
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert answer.headers["access-control-expose-headers"] == "X-Genkit-Stream-Id"
    assert cursor.partition("/")[0] == first.headers[STREAM_ID]
    assert rest.text.count("event: chunk") == 2
    assert unknown.status_code == 404


def plain_app() -> FastAPI:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    async def chunks() -> AsyncGenerator[int]:
        yield 0

    @app.post("/ask")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, chunks(), framing=SSEFraming())

    app.include_router(durable_flow(flow_of(count), streams_http))
    return app


@pytest.mark.parametrize(
    ("options", "exposed"),
    [
        ({}, "X-Genkit-Stream-Id"),
        ({"expose_headers": ["X-Other"]}, "X-Other"),
        ({"expose_headers": ["X-Other", "X-Genkit-Stream-Id"]}, "X-Other, X-Genkit-Stream-Id"),
    ],
    ids=["ours", "theirs instead", "both"],
)
async def test_what_is_exposed_replaces_what_we_expose(options: dict[str, Any], exposed: str) -> None:
    app = plain_app()
    app.add_middleware(CORSMiddleware, allow_origins=["https://app.example"], **options)
    async with http_to(app) as http:
        answers = [
            await http.post("/ask", headers=ORIGIN),
            await http.post("/count", json={"data": 1}, headers={**ORIGIN, **STREAMING}),
        ]
        of_the_same_origin = await http.post("/ask")
    assert [answer.headers["access-control-expose-headers"] for answer in answers] == [exposed, exposed]
    assert of_the_same_origin.headers["access-control-expose-headers"] == "X-Genkit-Stream-Id"
    assert "access-control-allow-origin" not in of_the_same_origin.headers


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
async def test_around_durable_streaming_the_middleware_for_cors_belongs_outside(outside: bool) -> None:
    inner = FastAPI()

    async def events() -> AsyncGenerator[bytes]:
        yield b"data: 1\n\n"

    @inner.post("/")
    async def ask() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    if not outside:
        inner.add_middleware(CORSMiddleware, allow_origins=["https://app.example"])
    app: Any = DurableStreaming(inner, InMemoryStreamManager())
    if outside:
        app = CORSMiddleware(app, allow_origins=["https://app.example"])
    async with http_to(app) as http:
        first = await http.post("/", headers=ORIGIN)
        again = await http.post("/", headers={**ORIGIN, STREAM_ID: first.headers[STREAM_ID]})
    assert "access-control-allow-origin" in first.headers
    assert ("access-control-allow-origin" in again.headers) == outside


async def test_a_token_in_the_query_says_who_is_asking() -> None:
    shown: dict[str, Any] = {}
    exec(compile(blocks(PAGE)[1].replace("sqlite:///streams.db", "memory://"), str(PAGE), "exec", dont_inherit=True), shown)
    streams_http = shown["streams_http"]
    async with http_to(streams_http, lifespan="off") as http, streams_http:
        async with streams_http.streams.open("s", owner="ann") as stream:
            await stream.done()
        answers = [await http.get("/s", params=params) for params in ({"token": "t0k3n"}, {"token": "x"}, {})]
    assert [answer.status_code for answer in answers] == [200, 401, 401]


# An EventSource


async def test_an_answer_is_started_by_fetch_and_followed_by_an_event_source(chromium: str) -> None:
    shown = shown_program()
    paced = Paced()
    paced.may_begin.set()
    shown["answer"] = paced.answer
    program, *_ = re.findall(r"^```js\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    page_of_ours = f"""<!doctype html><output></output><script type="module">
        const text = document.querySelector("output"), question = "Nothing is lost";
        const show = (chunk) => text.append(chunk.text + " ");
        {program}
        events.addEventListener("done", () => text.append("done"));
        </script>"""
    shown["app"].router.routes.append(Route("/page.html", Response(page_of_ours, media_type="text/html")))
    async with serving(shown["app"]) as url, chromium_page(chromium, f"{url}/page.html") as page:
        await text_of(page, "Nothing")
        paced.may_go_on.set()
        await text_of(page, "Nothing is lost done")
    assert paced.runs == 1


async def test_an_endpoint_may_give_the_id_alone() -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)
    app.mount("/streams", streams_http)

    @app.post("/ask")
    async def ask(request: Request) -> dict[str, str | None]:
        return {"stream": (await streams_http.respond(request, [1, 2], framing=SSEFraming())).stream}

    async with http_to(app) as http:
        started = [(await http.post("/ask", headers={"Idempotency-Key": "k"})).json()["stream"] for _ in range(2)]
        followed = await http.get(f"/streams/{started[0]}")
        runs = await streams_http.streams.list()
    assert (followed.text.count("event: chunk"), len(set(started)), len(runs)) == (2, 1, 1)


# The page without a package


@pytest.fixture(scope="session")
def chromium(requires: Callable[[str], str]) -> str:
    """Give Chromium's path."""
    return requires("chromium")


def shown_page() -> dict[str, str]:
    """Give the page and its program."""
    text = PAGE.read_text().partition("## A page without a package")[2]
    (html,) = re.findall(r"^```html\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    program, *_ = re.findall(r"^```js\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return {"/page.html": f"<!doctype html>\n{html}", "/page.js": program}


class Paced:
    """Answers with the words of a question: the first when it may begin, the others when it may go on."""

    def __init__(self) -> None:
        self.runs = 0
        self.may_begin = anyio.Event()
        self.may_go_on = anyio.Event()

    async def answer(self, question: str) -> AsyncGenerator[dict[str, str]]:
        self.runs += 1
        await self.may_begin.wait()
        for number, word in enumerate(question.split()):
            if number == 1:
                await self.may_go_on.wait()
            yield {"text": word}


@asynccontextmanager
async def asked(chromium: str) -> AsyncGenerator[tuple[Page, Paced, Network]]:
    """Serve the page by the app that is shown, and ask in Chromium, over a network."""
    shown = shown_program()
    paced = Paced()
    shown["answer"] = paced.answer
    add_page(shown["app"])
    async with (
        serving(shown["app"]) as url,
        bad_network(url) as network,
        chromium_page(chromium, f"{network.path()}/page.html") as page,
    ):
        await page.fill("input", "Nothing is lost")
        await page.click("text=Ask")
        await until(lambda: paced.runs)
        yield page, paced, network


def add_page(app: Any) -> None:
    for path, text in shown_page().items():
        media_type = "text/javascript" if path.endswith(".js") else "text/html"
        app.router.routes.append(Route(path, Response(text, media_type=media_type)))


def page_app(streams_http: StreamsHTTP) -> ASGIApp:
    """Give the app with its page, and an answer that never goes on behind its first word."""
    paced = Paced()
    paced.may_begin.set()
    app = shown_app_over("docs/how-to/browsers.md", streams_http, answer=paced.answer)
    add_page(app)
    return app


async def text_of(page: Page, text: str) -> None:
    """Return when the page shows just that."""
    await page.wait_for_function(
        "text => document.querySelector('output').textContent.trim() === text", arg=text, timeout=20_000
    )


def test_the_page_without_a_package_is_forty_lines_that_import_nothing() -> None:
    program = shown_page()["/page.js"]
    assert len(program.splitlines()) <= 40
    assert "import" not in program


async def test_a_question_that_is_asked_while_another_is_answered_is_shown_alone(chromium: str) -> None:
    async with asked(chromium) as (page, paced, _):
        paced.may_begin.set()
        await text_of(page, "Nothing")
        await page.fill("input", "Twice is said")
        await page.click("text=Ask")
        await until(lambda: paced.runs == 2)
        paced.may_go_on.set()
        await text_of(page, "Twice is said")


@pytest.mark.cell("reload", "a page without a package")
async def test_a_reload_of_the_page_in_mid_answer_loses_and_repeats_nothing(chromium: str) -> None:
    async with asked(chromium) as (page, paced, _):
        paced.may_begin.set()
        await text_of(page, "Nothing")
        await page.reload()
        await text_of(page, "Nothing")
        paced.may_go_on.set()
        await text_of(page, "Nothing is lost")
        await page.reload()  # what has ended is still there
        await text_of(page, "Nothing is lost")
    assert paced.runs == 1


@pytest.mark.cell("cut", "a page without a package")
@pytest.mark.parametrize(
    "place", [b"data: {", *(pytest.param(place, marks=pytest.mark.slow) for place in (0, 1, b"event: done", b"\r\n0\r\n\r"))]
)
async def test_wherever_the_page_is_cut_it_loses_and_repeats_nothing(chromium: str, place: int | bytes) -> None:
    async with asked(chromium) as (page, paced, network):
        paced.may_begin.set()
        await text_of(page, "Nothing")
        network.meet(Fate(End.FIN, place))
        paced.may_go_on.set()
        await text_of(page, "Nothing is lost")
        await until(lambda: network.struck)
        await page.reload()
        await text_of(page, "Nothing is lost")
    assert paced.runs == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "reloaded"])
async def test_a_page_that_is_lost_before_the_first_event_asks_no_second_time(chromium: str, how: str) -> None:
    async with asked(chromium) as (page, paced, network):
        if how == "cut":
            network.meet(Fate(End.FIN, 0))
        else:
            await page.reload()
        paced.may_begin.set()
        await text_of(page, "Nothing")
        paced.may_go_on.set()
        await text_of(page, "Nothing is lost")
    assert paced.runs == 1


@pytest.mark.cell("second tab", "a page without a package")
@pytest.mark.slow
async def test_a_second_tab_of_the_pages_url_has_all_of_it_too(chromium: str) -> None:
    async with asked(chromium) as (page, paced, _):
        paced.may_begin.set()
        await text_of(page, "Nothing")
        async with await page.context.browser.new_context() as other:  # type: ignore[union-attr]  # a page that we have opened has one
            tab = await other.new_page()
            await tab.goto(page.url)
            await text_of(tab, "Nothing")
            paced.may_go_on.set()
            for each in (page, tab):
                await text_of(each, "Nothing is lost")
    assert paced.runs == 1


@pytest.mark.cell("restart", "a page without a package")
@pytest.mark.cell("kill -9", "a page without a package")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_comes_back_has_what_was_stored_and_says_why_there_is_no_more(
    chromium: str, how: str, sqlite_url: str
) -> None:
    async with bad_network() as network, server_process("page", sqlite_url) as server:
        network.url = server.url
        async with chromium_page(chromium, f"{network.path()}/page.html") as page:
            await page.fill("input", "Nothing is lost")
            await page.click("text=Ask")
            await text_of(page, "Nothing")
            await server.end(how)
            async with server_process("page", sqlite_url) as again:
                network.url = again.url
                why = "the server was shut down" if how == "restart" else "the writer went away"
                for _ in range(2):
                    await text_of(page, f"Nothing ({why} before the stream was completed)")
                    assert await page.is_disabled("#stop")
                    await page.reload()


@pytest.mark.cell("Stop", "a page without a package")
async def test_stop_on_the_page_ends_the_answer(chromium: str) -> None:
    async with asked(chromium) as (page, paced, _):
        paced.may_begin.set()
        await text_of(page, "Nothing")
        await page.click("#stop")
        for _ in range(2):
            await text_of(page, "Nothing (the stream was cancelled)")
            assert await page.is_disabled("#stop")
            await page.reload()
    assert paced.runs == 1
