"""Genkit's agents: their turns as the work of durable streams, and the calls beside them, `getSnapshot` and `abort`.

A turn is a run as a flow's is. A detached turn is answered with its snapshot as soon as it has begun, and goes on as a stream. Its id is
that snapshot's: so it is read, resumed and stopped as any other. The stream is open before the snapshot is stored, so whose it is is known
wherever that can be seen.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Final, TypeGuard

import anyio
from genkit.exp.agent import (
    Agent,
    AgentFinishReason,
    AgentInit,
    AgentInput,
    AgentOutput,
    AgentResult,
    SessionSnapshot,
    SessionState,
    SnapshotStatus,
)
from genkit.plugin_api import Action, ActionKind, is_dev_environment
from pydantic import ValidationError

from .._input import StreamInput
from .._manager import StreamManager
from ..errors import STATUSES, InvalidArgumentError, PublicError, StreamNotFoundError
from ..events import hidden_error, shown_info
from ..http import access
from ..http.app import Admits, Detached, Output
from ..http.runner import keep_place
from ..wire import GenkitRequest
from .genkit import Answered, FlowWork, output_of, plain, run_action, told, trace_of

logger: Final = logging.getLogger("streamkeep")

PENDING: Final = "pending"
MODEL: Final = "model"
CANCEL_SECONDS: Final = 4.0
"""How long an agent's function may take to end when it is cancelled."""


class Turn:
    """One request's turn.

    Args:
        admits: says which snapshots it may go on from.
        stop: set when the turn is to end; it sets the `abort_signal` of the agent's function.
        send: takes the chunks, as they are sent.
        snapshot: the id that its snapshot will have, if it is detached.

    Attributes:
        failure: what the turn has raised.
        last_good: the state before a turn that has failed.
        result: what the agent's function has given.
        raised: what the agent's function has raised.
        session: the id of a detached turn's session.
        loaded: that session is loaded.
        may_begin: a detached turn may begin.
        over: a detached turn has ended, and its snapshot says how.
    """

    def __init__(
        self, admits: Admits, stop: anyio.Event, send: Callable[[object], object], *, snapshot: str | None = None
    ) -> None:
        self.admits = admits
        self.stop = stop
        self.send = send
        self.snapshot = snapshot
        self.failure: BaseException | None = None
        self.last_good: SessionState | None = None
        self.result: AgentResult | None = None
        self.raised: BaseException | None = None
        self.session: str | None = None
        self.loaded = anyio.Event()
        self.may_begin = anyio.Event()
        self.over = anyio.Event()
        self._task: asyncio.Task[Any] | None = None

    def take(self, chunk: object) -> None:
        """Take a chunk."""
        self.send(plain(chunk))

    async def load(self, session: str | None) -> None:
        """Note a detached turn's session, and return when the turn may begin."""
        self.session = session
        self.loaded.set()
        await self.may_begin.wait()

    @property
    def raised_beside_its_turn(self) -> BaseException | None:
        """What the agent's function has raised, where no turn has failed by it, and it was not cancelled."""
        return None if self.failure is not None or isinstance(self.raised, asyncio.CancelledError) else self.raised

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
        self,
        request: GenkitRequest,
        context: Mapping[str, Any],
        admits: Admits,
        send_chunk: Callable[[object], object],
        stop: anyio.Event,
    ) -> Output:
        """See `Work.run`."""
        if self._turns is not None:
            return await self._run(Turn(admits, stop, send_chunk), request, context)
        named = _gone_on_from(request)
        if named is not None and self._agent.store is not None and not await admits(named):
            unknown = {"status": "NOT_FOUND", "message": f"Snapshot {named!r} not found"}
            return Output(_told({"finishReason": AgentFinishReason.FAILED, "error": unknown}, None))
        output = await self._flow.run(request, context, admits, send_chunk, stop)
        return Output(_told(output.value, None), output.headers)

    async def detach(self, request: GenkitRequest, context: Mapping[str, Any], admits: Admits) -> Detached | Output:
        """See `Work.detach`. When this returns, the session is loaded, and nothing is stored yet."""
        snapshot = str(uuid.uuid4())
        turn = Turn(admits, anyio.Event(), _drop, snapshot=snapshot)
        running = asyncio.create_task(self._run(turn, request, context))
        is_loaded = asyncio.create_task(turn.loaded.wait())
        try:
            await asyncio.wait({running, is_loaded}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _cancel(running)
            raise
        finally:
            is_loaded.cancel()
        if running.done():
            return running.result()  # it is refused, or raises
        work = _DetachedTurn(self._agent, self._abort, turn, snapshot, running, context)
        return Detached(work.answer, snapshot, work.produce, work.begun, work.abandon)

    async def _run(self, turn: Turn, request: GenkitRequest, context: Mapping[str, Any]) -> Output:
        assert self._turns is not None
        token = turn_here.set(turn)
        try:
            response = await run_action(self._turns, request, context, on_chunk=turn.take)
        finally:
            turn_here.reset(token)
        output = output_of(response)
        return Output(_told(output.value, turn.failure), output.headers)


class _DetachedTurn:
    """A detached turn, which is loaded, and begins when its stream is open."""

    def __init__(
        self,
        agent: Agent[Any],
        abort: "AbortCall",
        turn: Turn,
        snapshot: str,
        running: asyncio.Task[Output],
        context: Mapping[str, Any],
    ) -> None:
        self._agent = agent
        self._abort = abort
        self._turn = turn
        self._snapshot = snapshot
        self._running = running
        self._context = context
        self.answer = plain(
            AgentOutput(session_id=turn.session, snapshot_id=snapshot, finish_reason=AgentFinishReason.DETACHED)
        )

    async def begun(self) -> Output:
        """See `Detached.begun`."""
        await asyncio.wait({self._running})
        if self._running.cancelled():
            raise PublicError("CANCELLED", "the turn was stopped before it had begun")
        output = self._running.result()
        if output.value != self.answer:
            raise RuntimeError(f"agent {self._agent.name}: a detached turn was not answered by its snapshot {self._snapshot}")
        return output

    async def abandon(self) -> None:
        """See `Detached.abandon`."""
        await _cancel(self._running)

    async def produce(self, stream: StreamInput, stop: anyio.Event) -> object:
        """See `Detached.produce`."""
        self._turn.send = stream.write_soon
        self._turn.may_begin.set()
        stopping = asyncio.create_task(self._stop_at(stop))
        try:
            await self.begun()
            await self._turn.over.wait()
        except asyncio.CancelledError:
            self._turn.send = _drop
            with anyio.move_on_after(CANCEL_SECONDS):
                await self._turn.cancel()
                await _cancel(self._running)
                if stop.is_set():
                    await asyncio.wait({stopping})  # its store may be slow
            raise
        except Exception:  # it did not begin
            await self._turn.cancel()
            raise
        finally:
            stopping.cancel()
        return await self._output()

    async def _output(self) -> object:
        """Give what the turn has come to, as the output of a turn that is not detached.

        PublicError: it was aborted. RuntimeError: its store does not say how it ended, as Genkit leaves it when saving that fails. Else
        what the agent's function has raised, if that is not the turn's failure.
        """
        turn, raised = self._turn, self._turn.raised_beside_its_turn
        found = None
        try:
            found = await _snapshot_of(self._agent, {"snapshot_id": self._snapshot}, self._context)
        except Exception:
            if raised is None:
                raise
        if found is not None and found.status == SnapshotStatus.ABORTED:
            raise PublicError("CANCELLED", "the turn was aborted")
        if raised is not None:
            raise told(raised) if isinstance(raised, Exception) else raised
        if found is None or found.status not in (SnapshotStatus.COMPLETED, SnapshotStatus.FAILED):
            raise RuntimeError(
                f"agent {self._agent.name}: the snapshot {self._snapshot} does not say how its turn ended; see above in the log"
            )
        output = _failed_output(turn) if found.status == SnapshotStatus.FAILED else _completed_output(turn)
        output.session_id, output.snapshot_id = turn.session, self._snapshot
        output.finish_reason, output.error = found.finish_reason, found.error
        return _told(plain(output), turn.failure)

    async def _stop_at(self, stop: anyio.Event) -> None:
        """End it when it is to stop, and has begun: its snapshot is aborted, and its function is told."""
        await stop.wait()
        await asyncio.wait({self._running})
        try:
            await self._abort.abort(self._snapshot, self._context)
        except Exception:
            logger.exception("agent %s: the snapshot %s could not be aborted", self._agent.name, self._snapshot)
        self._turn.stop.set()


def _completed_output(turn: Turn) -> AgentOutput:
    result = turn.result or AgentResult()
    return AgentOutput(message=result.message, artifacts=[*(result.artifacts or [])])


def _failed_output(turn: Turn) -> AgentOutput:
    """Give what an attached turn that fails gives: what was there before it, or else what the function has given.

    Genkit's may give the question as the answer.
    """
    result, last_good = turn.result or AgentResult(artifacts=[]), turn.last_good or SessionState()
    message = last_good.messages[-1] if last_good.messages else result.message
    if message is not None and message.role != MODEL:
        message = None
    return AgentOutput(message=message, artifacts=last_good.artifacts or result.artifacts)


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})


def _gone_on_from(request: GenkitRequest) -> str | None:
    """Give the snapshot that a request names to go on from."""
    with suppress(ValidationError):
        return AgentInit.model_validate(request.init).snapshot_id
    return None


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
        response = await _look_up(self._agent, _lookup_in(request.data), context)
        found: SessionSnapshot | None = response.response
        if found is None:
            return self.not_found(request)
        return Output(_told(plain(found), None), trace_of(response), about=found.snapshot_id)

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
        response = await self.abort(snapshot, context)
        if response.response is None:
            return self.not_found(request)
        status = str(response.response)
        if status == PENDING:
            with suppress(StreamNotFoundError):
                await streams.cancel(snapshot)  # its turn may run in another process
        return Output({"snapshotId": snapshot, "status": status}, trace_of(response))

    def not_found(self, request: GenkitRequest) -> Output:
        """See `Call.not_found`."""
        return Output({"snapshotId": _snapshot_in(request.data), "status": None})

    async def abort(self, snapshot: str, context: Mapping[str, Any]) -> Answered:
        """Abort a pending snapshot. The response says how it was before; None: there is none."""

        async def abort() -> object:
            return await self._agent.abort_snapshot_data(snapshot)

        action = Action(kind=ActionKind.AGENT_ABORT, name=self._agent.name, fn=abort)
        return await action.run(context=dict(context))


async def _snapshot_of(agent: Agent[Any], lookup: Mapping[str, str], context: Mapping[str, Any]) -> SessionSnapshot | None:
    found: SessionSnapshot | None = (await _look_up(agent, lookup, context)).response
    return found


async def _look_up(agent: Agent[Any], lookup: Mapping[str, str], context: Mapping[str, Any]) -> Answered:
    """Look a snapshot up in the agent's store, in an action, from where the store has the context."""

    async def look_up() -> SessionSnapshot | None:
        return await agent.get_snapshot_data(**lookup)

    action = Action(kind=ActionKind.AGENT_SNAPSHOT, name=agent.name, fn=look_up)
    return await action.run(context=dict(context))


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
