"""Google's SDK: what `generate_content_stream` gives, as it comes."""

from collections.abc import AsyncGenerator
from typing import Any, ClassVar

import anyio.to_thread
import pytest
from google import genai
from google.genai.types import GenerateContentResponse
from tests.sdks.provider import SECRET
from tests.sdks.suite import SDKSuite

from streamkeep import JSONEncoding
from streamkeep.http.sources import Source
from streamkeep.integrations.google_genai import chunks

pytestmark = [
    pytest.mark.slow,  # to import it takes a second
    # It uses aiohttp where that is installed.
    pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning"),
]

CONTEXT, RESULT = "a document that nobody is to see", "rain, says the tool"
ASKED: Any = {"contents": "why?", "config": {"system_instruction": SECRET}}


class GoogleSuite(SDKSuite):
    encode = JSONEncoding(exclude_none=True)
    event = GenerateContentResponse

    def text_of(self, chunks: list[Any]) -> str:
        return "".join(chunk.text or "" for chunk in chunks)

    def own_json(self, event: Any) -> Any:
        return event.model_dump(mode="json", by_alias=True, exclude_none=True)


class TestContentAsItComes(GoogleSuite):
    def source(self, model: str) -> Source:
        client = genai.Client()
        self.clients.push_async_callback(client.aio.aclose)
        return lambda: client.aio.models.generate_content_stream(model=model, **ASKED)


class TestContentThatDoesNotAwait(GoogleSuite):
    test_a_stop_closes_the_providers_connection: ClassVar[None] = None  # type: ignore[assignment]  # a thread waits for the next chunk

    def source(self, model: str) -> Source:
        client = genai.Client()
        self.clients.callback(client.close)
        return lambda: client.models.generate_content_stream(model=model, **ASKED)


class TestWhatIsToBeSeenOfContent(GoogleSuite):
    encode = JSONEncoding()
    cut = "ABORTED"

    def own_json(self, event: Any) -> Any:
        return event.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def source(self, model: str) -> Source:
        client = genai.Client()
        self.clients.push_async_callback(client.aio.aclose)

        async def answer() -> Any:
            return chunks(await client.aio.models.generate_content_stream(model=model, **ASKED))

        return answer


def weather(city: str) -> str:
    """Say how the weather is."""
    return f"{RESULT} in {city}"


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("is_async", [True, False])
async def test_what_was_said_before_a_functions_result_is_left_out(is_async: bool) -> None:
    asked: Any = {"model": "tool", "contents": f"why? {CONTEXT}", "config": {"tools": [weather]}}
    if is_async:
        async with genai.Client().aio as client:
            plain = [chunk async for chunk in await client.models.generate_content_stream(**asked)]
            seen = [chunk async for chunk in chunks(await client.models.generate_content_stream(**asked))]
    else:
        with genai.Client() as synchronous:
            plain, seen = await anyio.to_thread.run_sync(
                lambda: (
                    [*synchronous.models.generate_content_stream(**asked)],
                    [*chunks(synchronous.models.generate_content_stream(**asked))],
                )
            )
    came = str([chunk.model_dump(mode="json", by_alias=True) for chunk in plain])
    assert all(hidden in came for hidden in (RESULT, CONTEXT, "sdkHttpResponse"))
    assert not any(hidden in str(seen) for hidden in (RESULT, CONTEXT, "sdkHttpResponse"))
    assert len(seen) == len(plain)


async def test_a_prompt_that_is_blocked_is_answered_whole() -> None:
    async def blocked() -> AsyncGenerator[GenerateContentResponse]:
        yield GenerateContentResponse.model_validate({"promptFeedback": {"blockReason": "SAFETY"}})

    assert [chunk async for chunk in chunks(blocked())] == [{"promptFeedback": {"blockReason": "SAFETY"}}]
