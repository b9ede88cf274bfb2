"""Anthropic's SDK: what `create(stream=True)` gives, as it comes, and what `.stream()` gives."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, ClassVar

import anyio
import httpx2
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import RawMessageStreamEvent
from anthropic.types.beta import BetaRawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter
from tests.sdks.provider import SECRET, Provider, message_events
from tests.sdks.suite import SDKSuite, stored_in, types_in

from streamkeep import InMemoryStreamManager, JSONEncoding
from streamkeep.http.sources import Source, producer_of
from streamkeep.integrations import anthropic
from streamkeep.integrations.anthropic import chunks

pytestmark = pytest.mark.slow  # to import it takes two seconds

MESSAGE: Any = {"max_tokens": 9, "system": SECRET, "messages": [{"role": "user", "content": "why?"}]}


class AnthropicSuite(SDKSuite):
    event = TypeAdapter[RawMessageStreamEvent](RawMessageStreamEvent)

    def client(self) -> AsyncAnthropic:
        return self.clients.push_async_exit(AsyncAnthropic(max_retries=0))

    def text_of(self, chunks: list[Any]) -> str:
        deltas = [event.delta for event in chunks if event.type == "content_block_delta"]
        return "".join(delta.text for delta in deltas if delta.type == "text_delta")

    @pytest.mark.parametrize("model", ["words", "tool", "thinking"])
    async def test_it_is_what_has_come(self, provider: Provider, model: str) -> None:
        asked = {"model": model, **MESSAGE}
        sent = [event async for event in message_events(provider, asked) if event["type"] != "ping"]
        assert (await self.stored(model)).chunks == sent


class TestMessagesAsTheyCome(AnthropicSuite):
    encode = JSONEncoding(exclude_unset=True)

    def source(self, model: str) -> Source:
        client = self.client()
        return lambda: client.messages.create(model=model, stream=True, **MESSAGE)


class TestMessagesOfStream(AnthropicSuite):
    cut = "ABORTED"

    def source(self, model: str) -> Source:
        async def answer() -> AsyncIterator[Any]:
            return chunks(self.client().messages.stream(model=model, **MESSAGE))

        return answer


class TestMessagesOfStreamThatIsEntered(AnthropicSuite):
    cut = "ABORTED"

    def source(self, model: str) -> Source:
        async def answer() -> AsyncGenerator[Any]:
            async with self.client().messages.stream(model=model, **MESSAGE) as stream:
                async for chunk in chunks(stream):
                    yield chunk
                assert (await stream.get_final_message()).content

        return answer


class TestMessagesOfStreamThatDoNotAwait(AnthropicSuite):
    cut = "ABORTED"
    test_a_stop_closes_the_providers_connection: ClassVar[None] = None  # type: ignore[assignment]  # a thread waits for the next chunk

    def source(self, model: str) -> Source:
        return lambda: chunks(self.clients.push(Anthropic(max_retries=0)).messages.stream(model=model, **MESSAGE))


def client_of(events: list[Any]) -> Anthropic:
    """Give a client whose provider answers with these events."""
    frames = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=frames)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    return Anthropic(api_key="none", base_url="http://127.0.0.1:9", http_client=http)


@pytest.mark.parametrize("is_beta", [False, True])
def test_what_the_sdk_makes_itself_is_left_out_whatever_it_makes(is_beta: bool) -> None:
    usage = {"input_tokens": 1, "output_tokens": 1}
    head = {"id": "m", "type": "message", "role": "assistant", "model": "c", "content": [], "usage": usage}
    deltas = {
        "text": [{"type": "text_delta", "text": '{"city":'}, {"type": "text_delta", "text": '"Paris"}'}],
        "thinking": [{"type": "thinking_delta", "thinking": "Hm"}, {"type": "signature_delta", "signature": "c2ln"}],
        "tool_use": [{"type": "input_json_delta", "partial_json": "{}"}],
        **(
            {"compaction": [{"type": "compaction_delta", "content": "all so far", "encrypted_content": "c2ln"}]}
            if is_beta
            else {}
        ),
    }
    empty: dict[str, Any] = {
        "text": {"text": ""},
        "thinking": {"thinking": "", "signature": ""},
        "tool_use": {"id": "t", "name": "weather", "input": {}},
        "compaction": {"content": None, "encrypted_content": None},
    }
    came: list[Any] = [{"type": "message_start", "message": {**head, "stop_reason": None, "stop_sequence": None}}]
    for index, (kind, parts) in enumerate(deltas.items()):
        came.append({"type": "content_block_start", "index": index, "content_block": {"type": kind, **empty[kind]}})
        came += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in parts]
        came.append({"type": "content_block_stop", "index": index})
    new = {"type": "message_new", "system": SECRET}
    last: list[Any] = [
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
        {"type": "message_stop"},
    ]
    client = client_of([*came, new, *last])
    asked: Any = {"model": "c", **MESSAGE, "output_format": City}
    assert list(chunks((client.beta if is_beta else client).messages.stream(**asked))) == [*came, *last]


class City(BaseModel):
    city: str


def test_every_event_that_comes_is_known() -> None:
    assert types_in(RawMessageStreamEvent) == types_in(BetaRawMessageStreamEvent) == anthropic._CAME.keys()


async def test_what_stream_gives_is_a_source_as_it_is_and_repeats_the_text(provider: Provider) -> None:
    sizes: list[int] = []
    async with AsyncAnthropic() as client, InMemoryStreamManager() as streams:
        for model in ("words-100", "words-200"):
            async with streams.open(model) as stream:
                await producer_of(client.messages.stream(model=model, **MESSAGE))(stream, anyio.Event())
                await stream.done()
            sizes.append((await stored_in(streams, model)).size)
    assert sizes[1] > 3 * sizes[0]
