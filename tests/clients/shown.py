"""The apps that pages of the docs show, around a producer of ours: no line of theirs is changed but where they store,
and how long clients wait."""

import json
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, cast

import anyio
from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskStore
from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, HTMLResponse
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph  # pyright: ignore[reportMissingTypeStubs]
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from tests.clients.programs import BOUND_SECONDS, COPILOTKIT, PACKAGES, bundle_of
from tests.test_docs import ROOT, blocks

from streamkeep import StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.response import ASGIApp
from streamkeep.integrations.mcp import StreamEventStore

WORDS: Final = ("Nothing ", "is ", "lost, ", "not even é\u2028.")
HELD: Final = 2
ON_PAGE: Final = " ".join("".join(WORDS).split())
PART_ON_PAGE: Final = " ".join("".join(WORDS[:HELD]).split())
"""As a page shows them, on which one white space is as good as another; and how many milliseconds that may take."""
SHOWN: Final = 1000 * BOUND_SECONDS
STORED: Final = re.compile(r'\b[\w.]+\("sqlite:///streams\.db"\)')


RETRY: Final = re.compile(r"retry_interval=[\d_]+")
"""How long a client of MCP's waits; ours need not."""


def shown_app(
    page: str,
    stored: object,
    *,
    block: int = 0,
    also: Sequence[int] = (),
    edits: Mapping[str, str] | None = None,
    names: Mapping[str, object] | None = None,
    **ours: object,
) -> ASGIApp:
    """Give the app of a page, with this where it makes what stores, and with what is ours in place of its own of the same name.

    Blocks that are shown behind it may add to it. `edits` are made in its text first, which may use `names`.
    """
    every = blocks(path := ROOT / page)
    program, count = STORED.subn("given", RETRY.sub("retry_interval=500", "\n".join(every[each] for each in (block, *also))))
    assert count == 1, page
    for text, edited in (edits or {}).items():
        assert program.count(text) == 1, text
        program = program.replace(text, edited)
    shown: dict[str, Any] = {"given": stored, **(names or {})}
    exec(compile(program, str(path), "exec", dont_inherit=True), shown)
    assert shown.keys() >= ours.keys()
    shown.update(ours)
    app: ASGIApp = shown["app"]
    return app


@dataclass(eq=False, slots=True)
class Paced:
    """Says `WORDS`, or others, and counts how often it has answered each question. An answer that is held stops before word `HELD`."""

    runs: Counter[int] = field(default_factory=Counter[int])
    may_go_on: anyio.Event = field(default_factory=anyio.Event)
    says: Sequence[str] = WORDS

    async def words(self, number: int, *, holds: bool) -> AsyncGenerator[str]:
        self.runs[number] += 1
        for place, word in enumerate(self.says):
            if holds and place == HELD:
                await self.may_go_on.wait()
            yield word


def langgraph_app(streams_http: StreamsHTTP, paced: Paced) -> ASGIApp:
    """Give the app of the page about LangGraph's clients."""

    async def answer(_: str, question: dict[str, Any]) -> AsyncGenerator[object]:
        async for word in paced.words(question["number"], holds=question.get("holds", False)):
            yield "values", {"word": word}

    return shown_app("docs/how-to/langgraph.md", streams_http, answer=answer)


class PacedModel(BaseChatModel):
    """A model of LangChain's that answers such questions; one is text that is JSON."""

    paced: Any

    @property
    def _llm_type(self) -> str:
        return "paced"

    def _generate(self, *_: object, **__: object) -> ChatResult:
        raise NotImplementedError

    async def _astream(self, messages: list[BaseMessage], *_: object, **__: object) -> AsyncIterator[ChatGenerationChunk]:
        async for word in self.paced.words(**json.loads(str(messages[-1].content))):
            yield ChatGenerationChunk(message=AIMessageChunk(content=word))


def graph_of(paced: Paced) -> Any:
    """Give a graph of LangGraph's around such a model, with a checkpointer."""
    model = PacedModel(paced=paced)

    async def call(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    graph: Any = StateGraph(MessagesState)
    graph.add_node("model", call)
    graph.add_edge(START, "model")
    return graph.compile(checkpointer=InMemorySaver())


def use_stream_app(streams_http: StreamsHTTP, paced: Paced) -> ASGIApp:
    """Give the app of the same page with what it shows for `useStream`, and the page that it shows."""
    app = shown_app("docs/how-to/langgraph.md", streams_http, also=[1], graph=graph_of(paced))
    return with_page(app, "docs/how-to/langgraph.md", PACKAGES / "use-stream.jsx")


def ag_ui_app(streams_http: StreamsHTTP, paced: Paced) -> ASGIApp:
    """Give the app of the page about AG-UI's clients. A question is text that is JSON."""

    async def answer(messages: list[dict[str, Any]]) -> AsyncGenerator[str]:
        async for word in paced.words(**json.loads(messages[-1]["content"])):
            yield word

    return shown_app("docs/how-to/ag-ui.md", streams_http, also=[1], answer=answer)


def copilotkit_app(streams_http: StreamsHTTP, paced: Paced) -> ASGIApp:
    """Give that app with the page of CopilotKit's that the same page shows."""
    return with_page(ag_ui_app(streams_http, paced), "docs/how-to/ag-ui.md", COPILOTKIT / "page.jsx")


def with_page(shown: ASGIApp, doc: str, program: Path) -> ASGIApp:
    """Give an app with a page: what is shown there, in a program around it."""
    app = cast("FastAPI", shown)
    (component,) = re.findall(r"^```jsx\n(.*?)^```$", (ROOT / doc).read_text(), re.MULTILINE | re.DOTALL)

    @app.get("/page")
    async def page() -> Response:
        return HTMLResponse('<!doctype html><body><script type="module" src="/page.js"></script>')

    @app.get("/page.js")
    async def script() -> Response:
        return FileResponse(bundle_of(program, component))

    return shown


def agent_of(paced: Paced) -> Agent:
    """Give an agent of Pydantic AI's that answers such questions."""

    async def words(messages: list[ModelMessage], _: AgentInfo) -> AsyncIterator[str]:
        (prompt,) = [part.content for part in messages[-1].parts if isinstance(part, UserPromptPart)]
        question = json.loads(prompt if isinstance(prompt, str) else str(prompt[0]))
        async for word in paced.words(**question):
            yield word

    return Agent(FunctionModel(stream_function=words))


def pydantic_ai_app(streams_http: StreamsHTTP, paced: Paced) -> ASGIApp:
    """Give the app of the same page around an agent of Pydantic AI's."""
    return shown_app("docs/how-to/ag-ui.md", streams_http, block=2, agent=agent_of(paced))


def openai_app(streams_http: StreamsHTTP, paced: Paced) -> ASGIApp:
    """Give the app of the page about OpenAI's SDK. A question is text that is JSON."""

    async def model(question: str) -> AsyncGenerator[str]:
        asked = json.loads(question)
        if asked.get("fails"):
            raise ValueError("secret")
        async for word in paced.words(asked["number"], holds=asked.get("holds", False)):
            yield word

    return shown_app("docs/how-to/openai.md", streams_http, model=model)


def mcp_app(events: StreamEventStore, paced: Paced) -> ASGIApp:
    """Give the app of the page about MCP. A question is text that is JSON."""

    async def words(question: str) -> AsyncGenerator[str]:
        async for word in paced.words(**json.loads(question)):
            yield word

    return shown_app("docs/how-to/mcp.md", events, words=words)


def a2a_app(
    streams: StreamManager,
    paced: Paced,
    store: TaskStore | None = None,
    agent: AgentExecutor | None = None,
    **options: object,
) -> ASGIApp:
    """Give the app of the page about A2A, with this store of tasks, this agent, these options. A question is text that is JSON."""

    async def words(question: str) -> AsyncGenerator[str]:
        async for word in paced.words(**json.loads(question)):
            yield word

    edits = {
        "InMemoryTaskStore(), card)": "store or InMemoryTaskStore(), card, **options)",
        "Answers(),": "agent or Answers(),",
    }
    names = {"store": store, "agent": agent, "options": options}
    return shown_app("docs/how-to/a2a.md", streams, edits=edits, names=names, words=words)


class Runs(Protocol):
    """What may be run many at once."""

    async def run(self, url: str, number: int) -> None: ...


async def run_all(served: AbstractAsyncContextManager[tuple[str, Paced]], those: Sequence[Runs], at_once: int) -> None:
    """Run those, many at once, over one server, which has worked once for each."""
    room = anyio.CapacityLimiter(at_once)

    async def run(number: int, each: Runs) -> None:
        async with room:
            await each.run(url, number)

    async with served as (url, paced), anyio.create_task_group() as tasks:
        for number, each in enumerate(those):
            tasks.start_soon(run, number, each)
    assert paced.runs == dict.fromkeys(range(len(those)), 1)
