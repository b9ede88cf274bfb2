"""One sample of each SDK that is imported quickly; each has a file of slow tests, and OpenAI's one of quick ones."""

from typing import Any

import anyio
import pytest
from tests.sdks.provider import SECRET, TEXT, Provider
from tests.sdks.suite import Stored, stored_in

from streamkeep import InMemoryStreamManager, JSONEncoding
from streamkeep.http.sources import Source, producer_of


async def stored_of(source: Source, **options: Any) -> Stored:
    """Give what is stored of a source."""
    async with InMemoryStreamManager() as streams:
        async with streams.open("a", **options) as stream:
            await producer_of(source)(stream, anyio.Event())
            await stream.done()
        return await stored_in(streams, "a")


# It uses aiohttp where that is installed.
@pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")
async def test_what_gemini_generates_is_a_source_as_it_is(provider: Provider) -> None:
    from google import genai

    async with genai.Client().aio as client:
        asked = client.models.generate_content_stream(model="words", contents="why?")
        stored = await stored_of(lambda: asked, encode=JSONEncoding(exclude_none=True))
    assert "".join(chunk["candidates"][0]["content"]["parts"][0]["text"] for chunk in stored.chunks) == TEXT


async def test_a_run_of_pydantic_ai_is_a_source_as_it_is() -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.test import TestModel

    agent = Agent(TestModel(custom_output_text="Nothing is lost"), instructions=SECRET)
    stored = await stored_of(agent.run_stream_events("why?"))
    assert stored.chunks[0]["event_kind"] == "part_start"
    assert stored.chunks[-1] == {"result": {"output": "Nothing is lost"}, "event_kind": "agent_run_result"}
    assert SECRET not in str(stored)


async def test_what_langgraph_streams_is_a_source_as_it_is() -> None:
    from langchain_core.language_models import GenericFakeChatModel
    from langchain_core.messages import AIMessage
    from langgraph.graph import START, MessagesState, StateGraph  # pyright: ignore[reportMissingTypeStubs]

    async def answer(state: MessagesState) -> dict[str, Any]:
        model = GenericFakeChatModel(messages=iter([AIMessage("Nothing is lost")]))
        return {"messages": [await model.ainvoke([("system", SECRET), *state["messages"]])]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    asked: Any = {"messages": [("user", "why?")]}
    stored = await stored_of(graph.compile().astream(asked, stream_mode="messages"))
    assert "".join(message["content"] for message, _ in stored.chunks) == "Nothing is lost"
    assert SECRET not in str(stored)
