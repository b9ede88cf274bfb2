"""LiteLLM: what `acompletion(stream=True)` gives, as it comes."""

from typing import Any, ClassVar

import pytest
from openai import AsyncOpenAI, OpenAI
from tests.sdks.provider import SECRET, Provider
from tests.sdks.suite import SDKSuite

from streamkeep import JSONEncoding
from streamkeep.http.sources import Source

pytestmark = pytest.mark.slow  # to import it takes five seconds

MESSAGES: Any = [{"role": "system", "content": SECRET}, {"role": "user", "content": "why?"}]


class LiteLLMSuite(SDKSuite):
    encode = JSONEncoding(exclude_none=True)
    cut = "INTERNAL"  # it raises

    @pytest.fixture(autouse=True)
    def import_it(self, monkeypatch: pytest.MonkeyPatch, provider: Provider) -> None:
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # which it would fetch when it is imported
        import litellm

        self.litellm: Any = litellm
        self.base_url = f"{provider.url}/v1"

    def asking(self, model: str) -> dict[str, Any]:
        return {
            "model": f"openai/{model}",
            "messages": MESSAGES,
            "stream": True,
            "base_url": self.base_url,
            "api_key": "none",
            "num_retries": 0,
            "max_retries": 0,
        }

    def text_of(self, chunks: list[Any]) -> str:
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


class TestCompletionsAsTheyCome(LiteLLMSuite):
    def source(self, model: str) -> Source:
        client = self.clients.push_async_exit(AsyncOpenAI(max_retries=0))
        return lambda: self.litellm.acompletion(client=client, **self.asking(model))


class TestCompletionsThatDoNotAwait(LiteLLMSuite):
    test_a_stop_closes_the_providers_connection: ClassVar[None] = None  # type: ignore[assignment]  # a thread waits for the next chunk

    def source(self, model: str) -> Source:
        client = self.clients.push(OpenAI(max_retries=0))
        return lambda: self.litellm.completion(client=client, **self.asking(model))
