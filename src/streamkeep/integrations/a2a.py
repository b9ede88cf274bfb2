"""A2A's tasks as streams, so that whoever subscribes to one has all of it, in any process. For the official SDK, `a2a-sdk`.

The SDK's client says nothing of where it was: `SubscribeToTask` begins with the task as it stands, then come the events. So what is kept
of a task in the app's `TaskStore` says how far into its streams it goes, and what is sent behind it begins there. A task has a stream
for each of its turns: from a message of the user's until the agent waits for the next one, or has ended.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from datetime import timedelta
from functools import wraps
from types import TracebackType
from typing import Any, Final, Self, TypedDict, TypeVar, Unpack

import anyio

from .._durations import check_durations
from .._extras import needed_by

with needed_by(__name__, "a2a"):
    from a2a.server.agent_execution import AgentExecutor, RequestContext, RequestContextBuilder
from a2a.server.cluster import ConcurrentTaskModificationError
from a2a.server.context import ServerCallContext
from a2a.server.events import Event, EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.request_handlers.request_handler import RequestHandler, validate_request_params
from a2a.server.tasks import PushNotificationConfigStore, PushNotificationSender, TaskStore
from a2a.types import (
    AgentCard,
    CancelTaskRequest,
    SubscribeToTaskRequest,
    Task,
    TaskState,
)
from a2a.utils.errors import (
    A2AError,
    InternalError,
    TaskNotCancelableError,
    TaskNotFoundError,
    UnsupportedOperationError,
)

from .._manager import StreamManager
from ..events import shown_info
from ._a2a_events import has_ended, status_event, take_place
from ._a2a_tasks import END_SECONDS, Run, Tasks

__all__ = ["StreamRequestHandler"]

logger: Final = logging.getLogger("streamkeep")

STOP_SECONDS: Final = 5.0
"""How long agents may take to end when they are cancelled because the handler is left."""


Handler = TypeVar("Handler", bound=type[RequestHandler])


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


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    """Give a method of a handler that tells clients no more than that, whether it gives an answer or events."""

    async def answer(given: Awaitable[object]) -> object:
        with _told():
            return await given

    async def each(given: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        with _told():
            async with aclosing(given) as events:
                async for event in events:
                    yield event

    @wraps(method)
    def call(*args: object, **kwargs: object) -> object:
        given = method(*args, **kwargs)
        return each(given) if isinstance(given, AsyncGenerator) else answer(given)

    return call


def _telling_all(handler: Handler) -> Handler:
    """Do so for all that the SDK's routes may call of a handler: also what a later SDK adds."""
    for name in dir(RequestHandler):
        if name.startswith("on_"):
            setattr(handler, name, _telling(getattr(handler, name)))
    return handler


@_telling_all
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
        push = options.get("push_sender")
        self._tasks = Tasks(self._streams, task_store, None if push is None else push.send_notification)
        check_durations(drain=drain)
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

    @validate_request_params
    async def on_cancel_task(self, params: CancelTaskRequest, context: ServerCallContext) -> Task | None:
        """See the SDK's, which asks the agent's `cancel` wherever it was asked itself: here only where the agent is."""
        try:
            if await self._tasks.is_elsewhere(params.id, context):
                return (await self._tasks.cancel(params.id, context)).task
            run = self._tasks.run_of(params.id)
            task: Task | None = await super().on_cancel_task(params, context)
            if run is not None and run.turn is not None and task is not None and not run.has_said_end:
                await self._tasks.tell(task, run.turn.place)
        except ConcurrentTaskModificationError:
            seen = await self._tasks.look(params.id, context)
        else:
            return task
        if seen is None:
            raise TaskNotFoundError
        if seen.task.status.state == TaskState.TASK_STATE_CANCELED:
            return seen.task  # by somebody who was faster
        raise TaskNotCancelableError

    @validate_request_params
    async def on_subscribe_to_task(
        self, params: SubscribeToTaskRequest, context: ServerCallContext
    ) -> AsyncGenerator[Event, None]:
        """Give the task as it stands, then each event behind that, until it has ended.

        Also where the agent runs in this process: what the SDK does there gives some events twice, and ends with a client that is slow.
        """
        if not self._agent_card.capabilities.streaming:
            raise UnsupportedOperationError(message="Streaming is not supported by the agent")
        seen = await self._tasks.look(params.id, context)
        if seen is None:
            raise TaskNotFoundError
        if seen.has_ended:
            state = TaskState.Name(seen.task.status.state)
            raise UnsupportedOperationError(message=f"Task {params.id} is in terminal state: {state}")
        async with aclosing(self._tasks.follow(seen, context)) as events:
            async for event in events:
                yield event


class _Executor(AgentExecutor):
    """The agent, told when somebody else has ended its task."""

    def __init__(self, agent: AgentExecutor, tasks: Tasks) -> None:
        self._agent = agent
        self._tasks = tasks

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        for related in context.related_tasks:
            take_place(related)  # of the app's store, which a builder of contexts may have asked
        run = await self._tasks.begin_run(context)
        queue = _Counting(event_queue, run)
        has_returned = False
        stop = _Stop(self._agent, context, queue, run, self._tasks)
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
        run = self._tasks.run_of(context.task_id or "")
        await self._agent.cancel(context, event_queue if run is None else _Counting(event_queue, run))


class _Stop:
    """Cancels an agent when another process asks for it, as the SDK does where it is asked to: first by the agent's own `cancel`."""

    def __init__(self, agent: AgentExecutor, context: RequestContext, queue: EventQueue, run: Run, tasks: Tasks) -> None:
        self._agent = agent
        self._context = context
        self._queue = queue
        self._run = run
        self._tasks = tasks
        self._has_begun = False
        self._has_returned = anyio.Event()

    @asynccontextmanager
    async def around(self) -> AsyncGenerator[None, None]:
        agent = asyncio.current_task()
        assert agent is not None
        watch = asyncio.create_task(self._when_cancelled(agent))
        try:
            yield
        finally:
            self._has_returned.set()
            if not self._has_begun:
                watch.cancel()
            try:
                await asyncio.wait([watch], timeout=2 * END_SECONDS)
            finally:
                watch.cancel()

    async def _when_cancelled(self, agent: asyncio.Task[Any]) -> None:
        await self._tasks.until_cancelled(self._run)
        self._has_begun = True
        try:
            with anyio.move_on_after(END_SECONDS) as scope:
                await self._agent.cancel(self._context, self._queue)
            if scope.cancelled_caught:
                logger.warning("task %s: the agent's `cancel` took longer than %g seconds", self._context.task_id, END_SECONDS)
        except Exception:
            logger.exception("task %s: the agent's `cancel` failed", self._context.task_id)
        finally:
            if not self._has_returned.is_set():
                agent.cancel()
            with anyio.move_on_after(END_SECONDS):
                await self._has_returned.wait()
            # If the task has been ended already, the SDK finds out when it stores an event, and tells who listens.
            if not self._run.has_said_end:
                event = status_event(self._context.task_id, self._context.context_id, TaskState.TASK_STATE_CANCELED)
                with anyio.move_on_after(END_SECONDS):
                    await self._queue.enqueue_event(event)


class _Counting(EventQueue):
    """The SDK's queue; it counts what the agent puts into it."""

    def __init__(self, queue: EventQueue, run: Run) -> None:
        self._queue = queue
        self._run = run

    async def enqueue_event(self, event: Event) -> None:
        self._run.queued += 1
        self._run.has_said_end |= has_ended(event)
        await self._queue.enqueue_event(event)

    def __getattr__(self, name: str) -> object:  # what the SDK's has besides: `is_closed`, say
        return getattr(self._queue, name)
