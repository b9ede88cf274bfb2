"""A2A's tasks as streams, so that whoever subscribes to one has all of it, in any process. For the official SDK, `a2a-sdk`.

The SDK's client says nothing of where it was: `SubscribeToTask` begins with the task as it stands, then come the events. So what is kept
of a task in the app's `TaskStore` says how far into its streams it goes, and what is sent behind it begins there. A task has a stream
for each of its turns: from a message of the user's until the agent waits for the next one, or has ended.
"""

import asyncio
import json
import logging
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Final, Self, TypedDict, Unpack

import anyio

try:
    from a2a.server.agent_execution import AgentExecutor, RequestContext, RequestContextBuilder
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "streamkeep.integrations.a2a needs a2a-sdk: pip install 'streamkeep[a2a]'", name=error.name
    ) from error
from a2a.server.agent_execution.active_task import INTERRUPTED_TASK_STATES, TERMINAL_TASK_STATES
from a2a.server.cluster import (
    ConcurrentTaskModificationError,
    StoredTask,
    TaskEventStream,
    TaskVersion,
    VersionedEvent,
    VersionedTaskStore,
)
from a2a.server.context import ServerCallContext
from a2a.server.events import Event, EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.request_handlers.request_handler import validate_request_params
from a2a.server.tasks import PushNotificationConfigStore, PushNotificationSender, TaskStore
from a2a.server.tasks.task_manager import append_artifact_to_task
from a2a.types import (
    AgentCard,
    CancelTaskRequest,
    GetTaskRequest,
    ListTasksRequest,
    ListTasksResponse,
    Message,
    Part,
    Role,
    SendMessageRequest,
    StreamResponse,
    SubscribeToTaskRequest,
    Task,
    TaskArtifactUpdateEvent,
    TaskState,
    TaskStatus,
    TaskStatusUpdateEvent,
)
from a2a.utils.errors import A2AError, InternalError, TaskNotFoundError, UnsupportedOperationError
from a2a.utils.proto_utils import to_stream_response
from google.protobuf import json_format

from .._input import StreamInput
from .._listing import StreamInfo
from .._manager import StreamManager
from ..errors import (
    InvalidArgumentError,
    LimitExceededError,
    StorageError,
    StreamAlreadyExistsError,
    StreamCompletedError,
    StreamInputClosedError,
    StreamkeepError,
    StreamNotFoundError,
    StreamTakenOverError,
)
from ..events import ErrorInfo, StreamEventType, shown_info

logger: Final = logging.getLogger("streamkeep")

KEY: Final = "streamkeep"
"""What a task that is stored has in its metadata to say how far it goes; nobody is shown it."""

PLACE: Final = re.compile(r"(a2a~[0-9a-f]{32})/([0-9]{1,9})/([0-9]{1,16})")

STOPPED: Final = ErrorInfo("ABORTED", "the agent was stopped before the task had ended")
CANCELED: Final = ErrorInfo("CANCELLED", "the task was canceled")
MESSAGES: Final = {
    "ABORTED": STOPPED.message,
    "CANCELLED": CANCELED.message,
    "NOT_FOUND": "nothing is known of the agent's run any more",
}
LOST: Final = (StreamCompletedError, StreamTakenOverError, StreamNotFoundError, StreamInputClosedError)
UNFIT: Final = (LimitExceededError, InvalidArgumentError, json_format.SerializeToJsonError)
LOOK_SECONDS: Final = 30.0
"""How often who waits for a task's next turn looks at the task itself."""
STOP_SECONDS: Final = 5.0
"""How long agents may take to end when they are cancelled because the handler is left."""
END_SECONDS: Final = 10.0
"""How long the ends of all tasks may take to be stored when the handler is left, and an agent's own `cancel` when another process asks."""


class Options(TypedDict, total=False):
    """What the SDK's `DefaultRequestHandler` takes besides; see there."""

    push_config_store: PushNotificationConfigStore
    push_sender: PushNotificationSender
    request_context_builder: RequestContextBuilder
    extended_agent_card: AgentCard
    extended_card_modifier: Callable[[AgentCard, ServerCallContext], Awaitable[AgentCard]]
    push_url_validator: Callable[[str], Awaitable[bool]]
    validate_input_modes: bool
    interrupted_task_timeout: float


class StreamRequestHandler(DefaultRequestHandler):
    """The SDK's request handler, over a StreamManager.

        handler = StreamRequestHandler("sqlite:///streams.db", agent, task_store, card)
        app = Starlette(routes=create_jsonrpc_routes(handler, "/"), lifespan=handler.lifespan)

    Several processes may serve the same tasks, if they have one storage and one store of tasks. In each of them, `SubscribeToTask` gives
    the task as it stands and then each event behind that once, however slow the client is, until the task has ended; `CancelTask` reaches
    the agent at once, wherever it runs; and a message for a task that is being worked on waits for its turn. The agent goes on when its
    clients leave. Of a task whose process was killed, all are told that it has failed, some seconds later.

    Who may see a task is what the store says: nothing of a task is shown to whom the store does not give it.

    Args:
        streams: a manager, or its URL. A stream is kept for the manager's `ttl` from the end of its turn on.
        agent_executor: the agent.
        task_store: where the app keeps its tasks; any of the SDK's that has no versions. A stored task has one more entry in its metadata.
        agent_card: what the agent says of itself.
        drain: how long agents that run may go on when the handler is left; then their tasks have failed.
        options: what else the SDK's handler takes.
    """

    def __init__(
        self,
        streams: StreamManager | str,
        agent_executor: AgentExecutor,
        task_store: TaskStore,
        agent_card: AgentCard,
        *,
        drain: timedelta = timedelta(seconds=10),
        **options: Unpack[Options],
    ) -> None:
        self._streams = StreamManager.connect(streams) if isinstance(streams, str) else streams
        self._tasks = _Tasks(self._streams, task_store)
        self._drain_seconds = drain.total_seconds()
        self._ours = AsyncExitStack()
        executor = _Executor(agent_executor, self._tasks)
        super().__init__(executor, self._tasks, agent_card, event_stream=self._tasks, **options)

    @asynccontextmanager
    async def lifespan(self, _app: object) -> AsyncGenerator[None, None]:
        """Run while an app runs; in the form in which Starlette and FastAPI want a lifespan."""
        async with self:
            yield

    async def __aenter__(self) -> Self:
        if not self._streams.is_running:
            await self._ours.enter_async_context(self._streams)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the agents that run, at most `drain`; then end them, and store that their tasks have failed."""
        async with self._ours:
            try:
                with anyio.move_on_after(self._drain_seconds):
                    await self._tasks.drained()
            finally:
                with anyio.CancelScope(shield=True):
                    await self.aclose()

    async def aclose(self) -> None:
        """End the agents that run here, and store that their tasks have failed. One that takes no cancellation is left alone."""
        closing = asyncio.create_task(super().aclose())  # which waits for each of them
        try:
            await asyncio.wait([closing], timeout=STOP_SECONDS)
        finally:
            if not closing.done():
                logger.warning("agents go on, which were cancelled %g seconds ago; their tasks have failed", STOP_SECONDS)
            with anyio.move_on_after(END_SECONDS):
                await self._tasks.end_all()

    async def on_get_task(self, params: GetTaskRequest, context: ServerCallContext) -> Task | None:
        """See the SDK's."""
        with _told():
            task: Task | None = await super().on_get_task(params, context)
            return task

    async def on_list_tasks(self, params: ListTasksRequest, context: ServerCallContext) -> ListTasksResponse:
        """See the SDK's."""
        with _told():
            page: ListTasksResponse = await super().on_list_tasks(params, context)
            return page

    async def on_cancel_task(self, params: CancelTaskRequest, context: ServerCallContext) -> Task | None:
        """See the SDK's."""
        with _told():
            task: Task | None = await super().on_cancel_task(params, context)
            return task

    async def on_message_send(self, params: SendMessageRequest, context: ServerCallContext) -> Message | Task:
        """See the SDK's."""
        with _told():
            answer: Message | Task = await super().on_message_send(params, context)
            return answer

    async def on_message_send_stream(
        self, params: SendMessageRequest, context: ServerCallContext
    ) -> AsyncGenerator[Event, None]:
        """See the SDK's."""
        with _told():
            async with aclosing(super().on_message_send_stream(params, context)) as events:
                async for event in events:
                    yield event

    @validate_request_params
    async def on_subscribe_to_task(
        self, params: SubscribeToTaskRequest, context: ServerCallContext
    ) -> AsyncGenerator[Event, None]:
        """Give the task as it stands, then each event behind that, until it has ended.

        Also where the agent runs in this process: what the SDK does there gives some events twice, and ends with a client that is slow.
        """
        if not self._agent_card.capabilities.streaming:
            raise UnsupportedOperationError(message="Streaming is not supported by the agent")
        with _told():
            seen = await self._tasks.look(params.id, context)
            if seen is None:
                raise TaskNotFoundError
            if seen.has_ended:
                state = TaskState.Name(seen.task.status.state)
                raise UnsupportedOperationError(message=f"Task {params.id} is in terminal state: {state}")
            async with aclosing(self._tasks.follow(seen, context)) as events:
                async for event in events:
                    yield event


@dataclass(frozen=True, slots=True)
class _Place:
    """How far into its streams a task goes: so many events into the stream of a turn."""

    root: str
    turn: int
    tail: int

    @property
    def stream(self) -> str:
        return f"{self.root}.{self.turn}"

    @property
    def next(self) -> "_Place":
        """The beginning of the next turn."""
        return _Place(self.root, self.turn + 1, 0)

    def behind(self, events: int) -> "_Place":
        return _Place(self.root, self.turn, self.tail + events)


class _Version(TaskVersion):
    """A place, as the SDK compares them."""

    __slots__ = ("place",)

    def __init__(self, place: _Place) -> None:
        super().__init__(f"{place.root}/{place.turn:09}/{place.tail:016}")
        self.place = place


@dataclass(frozen=True, slots=True)
class _Seen:
    """A task as it stands.

    Attributes:
        task: the task.
        place: what it has in it; None: it was stored without us. Between two turns, the beginning of the next one.
        is_open: whether that turn is open: its agent runs somewhere.
    """

    task: Task
    place: _Place | None
    is_open: bool = False

    @property
    def has_ended(self) -> bool:
        return _has_ended(self.task)

    @property
    def version(self) -> TaskVersion:
        return TaskVersion.MISSING if self.place is None else _Version(self.place)


@dataclass(eq=False, slots=True)
class _Turn:
    """A turn that is written here.

    Attributes:
        place: how far it has come.
        seen: how far the SDK knows of it; what it was told has failed may be stored all the same.
        is_run: an agent runs, and more will come; else it ends with its first event.
        last: the task as it was stored last, and for whom.
    """

    place: _Place
    seen: _Place
    writer: StreamInput
    is_run: bool = False
    last: tuple[Task, ServerCallContext] | None = None
    lock: anyio.Lock = field(default_factory=anyio.Lock)


@dataclass(eq=False, slots=True)
class _Run:
    """An agent that runs here.

    Attributes:
        turn: what it writes; None before its first event.
        queued: how many of its events the SDK has not stored yet.
        is_over: whether it has returned.
        scope: cancelled when its turn goes on in another stream.
    """

    turn: _Turn | None = None
    queued: int = 0
    is_over: bool = False
    begun: anyio.Event = field(default_factory=anyio.Event)
    ended: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    async def until_cancelled(self) -> None:
        """Return when somebody else has ended its turn."""
        await self.begun.wait()
        while (turn := self.turn) is not None:
            with anyio.CancelScope() as self.scope:
                await turn.writer.cancelled.wait()
                return


class _Tasks(VersionedTaskStore, TaskEventStream):
    """The app's tasks, and the streams of their turns.

    An event is stored in the turn's stream, then the task in the app's store. So a stored task may be behind, never ahead: who looks at it
    applies what its stream has more.
    """

    def __init__(self, streams: StreamManager, store: TaskStore) -> None:
        self._streams = streams
        self._store = store
        self._turns: dict[str, _Turn] = {}  # by root
        self._runs: dict[str, _Run] = {}  # by task

    # What the SDK asks of a store

    async def get(self, task_id: str, context: ServerCallContext) -> StoredTask | None:
        seen = await self.look(task_id, context)
        return None if seen is None else StoredTask(seen.task, seen.version)

    async def list(self, params: ListTasksRequest, context: ServerCallContext) -> ListTasksResponse:
        page = ListTasksResponse()
        page.CopyFrom(await self._store.list(params, context))
        for task in page.tasks:
            _take_place(task)
        return page

    async def delete(self, task_id: str, context: ServerCallContext) -> None:
        await self._store.delete(task_id, context)

    async def save(
        self,
        task: Task,
        *,
        event: Event | None,
        prev: Task | None,  # noqa: ARG002 - of the SDK's interface
        prev_version: TaskVersion,
        context: ServerCallContext,
    ) -> TaskVersion:
        place = prev_version.place if isinstance(prev_version, _Version) else None
        is_cancel = task.status.state == TaskState.TASK_STATE_CANCELED
        turn = None if place is None else self._turns.get(place.root)
        if turn is None and is_cancel:
            return await self._cancel(task, event, context)
        if turn is None:
            turn = await self._begin_at(task, place, context)
        async with turn.lock:
            if not is_cancel and place is not None and place != turn.seen:
                raise ConcurrentTaskModificationError(task.id)
            return await self._write(turn, task, event, context)

    async def _begin_at(self, task: Task, place: _Place | None, context: ServerCallContext) -> _Turn:
        """Begin a turn behind what was seen of a task, if nothing has come since."""
        if place is not None:
            seen = await self.look(task.id, context)
            if seen is None or seen.has_ended or seen.is_open or seen.place != place:
                raise ConcurrentTaskModificationError(task.id)
        if (turn := await self._begin(place)) is None:
            raise ConcurrentTaskModificationError(task.id)
        run = self._runs.get(task.id)
        if run is not None and run.turn is None:
            _attach(run, turn)
        return turn

    async def _cancel(self, task: Task, event: Event | None, context: ServerCallContext) -> TaskVersion:
        """Cancel a task that does not run here. Concurrent…Error: it has ended already."""
        while (seen := await self.look(task.id, context)) is not None and not seen.has_ended:
            if seen.is_open and seen.place is not None:
                try:
                    await self._streams.cancel(seen.place.stream)
                except StreamNotFoundError:
                    continue
                seen = await self.look(task.id, context)
                if seen is not None and seen.task.status.state == TaskState.TASK_STATE_CANCELED:
                    return seen.version
            elif (turn := await self._begin(seen.place)) is not None:
                async with turn.lock:
                    return await self._write(turn, task, event, context)
        raise ConcurrentTaskModificationError(task.id)

    async def _begin(self, place: _Place | None) -> _Turn | None:
        """Begin a turn; None: somebody else has."""
        place = place or _Place(f"a2a~{uuid.uuid4().hex}", 0, 0)
        try:
            writer = await self._streams.open(place.stream)
        except StreamAlreadyExistsError:
            return None
        turn = self._turns[place.root] = _Turn(place, place, writer)
        return turn

    async def _write(self, turn: _Turn, task: Task, event: Event | None, context: ServerCallContext) -> TaskVersion:
        """Store an event, then the task with it. Concurrent…Error: the turn is somebody else's, or was ended by one."""
        is_last = _has_ended(task) or not turn.is_run
        try:
            try:
                record = _json_of(task if event is None else event)
                await (turn.writer.done(record) if is_last else turn.writer.write(record))
            except UNFIT:
                await self._go_on_in_another(turn, task, context, is_last=is_last)
            else:
                turn.place = turn.place.next if is_last else turn.place.behind(1)
        except LOST:
            self._drop(turn)
            raise ConcurrentTaskModificationError(task.id) from None
        except StorageError:
            self._give_up(turn)
            raise
        if is_last:
            self._drop(turn)
        stored = _with_place(task, turn.place)
        turn.last = stored, context
        await self._store.save(stored, context)
        turn.seen = turn.place
        return _Version(turn.place)

    async def _go_on_in_another(self, turn: _Turn, task: Task, context: ServerCallContext, *, is_last: bool) -> None:
        """Go on behind an event that does not fit into the stream. Who follows is told to look at the task, so that is stored first."""
        old, place = turn.writer, turn.place.next
        new = await self._streams.open(place.stream)
        turn.place, turn.writer = place.behind(1), new
        try:
            await self._store.save(_with_place(task, turn.place), context)
            await new.write(None)
            if is_last:
                await new.done()
                turn.place = place.next
        finally:
            try:
                await old.done()
            except LOST:
                new.end_soon(CANCELED)  # by somebody who could not know of this one
                raise
        for run in self._runs.values():
            if run.turn is turn:
                run.scope.cancel()

    def _drop(self, turn: _Turn) -> None:
        if self._turns.get(turn.place.root) is turn:
            del self._turns[turn.place.root]

    def _give_up(self, turn: _Turn) -> None:
        """End a turn of which nothing more can be stored now; that is stored in the background, as soon as it can be."""
        self._drop(turn)
        turn.writer.end_soon(STOPPED)

    # What the SDK asks of an event stream

    async def publish(self, task_id: str, event: VersionedEvent) -> None:  # noqa: ARG002 - it was stored before
        run = self._runs.get(task_id)
        if run is not None:
            run.queued -= 1
            await self._end_if_over(task_id, run)

    def subscribe(self, task_id: str, *, after: TaskVersion) -> AsyncGenerator[VersionedEvent, None]:
        raise NotImplementedError("StreamRequestHandler follows tasks by itself")

    async def destroy(self, task_id: str) -> None:
        pass

    # Runs

    async def begin_run(self, context: RequestContext) -> _Run:
        """Note that an agent is about to run; of a task that there is, when no other turn of it is open anywhere."""
        task_id = _id_of(context)
        run = _Run()
        while (seen := await self.look(task_id, context.call_context)) is not None and seen.place is not None:
            if seen.has_ended:
                raise UnsupportedOperationError(message=f"Task {task_id} has ended")
            if (stale := self._turns.get(seen.place.root)) is not None:
                await self._end(stale)
            elif seen.is_open:
                await self._until_over(seen.place)
            elif (turn := await self._begin(seen.place)) is not None:
                _attach(run, turn)
                context.current_task = seen.task
                break
        self._runs[task_id] = run
        return run

    async def end_run(self, context: RequestContext, run: _Run, *, has_returned: bool) -> None:
        """Note that it has ended. If it was cancelled, or has failed, its turn ends with what the SDK stores of that, if it does."""
        run.is_over = True
        task_id = _id_of(context)
        if has_returned:
            await self._end_if_over(task_id, run)
            self._look_after(task_id, run, run.queued + 1)
        else:
            self._forget(task_id, run)
            if run.turn is not None:
                self._end_if_left(run.turn, None)

    def _end_if_left(self, turn: _Turn, place: _Place | None) -> None:
        """Give a turn up when nobody stores how it has ended: the SDK does not if who asked it to cancel has gone meanwhile."""
        if self._turns.get(turn.place.root) is not turn:
            return
        if turn.place == place and not turn.lock.locked():
            self._give_up(turn)
        else:
            asyncio.get_running_loop().call_later(END_SECONDS, self._end_if_left, turn, turn.place)

    async def _end_if_over(self, task_id: str, run: _Run) -> None:
        if not run.is_over or run.queued > 0:
            return
        self._forget(task_id, run)
        if run.turn is not None:
            try:
                await self._end(run.turn)
            except StreamkeepError as error:
                logger.warning("stream %s: the end of its turn could not be stored: %s", run.turn.place.stream, error)
            except Exception:  # the store's; what it has is behind by no event
                logger.exception("task %s: that its turn is over could not be stored", task_id)

    def _look_after(self, task_id: str, run: _Run, queued: int) -> None:
        """Give a run up when its events are stored no more: the SDK has dropped them, after an error."""
        if run.ended.is_set():
            return
        if run.queued < queued or (run.turn is not None and run.turn.lock.locked()):
            asyncio.get_running_loop().call_later(END_SECONDS, self._look_after, task_id, run, run.queued)
            return
        self._forget(task_id, run)
        if run.turn is not None and self._turns.get(run.turn.place.root) is run.turn:
            self._give_up(run.turn)

    def _forget(self, task_id: str, run: _Run) -> None:
        if self._runs.get(task_id) is run:
            del self._runs[task_id]
        run.ended.set()

    async def _end(self, turn: _Turn) -> None:
        """End a turn whose agent has returned and whose task has not ended."""
        async with turn.lock:
            if self._turns.get(turn.place.root) is not turn:
                return
            self._drop(turn)
            try:
                await turn.writer.done()
            except LOST:
                return
            if turn.last is not None:
                task, context = turn.last
                await self._store.save(_with_place(task, turn.place.next), context)

    async def _until_over(self, place: _Place) -> None:
        try:
            async with self._streams.subscribe(place.stream, _after(place.tail)) as events:
                async for _ in events:
                    pass
        except StreamNotFoundError:
            pass

    async def drained(self) -> None:
        """Return when no agent runs."""
        while self._runs:
            await next(iter(self._runs.values())).ended.wait()

    async def end_all(self) -> None:
        """Store of all tasks that are worked on here that they have failed."""
        for turn in list(self._turns.values()):
            self._drop(turn)
            try:
                await turn.writer.error(STOPPED)
                if turn.last is not None:
                    task, context = turn.last
                    await self.look(task.id, context)
            except LOST:
                pass
            except Exception:
                logger.exception("stream %s: that its task has failed could not be stored", turn.place.stream)

    # Reading

    async def look(self, task_id: str, context: ServerCallContext) -> _Seen | None:
        """Give a task as it stands: what the store has, and what its streams have more. That its agent has died is stored."""
        stored = await self._store.get(task_id, context)
        if stored is None:
            return None
        task = Task()
        task.CopyFrom(stored)
        place = _take_place(task)
        if place is None or _has_ended(task):
            return _Seen(task, place)
        before = place
        while True:
            info = await self._info(place.stream)
            if info is None and (place.tail == 0 or task.status.state in INTERRUPTED_TASK_STATES):
                error = None
            elif info is None:
                if await self._has_gone_on(task_id, before, context):
                    return await self.look(task_id, context)
                error = "NOT_FOUND"
            else:
                place, error = await self._caught_up(task, place, info), info.error
                if info.status == "open":
                    return _Seen(task, place, is_open=True)
            if _has_ended(task) or error is not None or (info is None and place.tail == 0):
                break
            place = place.next
        _end_by(task, place, error)
        if error is not None or (place != before and _has_ended(task)):
            await self._store.save(_with_place(task, place), context)
        return _Seen(task, place)

    async def _has_gone_on(self, task_id: str, place: _Place, context: ServerCallContext) -> bool:
        """Say whether the store has another place of a task now: since that was read its stream may have ended, and been removed."""
        stored = await self._store.get(task_id, context)
        if stored is None:
            return True
        task = Task()
        task.CopyFrom(stored)
        return _take_place(task) != place

    async def _info(self, stream: str) -> StreamInfo | None:
        try:
            return await self._streams.info(stream)
        except StreamNotFoundError:
            return None

    async def _caught_up(self, task: Task, place: _Place, info: StreamInfo) -> _Place:
        """Apply to a task what a stream has more."""
        if info.tail <= place.tail:
            return place
        async with self._streams.subscribe(place.stream, _after(place.tail), follow=False) as events:
            async for event in events:
                if event.offset >= info.tail:
                    break
                place = place.behind(1)
                if event.type is not StreamEventType.ERROR and (update := _event_of(event.data)) is not None:
                    _apply(task, update)
        return place

    async def follow(self, seen: _Seen, context: ServerCallContext) -> AsyncGenerator[Event, None]:
        """Give a task, then each event behind that, until it has ended."""
        yield seen.task
        while seen.place is not None and not seen.has_ended:
            async with aclosing(self._behind(seen.task.id, seen.place, context)) as events:
                async for event in events:
                    yield event
                    if _has_ended(event):
                        return
            # There is a gap, or an error: what it has come to is given in place of what the client has.
            again = await self.look(seen.task.id, context)
            if again is None:
                return
            seen = again
            yield seen.task

    async def _behind(self, task_id: str, place: _Place, context: ServerCallContext) -> AsyncGenerator[Event, None]:
        """Give each event behind a place, over all turns; return where there is a gap, or an error."""
        while await self._there(task_id, place, context):
            try:
                info = await self._streams.info(place.stream)
                async with self._streams.subscribe(place.stream, _after(min(place.tail, info.tail))) as events:
                    async for event in events:
                        if event.type is StreamEventType.ERROR:
                            return
                        update = _event_of(event.data)
                        if event.offset >= place.tail and update is not None:
                            yield update
                        elif event.offset >= place.tail and event.type is StreamEventType.CHUNK:
                            return
            except StreamNotFoundError:
                return
            place = place.next

    async def _there(self, task_id: str, place: _Place, context: ServerCallContext) -> bool:
        """Wait for a turn to begin; False if it does not: the task has ended, or gone on elsewhere."""
        if await self._info(place.stream) is not None:
            return True
        async with self._streams.storage.watch(place.stream) as doorbell:
            while await self._info(place.stream) is None:
                seen = await self.look(task_id, context)
                if seen is None or seen.has_ended or seen.place != place:
                    return False
                with anyio.move_on_after(LOOK_SECONDS):
                    await doorbell.wait()
        return True


class _Executor(AgentExecutor):
    """The agent, told when somebody else has ended its task."""

    def __init__(self, agent: AgentExecutor, tasks: _Tasks) -> None:
        self._agent = agent
        self._tasks = tasks

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        run = await self._tasks.begin_run(context)
        queue = _Counting(event_queue, run)
        has_returned = False
        stop = _Stop(self._agent, context, queue, run)
        try:
            async with stop.around():
                await self._execute(context, queue)
            has_returned = True
        finally:
            await self._tasks.end_run(context, run, has_returned=has_returned)

    async def _execute(self, context: RequestContext, queue: EventQueue) -> None:
        try:
            await self._agent.execute(context, queue)
        except asyncio.CancelledError as error:
            here = asyncio.current_task()
            if here is None or here.cancelling():
                raise
            # Of a task that it has awaited, say. The SDK would take it for a cancellation, and nothing would be said of the task.
            raise RuntimeError("the agent has raised a CancelledError, and nobody has cancelled it") from error

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        await self._agent.cancel(context, event_queue)


class _Stop:
    """Cancels an agent whose turn was ended by somebody else, as the SDK does where it is asked to: first by the agent's own `cancel`."""

    def __init__(self, agent: AgentExecutor, context: RequestContext, queue: EventQueue, run: _Run) -> None:
        self._agent = agent
        self._context = context
        self._queue = queue
        self._run = run
        self._has_begun = False
        self._is_over = False

    @asynccontextmanager
    async def around(self) -> AsyncGenerator[None, None]:
        agent = asyncio.current_task()
        assert agent is not None
        watch = asyncio.create_task(self._when_cancelled(agent))
        try:
            yield
        finally:
            if not self._has_begun:
                watch.cancel()
            try:
                await asyncio.wait([watch], timeout=END_SECONDS)
            finally:
                self._is_over = True
                watch.cancel()

    async def _when_cancelled(self, agent: asyncio.Task[Any]) -> None:
        await self._run.until_cancelled()
        self._has_begun = True
        try:
            with anyio.move_on_after(END_SECONDS) as scope:
                await self._agent.cancel(self._context, self._queue)
            if scope.cancelled_caught:
                logger.warning("task %s: the agent's `cancel` took longer than %g seconds", self._context.task_id, END_SECONDS)
        except Exception:
            logger.exception("task %s: the agent's `cancel` failed", self._context.task_id)
        finally:
            # The SDK finds out when it stores an event that the task has ended, and tells who listens.
            status = TaskStatus(state=TaskState.TASK_STATE_CANCELED)
            event = TaskStatusUpdateEvent(task_id=self._context.task_id, context_id=self._context.context_id, status=status)
            with anyio.move_on_after(END_SECONDS):
                await self._queue.enqueue_event(event)
            if not self._is_over:
                agent.cancel()


class _Counting(EventQueue):
    """The SDK's queue; it counts what the agent puts into it."""

    def __init__(self, queue: EventQueue, run: _Run) -> None:
        self._queue = queue
        self._run = run

    async def enqueue_event(self, event: Event) -> None:
        self._run.queued += 1
        await self._queue.enqueue_event(event)


@contextmanager
def _told() -> Generator[None]:
    """Tell clients of what is no error of the protocol's as little as everywhere: the SDK would send them its text."""
    try:
        yield
    except A2AError:
        raise
    except Exception as error:
        logger.exception("a request of A2A's failed")
        raise InternalError(message=shown_info(error).message) from error


def _attach(run: _Run, turn: _Turn) -> None:
    run.turn, turn.is_run = turn, True
    run.begun.set()


def _id_of(context: RequestContext) -> str:
    assert context.task_id is not None
    return context.task_id


def _after(tail: int) -> int | None:
    return tail - 1 if tail else None


def _has_ended(event: Event) -> bool:
    return isinstance(event, Task | TaskStatusUpdateEvent) and event.status.state in TERMINAL_TASK_STATES


def _with_place(task: Task, place: _Place) -> Task:
    """Give a copy of a task that says how far it goes, whatever it has said before."""
    stored = Task()
    stored.CopyFrom(task)
    stored.metadata[KEY] = f"{place.root}/{place.turn}/{place.tail}"
    return stored


def _take_place(task: Task) -> _Place | None:
    """Take out of a stored task how far it goes."""
    found = PLACE.fullmatch(str(task.metadata[KEY])) if KEY in task.metadata else None
    if found is None:
        return None
    del task.metadata[KEY]
    if not task.metadata:
        task.ClearField("metadata")
    return _Place(found[1], int(found[2]), int(found[3]))


def _json_of(event: Event) -> dict[str, Any]:
    encoded: dict[str, Any] = json_format.MessageToDict(to_stream_response(event))
    return encoded


def _event_of(data: bytes) -> Event | None:
    """Give an event as it was stored; None: this is none."""
    stored = json.loads(data)
    if stored is None:
        return None
    response = json_format.ParseDict(stored, StreamResponse())
    event: Event = getattr(response, response.WhichOneof("payload") or "task")
    return event


def _apply(task: Task, event: Event) -> None:
    """Change a task as the SDK does by an event."""
    match event:
        case Task():
            task.CopyFrom(event)
        case TaskStatusUpdateEvent():
            _set_status(task, event.status)
            task.metadata.MergeFrom(event.metadata)
        case TaskArtifactUpdateEvent():
            append_artifact_to_task(task, event)
        case _:
            pass


def _end_by(task: Task, place: _Place, error: str | None) -> None:
    """End a task whose turn has ended in an error, if it has, and unless it had ended before."""
    if error is not None and not _has_ended(task):
        is_canceled = error == "CANCELLED"
        state = TaskState.TASK_STATE_CANCELED if is_canceled else TaskState.TASK_STATE_FAILED
        _set_status(task, _status(state, place, MESSAGES.get(error, STOPPED.message)))


def _set_status(task: Task, status: TaskStatus) -> None:
    if task.status.HasField("message"):
        task.history.append(task.status.message)
    task.status.CopyFrom(status)


def _status(state: TaskState, place: _Place, text: str) -> TaskStatus:
    # Who looks at it next gives it the same id; the stream's own is nobody's to know.
    message_id = uuid.uuid5(uuid.NAMESPACE_OID, place.stream)
    message = Message(message_id=str(message_id), role=Role.ROLE_AGENT, parts=[Part(text=text)])
    status = TaskStatus(state=state, message=message)
    status.timestamp.FromDatetime(datetime.now(UTC))
    return status
