"""An answer that is not whole is seen as a cut, where a server can cut; where it cannot, the client is told by an event."""

import json
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio
import httpx
import pytest
from tests.deploy.servers import DAPHNE, GRANIAN, HYPERCORN, HYPERCORN_ALONE, WAIT_SECONDS, Kind, Server, running

from streamkeep import StreamManager

pytestmark = pytest.mark.timeout(240)

APP: Final = "from tests.deploy.cut_app import app\n"
STREAM_ID: Final = "X-Genkit-Stream-Id"


class Answer:
    """What a client has seen of an answer."""

    def __init__(self) -> None:
        self.begun = anyio.Event()
        self.stream = ""
        self.is_cut = False
        self.body = ""

    async def read(self, http: httpx.AsyncClient, method: str, path: str) -> None:
        """Read until it ends in whatever way."""
        try:
            async with http.stream(method, path) as response:
                self.stream = response.headers.get(STREAM_ID, "")
                async for text in response.aiter_text():
                    self.body += text
                    self.begun.set()
        except httpx.RemoteProtocolError:
            self.is_cut = True

    @property
    def error(self) -> str | None:
        """The status of the error that it ends with."""
        if "event: error" not in self.body:
            return None
        data = json.loads(self.body.split("event: error\ndata: ")[1].partition("\n")[0])
        return str(data.get("error", data)["status"])


async def answer_of(http: httpx.AsyncClient, method: str, path: str) -> Answer:
    answer = Answer()
    await answer.read(http, method, path)
    return answer


@asynccontextmanager
async def served(kind: Kind, directory: Path, *, http2: bool = False) -> AsyncGenerator[tuple[Server, httpx.AsyncClient]]:
    async with (
        running(kind, directory, APP) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_SECONDS, http1=not http2, http2=http2) as http,
    ):
        yield server, http


async def those_that_are_not_whole(http: httpx.AsyncClient) -> list[Answer]:
    """Give answers that last as long as they may, passed through and in native events; and see that a whole one is whole."""
    whole = await answer_of(http, "POST", "/brief")
    assert (whole.is_cut, whole.body.count("data: "), whole.error) == (False, 2, None)
    return [await answer_of(http, "POST", "/brief/endless"), await answer_of(http, "GET", "/brief/native")]


async def those_at_the_shutdown(server: Server, http: httpx.AsyncClient) -> list[Answer]:
    """Stop the server while clients read; give what they have seen."""
    answers = [Answer(), Answer()]
    async with anyio.create_task_group() as reading:
        reading.start_soon(answers[0].read, http, "POST", "/patient/endless")
        reading.start_soon(answers[1].read, http, "GET", "/patient/native")
        for answer in answers:
            await answer.begun.wait()
        server.signal(signal.SIGTERM)
    assert await server.exit_code() == server.kind.terminated
    return answers


@asynccontextmanager
async def native_stream(server: Server) -> AsyncGenerator[None]:
    """Have another process write a stream that does not end."""
    async with StreamManager.connect(server.storage) as streams, streams.open("native") as stream:
        await stream.write(0)
        yield


@pytest.mark.parametrize(
    ("kind", "told"),
    # The workers of hypercorn hear of no signal, and their answers are over when their streams are ended.
    [(HYPERCORN, None), (HYPERCORN_ALONE, "ABORTED"), (GRANIAN, "ABORTED")],
    ids=["hypercorn", "hypercorn-alone", "granian"],
)
async def test_an_answer_that_is_not_whole_is_cut_and_a_whole_one_is_not(kind: Kind, told: str | None, tmp_path: Path) -> None:
    async with served(kind, tmp_path) as (server, http), native_stream(server):
        for answer in await those_that_are_not_whole(http):
            assert (answer.is_cut, answer.error) == (True, None)  # nothing is said to who comes back
        ours, anothers = await those_at_the_shutdown(server, http)
        assert (ours.is_cut, ours.error) == (True, told)
        assert (anothers.is_cut, anothers.error) == (True, None)


async def test_daphne_cannot_cut_and_so_an_event_says_that_an_answer_is_not_whole(tmp_path: Path) -> None:
    async with served(DAPHNE, tmp_path) as (server, http), native_stream(server):
        for answer in await those_that_are_not_whole(http):
            assert (answer.is_cut, answer.error) == (False, "DEADLINE_EXCEEDED")
        ours, anothers = await those_at_the_shutdown(server, http)
        for answer in (ours, anothers):
            assert (answer.is_cut, answer.error) == (False, "UNAVAILABLE")
        async with StreamManager.connect(server.storage) as streams, streams.subscribe(ours.stream) as events:
            last = [event async for event in events][-1]
        assert last.error.status == "ABORTED"  # it has left the run behind


async def test_over_http_2_hypercorn_cannot_cut_one_answer_of_a_connection_and_so_an_event_says_it(tmp_path: Path) -> None:
    async with served(HYPERCORN, tmp_path, http2=True) as (server, http), native_stream(server):
        other = Answer()
        async with anyio.create_task_group() as reading:
            reading.start_soon(other.read, http, "POST", "/patient/endless")
            await other.begun.wait()
            for answer in await those_that_are_not_whole(http):
                assert (answer.is_cut, answer.error) == (False, "DEADLINE_EXCEEDED")
            reading.cancel_scope.cancel()
