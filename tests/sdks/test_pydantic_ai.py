"""Pydantic AI: a run's events, as they come, and its text."""

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from openai import AsyncOpenAI
from pydantic import TypeAdapter
from pydantic_ai import Agent, AgentStreamEvent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from tests.sdks.provider import SECRET, Provider
from tests.sdks.suite import SDKSuite

from streamkeep.http.sources import Source

pytestmark = pytest.mark.slow  # to import it takes two seconds

EVENT = TypeAdapter[AgentStreamEvent](AgentStreamEvent)


def weather(city: str) -> str:
    """Give a city's weather."""
    return f"sunny in {city}"


class PydanticAISuite(SDKSuite):
    def agent(self, model: str) -> Agent:
        client = self.clients.push_async_exit(AsyncOpenAI(max_retries=0))
        provider = OpenAIProvider(openai_client=client)
        return Agent(OpenAIChatModel(model, provider=provider), instructions=SECRET, tools=[weather])


class TestRunStreamEvents(PydanticAISuite):
    def source(self, model: str) -> Source:
        return self.agent(model).run_stream_events("why?")

    def text_of(self, chunks: list[Any]) -> str:
        first = [chunk["part"]["content"] for chunk in chunks if chunk["event_kind"] == "part_start"]
        return "".join(first + [chunk["delta"]["content_delta"] for chunk in chunks if chunk["event_kind"] == "part_delta"])

    @pytest.mark.parametrize("model", ["words", "tool", "thinking"])
    async def test_it_is_the_sdks_own_json(self, provider: Provider, model: str) -> None:
        *events, last = (await self.stored(model)).chunks
        assert [EVENT.dump_python(EVENT.validate_python(event), mode="json") for event in events] == events
        assert last["event_kind"] == "agent_run_result"
        assert last["result"].keys() == {"output"}
        assert "why?" not in msgspec.json.encode(last).decode()


class TestTextOfRunStream(PydanticAISuite):
    def source(self, model: str) -> Source:
        async def answer() -> AsyncGenerator[str]:
            async with self.agent(model).run_stream("why?") as run:
                async for text in run.stream_text(delta=True, debounce_by=None):
                    yield text

        return answer

    def text_of(self, chunks: list[Any]) -> str:
        return "".join(chunks)


class TestTextOfIter(PydanticAISuite):
    """Events of the model's requests only, as its documentation shows them."""

    def source(self, model: str) -> Source:
        async def answer() -> AsyncGenerator[Any]:
            async with self.agent(model).iter("why?") as run:
                async for node in run:
                    if Agent.is_model_request_node(node):
                        async with node.stream(run.ctx) as events:
                            async for event in events:
                                yield event

        return answer

    def text_of(self, chunks: list[Any]) -> str:
        return TestRunStreamEvents().text_of(chunks)
