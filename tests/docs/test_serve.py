"""Serving streams: the programs that the page and the README show answer as their pages say."""

from typing import Any, Final

import httpx
from fastapi import FastAPI, Request, Response
from tests.http.servers import STREAM_ID, STREAMING, frames_of, http_to, without_lives
from tests.test_docs import ROOT, blocks

from streamkeep import InMemoryStreamManager
from streamkeep.http import Framing, StreamsHTTP

PAGE: Final = ROOT / "docs/how-to/serve.md"
WORDS: Final = {"question": "Nothing is lost"}


def shown_with(*names: str, page: Any = PAGE) -> dict[str, Any]:
    """Run the page's program in which these names are, on memory, and give what it defines."""
    (program,) = [block for block in blocks(page) if all(name in block for name in names)]
    shown: dict[str, Any] = {}
    exec(compile(program.replace("sqlite:///streams.db", "memory://"), str(page), "exec", dont_inherit=True), shown)
    return shown


async def test_one_line_makes_an_app_durable_that_streams_already() -> None:
    async with http_to(shown_with("app.add_middleware(DurableStreaming")["app"]) as http:
        first = await http.post("/chat", params=WORDS)
        ids = [line.removeprefix("id: ") for line in first.text.splitlines() if line.startswith("id: ")]
        rest = await http.post("/chat", params=WORDS, headers={"Last-Event-ID": ids[0]})
    assert without_lives(first.content) == b"data: Nothing\nid: 0\n\ndata: is\nid: 1\n\ndata: lost\nid: 2\n\n"
    assert first.content.endswith(rest.content)
    assert rest.text.count("data: ") == 2


async def test_an_endpoint_of_ones_own_is_started_followed_and_stopped() -> None:
    async with http_to(shown_with("def stop(")["app"]) as http:
        answer = await http.post("/chat/c", params=WORDS)
        nothing_runs = await http.get("/chat/c/stream")
        rest = await http.get(
            "/chat/c/stream", headers={"Last-Event-ID": answer.text.partition("\nid: ")[2].partition("\n")[0]}
        )
        stopped = await http.delete("/chat/c")
        by_get = await http.get(f"/streams/{answer.headers[STREAM_ID]}")
        nobody = await http.get("/streams/")
    assert answer.text.count("event: chunk") == 3
    assert (nothing_runs.status_code, rest.text.count("event: chunk"), stopped.json()) == (204, 2, {"stopped": False})
    assert by_get.text == answer.text
    assert nobody.status_code == 404


async def test_a_genkit_flow_streams() -> None:
    async with http_to(shown_with("durable_flow(answer")["app"]) as http:
        answer = await http.post("/answer", json={"data": "Nothing is lost"}, headers=STREAMING)
    assert [frame["offset"] for frame in frames_of(answer.content)] == [0, 1, 2, 3]


async def test_a_framing_of_ones_own_is_sent() -> None:
    framing: type[Framing] = shown_with("class CSVFraming")["CSVFraming"]
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/")
    async def ask(request: Request) -> Response:
        return await streams_http.respond(request, [{"text": "a"}, {"text": "b"}], framing=framing())

    async with http_to(app) as http:
        answer = await http.post("/")
    assert answer.content == b"offset,text\r\n0,a\r\n1,b\r\n"
    assert answer.headers["content-type"] == "text/csv"


async def test_who_may_is_asked() -> None:
    streams_http: StreamsHTTP = shown_with("authorize=authorize")["streams_http"]
    async with http_to(streams_http, lifespan="off") as http, streams_http:
        async with streams_http.streams.open("s", owner="ann") as stream:
            await stream.done()
        mine: httpx.Response = await http.get("/", headers={"Authorization": "Bearer t0k3n"})
        refused = await http.get("/s")
    assert [found["id"] for found in mine.json()["streams"]] == ["s"]
    assert refused.status_code == 401


async def test_the_readmes_two_lines() -> None:
    async with http_to(shown_with("streams_http.respond(", page=ROOT / "README.md")["app"]) as http:
        answer = await http.post("/ask", params=WORDS)
    assert len(frames_of(answer.content)) == 4
