"""Agents of Genkit's for tests: one whose turns are held, one that asks before it acts; served by Genkit's own server, and by ours."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import anyio
from fastapi import FastAPI
from genkit import ActionRunContext, Interrupt, Message, Part, ToolRequest
from genkit.exp import Genkit
from genkit.exp.agent import (
    Agent,
    AgentFinishReason,
    AgentInput,
    AgentResult,
    AgentStreamChunk,
    FileSessionStore,
    InMemorySessionStore,
    SessionRunner,
    SessionSnapshot,
    SessionStore,
    TurnContext,
    TurnResult,
)
from genkit.model import ModelRequest, ModelResponse, ModelResponseChunk
from genkit_fastapi import serve_agent

from streamkeep import InMemoryStreamManager, StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.response import ASGIApp
from streamkeep.integrations.fastapi import durable_flow

WORDS: Final = ("Nothing ", "is ", "lost")
HELD: Final = 2
"""How many words come before a turn that is held waits at the gate."""


class Words:
    """The function of an agent that says three words, and counts its turns in its state.

    A turn whose message begins with `hold` waits at the gate after two of them; one with `fail` raises.
    """

    def __init__(self) -> None:
        self.gate = anyio.Event()
        self.runs: Counter[str] = Counter()
        self.aborted = anyio.Event()
        self.cancelled = anyio.Event()
        self.contexts: list[dict[str, Any]] = []
        self.ignores_abort = False

    async def __call__(self, session: SessionRunner[Any], ctx: ActionRunContext[Any]) -> AgentResult:
        """Run the turns."""
        self.contexts.append(ctx.context)

        async def turn(asked: AgentInput, _: TurnContext) -> TurnResult:
            question = asked.message.text if asked.message else ""
            self.runs[question] += 1
            await session.update_custom(lambda state: {"turns": (state or {"turns": 0})["turns"] + 1})
            for number, word in enumerate(WORDS):
                if number == HELD and question.startswith("hold"):
                    try:
                        await self._held(ctx)
                    except BaseException:
                        self.cancelled.set()
                        raise
                    if ctx.abort_signal.is_set():
                        self.aborted.set()
                        if not self.ignores_abort:
                            return TurnResult(finish_reason=AgentFinishReason.ABORTED)
                        await anyio.sleep_forever()
                if question.startswith("fail"):
                    raise ValueError("secret://db-password")
                ctx.send_chunk(AgentStreamChunk(model_chunk=ModelResponseChunk(role="model", content=[Part.from_text(word)])))
            await session.add_messages([Message(role="model", content=[Part.from_text("".join(WORDS))])])
            return TurnResult(finish_reason=AgentFinishReason.STOP)

        await session.run(turn)
        return await session.result()

    async def _held(self, ctx: ActionRunContext[Any]) -> None:
        async with anyio.create_task_group() as waiting:

            async def until_aborted() -> None:
                await ctx.abort_signal.wait()
                waiting.cancel_scope.cancel()

            waiting.start_soon(until_aborted)
            await self.gate.wait()
            waiting.cancel_scope.cancel()


def words_agent(words: Words, store: SessionStore[Any] | None = None, **options: Any) -> Agent[Any]:
    """Give an agent of `Words`; without a store its state is the client's."""
    ai = Genkit()

    async def fn(session: SessionRunner[Any], ctx: ActionRunContext[Any]) -> AgentResult:
        return await words(session, ctx)

    return ai.define_custom_agent("words", fn, store=store, **options)


def careful_agent(store: InMemorySessionStore[Any]) -> Agent[Any]:
    """Give an agent whose model pays by a tool, which asks first."""
    ai = Genkit()

    @ai.tool()
    async def pay(amount: int) -> str:
        raise Interrupt({"asks": amount})

    async def model(request: ModelRequest[Any], ctx: ActionRunContext[Any]) -> ModelResponse[Any]:
        answers = [part.tool_response.output for part in request.messages[-1].content if part.tool_response]
        asks = Part(tool_request=ToolRequest(name="pay", ref="1", input=5))
        said = Part.from_text(f"It was {answers[0]}") if answers else asks
        ctx.send_chunk(ModelResponseChunk(role="model", content=[said]))
        return ModelResponse(message=Message(role="model", content=[said]))

    ai.define_model(name="model", fn=model)
    return ai.define_agent("careful", model="model", tools=["pay"], store=store)


def stored() -> InMemorySessionStore[Any]:
    return InMemorySessionStore()


def filed(directory: str) -> FileSessionStore[Any]:
    return FileSessionStore(directory)


def official_app(agent: Agent[Any], **options: Any) -> ASGIApp:
    """Serve an agent as Genkit does."""
    app = FastAPI()
    app.include_router(serve_agent(agent, **options))
    return app


def ours_app(agent: Agent[Any], streams: StreamManager | StreamsHTTP | None = None, **options: Any) -> ASGIApp:
    """Serve it durably."""
    streams = streams or InMemoryStreamManager()
    streams_http = streams if isinstance(streams, StreamsHTTP) else StreamsHTTP(streams)
    app = FastAPI(lifespan=streams_http.lifespan)
    app.include_router(durable_flow(agent, streams_http, **options))
    app.mount("/streams", streams_http)
    return app


def texts(chunks: Sequence[Any]) -> list[str]:
    """Give the text of those chunks that are the model's."""
    return [chunk["modelChunk"]["content"][0]["text"] for chunk in chunks if "modelChunk" in chunk]


def dumped(snapshot: SessionSnapshot | None) -> dict[str, Any]:
    """Give a snapshot as JSON has it."""
    assert snapshot is not None
    made: dict[str, Any] = snapshot.model_dump(mode="json", by_alias=True, exclude_none=True)
    return made
