"""OpenAI's SDK: chat completions and Responses, as it gives them."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any, ClassVar

from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from tests.sdks.provider import SECRET
from tests.sdks.suite import SDKSuite

from streamkeep import JSONEncoding
from streamkeep.http.sources import Source
from streamkeep.integrations.openai_sdk import chunks

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


class TestChatCompletionsThatDoNotAwait(Chat):
    encode = JSONEncoding(exclude_unset=True)
    test_a_stop_closes_the_providers_connection: ClassVar[None] = None  # type: ignore[assignment]  # a thread waits for the next chunk

    def source(self, model: str) -> Source:
        return lambda: self.clients.push(OpenAI(max_retries=0)).chat.completions.create(
            model=model, messages=MESSAGES, stream=True
        )


class TestChatCompletionsOfStream(Chat):
    def source(self, model: str) -> Source:
        async def answer() -> AsyncIterator[Any]:
            return chunks(self.client().chat.completions.stream(model=model, messages=MESSAGES))

        return answer


class Responses(OpenAISuite):
    event = TypeAdapter[ResponseStreamEvent](ResponseStreamEvent)

    def text_of(self, chunks: list[Any]) -> str:
        return words_of_response(chunks)


class TestResponses(Responses):
    def source(self, model: str) -> Source:
        async def answer() -> AsyncIterator[Any]:
            return chunks(await self.client().responses.create(model=model, stream=True, **RESPONSE))

        return answer


class TestResponsesOfStream(Responses):
    def source(self, model: str) -> Source:
        async def answer() -> AsyncGenerator[Any]:
            async with self.client().responses.stream(model=model, **RESPONSE) as stream:
                async for chunk in chunks(stream):
                    yield chunk

        return answer
