"""OpenAI's Agents SDK: a run's events."""

from collections.abc import AsyncIterator
from typing import Any, ClassVar

import msgspec
import pytest
from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, RunConfig, Runner, function_tool
from openai import AsyncOpenAI
from tests.sdks.provider import SECRET, Provider
from tests.sdks.suite import SDKSuite

from streamkeep.http.sources import Source
from streamkeep.integrations.openai_agents import chunks

pytestmark = pytest.mark.slow  # to import it takes two seconds


@function_tool
def weather(city: str) -> str:
    """Give a city's weather."""
    return f"sunny in {city}"


class AgentsSuite(SDKSuite):
    model: ClassVar[Any]

    def agent(self, model: str) -> Agent[Any]:
        client = self.clients.push_async_exit(AsyncOpenAI(max_retries=0))
        spanish = Agent[Any](name="spanish", instructions=SECRET)
        return Agent[Any](
            name="answering",
            instructions=SECRET,
            model=self.model(model, openai_client=client),
            tools=[weather],
            handoffs=[spanish],
        )

    def source(self, model: str) -> Source:
        async def answer() -> AsyncIterator[Any]:
            return chunks(Runner.run_streamed(self.agent(model), "why?", run_config=RunConfig(tracing_disabled=True)))

        return answer

    def text_of(self, chunks: list[Any]) -> str:
        data = [chunk["data"] for chunk in chunks if chunk["type"] == "raw_response_event"]
        return "".join(event["delta"] for event in data if event["type"] == "response.output_text.delta")

    async def test_what_is_known_of_an_agent_is_its_name(self, provider: Provider) -> None:
        chunks = (await self.stored("tool")).chunks
        assert [chunk["new_agent"] for chunk in chunks if chunk["type"] == "agent_updated_stream_event"] == [
            {"name": "answering"}
        ]
        items = [(chunk["name"], chunk["item"]) for chunk in chunks if chunk["type"] == "run_item_stream_event"]
        assert [name for name, _ in items] == ["tool_called", "tool_output", "message_output_created"]
        assert {item["agent"] for _, item in items} == {"answering"}
        assert items[1][1]["raw_item"]["output"] == "sunny in Paris"
        assert "weather" not in {
            tool for chunk in chunks for tool in chunk.get("data", {}).get("response", {}).get("tools", [])
        }
        assert b"parameters" not in msgspec.json.encode(chunks)


class TestRunsOverResponses(AgentsSuite):
    model = OpenAIResponsesModel


class TestRunsOverChatCompletions(AgentsSuite):
    model = OpenAIChatCompletionsModel
