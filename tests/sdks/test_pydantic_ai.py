"""Pydantic AI: a run's events, as they come, and its text."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from openai import AsyncOpenAI
from pydantic import TypeAdapter
from pydantic_ai import (
    Agent,
    AgentStreamEvent,
    ApprovalRequired,
    CustomEvent,
    DeferredToolRequests,
    RunContext,
    ToolReturn,
    messages,
)
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.providers.openai import OpenAIProvider
from tests.sdks.provider import SECRET, Provider
from tests.sdks.suite import SDKSuite

from streamkeep import JSONEncoding
from streamkeep.http.sources import Source
from streamkeep.integrations.pydantic_ai import chunks

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
        return lambda: chunks(self.agent(model).run_stream_events("why?"))

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
                            async for event in chunks(events):
                                yield event

        return answer

    def text_of(self, chunks: list[Any]) -> str:
        return TestRunStreamEvents().text_of(chunks)


# What readers are not to see


@dataclass(kw_only=True)
class Progress(CustomEvent, name="progress"):
    done: int


@dataclass(kw_only=True)
class Audit(CustomEvent, name="audit", ui=False):
    log: str = SECRET


@dataclass(kw_only=True)
class Found(CustomEvent, name="found"):
    rows: int
    query: str = SECRET

    def to_payload(self) -> Any:
        return {"rows": self.rows}


@dataclass(kw_only=True)
class Counted(CustomEvent, name="counted"):
    rows: int

    def to_payload(self) -> Any:
        return self.rows


async def shown(events: list[Any]) -> list[Any]:
    """Give what is stored of events."""

    async def come() -> AsyncGenerator[Any]:
        for event in events:
            yield event

    return [msgspec.json.decode(JSONEncoding(exclude_none=True)(chunk)) async for chunk in chunks(come())]


async def test_of_a_run_is_stored_what_the_model_says_and_what_tools_return(provider: Provider) -> None:
    agent = Agent(TestModel(), instructions=SECRET, system_prompt=SECRET)

    @agent.tool(description=SECRET)
    def weather(ctx: RunContext, city: str) -> Any:
        prompts: list[Any] = [messages.SystemPromptPart(SECRET), messages.UserPromptPart(SECRET)]
        ctx.enqueue(messages.ModelRequest(parts=prompts))
        return ToolReturn("sunny", content=SECRET, metadata={"row": SECRET})

    history = [messages.ModelRequest(parts=[messages.UserPromptPart(SECRET)])]
    seen = [chunk async for chunk in chunks(agent.run_stream_events(SECRET, message_history=history))]
    stored = msgspec.json.encode([msgspec.Raw(JSONEncoding()(chunk)) for chunk in seen]).decode()
    assert SECRET not in stored
    assert "sunny" in stored
    assert seen[-1] == {"result": {"output": '{"weather":"sunny"}'}, "event_kind": "agent_run_result"}
    assert [EVENT.dump_python(EVENT.validate_python(event), mode="json") for event in msgspec.json.decode(stored)[:-1]]


async def test_custom_events_are_stored_as_frontends_get_them(provider: Provider) -> None:
    events = [
        Progress(done=1, tool_call_id="c"),
        Audit(),
        Found(rows=2),
        Counted(rows=3),
        messages.UnknownCustomEvent(name="new"),
    ]
    named = {"event_kind": "custom", "tool_name": None}
    assert await shown(events) == [
        {**named, "name": "progress", "tool_call_id": "c", "done": 1},
        {**named, "name": "found", "tool_call_id": None, "rows": 2},
        {**named, "name": "counted", "tool_call_id": None, "data": 3},
    ]


async def test_a_request_for_an_approval_is_stored_without_its_metadata(provider: Provider) -> None:
    agent = Agent(TestModel(), output_type=[str, DeferredToolRequests])

    @agent.tool_plain
    def delete(path: str) -> str:
        raise ApprovalRequired(metadata={"why": SECRET})

    events = [chunk async for chunk in chunks(agent.run_stream_events("why?"))]
    (asked,) = [event for event in events if not isinstance(event, dict) and event.event_kind == "deferred_tool_requests"]
    output = events[-1]["result"]["output"]
    assert [call.tool_name for call in asked.requests.approvals] == [call.tool_name for call in output.approvals] == ["delete"]
    assert SECRET not in str([msgspec.json.decode(JSONEncoding()(event)) for event in events])


async def test_what_the_model_is_told_of_tools_and_what_nobody_has_looked_at_is_left_out(provider: Provider) -> None:
    listed: Any = {"tools": [{"name": SECRET}]}
    secret: Any = SECRET
    request = messages.ModelRequest(parts=[messages.SystemPromptPart(SECRET)])

    class New:
        event_kind = "new"
        part = SECRET

    events = [
        New(),
        secret,
        messages.EnqueuedMessagesEvent(enqueue_id="e", messages=(request,)),
        messages.PartStartEvent(index=0, part=messages.NativeToolReturnPart(tool_name="mcp_server:x", content=listed)),
        messages.FunctionToolResultEvent(
            messages.ToolReturnPart(tool_name="load_capability", content={"instructions": SECRET}, tool_kind="capability-load")
        ),
        messages.ToolAvailabilityDeltaEvent(part=messages.ToolAvailabilityDeltaPart(tools_added=[SECRET])),
        messages.DeferredToolResultsEvent(messages.DeferredToolResults(metadata={"c": {"why": SECRET}})),
    ]
    own = messages.ToolReturnPart(tool_name="look", content="found", tool_kind="inventory.lookup", metadata=SECRET)
    (event,) = await shown([*events, messages.FunctionToolResultEvent(own)])
    assert event["part"]["content"] == "found"
    assert SECRET not in str(event)


def test_every_event_of_the_sdk_is_looked_at() -> None:
    """Where this fails, the SDK has a new one: see what it has, and say whether it is stored."""
    stored = {"part_start", "part_delta", "part_end", "final_result", "custom", "deferred_tool_requests"}
    stored |= {"function_tool_call", "function_tool_result", "output_tool_call", "output_tool_result"}
    left_out = {"enqueued_messages", "deferred_tool_results", "capability", "tool_availability_delta"}
    left_out |= {"capability_load_delta", "model_settings_delta"}
    known = EVENT.json_schema(mode="serialization")["discriminator"]["mapping"].keys()
    assert stored | left_out == {kind for kind in known if not kind.startswith("realtime_")}


@pytest.mark.parametrize(
    "event",
    [
        messages.PartStartEvent(
            index=0, part=messages.FilePart(messages.BinaryImage(data=bytes(range(256)), media_type="image/png"))
        ),
        *(
            messages.FunctionToolResultEvent(messages.ToolReturnPart(tool_name="look", content=content, tool_call_id="c"))
            for content in (
                messages.BinaryContent(data=bytes(range(256)), media_type="image/png"),
                ["found", messages.ImageUrl("https://example.com/a.png")],
                "text",
            )
        ),
    ],
    ids=range(4),
)
def test_a_file_is_written_as_the_sdks_own_json(event: Any) -> None:
    own = msgspec.json.decode(EVENT.dump_json(event))
    assert msgspec.json.decode(JSONEncoding()(event)) == own
    assert msgspec.json.decode(JSONEncoding()({"a": [event]})) == {"a": [own]}
