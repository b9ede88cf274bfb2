"""LangChain's messages and LangGraph's graphs: what `astream` gives, as it comes."""

from typing import Any, ClassVar, Final

import anyio
import httpx2
import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, MessagesState, StateGraph  # pyright: ignore[reportMissingTypeStubs]
from langgraph.graph.state import CompiledStateGraph  # pyright: ignore[reportMissingTypeStubs]
from tests.sdks.provider import SECRET
from tests.sdks.suite import SDKSuite, Stored, stored_in

from streamkeep import InMemoryStreamManager
from streamkeep.http.sources import Source, producer_of

pytestmark = pytest.mark.slow  # to import it takes two seconds

THREAD: Any = {"configurable": {"thread_id": "t"}}
ASKED: Any = {"messages": [("user", "why?")]}
MODES: Final = ("values", "updates", "messages", "custom", "tasks", "checkpoints", "debug")


class LangChainSuite(SDKSuite):
    def chat(self, model: str) -> ChatOpenAI:
        http = self.clients.push_async_exit(httpx2.AsyncClient())
        return ChatOpenAI(model=model, max_retries=0, http_async_client=http)


class TestMessagesOfLangChain(LangChainSuite):
    event = AIMessageChunk

    def source(self, model: str) -> Source:
        return self.chat(model).astream([("system", SECRET), ("user", "why?")])

    def own_json(self, event: Any) -> Any:
        return event.model_dump(mode="json")

    def text_of(self, chunks: list[Any]) -> str:
        return "".join(chunk.content for chunk in chunks)


def graph_of(answer: Any) -> CompiledStateGraph[Any, Any, Any, Any]:
    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
    return graph.compile(checkpointer=InMemorySaver())


class LangGraphSuite(LangChainSuite):
    mode: ClassVar[Any]

    def source(self, model: str) -> Source:
        async def answer(state: MessagesState) -> dict[str, Any]:
            return {"messages": [await self.chat(model).ainvoke([("system", SECRET), *state["messages"]])]}

        return graph_of(answer).astream(ASKED, THREAD, stream_mode=self.mode)


class TestMessagesOfLangGraph(LangGraphSuite):
    mode = "messages"

    def text_of(self, chunks: list[Any]) -> str:
        return "".join(message["content"] for message, _ in chunks)


class TestSeveralModesOfLangGraph(LangGraphSuite):
    mode: ClassVar[Any] = ["messages", "values", "updates"]

    def text_of(self, chunks: list[Any]) -> str:
        return "".join(data[0]["content"] for mode, data in chunks if mode == "messages")


async def answer_with(state: MessagesState) -> dict[str, Any]:
    get_stream_writer()({"at": "work"})
    model = GenericFakeChatModel(messages=iter([AIMessage("Nothing is lost")]))
    return {"messages": [await model.ainvoke([("system", SECRET), *state["messages"]])]}


async def stored_of(source: Source) -> Stored:
    async with InMemoryStreamManager() as streams:
        async with streams.open("a") as stream:
            await producer_of(source)(stream, anyio.Event())
            await stream.done()
        return await stored_in(streams, "a")


async def test_whatever_astream_gives_is_stored_and_some_of_it_has_what_the_user_has_said() -> None:
    stored = {mode: await stored_of(graph_of(answer_with).astream(ASKED, THREAD, stream_mode=mode)) for mode in MODES}
    stored["events"] = await stored_of(graph_of(answer_with).astream_events(ASKED, THREAD, version="v2"))
    assert all(one.chunks for one in stored.values())
    assert {mode for mode, one in stored.items() if "why?" in str(one)} == {"values", "tasks", "checkpoints", "debug", "events"}
    assert {mode for mode, one in stored.items() if SECRET in str(one)} == {"events"}
    assert "".join(message["content"] for message, _ in stored["messages"].chunks) == "Nothing is lost"
