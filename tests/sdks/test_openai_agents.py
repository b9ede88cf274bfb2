"""OpenAI's Agents SDK: a run's events."""

from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest
from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, RunConfig, Runner, function_tool
from agents.items import InputItem
from agents.stream_events import RawResponsesStreamEvent, RunItemStreamEvent
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


class Told:
    """A run that has these events."""

    is_complete = True

    def __init__(self, *events: Any) -> None:
        self._events = events

    async def stream_events(self) -> AsyncGenerator[Any]:
        for event in self._events:
            yield event

    def cancel(self) -> None:
        pass


async def test_what_is_said_to_the_model_and_what_nobody_has_looked_at_is_left_out() -> None:
    def item(raw: Any) -> RunItemStreamEvent:
        return RunItemStreamEvent("tool_output", InputItem(Agent[Any](name="answering"), raw))

    said: list[Any] = [
        {"role": "user", "content": SECRET},
        {"type": "message", "role": "developer", "content": SECRET},
        {"type": "configuration_update", "text": SECRET},
    ]
    known: Any = {"type": "function_call_output", "call_id": "c", "output": "sunny"}
    raw: Any = RawResponsesStreamEvent(SimpleNamespace(type="response.new", instructions=SECRET))  # type: ignore[arg-type]  # a new one
    new = SimpleNamespace(type="new", text=SECRET)
    given = [chunk async for chunk in chunks(Told(*map(item, said), raw, new, item(known)))]
    assert [chunk["item"]["raw_item"] for chunk in given] == [known]


class TestRunsOverResponses(AgentsSuite):
    cut = "INTERNAL"  # the SDK raises
    model = OpenAIResponsesModel


class TestRunsOverChatCompletions(AgentsSuite):
    """Where the server is OpenAI's own, the SDK raises for one that is cut off."""

    model = OpenAIChatCompletionsModel
