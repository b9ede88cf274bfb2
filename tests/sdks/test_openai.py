"""OpenAI's SDK: chat completions and Responses, as it gives them."""

import gc
import json
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any, ClassVar

import httpx2
import pytest
from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from flask import Flask
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseOutputItem, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.http.servers import STREAM_ID, frames_of, http_to
from tests.sdks.provider import SECRET, TEXT, Provider
from tests.sdks.suite import SDKSuite, stored_in, types_in

from streamkeep import InMemoryStreamManager, JSONEncoding, PublicError, StreamEventType, sync
from streamkeep.http import DurableStreaming, StreamsHTTP
from streamkeep.http.sources import Source
from streamkeep.integrations import openai_sdk
from streamkeep.integrations.flask import FlaskStreams
from streamkeep.integrations.openai_sdk import checkpoint_of, chunks

MESSAGES: Any = [{"role": "system", "content": SECRET}, {"role": "user", "content": "why?"}]
TOOL: Any = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
RESPONSE: Any = {"input": "why?", "instructions": SECRET, "tools": [TOOL], "metadata": {"user": "ann"}}


def words_of_chat(chunks: Iterable[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def words_of_response(events: Iterable[ResponseStreamEvent]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


class OpenAISuite(SDKSuite):
    def client(self) -> AsyncOpenAI:
        return self.clients.push_async_exit(AsyncOpenAI(max_retries=0))


class Chat(OpenAISuite):
    event = ChatCompletionChunk

    def text_of(self, chunks: list[Any]) -> str:
        return words_of_chat(chunks)


class TestChatCompletionsAsTheyCome(Chat):
    encode = JSONEncoding(exclude_unset=True)

    def source(self, model: str) -> Source:
        client = self.client()
        return lambda: client.chat.completions.create(model=model, messages=MESSAGES, stream=True)


@pytest.mark.slow
class TestChatCompletionsThatDoNotAwait(Chat):
    encode = JSONEncoding(exclude_unset=True)
    test_a_stop_closes_the_providers_connection: ClassVar[None] = None  # type: ignore[assignment]  # a thread waits for the next chunk

    def source(self, model: str) -> Source:
        return lambda: self.clients.push(OpenAI(max_retries=0)).chat.completions.create(
            model=model, messages=MESSAGES, stream=True
        )


@pytest.mark.slow
class TestChatCompletionsOfStream(Chat):
    cut = "ABORTED"

    def source(self, model: str) -> Source:
        async def answer() -> AsyncIterator[Any]:
            return chunks(self.client().chat.completions.stream(model=model, messages=MESSAGES))

        return answer


class Responses(OpenAISuite):
    cut = "ABORTED"
    event = TypeAdapter[ResponseStreamEvent](ResponseStreamEvent)

    def text_of(self, chunks: list[Any]) -> str:
        return words_of_response(chunks)


class TestResponses(Responses):
    def source(self, model: str) -> Source:
        async def answer() -> AsyncIterator[Any]:
            return chunks(await self.client().responses.create(model=model, stream=True, **RESPONSE))

        return answer


@pytest.mark.slow
class TestResponsesOfStream(Responses):
    def source(self, model: str) -> Source:
        async def answer() -> AsyncGenerator[Any]:
            async with self.client().responses.stream(model=model, **RESPONSE) as stream:
                async for chunk in chunks(stream):
                    yield chunk

        return answer


# `chunks`


def without_padding(events: Iterable[Any]) -> list[Any]:
    """Give events without what OpenAI adds to hide their size, which `.stream()` leaves out."""
    return [{name: value for name, value in event.items() if name != "obfuscation"} for event in events]


@pytest.mark.parametrize("model", ["words", "tool", "thinking"])
async def test_it_is_the_same_whichever_way_the_sdk_is_asked(provider: Provider, model: str) -> None:
    async with AsyncOpenAI() as client:
        plain = [chunk async for chunk in chunks(await client.responses.create(model=model, stream=True, **RESPONSE))]
        managed = [chunk async for chunk in chunks(client.responses.stream(model=model, **RESPONSE))]
        async with client.responses.stream(model=model, **RESPONSE) as stream:
            entered = [chunk async for chunk in chunks(stream)]
        chat = await client.chat.completions.create(model=model, messages=MESSAGES, stream=True)
        completion = [chunk async for chunk in chunks(chat)]
        completion_managed = [chunk async for chunk in chunks(client.chat.completions.stream(model=model, messages=MESSAGES))]

    def ask() -> tuple[list[Any], list[Any]]:
        with OpenAI() as client:
            return (
                list(chunks(client.responses.create(model=model, stream=True, **RESPONSE))),
                list(chunks(client.responses.stream(model=model, **RESPONSE))),
            )

    named = [{**event, "response": {**event["response"], "id": "r"}} if "response" in event else event for event in plain]
    for others in (managed, entered, *await to_thread.run_sync(ask)):
        same = [{**event, "response": {**event["response"], "id": "r"}} if "response" in event else event for event in others]
        assert without_padding(same) == without_padding(named)
    assert completion_managed == completion


async def test_of_a_response_is_stored_how_it_goes_and_not_what_it_was_asked(provider: Provider) -> None:
    async with AsyncOpenAI() as client:
        asked = await client.responses.create(model="words", stream=True, **RESPONSE)
        responses = [event["response"] for event in [event async for event in chunks(asked)] if "response" in event]
    assert [response["status"] for response in responses] == ["in_progress", "in_progress", "completed"]
    assert responses[-1]["output"][0]["content"][0]["text"] == TEXT
    assert responses[-1]["usage"]["total_tokens"] == 16
    for response in responses:
        assert (response["tools"], response["tool_choice"]) == ([], "auto")
        assert not {"instructions", "metadata", "text", "prompt", "user", "previous_response_id"} & response.keys()


@pytest.mark.parametrize(
    ("event", "raised", "words"),
    [
        ({"type": "error", "code": "server_error", "message": "host db-1"}, RuntimeError, "host db-1"),
        (
            {"type": "response.failed", "response": {"id": "r", "error": {"code": "x", "message": "y"}}},
            RuntimeError,
            "'code': 'x'",
        ),
        ({"type": "response.failed", "response": {"error": {"code": "rate_limit_exceeded"}}}, PublicError, "asked too much"),
        ({"type": "response.failed"}, RuntimeError, "server has failed"),
        ({"type": "response.failed", "response": None}, RuntimeError, "server has failed"),
        ({"type": "response.failed", "response": "r"}, RuntimeError, "server has failed"),
        ({"type": "response.failed", "response": {"error": "x", "id": 1}}, RuntimeError, "server has failed"),
        ({"type": "error"}, RuntimeError, "server has failed"),
        ({"type": "error", "error": None, "code": ["x"]}, RuntimeError, "server has failed"),
    ],
)
def test_an_event_that_says_that_it_has_failed_is_raised(event: Any, raised: type[Exception], words: str) -> None:
    with pytest.raises(raised, match=words):
        list(chunks([{"type": "response.in_progress"}, event]))


@pytest.mark.parametrize("event", [{"type": "response.failed"}, {"type": "response.failed", "response": None}])
async def test_a_response_that_fails_and_says_nothing_of_it_is_the_providers_failure(event: Any) -> None:
    """As the SDK gives it, which has no `response` then, or one that is None."""

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=f"data: {json.dumps(event)}\n\n")

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
    async with AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:9", http_client=http) as client:
        given = chunks(await client.responses.create(model="m", input="why?", stream=True))
        with pytest.raises(RuntimeError, match="the model's server has failed"):
            await anext(given)


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.new", "instructions": "secret"},
        {"type": "new", "prompt": "secret"},
        {"object": "new", "messages": "secret"},
        {"type": "response.output_item.added", "item": {"type": "new", "prompt": "secret"}},
        {"type": "response.output_item.added", "item": {"type": "message", "role": "user", "content": "secret"}},
        {"type": "response.output_item.done", "item": "secret"},
    ],
)
def test_what_nobody_has_looked_at_is_left_out(event: Any) -> None:
    last = {"type": "response.completed", "response": {"id": "r", "output": [event.get("item"), {"type": "reasoning"}]}}
    (only,) = chunks([event, last])
    assert only["response"]["output"] == [{"type": "reasoning"}]


def test_every_event_and_item_that_the_sdk_knows_is_looked_at() -> None:
    """Where this fails, the SDK has a new one: see what it has, and add it to what is stored."""
    assert {f"response.{kind}" for kind in openai_sdk._EVENTS} - {"response.cancelled"} == types_in(ResponseStreamEvent) - {
        "error"
    }
    assert types_in(ResponseOutputItem) == openai_sdk._ITEMS


@pytest.mark.parametrize("kind", ["mcp_list_tools", "tool_search_output", "additional_tools"])
def test_tools_that_an_item_lists_are_left_out(kind: str) -> None:
    item = {"type": kind, "id": "i", "tools": [{"name": "secret"}]}
    response = {"id": "r", "output": [item]}
    events = [{"type": "response.output_item.done", "item": item}, {"type": "response.completed", "response": response}]
    assert "secret" not in str(list(chunks(events)))


async def test_closed_before_it_is_begun_it_closes_the_providers_connection(provider: Provider) -> None:
    async with AsyncOpenAI() as client:
        given = chunks(await client.responses.create(model="waits", input="why?", stream=True))
        await given.aclose()
        await provider.until_left()
        begun = chunks(client.responses.stream(model="waits", input="why?"))
        assert (await anext(begun))["type"] == "response.created"
        await begun.aclose()
        await provider.until_left(2)
        with pytest.raises(StopAsyncIteration):
            await anext(begun)


async def test_a_stream_that_is_not_wanted_is_closed(provider: Provider) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)
    async with AsyncOpenAI() as client:

        @app.post("/ask")
        async def ask(request: Request) -> Response:
            asked = await client.responses.create(model="waits", input="why?", stream=True)
            return await streams_http.respond(request, chunks(asked), key="chat")

        async with http_to(app) as http, http.stream("POST", "/ask"):
            async with http.stream("POST", "/ask") as joined:
                assert joined.status_code == 200
                await provider.until_left()
            assert provider.left == 1
            provider.may_end.set()


@pytest.mark.parametrize("is_plain", [False, True])
async def test_a_manager_that_is_not_wanted_leaves_no_request_that_nobody_has_awaited(
    provider: Provider, is_plain: bool
) -> None:
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)
    async with AsyncOpenAI() as client:

        @app.post("/ask")
        async def ask(request: Request) -> Response:
            asked = client.responses.stream(model="waits", input="why?")
            return await streams_http.respond(request, asked if is_plain else chunks(asked), key="chat")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            async with http_to(app) as http, http.stream("POST", "/ask"):
                async with http.stream("POST", "/ask") as joined:
                    assert joined.status_code == 200
                given = [chunks(client.responses.stream(model="words", input="why?"))]
                given.append(chunks(client.chat.completions.stream(model="words", messages=MESSAGES)))
                while given:
                    await given.pop().aclose()
                provider.may_end.set()
            gc.collect()
        assert not [warning for warning in caught if "never awaited" in str(warning.message)]
    assert len(provider.asked) == 1


# Other ways to write


async def test_it_is_written_to_a_stream_by_hand_and_by_code_that_does_not_await(provider: Provider) -> None:
    async with AsyncOpenAI() as client, InMemoryStreamManager(encode=JSONEncoding(exclude_unset=True)) as streams:
        asked = await client.chat.completions.create(model="words", messages=MESSAGES, stream=True)
        async with streams.open("a") as stream:
            async for chunk in asked:
                await stream.write(chunk)
            await stream.done()
        stored = (await stored_in(streams, "a")).chunks

    def write() -> list[Any]:
        with OpenAI() as client, sync.StreamManager.connect("memory://", encode=JSONEncoding(exclude_unset=True)) as streams:
            with streams.open("a") as stream:
                for chunk in client.chat.completions.create(model="words", messages=MESSAGES, stream=True):
                    stream.write(chunk)
                stream.done()
            return [event.chunk for event in streams.subscribe("a") if event.type is StreamEventType.CHUNK]

    assert await to_thread.run_sync(write) == stored
    assert words_of_chat(map(ChatCompletionChunk.model_validate, stored)) == TEXT


async def test_a_view_of_flask_gives_what_does_not_await(provider: Provider) -> None:
    def ask() -> str:
        app = Flask(__name__)
        app.config["STREAMKEEP_URL"] = "memory://"
        streams = FlaskStreams(app=app)
        with OpenAI() as client:

            @app.post("/ask")
            def view() -> Any:
                return streams.respond(lambda: chunks(client.responses.create(model="words", stream=True, **RESPONSE)))

            try:
                return app.test_client().post("/ask").get_data(as_text=True)
            finally:
                streams.close()

    answer = await to_thread.run_sync(ask)
    events = [frame["message"] for frame in frames_of(answer.encode()) if "message" in frame]
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == TEXT  # type: ignore[index]
    assert SECRET not in answer


async def test_an_endpoint_that_streams_already_is_made_durable_as_it_is(provider: Provider) -> None:
    app = FastAPI()
    async with AsyncOpenAI() as client:

        @app.post("/chat")
        async def chat() -> StreamingResponse:
            asked = await client.chat.completions.create(model="words", messages=MESSAGES, stream=True)

            async def frames() -> AsyncGenerator[str]:
                async for chunk in asked:
                    yield f"data: {chunk.to_json(indent=None)}\n\n"
                yield "data: [DONE]\n\n"

            return StreamingResponse(frames(), media_type="text/event-stream")

        app.add_middleware(DurableStreaming, streams="memory://")
        async with http_to(app) as http:
            first = await http.post("/chat")
            again = await http.post("/chat", headers={STREAM_ID: first.headers[STREAM_ID]})
    data = [line.removeprefix("data: ") for line in first.text.splitlines() if line.startswith("data: {")]
    assert words_of_chat(map(ChatCompletionChunk.model_validate_json, data)) == TEXT
    assert again.content == first.content


# `checkpoint_of`


async def test_a_checkpoint_is_where_openai_goes_on(provider: Provider) -> None:
    async with AsyncOpenAI() as client:
        kept: dict[str, Any] | None = None
        seen: list[Any] = []
        async for event in await client.responses.create(model="words", stream=True, background=True, **RESPONSE):
            kept = checkpoint_of(event, kept)
            seen.append(event)
            if len(seen) == 6:
                break
        assert kept == {"response": "resp_1", "sequence": 5}
        assert kept is not None
        rest = await client.responses.retrieve(kept["response"], stream=True, starting_after=kept["sequence"])
        async for event in rest:
            kept = checkpoint_of(event, kept)
            seen.append(event)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert kept == {"response": "resp_1", "sequence": len(seen) - 1}
    assert words_of_response(seen) == TEXT


@pytest.mark.parametrize(
    ("event", "before", "kept"),
    [
        ({"type": "response.created", "sequence_number": 0, "response": {"id": "r"}}, None, {"response": "r", "sequence": 0}),
        (
            {"type": "response.output_text.delta", "sequence_number": 7},
            {"response": "r", "sequence": 6},
            {"response": "r", "sequence": 7},
        ),
        ({"type": "response.output_text.delta", "sequence_number": 7}, None, None),
        ({"type": "response.output_text.delta"}, {"response": "r", "sequence": 6}, {"response": "r", "sequence": 6}),
        ({"object": "chat.completion.chunk", "id": "c"}, None, None),
        ("text", None, None),
    ],
)
def test_a_checkpoint_says_nothing_that_is_not_known(event: Any, before: Any, kept: Any) -> None:
    assert checkpoint_of(event, before) == kept
