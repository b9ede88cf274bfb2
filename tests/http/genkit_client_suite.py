"""GenkitClientSuite: Genkit's official JavaScript client against our servers, over any storage that a URL names, as a pytest class.

What it is given, and that it never hangs or spins.

A client that takes too long is killed by the fixture and reports `{"hang": True}`, which no test here expects.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import anyio
import httpx
import pytest
from fastapi import HTTPException, Request
from genkit import ActionRunContext
from genkit import PublicError as GenkitPublicError
from tests.http.servers import (
    STREAM_ID,
    STREAMING,
    count,
    durable_app,
    events_of,
    http_to,
    server_process,
    serving,
    wrapped_app,
)

from streamkeep import StreamManager
from streamkeep.http import StreamsHTTP, response
from streamkeep.http.response import ASGIApp, Timeouts

if TYPE_CHECKING:
    from tests.http.conftest import GenkitClient

AppOf = Callable[..., ASGIApp]


class Gated:
    """A flow that sends two chunks, waits at the gate, and sends a third."""

    def __init__(self) -> None:
        self.gate = anyio.Event()
        self.runs = 0

    @property
    def work(self) -> Callable[..., Any]:
        async def talk(name: str, ctx: ActionRunContext) -> dict[str, str]:
            self.runs += 1
            ctx.send_chunk({"text": "hello"})
            ctx.send_chunk({"text": name})
            await self.gate.wait()
            ctx.send_chunk({"text": "bye"})
            return {"talked": name}

        return talk


LINES: Final[list[dict[str, object]]] = [
    {"chunk": {"text": "hello"}},
    {"chunk": {"text": "Ada"}},
    {"chunk": {"text": "bye"}},
    {"output": {"talked": "Ada"}},
]


class GenkitClientSuite:
    """Subclass it, and give the URL of an empty storage."""

    @pytest.fixture
    def storage_url(self) -> str:
        """Give the URL of an empty storage."""
        raise NotImplementedError("override the fixture storage_url")

    @pytest.fixture(params=[durable_app, wrapped_app], ids=["durable_flow", "DurableStreaming"])
    def app_of(self, request: pytest.FixtureRequest) -> AppOf:
        """Give a way to make an app of flows."""
        made: AppOf = request.param
        return made

    async def test_a_fresh_stream_gives_its_id_its_chunks_and_the_output(
        self, app_of: AppOf, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        gated = Gated()
        gated.gate.set()
        streams = StreamManager.connect(storage_url)
        async with serving(app_of(gated.work, streams=streams)) as url:
            first, *lines = await genkit_client(url=f"{url}/talk", input="Ada")
            (info,) = await streams.list()
        assert first == {"streamId": info.id}
        assert lines == LINES

    async def test_a_stream_is_resumed_by_its_id_while_it_runs_and_after_it_has_ended(
        self, app_of: AppOf, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        gated = Gated()
        async with (
            serving(app_of(gated.work, streams=StreamManager.connect(storage_url))) as url,
            genkit_client.live(url=f"{url}/talk", input="Ada") as fresh,
        ):
            begin = await fresh.next_line()
            stream = begin["streamId"]
            async with genkit_client.live(url=f"{url}/talk", streamId=stream) as resumed:
                assert await resumed.next_line() == begin
                assert [await resumed.next_line(), await resumed.next_line()] == LINES[:2]
                gated.gate.set()
                assert [line async for line in resumed] == LINES[2:]
            assert [line async for line in fresh] == LINES
            assert await genkit_client(url=f"{url}/talk", streamId=stream, input="somebody else") == [begin, *LINES]
        assert gated.runs == 1

    async def test_an_unknown_stream_is_not_found_in_exactly_these_words(
        self, app_of: AppOf, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        async with serving(app_of(count, streams=StreamManager.connect(storage_url))) as url:
            lines = await genkit_client(url=f"{url}/count", streamId="unknown", input=1)
        assert lines == [{"streamId": None}, {"error": "NOT_FOUND: Stream not found."}]

    @pytest.mark.parametrize("chunks", [1, 512, 1200])
    async def test_all_chunks_before_an_error_are_received_and_its_text_is_not(
        self,
        app_of: AppOf,
        chunks: int,
        storage_url: str,
        genkit_client: "GenkitClient",
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # The client forgets what it has not given out when the error comes, and on a busy machine takes longer than most for it.
        monkeypatch.setattr(response, "ERROR_PAUSE_SECONDS", 1.0)

        async def fails(to: int, ctx: ActionRunContext) -> None:
            await count(to, ctx)
            raise ValueError("secret://db-password")

        async with serving(app_of(fails, streams=StreamManager.connect(storage_url))) as url:
            begin, *lines = await genkit_client(url=f"{url}/fails", input=chunks)
            assert lines == [*({"chunk": number} for number in range(chunks)), {"error": "INTERNAL: internal\nnull"}]
            assert await genkit_client(url=f"{url}/fails", streamId=begin["streamId"]) == [begin, *lines]

    async def test_a_public_error_is_told(self, storage_url: str, genkit_client: "GenkitClient") -> None:
        async def refuses(_: None, ctx: ActionRunContext) -> None:
            ctx.send_chunk("before")
            raise GenkitPublicError("PERMISSION_DENIED", "not for you")

        async with serving(durable_app(refuses, streams=StreamManager.connect(storage_url))) as url:
            _, *lines = await genkit_client(url=f"{url}/refuses")
            assert lines == [{"chunk": "before"}, {"error": "PERMISSION_DENIED: not for you\n[object Object]"}]
            (line,) = await genkit_client("run", url=f"{url}/refuses")
        assert str(line["error"]).startswith(
            'Server returned: 403: {"error":{"status":"PERMISSION_DENIED","message":"not for you"'
        )

    @pytest.mark.cell("reload", "Genkit's JS client")
    async def test_a_client_that_aborts_and_comes_back_gets_all(
        self, app_of: AppOf, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        gated = Gated()
        streams = StreamManager.connect(storage_url)
        async with serving(app_of(gated.work, streams=streams)) as url:
            begin, *lines, last = await genkit_client(url=f"{url}/talk", input="Ada", abortAfter=2)
            assert lines == LINES[:2]
            assert "operation was aborted" in str(last["error"])  # the rest is Node's, and has changed
            gated.gate.set()
            await events_of(streams, str(begin["streamId"]))
            assert await genkit_client(url=f"{url}/talk", streamId=begin["streamId"]) == [begin, *LINES]
        assert gated.runs == 1

    async def test_heartbeats_in_a_gap_are_not_seen(
        self, app_of: AppOf, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        async def slow(_: None, ctx: ActionRunContext) -> str:
            for number in range(3):
                await anyio.sleep(0.1)
                ctx.send_chunk(number)
            await anyio.sleep(0.1)
            return "done"

        streams_http = StreamsHTTP(StreamManager.connect(storage_url), timeouts=Timeouts(heartbeat=timedelta(milliseconds=5)))
        async with serving(app_of(slow, streams=streams_http)) as url:
            _, *lines = await genkit_client(url=f"{url}/slow")
        assert lines == [{"chunk": 0}, {"chunk": 1}, {"chunk": 2}, {"output": "done"}]

    @pytest.mark.timeout(200)
    async def test_ten_thousand_chunks_arrive_fresh_and_replayed(
        self, app_of: AppOf, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        expected = [*({"chunk": number} for number in range(10_000)), {"output": {"counted": 10_000}}]
        async with serving(app_of(count, streams=StreamManager.connect(storage_url))) as url:
            begin, *lines = await genkit_client(url=f"{url}/count", input=10_000, timeout_seconds=80)
            assert lines == expected
            _, *lines = await genkit_client(url=f"{url}/count", streamId=begin["streamId"], timeout_seconds=80)
            assert lines == expected

    async def test_a_finished_stream_of_any_length_replays_at_once(
        self, app_of: AppOf, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        async with http_to(app_of(count, streams=StreamManager.connect(storage_url))) as http:
            for chunks in (99, 100, 101, 300):
                fresh = await http.post("/count", json={"data": chunks}, headers=STREAMING)
                first, *lines = await genkit_client(url=f"{http.base_url}/count", streamId=fresh.headers[STREAM_ID])
                assert first == {"streamId": fresh.headers[STREAM_ID]}
                assert lines == [*({"chunk": number} for number in range(chunks)), {"output": {"counted": chunks}}]

    async def test_any_text_arrives_whole(self, app_of: AppOf, storage_url: str, genkit_client: "GenkitClient") -> None:
        text = "\u2028\u2029\x85 é 世界 \U0001f44b\U0001f3fd\u200d\U0001f9b0 \x00\x1f\x7f\\ \"'\r\n\n data: "

        async def echo(said: str, ctx: ActionRunContext) -> dict[str, str]:
            for character in said:
                ctx.send_chunk(character)
            return {said: said}

        async with serving(app_of(echo, streams=StreamManager.connect(storage_url))) as url:
            _, *lines = await genkit_client(url=f"{url}/echo", input=text)
        assert lines == [*({"chunk": character} for character in text), {"output": {text: text}}]

    @pytest.mark.cell("second tab", "Genkit's JS client")
    async def test_two_consumers_of_one_stream_get_equal_chunks_and_output(
        self, app_of: AppOf, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        gated = Gated()
        async with (
            serving(app_of(gated.work, streams=StreamManager.connect(storage_url))) as url,
            genkit_client.live(url=f"{url}/talk", input="Ada") as fresh,
        ):
            begin = await fresh.next_line()
            resume: dict[str, Any] = {"url": f"{url}/talk", "streamId": begin["streamId"]}
            async with genkit_client.live(**resume) as one, genkit_client.live(**resume) as other:
                for client in (one, other):
                    assert await client.next_line() == begin
                gated.gate.set()
                for client in (one, other, fresh):
                    assert [line async for line in client] == LINES

    async def test_run_flow_gives_the_output(self, app_of: AppOf, storage_url: str, genkit_client: "GenkitClient") -> None:
        async with serving(app_of(count, streams=StreamManager.connect(storage_url))) as url:
            assert await genkit_client("run", url=f"{url}/count", input=3) == [{"output": {"counted": 3}}]

    async def test_headers_reach_the_context_and_a_rejection_reaches_the_client(
        self, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        def context(request: Request) -> dict[str, object]:
            if "authorization" not in request.headers:
                raise HTTPException(401, "sign in")
            return {"name": request.headers["authorization"]}

        async def whoami(_: None, ctx: ActionRunContext) -> object:
            return ctx.context["name"]

        async with serving(durable_app(whoami, streams=StreamManager.connect(storage_url), context=context)) as url:
            begin, *lines = await genkit_client(url=f"{url}/whoami", headers={"Authorization": "Ada"})
            assert lines == [{"output": "Ada"}]
            rejected = [{"streamId": None}, {"error": 'Server returned: 401: {"detail":"sign in"}'}]
            assert await genkit_client(url=f"{url}/whoami") == rejected
            assert await genkit_client(url=f"{url}/whoami", streamId=begin["streamId"]) == rejected

    async def test_an_init_that_is_not_taken_is_refused(self, storage_url: str, genkit_client: "GenkitClient") -> None:
        async with serving(durable_app(count, streams=StreamManager.connect(storage_url))) as url:
            _, line = await genkit_client(url=f"{url}/count", input=1, init={"session": 1})
        assert str(line["error"]).startswith('Server returned: 400: {"error":{"status":"INVALID_ARGUMENT"')


class GenkitProcessesSuite:
    """The same for servers that are processes, and are stopped and killed; over a storage that processes share."""

    @pytest.fixture
    def storage_url(self) -> str:
        """Give the URL of an empty storage."""
        raise NotImplementedError("override the fixture storage_url")

    @pytest.fixture(params=["durable", "wrapped"], ids=["durable_flow", "DurableStreaming"])
    def app(self, request: pytest.FixtureRequest) -> str:
        """Give the name of an app in `tests.http.servers.APPS`."""
        name: str = request.param
        return name

    @pytest.mark.cell("restart", "Genkit's JS client")
    async def test_a_server_that_is_stopped_tells_its_readers_and_ends_the_stream(
        self, app: str, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        async with server_process(app, storage_url) as server:
            async with genkit_client.live(url=f"{server.url}/endless", input=1) as client:
                begin = await client.next_line()
                assert await client.next_line() == {"chunk": "begun"}
                server.stop()
                (last,) = [line async for line in client]
            await server.wait()
        async with server_process(app, storage_url) as server:
            _, *lines = await genkit_client(url=f"{server.url}/endless", streamId=begin["streamId"])
        aborted = {"error": "ABORTED: the server was shut down before the stream was completed\nnull"}
        assert last == aborted
        assert lines == [{"chunk": "begun"}, aborted]

    @pytest.mark.cell("kill -9", "Genkit's JS client")
    async def test_a_server_that_is_killed_leaves_no_client_hanging_and_the_next_one_ends_the_stream(
        self, app: str, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        async with server_process(app, storage_url) as server, server_process(app, storage_url) as other:
            async with genkit_client.live(url=f"{server.url}/endless", input=1) as client:
                begin = await client.next_line()
                assert await client.next_line() == {"chunk": "begun"}
                resume: dict[str, Any] = {"url": f"{other.url}/endless", "streamId": begin["streamId"]}
                async with genkit_client.live(**resume) as elsewhere:
                    assert [await elsewhere.next_line(), await elsewhere.next_line()] == [begin, {"chunk": "begun"}]
                    await server.kill()
                    assert [line async for line in client] == [{"error": "terminated"}]
                    (last,) = [line async for line in elsewhere]
            aborted = {"error": "ABORTED: the writer went away before the stream was completed\nnull"}
            assert last == aborted
            assert await genkit_client(**resume) == [begin, {"chunk": "begun"}, aborted]

    @pytest.mark.cell("Stop", "Genkit's JS client")
    async def test_what_one_server_produces_is_read_resumed_and_cancelled_through_another(
        self, app: str, storage_url: str, genkit_client: "GenkitClient"
    ) -> None:
        async with (
            server_process(app, storage_url) as one,
            server_process(app, storage_url) as other,
            httpx.AsyncClient(timeout=20) as http,
        ):
            begin, *lines = await genkit_client(url=f"{one.url}/count", input=600)
            assert lines == [*({"chunk": number} for number in range(600)), {"output": {"counted": 600}}]
            assert await genkit_client(url=f"{other.url}/count", streamId=begin["streamId"]) == [begin, *lines]

            async with genkit_client.live(url=f"{one.url}/endless", input=1) as producing:
                begin = await producing.next_line()
                assert await producing.next_line() == {"chunk": "begun"}
                async with genkit_client.live(url=f"{other.url}/endless", streamId=begin["streamId"]) as elsewhere:
                    assert [await elsewhere.next_line(), await elsewhere.next_line()] == [begin, {"chunk": "begun"}]
                    stopped = await http.delete(f"{other.url}/streams/{begin['streamId']}")
                    assert stopped.json() == {"stopped": True}
                    cancelled = {"error": "CANCELLED: the stream was cancelled\nnull"}
                    assert [line async for line in producing] == [cancelled]
                    assert [line async for line in elsewhere] == [cancelled]
