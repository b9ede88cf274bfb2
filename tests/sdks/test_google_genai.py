"""Google's SDK: what `generate_content_stream` gives, as it comes."""

from typing import Any, ClassVar

import pytest
from google import genai
from google.genai.types import GenerateContentResponse
from tests.sdks.provider import SECRET
from tests.sdks.suite import SDKSuite

from streamkeep import JSONEncoding
from streamkeep.http.sources import Source

pytestmark = [
    pytest.mark.slow,  # to import it takes a second
    # It uses aiohttp where that is installed.
    pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning"),
]

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
