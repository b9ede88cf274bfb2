"""Anthropic's SDK: what `create(stream=True)` gives, as it comes, and what `.stream()` gives."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, ClassVar

import anyio
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter
from tests.sdks.provider import SECRET, Provider, message_events
from tests.sdks.suite import SDKSuite, stored_in

from streamkeep import InMemoryStreamManager, JSONEncoding
from streamkeep.http.sources import Source, producer_of
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
    def source(self, model: str) -> Source:
        async def answer() -> AsyncIterator[Any]:
            return chunks(self.client().messages.stream(model=model, **MESSAGE))

        return answer


class TestMessagesOfStreamThatIsEntered(AnthropicSuite):
    def source(self, model: str) -> Source:
        async def answer() -> AsyncGenerator[Any]:
            async with self.client().messages.stream(model=model, **MESSAGE) as stream:
                async for chunk in chunks(stream):
                    yield chunk
                assert (await stream.get_final_message()).content

        return answer


class TestMessagesOfStreamThatDoNotAwait(AnthropicSuite):
    test_a_stop_closes_the_providers_connection: ClassVar[None] = None  # type: ignore[assignment]  # a thread waits for the next chunk

    def source(self, model: str) -> Source:
        return lambda: chunks(self.clients.push(Anthropic(max_retries=0)).messages.stream(model=model, **MESSAGE))


async def test_what_stream_gives_is_a_source_as_it_is_and_repeats_the_text(provider: Provider) -> None:
    sizes: list[int] = []
    async with AsyncAnthropic() as client, InMemoryStreamManager() as streams:
        for model in ("words-100", "words-200"):
            async with streams.open(model) as stream:
                await producer_of(client.messages.stream(model=model, **MESSAGE))(stream, anyio.Event())
                await stream.done()
            sizes.append((await stored_in(streams, model)).size)
    assert sizes[1] > 3 * sizes[0]
