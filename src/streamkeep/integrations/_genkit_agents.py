"""Genkit's agents: their turns as the work of durable streams, and the calls beside them, `getSnapshot` and `abort`.

A turn is a run as a flow's is. A detached turn is answered with its snapshot as soon as it has begun, and goes on as a stream. Its id is
that snapshot's: so it is read, resumed and stopped as any other.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Final, TypeGuard

import anyio
from genkit.exp.agent import Agent, AgentInput, AgentOutput, SessionSnapshot, SnapshotStatus
from genkit.plugin_api import Action, ActionKind, is_dev_environment
from pydantic import ValidationError

from .._input import StreamInput
from .._manager import StreamManager
from ..errors import STATUSES, InvalidArgumentError, PublicError, StreamNotFoundError
from ..events import hidden_error, shown_info
from ..http import access
from ..http.app import STOP_SECONDS, Detached, Output
from ..http.runner import keep_place
from ..wire import GenkitRequest
from .genkit import FlowWork, output_of, plain, run_action

logger: Final = logging.getLogger("streamkeep")

DETACHED: Final = "detached"
PENDING: Final = "pending"
CANCEL_SECONDS: Final = 4.0
"""How long an agent's function may take to end when it is cancelled."""


class Turn:
    """One request's turn.

    Args:
        stop: set when the turn is to end; it sets the `abort_signal` of the agent's function.
        send: takes the chunks, as they are sent.

    Attributes:
        failure: what the turn has raised.
        over: a detached turn has ended, and its snapshot says how.
    """

    def __init__(self, stop: anyio.Event, send: Callable[[object], object]) -> None:
        self.stop = stop
        self.send = send
        self.failure: BaseException | None = None
        self.over = anyio.Event()
        self._task: asyncio.Task[Any] | None = None

    def take(self, chunk: object) -> None:
        """Take a chunk."""
        self.send(plain(chunk))

    def runs_here(self) -> None:
        """Note that the task that calls this is the agent's function's."""
        self._task = asyncio.current_task()

    async def cancel(self) -> None:
        """Cancel the agent's function, and return when it has ended, or takes too long. Until it ends its stream's place is taken."""
        if self._task is not None and not self._task.done():
            give_back = keep_place()
            self._task.add_done_callback(lambda _: give_back())
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=CANCEL_SECONDS)


turn_here: Final[ContextVar[Turn]] = ContextVar("streamkeep_turn")


def is_agent(action: Action[Any, Any, Any, Any]) -> TypeGuard[Agent[Any]]:
    """Say whether an action is an agent."""
    return isinstance(action, Agent)


class AgentWork:
    """An agent's turns, one for each request."""

    def __init__(self, agent: Agent[Any]) -> None:
        self._agent = agent
        self._flow = FlowWork(agent)
        self._turns = _turns_of(agent)
        self._abort = AbortCall(agent)
        if self._turns is None:
            logger.warning(
                "the agent %s is made otherwise than streamkeep knows: its turns go on when they are stopped, and keep no chunks"
                " when they are detached",
                agent.name,
            )

    def check(self, request: GenkitRequest) -> None:
        """See `Work.check`."""
        self._flow.check(request)
        if self._agent.store is None and self.detaches(request):
            raise PublicError(
                "FAILED_PRECONDITION", f"the agent {self._agent.name} has no store, and so no turn can be detached"
            )

    def detaches(self, request: GenkitRequest) -> bool:
        """See `Work.detaches`."""
        if self._turns is None:
            return False
        with suppress(ValidationError):
            return bool(AgentInput.model_validate(request.data).detach)
        return False

    async def run(
        self, request: GenkitRequest, context: Mapping[str, Any], send_chunk: Callable[[object], object], stop: anyio.Event
    ) -> Output:
        """See `Work.run`."""
        if self._turns is None:
            output = await self._flow.run(request, context, send_chunk, stop)
            return Output(_told(output.value, None), output.headers)
        return await self._run(Turn(stop, send_chunk), request, context)

    async def detach(self, request: GenkitRequest, context: Mapping[str, Any]) -> Detached | Output:
        """See `Work.detach`."""
        early: list[object] = []
        turn = Turn(anyio.Event(), early.append)
        output = await self._run(turn, request, context)
        answer: Any = output.value
        snapshot = answer.get("snapshotId")
        if answer.get("finishReason") != DETACHED or snapshot is None:
            return output

        async def abandon() -> None:
            turn.send = _drop
            stopping = asyncio.create_task(self._stop(turn, snapshot, context))
            try:
                with anyio.move_on_after(STOP_SECONDS):
                    await turn.over.wait()
            finally:
                with anyio.move_on_after(CANCEL_SECONDS, shield=True):
                    await turn.cancel()
                    await asyncio.wait({stopping})  # its store may be slow
                stopping.cancel()

        async def produce(stream: StreamInput, stop: anyio.Event) -> object:
            stopping = asyncio.create_task(self._stop_at(stop, turn, snapshot, context))
            try:
                while early:
                    await stream.write(early.pop(0))
                turn.send = stream.write_soon
                await turn.over.wait()
            except asyncio.CancelledError:
                turn.send = _drop
                with anyio.move_on_after(CANCEL_SECONDS):
                    await turn.cancel()
                    if stop.is_set():
                        await asyncio.wait({stopping})  # its store may be slow
                raise
            except Exception:  # of a stream that is written no more, or of its storage
                await abandon()
                raise
            finally:
                stopping.cancel()
            return _told(await self._output(snapshot, context), turn.failure)

        return Detached(answer, snapshot, produce, abandon)

    async def _run(self, turn: Turn, request: GenkitRequest, context: Mapping[str, Any]) -> Output:
        assert self._turns is not None
        token = turn_here.set(turn)
        try:
            response = await run_action(self._turns, request, context, on_chunk=turn.take)
        finally:
            turn_here.reset(token)
        output = output_of(response)
        return Output(_told(output.value, turn.failure), output.headers)

    async def _output(self, snapshot: str, context: Mapping[str, Any]) -> object:
        """Give what a detached turn has come to, as the output of a turn that is not.

        PublicError: it was aborted. RuntimeError: its store does not say how it ended, as Genkit leaves it when saving that fails.
        """
        found: SessionSnapshot | None = await _snapshot_of(self._agent, {"snapshot_id": snapshot}, context)
        if found is not None and found.status == SnapshotStatus.ABORTED:
            raise PublicError("CANCELLED", "the turn was aborted")
        if found is None or found.state is None or found.status not in (SnapshotStatus.COMPLETED, SnapshotStatus.FAILED):
            raise RuntimeError(
                f"agent {self._agent.name}: the snapshot {snapshot} does not say how its turn ended; see above in the log"
            )
        messages = found.state.messages
        output = AgentOutput(
            session_id=found.session_id,
            snapshot_id=snapshot,
            message=messages[-1] if messages else None,
            artifacts=[*(found.state.artifacts or [])],
            finish_reason=found.finish_reason,
            error=found.error,
        )
        return plain(output)

    async def _stop_at(self, stop: anyio.Event, turn: Turn, snapshot: str, context: Mapping[str, Any]) -> None:
        await stop.wait()
        await self._stop(turn, snapshot, context)

    async def _stop(self, turn: Turn, snapshot: str, context: Mapping[str, Any]) -> None:
        """End a detached turn: its snapshot is aborted, and its function is told."""
        try:
            await self._abort.abort(snapshot, context)
        except Exception:
            logger.exception("agent %s: the snapshot %s could not be aborted", self._agent.name, snapshot)
        turn.stop.set()


def _turns_of(agent: Agent[Any]) -> Action[Any, Any, Any, Any] | None:
    try:
        from ._genkit_turns import turns_of
    except ImportError:  # of a name that is not public
        return None
    return turns_of(agent)


class SnapshotCall:
    """What `getSnapshot` answers: `{"snapshotId": …}` or `{"sessionId": …}` has it, or a text, which is a snapshot's id."""

    action: access.Action = "read"

    def __init__(self, agent: Agent[Any]) -> None:
        self._agent = agent

    def about(self, request: GenkitRequest) -> str | None:
        """See `Call.about`."""
        return _lookup_in(request.data).get("snapshot_id")

    async def run(self, request: GenkitRequest, context: Mapping[str, Any], streams: StreamManager) -> Output:  # noqa: ARG002
        """See `Call.run`."""
        found = await _snapshot_of(self._agent, _lookup_in(request.data), context)
        return self.not_found(request) if found is None else Output(_told(plain(found), None), about=found.snapshot_id)

    def not_found(self, request: GenkitRequest) -> Output:  # noqa: ARG002
        """See `Call.not_found`."""
        raise PublicError("NOT_FOUND", "snapshot not found")


class AbortCall:
    """What `abort` answers, and does to a detached turn: `{"snapshotId": …}`, or a text, names it."""

    action: access.Action = "stop"

    def __init__(self, agent: Agent[Any]) -> None:
        self._agent = agent

    def about(self, request: GenkitRequest) -> str | None:
        """See `Call.about`."""
        return _snapshot_in(request.data)

    async def run(self, request: GenkitRequest, context: Mapping[str, Any], streams: StreamManager) -> Output:
        """See `Call.run`. The output says how the turn was before: only a pending one is aborted."""
        snapshot = _snapshot_in(request.data)
        status = await self.abort(snapshot, context)
        if status == PENDING:
            with suppress(StreamNotFoundError):
                await streams.cancel(snapshot)  # its turn may run in another process
        return Output({"snapshotId": snapshot, "status": status})

    def not_found(self, request: GenkitRequest) -> Output:
        """See `Call.not_found`."""
        return Output({"snapshotId": _snapshot_in(request.data), "status": None})

    async def abort(self, snapshot: str, context: Mapping[str, Any]) -> str | None:
        """Abort a pending snapshot, and say how it was before; None: there is none."""

        async def abort() -> object:
            return await self._agent.abort_snapshot_data(snapshot)

        action = Action(kind=ActionKind.AGENT_ABORT, name=self._agent.name, fn=abort)
        status: object = (await action.run(context=dict(context))).response
        return None if status is None else str(status)


async def _snapshot_of(agent: Agent[Any], lookup: Mapping[str, str], context: Mapping[str, Any]) -> SessionSnapshot | None:
    """Look a snapshot up in the agent's store, in an action, from where the store has the context."""

    async def look_up() -> SessionSnapshot | None:
        return await agent.get_snapshot_data(**lookup)

    action = Action(kind=ActionKind.AGENT_SNAPSHOT, name=agent.name, fn=look_up)
    found: SessionSnapshot | None = (await action.run(context=dict(context))).response
    return found


def _lookup_in(data: object) -> dict[str, str]:
    named = {"snapshot_id": _id_in(data, "snapshotId", "snapshot_id"), "session_id": _id_in(data, "sessionId", "session_id")}
    lookup = {name: text for name, text in named.items() if text is not None}
    if isinstance(data, str):
        lookup = {"snapshot_id": _checked(data)}
    if len(lookup) != 1:
        raise InvalidArgumentError('a snapshot is asked for by either "snapshotId" or "sessionId"')
    return lookup


def _snapshot_in(data: object) -> str:
    snapshot = _checked(data) if isinstance(data, str) else _id_in(data, "snapshotId", "snapshot_id")
    if snapshot is None:
        raise InvalidArgumentError('what is to be aborted is named by "snapshotId"')
    return snapshot


def _id_in(data: object, *names: str) -> str | None:
    """Give the first of these that is there, as `genkit_fastapi` does: an empty one is not."""
    values = [data[name] for name in names if data.get(name)] if isinstance(data, dict) else []
    return _checked(values[0]) if values else None


def _checked(named: object) -> str:
    if not isinstance(named, str) or not named.strip():
        raise InvalidArgumentError("an id is a text, and not an empty one")
    return named


def _told(output: object, failure: BaseException | None) -> object:
    """Give a turn's output, or a snapshot, with what may be told of its error: its text only where that was raised to be public."""
    if not isinstance(output, dict) or not isinstance(error := output.get("error"), dict) or is_dev_environment():
        return output
    status = STATUSES.get(str(error.get("status")), "INTERNAL")
    info = hidden_error(status, "") if failure is None else shown_info(failure)
    details = {} if info.details is None else {"details": info.details}
    return {**output, "error": {"status": info.status, "message": info.message, **details}}


def _drop(_chunk: object) -> None:
    """Take a chunk that nobody can have any more."""
