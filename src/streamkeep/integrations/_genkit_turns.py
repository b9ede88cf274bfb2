"""Turns of Genkit's agents that hear of a stop, end when they are cancelled, and send their chunks when they are detached as well.

Genkit's own do none of it: an agent's function is given a signal of its runtime's own, runs in a task that nobody cancels, and what it
sends is dropped once the turn is detached. All three are decided in `AgentRuntime`, which is not public. So the coroutine function that
makes one, `define_custom_agent`'s, is copied with a runtime of ours in its place, and one more of its functions: what loads a session finds
no snapshot that is somebody else's. Genkit's own stays as it is. Where a release has it otherwise, this module cannot be imported, or its
`turns_of` gives None, and turns are Genkit's.
"""

# pyright: reportMissingTypeStubs=false

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Mapping
from types import FunctionType
from typing import Any, Final

from genkit._ai._agents._runtime import AgentRuntime, load_session
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
    SessionSnapshot,
    TurnEnd,
)
from genkit.plugin_api import Action, ActionRunContext, GenkitError

from ..errors import StreamkeepError
from ._genkit_agents import Turn, turn_here
from .genkit import forward

logger: Final = logging.getLogger("streamkeep")

NAMES_SNAPSHOT: Final = "new_snapshot_id"
"""The attribute of `SessionRunner` by which `AgentRuntime.run` is told the id of a detached turn's snapshot."""


def turns_of(agent: Agent[Any]) -> Action[AgentInput, AgentOutput, AgentStreamChunk, AgentInit] | None:
    """Give an action that runs an agent's turns as `turn_here` wants it; None: it is made otherwise than this module knows."""
    made = agent.bidi_fn
    if not isinstance(made, FunctionType) or NAMES_SNAPSHOT not in AgentRuntime.run.__code__.co_names:
        return None
    theirs: Mapping[str, Any] = made.__globals__
    if theirs.get("AgentRuntime") is not AgentRuntime or theirs.get("load_session") is not load_session:
        return None
    changed = {"AgentRuntime": _Runtime, "load_session": _load_session}
    ours = FunctionType(made.__code__, {**theirs, **changed}, made.__name__, None, made.__closure__)

    async def turn(data: AgentInput, ctx: ActionRunContext[AgentStreamChunk]) -> AgentOutput:
        async def inputs() -> AsyncIterator[AgentInput]:
            yield data

        output: AgentOutput = await ours(ctx.init, inputs(), ctx.send_chunk)
        return output

    return Action(kind=agent.kind, name=agent.name, fn=turn, description=agent.description, init_schema=AgentInit)


class _Admitted:
    """What loading a session asks of its store, to whom somebody else's snapshots do not exist."""

    def __init__(self, store: Any, turn: Turn) -> None:
        self._store = store
        self._admits = turn.admits

    async def get_snapshot(self, **lookup: Any) -> SessionSnapshot | None:
        found: SessionSnapshot | None = await self._store.get_snapshot(**lookup)
        if found is None or await self._admits(found.snapshot_id):
            return found
        # As of one that is unknown. Not None: a session would begin anew, and its owner go on with that.
        named = lookup.get("snapshot_id") or lookup.get("session_id")
        raise GenkitError(status="NOT_FOUND", message=f"Snapshot {named!r} not found")


async def _load_session(*, store: Any, **options: Any) -> Any:
    admitted: Any = None if store is None else _Admitted(store, turn_here.get())
    return await load_session(store=admitted, **options)


class _Runtime(AgentRuntime):
    def __init__(self, **options: Any) -> None:
        self._turn = turn_here.get()
        self._is_detached = False
        super().__init__(**options)
        self._name_snapshot()

    def _name_snapshot(self) -> None:
        if self._turn.snapshot is not None:
            setattr(self.session_runner, NAMES_SNAPSHOT, self._turn.snapshot)

    async def reset_custom_patch_turn(self) -> None:  # as a turn begins, which takes the name
        await super().reset_custom_patch_turn()
        self._name_snapshot()  # for `run` as well, which may come to it when the turn has ended

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
                turn.result = result = await fn(session_runner, ctx)
            except BaseException as error:
                turn.raised = error
                if turn.failure is not None:  # of which alone is told
                    self._log("an agent's function failed after its turn", error)
                raise
            finally:
                forwarding.cancel()
            return result

        if turn.snapshot is not None:
            await turn.load((await self.session.state()).session_id)
        try:
            return await super().run(fn=heard, client_inputs=client_inputs)
        except BaseException:  # cancelled; or its store has failed, and its function goes on
            await turn.cancel()
            raise

    async def emit_turn_end(self, finish_reason: AgentFinishReason | None = None) -> str | None:
        if finish_reason == AgentFinishReason.FAILED:
            self._turn.failure = failure = sys.exception()
            self._turn.last_good = self.session_runner.last_good_state
            self._log("a turn failed", failure)
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

    def _log(self, what: str, failure: BaseException | None) -> None:
        # What it raises because it was stopped says nothing.
        expected = self._turn.stop.is_set() or isinstance(failure, StreamkeepError)
        logger.log(logging.DEBUG if expected else logging.ERROR, "agent %s: %s", self.name, what, exc_info=failure)
