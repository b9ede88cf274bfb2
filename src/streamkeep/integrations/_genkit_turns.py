"""Turns of Genkit's agents that hear of a stop, end when they are cancelled, and send their chunks when they are detached as well.

Genkit's own do none of it: an agent's function is given a signal of its runtime's own, runs in a task that nobody cancels, and what it
sends is dropped once the turn is detached. All three are decided in `AgentRuntime`, which is not public. So the coroutine function that
makes one, `define_custom_agent`'s, is copied with a runtime of ours in its place; Genkit's own stays as it is. Where a release has it
otherwise, this module cannot be imported, or its `turns_of` gives None, and turns are Genkit's.
"""

# pyright: reportMissingTypeStubs=false

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Mapping
from types import FunctionType
from typing import Any, Final

from genkit._ai._agents._runtime import AgentRuntime
from genkit.exp.agent import (
    Agent,
    AgentFinishReason,
    AgentFn,
    AgentInit,
    AgentInput,
    AgentOutput,
    AgentResult,
    AgentStreamChunk,
    SessionRunner,
    TurnEnd,
)
from genkit.plugin_api import Action, ActionRunContext

from ..errors import StreamkeepError
from ._genkit_agents import turn_here
from .genkit import forward

logger: Final = logging.getLogger("streamkeep")


def turns_of(agent: Agent[Any]) -> Action[AgentInput, AgentOutput, AgentStreamChunk, AgentInit] | None:
    """Give an action that runs an agent's turns as `turn_here` wants it; None: it is made otherwise than this module knows."""
    made = agent.bidi_fn
    if not isinstance(made, FunctionType) or made.__globals__.get("AgentRuntime") is not AgentRuntime:
        return None
    theirs: Mapping[str, Any] = made.__globals__
    ours = FunctionType(made.__code__, {**theirs, "AgentRuntime": _Runtime}, made.__name__, None, made.__closure__)

    async def turn(data: AgentInput, ctx: ActionRunContext[AgentStreamChunk]) -> AgentOutput:
        async def inputs() -> AsyncIterator[AgentInput]:
            yield data

        output: AgentOutput = await ours(ctx.init, inputs(), ctx.send_chunk)
        return output

    return Action(kind=agent.kind, name=agent.name, fn=turn, description=agent.description, init_schema=AgentInit)


class _Runtime(AgentRuntime):
    def __init__(self, **options: Any) -> None:
        self._turn = turn_here.get()
        self._is_detached = False
        super().__init__(**options)

    @property
    def detached(self) -> bool:
        """Whether chunks are dropped, which is a variable there: never."""
        return False

    @detached.setter
    def detached(self, detached: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._is_detached = detached

    async def run(self, *, fn: AgentFn, client_inputs: AsyncIterator[AgentInput]) -> AgentOutput:
        turn = self._turn

        async def heard(session_runner: SessionRunner[Any], ctx: ActionRunContext[Any]) -> AgentResult:
            turn.runs_here()
            forwarding = asyncio.create_task(forward(turn.stop, ctx.abort_signal))
            try:
                return await fn(session_runner, ctx)
            finally:
                forwarding.cancel()

        try:
            return await super().run(fn=heard, client_inputs=client_inputs)
        except BaseException:  # cancelled; or its store has failed, and its function goes on
            await turn.cancel()
            raise

    async def emit_turn_end(self, finish_reason: AgentFinishReason | None = None) -> str | None:
        if finish_reason == AgentFinishReason.FAILED:
            self._turn.failure = failure = sys.exception()
            # What it raises because it was stopped says nothing.
            expected = self._turn.stop.is_set() or isinstance(failure, StreamkeepError)
            logger.log(logging.DEBUG if expected else logging.ERROR, "agent %s: a turn failed", self.name, exc_info=failure)
        if not self._is_detached:
            return await super().emit_turn_end(finish_reason)
        # Its snapshot is written when the agent's function has ended, and there is but one turn.
        snapshot = self.session_runner.current_turn_snapshot_id
        self.send_chunk(AgentStreamChunk(turn_end=TurnEnd(snapshot_id=snapshot, finish_reason=finish_reason)))
        return None

    async def finalize_detach(self, *, heartbeat_task: asyncio.Task[Any], **options: Any) -> None:
        try:
            await super().finalize_detach(heartbeat_task=heartbeat_task, **options)
        finally:
            heartbeat_task.cancel()
            self._turn.over.set()
