"""OpenAI's SDKs as their packages come, against the app that `docs/how-to/openai.md` shows; its table has what these tests say."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pydoc_data.topics import topics
from typing import Any, Final

import anyio
import httpx
import openai
import pytest
from anyio import to_thread
from openai import APIError, APIStatusError, AsyncOpenAI, NotFoundError, OpenAI
from openai.types.responses import ResponseCompletedEvent, ResponseCreatedEvent, ResponseInProgressEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tests.clients.conftest import Start
from tests.clients.programs import Event, Program, Reading, python
from tests.clients.shown import HELD, WORDS, Paced, openai_app, shown_app
from tests.http.servers import server_process, serving
from tests.network.cuts import exchange
from tests.network.proxy import FINE, End, Fate, bad_network
from tests.test_docs import ROOT, blocks

from streamkeep import InMemoryStreamManager, PublicError
from streamkeep.http import Access, StreamsHTTP
from streamkeep.integrations.openai import OpenAIResponses, ResponseRequest

NODE_CLIENT: Final = "openai"
PYTHON: Final = "AsyncOpenAI"
ENDS: Final = {"response.completed", "response.failed", "response.incomplete"}
TEXT: Final = "".join(WORDS)
TYPES: Final = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    *["response.output_text.delta"] * len(WORDS),
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]
STORED: Final = TYPES[: 4 + HELD]
"""What is stored of an answer that is held."""

of_each_client = pytest.mark.parametrize("client", [NODE_CLIENT, PYTHON])


async def read(reading: Reading, job: Mapping[str, Any]) -> None:
    """Do what an application writes around the client for Python; the other one is in `node/openai.js`."""
    async with AsyncOpenAI(api_key="none", base_url=f"{job['url']}/v1") as client:
        try:
            await show(client, reading, job)
        except APIError as error:
            thrown = error.status_code if isinstance(error, APIStatusError) else repr(error)
            reading.take({"event": "thrown", "data": json.dumps(thrown), "id": ""})


async def show(client: AsyncOpenAI, reading: Reading, job: Mapping[str, Any]) -> None:
    stream, seen, tries = job.get("id", ""), job.get("seen"), 0
    ask: Any = job.get("ask")
    while True:
        try:
            if not stream:
                events: Any = await client.responses.create(**ask, stream=True, background=True)
            else:
                after = {} if seen is None else {"starting_after": seen}
                events = await client.responses.retrieve(stream, stream=True, **after)
            async for event in events:
                seen = event.sequence_number
                if event.type == "response.created":
                    stream = event.response.id
                reading.take({"event": event.type, "data": event.to_json(), "id": str(seen)})
                if event.type in ENDS:
                    return
        except (APIError, httpx.HTTPError) as error:
            tries += 1
            if not stream or isinstance(error, APIStatusError) or tries > 50:
                raise
            await anyio.sleep(0.1)


def program_of(start_node: Start, client: str) -> AbstractAsyncContextManager[Program]:
    return start_node(client, "") if client == NODE_CLIENT else python(read)


@asynccontextmanager
async def served() -> AsyncGenerator[tuple[str, Paced]]:
    paced = Paced()
    async with serving(openai_app(StreamsHTTP(InMemoryStreamManager()), paced)) as url:
        yield url, paced


def question(number: int = 1, **more: object) -> dict[str, Any]:
    return {"model": "words", "input": json.dumps({"number": number, **more})}


def job_of(url: str, number: int = 1, **more: object) -> dict[str, object]:
    return {"url": url, "ask": question(number, **more)}


def types(events: Sequence[Event]) -> list[str]:
    """Give the types of events whose numbers are 0, 1, 2, …: none is missing, none comes twice."""
    assert [event["id"] for event in events] == [str(number) for number in range(len(events))]
    return [event["event"] for event in events]


def assert_whole(events: Sequence[Event], what: object = None) -> None:
    assert types(events) == TYPES, what
    assert "".join(json.loads(event["data"]).get("delta", "") for event in events) == TEXT
    response = json.loads(events[-1]["data"])["response"]
    assert response["status"] == "completed"
    assert response["output"][0]["content"][0]["text"] == TEXT


async def held(reading: Reading) -> str:
    """Return when it has what comes before the answer is held; give the response."""
    await reading.until(len(STORED))
    assert types(reading.events) == STORED
    stream: str = json.loads(reading.events[0]["data"])["response"]["id"]
    return stream


async def answer_to(url: str) -> bytes:
    """Give the answer to a POST, whole, as it is when it comes in one piece."""
    body = json.dumps({**question(0), "stream": True, "background": True})
    head = f"Host: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return await exchange(url, f"POST /v1/responses HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())


async def test_the_local_model_that_the_page_shows_answers_in_words_of_its_manual() -> None:
    app = shown_app("docs/how-to/openai.md", StreamsHTTP(InMemoryStreamManager()))
    manual = " ".join(topics.values()).split()
    async with serving(app) as url, AsyncOpenAI(api_key="none", base_url=f"{url}/v1") as client:
        response = await client.responses.create(model="any", input="generator")
    said = response.output_text.split()
    assert said[0] == "generator"
    assert len(said) == 100
    assert set(said) <= set(manual)


async def completions(request: Request) -> Response:
    """Answer as a server of Chat Completions does, whose last chunk has no choice."""
    (message,) = (await request.json())["messages"]
    deltas = [{"role": "assistant"}, *({"content": word + " "} for word in message["content"].split())]
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    lines = [json.dumps(chunk) for chunk in [*chunks, {"choices": [], "usage": None}]]
    return Response("".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]), media_type="text/event-stream")


async def test_the_model_of_another_server_that_the_page_shows_answers() -> None:
    local = Starlette(routes=[Route("/v1/chat/completions", completions, methods=["POST"])])
    page = ROOT / "docs/how-to/openai.md"
    (model,) = [block for block in blocks(page) if "chat.completions" in block]
    async with serving(local) as local_url:
        shown: dict[str, Any] = {"AsyncOpenAI": AsyncOpenAI}
        exec(compile(model.replace("http://localhost:11434", local_url), str(page), "exec", dont_inherit=True), shown)
        app = shown_app("docs/how-to/openai.md", StreamsHTTP(InMemoryStreamManager()), model=shown["model"])
        async with serving(app) as url, AsyncOpenAI(api_key="none", base_url=f"{url}/v1") as client, shown["local"]:
            response = await client.responses.create(model="any", input="Nothing is lost")
    assert response.output_text == "Nothing is lost "


@pytest.mark.cell("cut", "OpenAI's SDK in JavaScript", "OpenAI's SDK in Python")
@of_each_client
@pytest.mark.parametrize("apart", [211, pytest.param(23, marks=pytest.mark.slow)])
async def test_a_response_that_is_cut_is_gone_on_with_and_has_each_event_once(
    start_node: Start, client: str, apart: int
) -> None:
    async with served() as (url, paced), program_of(start_node, client) as program, bad_network(url) as network:
        answer = await answer_to(url)
        first = answer.index(b"\n\n") + 2  # before the first event a program has no id to come back with
        fates = [Fate(End.FIN, place) for place in range(first, len(answer), apart)]
        jobs = [job_of(network.path([fate]), number) for number, fate in enumerate(fates, 1)]
        for reading, fate in zip(await program.read(client, jobs), fates, strict=True):
            assert_whole(await reading.end(), fate)
        assert network.struck.total() == len(fates)
    assert set(paced.runs.values()) == {1}


@pytest.mark.cell("cut", "OpenAI's SDK in JavaScript", "OpenAI's SDK in Python")
@of_each_client
async def test_a_connection_that_is_cut_in_mid_answer_loses_and_repeats_nothing(start_node: Start, client: str) -> None:
    async with served() as (url, paced), program_of(start_node, client) as program, bad_network(url) as network:
        (reading,) = await program.read(client, [job_of(network.path(), holds=True)])
        await held(reading)
        network.meet(Fate(End.FIN, b'"delta"'))
        paced.may_go_on.set()
        assert_whole(await reading.end())
        assert network.struck.total() == 1
    assert paced.runs == {1: 1}


@pytest.mark.cell("reload", "OpenAI's SDK in JavaScript", "OpenAI's SDK in Python")
@pytest.mark.cell("second tab", "OpenAI's SDK in JavaScript", "OpenAI's SDK in Python")
@of_each_client
async def test_who_comes_with_the_id_has_all_from_the_start(start_node: Start, client: str) -> None:
    async with served() as (url, paced), program_of(start_node, client) as program:
        (first,) = await program.read(client, [job_of(url, holds=True)])
        stream = await held(first)
        (second,) = await program.read(client, [{"url": url, "id": stream}])
        await held(second)
        paced.may_go_on.set()
        for reading in (first, second):
            assert_whole(await reading.end())
        (rest,) = await program.read(client, [{"url": url, "id": stream, "seen": len(TYPES) - 3}])
        assert [event["event"] for event in await rest.end()] == TYPES[-2:]
    assert paced.runs == {1: 1}


@pytest.mark.cell("Stop", "OpenAI's SDK in JavaScript", "OpenAI's SDK in Python")
@of_each_client
async def test_cancel_ends_the_response_and_all_its_readers(start_node: Start, client: str) -> None:
    async with served() as (url, _), program_of(start_node, client) as program:
        readings = await program.read(client, [job_of(url, holds=True)])
        stream = await held(readings[0])
        readings += await program.read(client, [{"url": url, "id": stream}])
        await held(readings[1])
        async with AsyncOpenAI(api_key="none", base_url=f"{url}/v1") as openai_client:
            cancelled = await openai_client.responses.cancel(stream)
            assert (cancelled.status, cancelled.output_text) == ("cancelled", "".join(WORDS[:HELD]))
        for reading in readings:
            events = await reading.end()
            assert types(events) == [*STORED, "response.incomplete"]
            assert json.loads(events[-1]["data"])["response"]["status"] == "cancelled"


@pytest.mark.cell("restart", "OpenAI's SDK in JavaScript", "OpenAI's SDK in Python")
@pytest.mark.cell("kill -9", "OpenAI's SDK in JavaScript", "OpenAI's SDK in Python")
@pytest.mark.slow
@of_each_client
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_comes_back_has_what_was_stored_and_says_why_there_is_no_more(
    start_node: Start, client: str, how: str, sqlite_url: str
) -> None:
    async with bad_network() as network, server_process("openai", sqlite_url) as server:
        network.url = server.url
        async with program_of(start_node, client) as program:
            (reading,) = await program.read(client, [job_of(network.path(), holds=True)])
            await held(reading)
            await server.end(how)
            async with server_process("openai", sqlite_url) as again:
                network.url = again.url
                events = await reading.end()
    assert types(events) == [*STORED, "response.failed"]
    assert json.loads(events[-1]["data"])["response"]["error"]["code"] == "server_error"


async def test_a_response_is_had_without_a_stream_and_looked_at() -> None:
    async with served() as (url, paced), AsyncOpenAI(api_key="none", base_url=f"{url}/v1") as client:
        whole = await client.responses.create(**question(), metadata={"a": "b"})
        assert (whole.status, whole.output_text, whole.metadata) == ("completed", TEXT, {"a": "b"})
        begun = await client.responses.create(**question(2, holds=True), background=True)
        assert begun.status == "queued"
        texts = {"".join(WORDS[:number]) for number in range(HELD + 1)}
        now = await client.responses.retrieve(begun.id)
        assert now.status in {"queued", "in_progress"}
        assert now.output_text in texts
        paced.may_go_on.set()
        async for _ in await client.responses.retrieve(begun.id, stream=True):
            pass
        now = await client.responses.retrieve(begun.id)
        assert (now.status, now.output_text) == ("completed", TEXT)
        await client.responses.delete(begun.id)
        with pytest.raises(NotFoundError):
            await client.responses.retrieve(begun.id)
        failed = await client.responses.create(**question(3, fails=True))
        assert failed.status == "failed"
        assert failed.error is not None
        assert "secret" not in failed.error.message


async def test_one_idempotency_key_starts_one_response() -> None:
    async with served() as (url, paced), AsyncOpenAI(api_key="none", base_url=f"{url}/v1") as client:
        key = {"Idempotency-Key": "k"}
        ids = {(await client.responses.create(**question(), extra_headers=key)).id for _ in range(3)}
    assert len(ids) == 1
    assert paced.runs == {1: 1}


async def test_the_loop_that_is_shown_for_python_goes_on_behind_a_cut(capsys: pytest.CaptureFixture[str]) -> None:
    (loop,) = [block for block in blocks(ROOT / "docs/how-to/openai.md") if "async def ask(" in block]
    shown: dict[str, Any] = {}
    exec(loop, shown)
    async with served() as (url, paced), bad_network(url) as network:
        path = network.path([Fate(End.FIN, b'"delta"'), Fate(End.FIN, b'"delta"'), FINE])
        async with AsyncOpenAI(api_key="none", base_url=f"{path}/v1") as client:
            await shown["ask"](client, json.dumps({"number": 1}))
        assert network.struck.total() == 2
    assert capsys.readouterr().out == TEXT
    assert paced.runs == {1: 1}


async def test_an_input_may_be_text_or_messages() -> None:
    text = question()["input"]
    parts = [{"type": "input_text", "text": text}]
    asked: list[Any] = [text, [{"role": "user", "content": text}], [{"role": "user", "content": parts}]]
    async with served() as (url, paced), AsyncOpenAI(api_key="none", base_url=f"{url}/v1") as client:
        answers = [await client.responses.create(model="words", input=given) for given in asked]
    assert [answer.output_text for answer in answers] == [TEXT] * 3
    assert paced.runs == {1: 3}


async def test_who_wants_chat_completions_is_told_that_they_are_not_here() -> None:
    async with served() as (url, _), AsyncOpenAI(api_key="none", base_url=f"{url}/v1") as client:
        with pytest.raises(NotFoundError, match="only /responses"):
            await client.chat.completions.create(model="words", messages=[{"role": "user", "content": "why?"}])


async def test_the_client_that_does_not_await_streams_and_goes_on() -> None:
    def read(url: str) -> tuple[list[str], str]:
        with OpenAI(api_key="none", base_url=f"{url}/v1") as client:
            found: list[str] = []
            stream = ""
            for event in client.responses.create(**question(), stream=True, background=True):
                found.append(event.type)
                if event.type == "response.created":
                    stream = event.response.id
                if len(found) == 5:
                    break
            found += [event.type for event in client.responses.retrieve(stream, stream=True, starting_after=4)]
            return found, client.responses.retrieve(stream).output_text

    async with served() as (url, _):
        assert await to_thread.run_sync(read, url) == (TYPES, TEXT)


async def test_the_events_of_another_server_are_passed_on_under_our_id_and_numbers() -> None:
    async with served() as (upstream, _), AsyncOpenAI(api_key="none", base_url=f"{upstream}/v1") as model:

        async def answer(request: ResponseRequest) -> Any:
            return await model.responses.create(model="words", input=request.body["input"], stream=True)

        streams_http = StreamsHTTP(InMemoryStreamManager())
        async with (
            serving(OpenAIResponses(streams_http, answer)) as url,
            streams_http.streams,
            streams_http,
            AsyncOpenAI(api_key="none", base_url=url) as client,
        ):
            events = [event async for event in await client.responses.create(**question(), stream=True)]
            assert [event.sequence_number for event in events] == [*range(len(events))]
            assert [event.type for event in events] == TYPES
            ids = {
                event.response.id
                for event in events
                if isinstance(event, ResponseCreatedEvent | ResponseInProgressEvent | ResponseCompletedEvent)
            }
            assert len(ids) == 1
            assert (await client.responses.retrieve(ids.pop())).output_text == TEXT


async def test_whose_a_response_is_and_what_cannot_be_is_told_in_openais_shape() -> None:
    def who(access: Access) -> str:
        token = access.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in {"ann", "bob"}:
            raise PublicError("UNAUTHENTICATED", "sign in first")
        return token

    async def answer(request: ResponseRequest) -> AsyncGenerator[str]:
        yield request.owner

    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=who)
    async with (
        streams_http.streams,
        streams_http,
        serving(OpenAIResponses(streams_http, answer)) as url,
        AsyncOpenAI(api_key="ann", base_url=url) as ann,
        AsyncOpenAI(api_key="bob", base_url=url) as bob,
        AsyncOpenAI(api_key="eve", base_url=url) as eve,
        httpx.AsyncClient(base_url=url, headers={"Authorization": "Bearer ann"}) as http,
    ):
        response = await ann.responses.create(model="m", input="x")
        assert response.output_text == "ann"
        messages: set[str] = set()
        for stream in (response.id, "resp_unknown"):
            for call in (bob.responses.retrieve, bob.responses.cancel, bob.responses.delete):
                with pytest.raises(NotFoundError) as unknown:
                    await call(stream)
                messages.add(unknown.value.message)
        assert len(messages) == 1
        with pytest.raises(openai.AuthenticationError):
            await eve.responses.retrieve(response.id)

        assert (await ann.responses.retrieve(response.id)).output_text == "ann"
        bodies = [
            b"",
            b"[]",
            b"{",
            b'{"stream":"yes"}',
            b'{"input":1}',
            b'{"metadata":{"a":1}}',
            b"\xff",
            b'{"model":null,"input":[]',
        ]
        for body in bodies:
            answered = await http.post("/responses", content=body)
            assert answered.status_code == 400, body
            assert answered.json()["error"]["type"] == "invalid_request_error"
        for query in ("starting_after=99", "starting_after=x", "starting_after=-2", "starting_after=9999999999999999999"):
            answered = await http.get(f"/responses/{response.id}?stream=true&{query}")
            assert answered.status_code == 400, query
            assert "error" in answered.json()
