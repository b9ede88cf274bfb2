"""`StreamRequestHandler`, called as the SDK's routes call it, where a client cannot bring about what is tested."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import anyio
import anyio.lowlevel
import httpx
import pytest
from a2a.auth.user import User
from a2a.client import Client, ClientConfig, ClientFactory
from a2a.helpers.proto_helpers import new_text_message
from a2a.server.agent_execution import AgentExecutor, RequestContext, SimpleRequestContextBuilder
from a2a.server.context import ServerCallContext
from a2a.server.events import Event, EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.request_handlers.request_handler import RequestHandler
from a2a.server.routes import create_jsonrpc_routes, create_rest_routes
from a2a.server.tasks import (
    InMemoryPushNotificationConfigStore,
    InMemoryTaskStore,
    PushNotificationEvent,
    PushNotificationSender,
    TaskStore,
    TaskUpdater,
)
from a2a.server.tasks.task_manager import append_artifact_to_task
from a2a.types import (
    AgentCapabilities,
    AgentCard,
    AgentInterface,
    AgentSkill,
    CancelTaskRequest,
    DeleteTaskPushNotificationConfigRequest,
    GetExtendedAgentCardRequest,
    GetTaskPushNotificationConfigRequest,
    GetTaskRequest,
    ListTaskPushNotificationConfigsRequest,
    ListTasksRequest,
    ListTasksResponse,
    Message,
    Part,
    Role,
    SendMessageRequest,
    SubscribeToTaskRequest,
    Task,
    TaskArtifactUpdateEvent,
    TaskPushNotificationConfig,
    TaskState,
    TaskStatusUpdateEvent,
)
from a2a.utils.errors import (
    InternalError,
    InvalidParamsError,
    TaskNotCancelableError,
    TaskNotFoundError,
    UnsupportedOperationError,
)
from starlette.applications import Starlette
from tests.http.servers import serving, until

from streamkeep import InMemoryStreamManager, Limits, PublicError, StreamManager
from streamkeep.http.response import ASGIApp
from streamkeep.integrations import _a2a_tasks, a2a
from streamkeep.integrations._a2a_events import STOPPED
from streamkeep.integrations.a2a import StreamRequestHandler
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

COMPLETED: Final = TaskState.TASK_STATE_COMPLETED
WORKING: Final = TaskState.TASK_STATE_WORKING
FAILED: Final = TaskState.TASK_STATE_FAILED
CANCELED: Final = TaskState.TASK_STATE_CANCELED
INPUT_REQUIRED: Final = TaskState.TASK_STATE_INPUT_REQUIRED
AUTH_REQUIRED: Final = TaskState.TASK_STATE_AUTH_REQUIRED

Work = Callable[[TaskUpdater, RequestContext], Any]


class Named(User):
    """Somebody."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def user_name(self) -> str:
        return self._name


def of(user: str = "ada") -> ServerCallContext:
    return ServerCallContext(user=Named(user))


@dataclass(eq=False, slots=True)
class Agent(AgentExecutor):
    """Does what it is given to do."""

    work: Work
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    canceled: int = 0

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        if context.current_task is None:
            task = Task(id=context.task_id, context_id=context.context_id)
            task.metadata.update(self.metadata)
            await event_queue.enqueue_event(task)
        await self.work(TaskUpdater(event_queue, context.task_id or "", context.context_id or ""), context)

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        self.canceled += 1


class SlowStore(InMemoryTaskStore):
    """A store that awaits, as a database's does."""

    async def save(self, task: Task, context: ServerCallContext) -> None:
        await anyio.sleep(0.002)
        await super().save(task, context)


def card() -> AgentCard:
    return AgentCard(
        name="answers",
        description="Answers",
        version="1",
        capabilities=AgentCapabilities(streaming=True),
        supported_interfaces=[AgentInterface(url="http://localhost/", protocol_binding="JSONRPC", protocol_version="1.0")],
        skills=[AgentSkill(id="answer", name="answer", description="Answers", tags=["text"])],
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
    )


@asynccontextmanager
async def handler_of(
    work: Work,
    *,
    streams: StreamManager | None = None,
    store: TaskStore | None = None,
    agent: Agent | None = None,
    drain: float = 0.0,
) -> AsyncGenerator[StreamRequestHandler]:
    handler = StreamRequestHandler(
        streams or InMemoryStreamManager(),
        agent or Agent(work),
        store or InMemoryTaskStore(),
        card(),
        drain=timedelta(seconds=drain),
    )
    async with handler:
        yield handler


def request(text: str = "go", task: Task | None = None) -> SendMessageRequest:
    message = new_text_message(text, role=Role.ROLE_USER)
    if task is not None:
        message.task_id, message.context_id = task.id, task.context_id
    return SendMessageRequest(message=message)


async def begun(handler: DefaultRequestHandler, context: ServerCallContext, task: Task | None = None) -> Task:
    """Send a message, and leave when its task is there."""
    asked = request(task=task)
    asked.configuration.return_immediately = True
    answer = await handler.on_message_send(asked, context)
    assert isinstance(answer, Task)
    return answer


@dataclass(eq=False, slots=True)
class View:
    """What a client makes of what it is sent."""

    task: Task | None = None
    events: int = 0

    async def follow(
        self, handler: DefaultRequestHandler, task_id: str, context: ServerCallContext, pause: float = 0.0
    ) -> None:
        async with aclosing(handler.on_subscribe_to_task(SubscribeToTaskRequest(id=task_id), context)) as events:
            async for event in events:
                self.take(event)
                if pause:
                    await anyio.sleep(pause)

    def take(self, event: Event) -> None:
        self.events += 1
        match event:
            case Task():
                self.task = Task()
                self.task.CopyFrom(event)
            case TaskStatusUpdateEvent():
                assert self.task is not None
                self.task.status.CopyFrom(event.status)
            case TaskArtifactUpdateEvent():
                assert self.task is not None
                append_artifact_to_task(self.task, event)
            case _:
                raise AssertionError(event)

    @property
    def said(self) -> list[str]:
        return said(self.task)

    @property
    def state(self) -> int:
        return -1 if self.task is None else self.task.status.state


def said(task: Task | None) -> list[str]:
    return [] if task is None else [part.text for artifact in task.artifacts for part in artifact.parts]


async def got(handler: DefaultRequestHandler, task_id: str, context: ServerCallContext) -> Task:
    task = await handler.on_get_task(GetTaskRequest(id=task_id), context)
    assert isinstance(task, Task)
    return task


async def tell(task: TaskUpdater, *words: str, first: bool = True) -> None:
    for number, word in enumerate(words):
        await task.add_artifact([Part(text=word)], artifact_id="answer", append=not first or number > 0)


NUMBERS: Final = [str(number) for number in range(200)]


async def say_numbers(task: TaskUpdater, _: RequestContext) -> None:
    for number, word in enumerate(NUMBERS):
        await task.add_artifact([Part(text=word)], artifact_id="answer", append=number > 0)
        await anyio.lowlevel.checkpoint()
    await task.complete()


async def test_who_comes_at_any_moment_has_each_event_once() -> None:
    views = [View() for _ in range(40)]
    context = of()
    async with handler_of(say_numbers, store=SlowStore()) as handler, anyio.create_task_group() as tasks:
        task = await begun(handler, context)
        for view in views:
            tasks.start_soon(view.follow, handler, task.id, context)
            await anyio.sleep(0.003)
    for view in views:
        assert view.said == NUMBERS
        assert view.state == COMPLETED


async def test_the_handler_of_the_sdk_alone_gives_events_twice() -> None:
    # A defect of theirs: `ActiveTask.subscribe` gives the task as it stands, and then events that are in it. When this fails, they have
    # mended it.
    views = [View() for _ in range(40)]
    context = of()
    handler = DefaultRequestHandler(Agent(say_numbers), SlowStore(), card())
    async with anyio.create_task_group() as tasks:
        task = await begun(handler, context)
        for view in views:
            tasks.start_soon(view.follow, handler, task.id, context)
            await anyio.sleep(0.003)
    assert any(len(view.said) > len(NUMBERS) for view in views)
    await handler.aclose()


MANY: Final = 1500


async def test_a_client_that_is_slow_loses_nothing() -> None:
    """The SDK's own queue has room for 1,024 events, and ends with who is behind by more."""
    may_end, context, view = anyio.Event(), of(), View()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        for number in range(MANY):
            await task.add_artifact([Part(text="x")], artifact_id=f"{number % 7}", append=number >= 7)
        await may_end.wait()
        await task.complete()

    async with handler_of(work) as handler:
        task = await begun(handler, context)
        async with aclosing(handler.on_subscribe_to_task(SubscribeToTaskRequest(id=task.id), context)) as events:
            view.take(await anext(events))
            await until(lambda: len(said(_stored(handler, task.id))) == MANY)
            may_end.set()
            async for event in events:
                view.take(event)
    assert len(view.said) == MANY
    assert view.state == COMPLETED


def _stored(handler: StreamRequestHandler, task_id: str) -> Task | None:
    store = handler._tasks._store
    assert isinstance(store, InMemoryTaskStore)
    tasks: dict[str, Task] = store._impl.tasks["ada"]
    return tasks.get(task_id)


@pytest.mark.parametrize(
    "limits",
    [Limits(max_event_bytes=1000), Limits(max_events=3), Limits(max_stream_bytes=2000)],
    ids=["event", "events", "bytes"],
)
async def test_what_does_not_fit_into_a_stream_is_given_with_the_task(limits: Limits) -> None:
    may_go_on, context, view, late = anyio.Event(), of(), View(), View()
    words = ["a", "b" * 3000, "c", "d" * 3000, "e", "f", "g" * 3000]

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, *words[:3])
        await may_go_on.wait()
        await tell(task, *words[3:], first=False)
        await task.complete(new_text_message("h" * 3000))

    streams = StreamManager(MemoryStorage(), limits=limits)
    async with _entered(streams), handler_of(work, streams=streams) as handler:
        task = await begun(handler, context)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(view.follow, handler, task.id, context)
            await until(lambda: len(view.said) == 3)
            tasks.start_soon(late.follow, handler, task.id, context)
            await until(lambda: len(late.said) == 3)
            may_go_on.set()
        kept = await got(handler, task.id, context)
    for known in (view.task, late.task, kept):
        assert said(known) == words
        assert known is not None
        assert known.status.state == COMPLETED


@asynccontextmanager
async def _entered(streams: StreamManager) -> AsyncGenerator[None]:
    async with streams._storage, streams:
        yield


async def test_a_turn_that_goes_on_in_another_stream_is_still_canceled() -> None:
    context, streams, store = of(), StreamManager(MemoryStorage(), limits=Limits(max_events=2)), InMemoryTaskStore()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a", "b", "c", "d", "e")
        await anyio.sleep_forever()

    agent = Agent(work)
    async with (
        _entered(streams),
        handler_of(work, agent=agent, streams=streams, store=store) as here,
        handler_of(work, streams=streams, store=store) as there,
    ):
        task = await begun(here, context)
        await until(lambda: len(said(_stored(here, task.id))) == 5)
        canceled = await there.on_cancel_task(CancelTaskRequest(id=task.id), context)
        assert canceled is not None
        await until(lambda: agent.canceled == 1)
        assert (await got(here, task.id, context)).status.state == CANCELED


async def test_a_task_is_nobody_elses() -> None:
    may_end, ada, eve = anyio.Event(), of("ada"), of("eve")

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "secret")
        await may_end.wait()
        await task.complete()

    streams = InMemoryStreamManager()
    async with handler_of(work, streams=streams) as handler:
        task = await begun(handler, ada)
        view = View()
        for stolen in (
            task.id,
            f"a2a~{task.id}",
            "",
            "\0",
            "../" + task.id,
            "é" * 999,
            next(info.id for info in await streams.list()),
        ):
            error = TaskNotFoundError if stolen else InvalidParamsError
            with pytest.raises(error):
                await view.follow(handler, stolen, eve)
            with pytest.raises(error):
                await got(handler, stolen, eve)
            with pytest.raises(error):
                await handler.on_cancel_task(CancelTaskRequest(id=stolen), eve)
        with pytest.raises(TaskNotFoundError):
            await handler.on_message_send(request(task=task), eve)
        assert view.events == 0
        assert (await got(handler, task.id, ada)).status.state not in {CANCELED, FAILED}
        may_end.set()
        await view.follow(handler, task.id, ada)
        assert view.state == COMPLETED


async def test_nobody_is_shown_what_a_stored_task_has_of_ours_nor_is_it_believed_from_others() -> None:
    """An agent may put into a task's metadata what its client has sent."""
    may_end, context, streams, store = anyio.Event(), of(), InMemoryStreamManager(), InMemoryTaskStore()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await may_end.wait()
        await task.update_status(WORKING, metadata={"streamkeep": f"{root}/0/0"})
        await task.complete()

    async with streams, handler_of(work, streams=streams, store=store) as handler:
        victim = await begun(handler, of("victim"))
        await until(lambda: "victim" in store._impl.tasks)
        root = next(iter(await streams.list())).id.rpartition(".")[0]
        agent = Agent(work, metadata={"streamkeep": f"{root}/0/0", "mine": "kept"})
        async with handler_of(work, agent=agent, streams=streams, store=store) as other:
            task = await begun(other, context)
            view = View()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(view.follow, other, task.id, context)
                await until(lambda: view.said == ["a"])
                may_end.set()
            kept = await got(other, task.id, context)
            listed = await other.on_list_tasks(ListTasksRequest(), context)
        assert dict(kept.metadata) == {"mine": "kept"}
        assert [dict(each.metadata) for each in listed.tasks] == [{"mine": "kept"}]
        assert victim.id != task.id


@pytest.mark.parametrize("forged", ["", "a/b/c", "a2a~" + "0" * 32 + "/0/0", "a2a~" + "0" * 32 + "/999999999/7"])
async def test_a_task_that_was_stored_without_us_can_be_read_and_gone_on_with(forged: str) -> None:
    context, store, view = of(), InMemoryTaskStore(), View()
    task = Task(id="old one/é", context_id="c")
    task.status.state = INPUT_REQUIRED
    if forged:
        task.metadata["streamkeep"] = forged
    await store.save(task, context)

    async def work(updater: TaskUpdater, _: RequestContext) -> None:
        await tell(updater, "a")
        await updater.complete()

    async with handler_of(work, store=store) as handler:
        assert (await got(handler, task.id, context)).status.state == INPUT_REQUIRED
        answer = await handler.on_message_send(request(task=task), context)
        assert isinstance(answer, Task)
        assert (answer.status.state, said(answer)) == (COMPLETED, ["a"])
        with pytest.raises(UnsupportedOperationError):
            await view.follow(handler, task.id, context)


async def test_an_agent_that_fails_has_failed_for_all(caplog: pytest.LogCaptureFixture) -> None:
    may_fail, context, view = anyio.Event(), of(), View()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await may_fail.wait()
        raise ValueError("secret")

    streams = InMemoryStreamManager()
    async with handler_of(work, streams=streams) as handler:
        task = await begun(handler, context)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(view.follow, handler, task.id, context)
            await until(lambda: view.said == ["a"])
            may_fail.set()
        assert (view.state, view.said) == (FAILED, ["a"])
        assert (await got(handler, task.id, context)).status.state == FAILED
        assert all(info.status != "open" for info in await streams.list())
    assert "secret" not in str(view.task)
    caplog.clear()


async def test_an_agent_may_wait_for_an_authorization_within_its_turn() -> None:
    may_go_on, context, view = anyio.Event(), of(), View()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await task.requires_auth()
        await may_go_on.wait()
        await tell(task, "a")
        await task.complete()

    async with handler_of(work) as handler:
        task = await begun(handler, context)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(view.follow, handler, task.id, context)
            await until(lambda: view.state == AUTH_REQUIRED)
            may_go_on.set()
    assert (view.state, view.said) == (COMPLETED, ["a"])


async def test_a_turn_that_has_ended_leaves_no_stream_open_and_outlives_its_streams() -> None:
    """Also where the agent has returned and said nothing of what it waits for."""
    context, store = of(), InMemoryTaskStore()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await task.start_work()

    async with InMemoryStreamManager(ttl=timedelta(0)) as streams:
        async with handler_of(work, streams=streams, store=store) as handler:
            task = await handler.on_message_send(request(), context)
            assert isinstance(task, Task)
            await streams.sweep()
            assert not list(await streams.list())
            assert (await got(handler, task.id, context)).status.state == WORKING
        async with handler_of(work, streams=streams, store=store) as handler:
            assert (await got(handler, task.id, context)).status.state == WORKING
            canceled = await handler.on_cancel_task(CancelTaskRequest(id=task.id), context)
            assert canceled is not None
            assert canceled.status.state == CANCELED
            with pytest.raises(TaskNotCancelableError):
                await handler.on_cancel_task(CancelTaskRequest(id=task.id), context)


async def test_an_agent_may_end_when_the_handler_is_left() -> None:
    may_end, context, store = anyio.Event(), of(), InMemoryTaskStore()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await may_end.wait()
        await task.complete()

    async with anyio.create_task_group() as tasks, handler_of(work, store=store, drain=20) as handler:
        task = await begun(handler, context)
        tasks.start_soon(_soon, may_end)
    stored = await store.get(task.id, context)
    assert stored is not None
    assert stored.status.state == COMPLETED


async def _soon(event: anyio.Event) -> None:
    await anyio.sleep(0.05)
    event.set()


async def test_what_runs_longer_than_the_handler_waits_has_failed() -> None:
    context, store = of(), InMemoryTaskStore()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await anyio.sleep_forever()

    async with InMemoryStreamManager() as streams:
        async with handler_of(work, store=store, streams=streams) as handler:
            task = await begun(handler, context)
        stored = await store.get(task.id, context)
        assert stored is not None
        assert stored.status.state == FAILED
        assert all(info.status != "open" for info in await streams.list())


async def test_a_message_in_answer_is_no_task() -> None:
    class Answering(AgentExecutor):
        async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
            await event_queue.enqueue_event(new_text_message("hello"))

        async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
            raise NotImplementedError

    streams = InMemoryStreamManager()
    async with StreamRequestHandler(streams, Answering(), InMemoryTaskStore(), card()) as handler:
        answer = await handler.on_message_send(request(), of())
        assert isinstance(answer, Message)
        assert not list(await streams.list())
        with anyio.fail_after(2):
            await handler._tasks.drained()


async def test_streams_that_are_gone_leave_no_task_working_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    """As with `memory://` and a store that lasts, when the process has ended."""
    caplog.set_level(logging.CRITICAL)
    context, store = of(), InMemoryTaskStore()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await anyio.sleep_forever()

    first, second = InMemoryStreamManager(), InMemoryStreamManager()
    async with handler_of(work, store=store, streams=first) as here, handler_of(work, store=store, streams=second) as there:
        task = await begun(here, context)
        await until(lambda: bool(said(_stored(here, task.id))))
        view = View()
        with pytest.raises(UnsupportedOperationError):
            await view.follow(there, task.id, context)
        assert (await got(there, task.id, context)).status.state == FAILED


@pytest.mark.parametrize("version", ["1.0", "0.3"])
@pytest.mark.parametrize("binding", ["JSONRPC", "HTTP+JSON"])
async def test_each_protocol_that_the_sdk_serves_over_http_is_served(binding: str, version: str) -> None:
    may_end, store, streams = anyio.Event(), InMemoryTaskStore(), InMemoryStreamManager()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await may_end.wait()
        await tell(task, "b", first=False)
        await task.complete()

    handler = StreamRequestHandler(streams, Agent(work), store, card())
    other = StreamRequestHandler(streams, Agent(work), store, card())
    view = View()
    async with streams, serving(app_of(handler)) as here, serving(app_of(other)) as there, httpx.AsyncClient() as http:
        at = {url: client_of(http, f"{url}/", binding, version) for url in (here, there)}
        updates = at[here].send_message(request())
        async for update in updates:
            view.take(getattr(update, update.WhichOneof("payload") or ""))
            if view.said:
                break
        assert view.task is not None
        async for update in at[there].subscribe(SubscribeToTaskRequest(id=view.task.id)):
            view.take(getattr(update, update.WhichOneof("payload") or ""))
            may_end.set()
    assert (view.state, view.said) == (COMPLETED, ["a", "b"])


def app_of(handler: StreamRequestHandler) -> ASGIApp:
    routes = [
        *create_jsonrpc_routes(handler, "/", enable_v0_3_compat=True),
        *create_rest_routes(handler, enable_v0_3_compat=True),
    ]
    app: Any = Starlette(routes=routes, lifespan=handler.lifespan)
    served: ASGIApp = app
    return served


def client_of(http: httpx.AsyncClient, url: str, binding: str, version: str) -> Client:
    known = card()
    known.supported_interfaces[0].MergeFrom(AgentInterface(url=url, protocol_binding=binding, protocol_version=version))
    return ClientFactory(ClientConfig(httpx_client=http, supported_protocol_bindings=[binding])).create(known)


async def test_the_answer_to_a_message_is_what_the_sdk_alone_ends_for_who_is_slow() -> None:
    # By their design (`EventQueueSource._deliver_to_sink`), and the client is not told; it subscribes.
    context, view = of(), View()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        for number in range(MANY):
            await task.add_artifact([Part(text="x")], artifact_id=f"{number % 7}", append=number >= 7)
        await anyio.sleep_forever()

    async with handler_of(work) as handler:
        async with aclosing(handler.on_message_send_stream(request(), context)) as events:
            view.take(await anext(events))
            assert view.task is not None
            task_id = view.task.id
            await until(lambda: len(said(_stored(handler, task_id))) == MANY)
            async for event in events:
                view.take(event)
        assert len(view.said) < MANY
        async with aclosing(handler.on_subscribe_to_task(SubscribeToTaskRequest(id=task_id), context)) as events:
            view.take(await anext(events))
        assert len(view.said) == MANY


class FailingStore(InMemoryTaskStore):
    """A store that fails, as a database's does that is away for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = 0

    async def save(self, task: Task, context: ServerCallContext) -> None:
        if self.fails:
            self.fails -= 1
            raise OSError("no database")
        await super().save(task, context)


@pytest.mark.parametrize("fails", [1, 2])
async def test_a_store_that_fails_leaves_nobody_waiting(fails: int) -> None:
    may_go_on, context, store, view = anyio.Event(), of(), FailingStore(), View()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await may_go_on.wait()
        await tell(task, "b", first=False)
        await task.complete()

    async with handler_of(work, store=store) as handler:
        task = await begun(handler, context)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(view.follow, handler, task.id, context)
            await until(lambda: view.said == ["a"])
            store.fails = fails
            may_go_on.set()
        assert view.state == FAILED
        assert (await got(handler, task.id, context)).status.state == FAILED


async def test_messages_for_one_task_in_two_processes_take_turns() -> None:
    context, store, streams, views = of(), InMemoryTaskStore(), InMemoryStreamManager(), [View(), View()]

    async def work(task: TaskUpdater, asked: RequestContext) -> None:
        await task.add_artifact([Part(text=asked.get_user_input())], artifact_id=asked.get_user_input())
        await (task.complete() if asked.get_user_input() == "end" else task.requires_input())

    async with (
        streams,
        handler_of(work, streams=streams, store=store) as here,
        handler_of(work, streams=streams, store=store) as there,
    ):
        task = await begun(here, context)
        async with anyio.create_task_group() as tasks:
            for view, handler in zip(views, (here, there), strict=True):
                tasks.start_soon(view.follow, handler, task.id, context)
            async with anyio.create_task_group() as messages:
                for number in range(10):
                    messages.start_soon((here, there)[number % 2].on_message_send, request(f"m{number}", task), context)
            await here.on_message_send(request("end", task), context)
        kept = await got(there, task.id, context)
        assert all(info.status != "open" for info in await streams.list())
    assert sorted(said(kept)) == sorted(["go", "end", *(f"m{number}" for number in range(10))])
    assert [view.said for view in views] == [said(kept)] * 2


@pytest.mark.parametrize("steps", range(0, 40, 4))
async def test_a_cancel_at_any_moment_is_the_end_or_comes_too_late_for_all(steps: int) -> None:
    context, store, streams, view = of(), InMemoryTaskStore(), InMemoryStreamManager(), View()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        for number in range(10):
            await task.add_artifact([Part(text=f"{number}")], artifact_id="answer", append=number > 0)
            await anyio.lowlevel.checkpoint()
        await task.complete()

    async with (
        streams,
        handler_of(work, streams=streams, store=store) as here,
        handler_of(work, streams=streams, store=store) as there,
    ):
        task = await begun(here, context)

        async def follow() -> None:
            try:
                await view.follow(there, task.id, context)
            except UnsupportedOperationError:
                view.task = await got(there, task.id, context)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            try:
                canceled = await there.on_cancel_task(CancelTaskRequest(id=task.id), context)
                assert canceled is not None
                expected = canceled.status.state
            except TaskNotCancelableError:
                expected = COMPLETED
        kept = await got(here, task.id, context)
    assert (view.state, view.said) == (kept.status.state, said(kept))
    assert kept.status.state == expected


@pytest.mark.parametrize("raises", [None, asyncio.CancelledError, OSError])
async def test_an_agent_is_canceled_from_another_process_whatever_its_own_cancel_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, raises: type[BaseException] | None
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(a2a, "END_SECONDS", 0.1)
    context, store, has_ended = of(), InMemoryTaskStore(), anyio.Event()

    class Hanging(Agent):
        async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
            if raises is not None:
                raise raises
            await anyio.sleep_forever()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        try:
            await anyio.sleep_forever()
        finally:
            has_ended.set()

    async with (
        InMemoryStreamManager() as streams,
        handler_of(work, agent=Hanging(work), streams=streams, store=store) as here,
        handler_of(work, streams=streams, store=store) as there,
    ):
        task = await begun(here, context)
        await until(lambda: said(_stored(here, task.id)) == ["a"])
        await there.on_cancel_task(CancelTaskRequest(id=task.id), context)
        with anyio.fail_after(5):
            await has_ended.wait()
        assert (await got(here, task.id, context)).status.state == CANCELED


async def test_an_agent_that_nobody_has_cancelled_has_failed_when_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Of a task of its own that was cancelled, and that it awaits."""
    caplog.set_level(logging.CRITICAL)
    context, view, may_fail = of(), View(), anyio.Event()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await may_fail.wait()
        child = asyncio.create_task(anyio.sleep_forever())
        child.cancel()
        await child

    async with handler_of(work) as handler:
        task = await begun(handler, context)
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(view.follow, handler, task.id, context)
                await until(lambda: view.said == ["a"])
                may_fail.set()
        assert (view.state, view.said) == (FAILED, ["a"])


async def test_a_task_that_was_half_canceled_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK ends the agent, and then stores that; who asks it to may be cut off between the two."""
    monkeypatch.setattr(_a2a_tasks, "END_SECONDS", 0.1)
    context, view, is_ending, may_end = of(), View(), anyio.Event(), anyio.Event()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        try:
            await anyio.sleep_forever()
        finally:
            is_ending.set()
            with anyio.CancelScope(shield=True):
                await may_end.wait()

    async with handler_of(work) as handler:
        task = await begun(handler, context)
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(view.follow, handler, task.id, context)
                await until(lambda: view.said == ["a"])
                canceling = asyncio.create_task(handler.on_cancel_task(CancelTaskRequest(id=task.id), context))
                await is_ending.wait()
                canceling.cancel()
                await asyncio.wait([canceling])
                may_end.set()
        assert view.state == FAILED
        assert (await got(handler, task.id, context)).status.state == FAILED


async def test_an_agent_that_takes_no_cancellation_holds_up_neither_the_end_nor_the_other_tasks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(a2a, "STOP_SECONDS", 0.1)
    context, store, may_end, agents = of(), InMemoryTaskStore(), anyio.Event(), list[asyncio.Task[Any]]()

    async def work(task: TaskUpdater, asked: RequestContext) -> None:
        await tell(task, "a")
        if asked.get_user_input() == "stubborn":
            agents.extend(each for each in asyncio.all_tasks() if each is asyncio.current_task())
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                if asked.get_user_input() != "stubborn":
                    raise

    asked = request("stubborn")
    asked.configuration.return_immediately = True
    async with InMemoryStreamManager() as streams:
        try:
            with anyio.fail_after(5):
                async with handler_of(work, streams=streams, store=store) as handler:
                    tasks = [await handler.on_message_send(asked, context), await begun(handler, context)]
                    ids = [task.id for task in tasks if isinstance(task, Task)]
                    await until(lambda: all(said(_stored(handler, id)) == ["a"] for id in ids))
        finally:
            may_end.set()
            await asyncio.wait(agents, timeout=5)
        for id in ids:
            stored = await store.get(id, context)
            assert stored is not None
            assert stored.status.state == FAILED
        assert all(info.status != "open" for info in await streams.list())
    assert "agents go on" in caplog.text


async def test_what_an_agent_or_a_store_raises_is_told_to_no_client(caplog: pytest.LogCaptureFixture) -> None:
    """The SDK sends its text. What an agent raises to be told is told: the protocol's errors, and ours that are public."""
    caplog.set_level(logging.CRITICAL)
    raised: list[Exception] = [ValueError("secret"), UnsupportedOperationError("told"), PublicError("UNAVAILABLE", "told")]

    class Broken(InMemoryTaskStore):
        async def get(self, task_id: str, context: ServerCallContext) -> Task | None:
            if task_id == "broken":
                raise OSError("secret")
            return await super().get(task_id, context)

    async def work(task: TaskUpdater, asked: RequestContext) -> None:
        await tell(task, "a")
        raise raised[int(asked.get_user_input())]

    handler = StreamRequestHandler(InMemoryStreamManager(), Agent(work), Broken(), card())
    async with serving(app_of(handler)) as url, httpx.AsyncClient() as http:

        async def answer(method: str, **params: object) -> str:
            body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
            return (await http.post(f"{url}/", json=body, headers={"A2A-Version": "1.0"})).text

        for method in ("SendMessage", "SendStreamingMessage"):
            for number, word in enumerate(["internal", "told", "told"]):
                message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": f"{number}"}]}
                text = await answer(method, message=message)
                assert "secret" not in text
                assert f'"{word}"' in text
        for method in ("GetTask", "CancelTask", "SubscribeToTask"):
            text = await answer(method, id="broken")
            assert "secret" not in text
            assert '"internal"' in text


async def test_the_id_of_a_stream_is_shown_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    context = of()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await anyio.sleep_forever()

    async with InMemoryStreamManager() as streams, handler_of(work, streams=streams) as handler:
        task = await begun(handler, context)
        await until(lambda: bool(said(_stored(handler, task.id))))
        (stream,) = [info.id for info in await streams.list()]
        await streams.cancel(stream)
        kept = await got(handler, task.id, context)
        assert kept.status.state == CANCELED
        assert kept.status.HasField("message")
        assert "a2a~" not in str(kept)


class Holding(InMemoryTaskStore):
    """A store whose next answer takes long, as one does whose process was suspended."""

    def __init__(self) -> None:
        super().__init__()
        self.hold, self.is_held, self.may_answer = False, anyio.Event(), anyio.Event()

    async def get(self, task_id: str, context: ServerCallContext) -> Task | None:
        task = await super().get(task_id, context)
        if self.hold:
            self.hold = False
            self.is_held.set()
            await self.may_answer.wait()
        return task


async def test_who_looks_at_a_task_for_long_does_not_store_that_it_has_failed() -> None:
    context, store, may_end = of(), Holding(), anyio.Event()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await may_end.wait()
        await task.complete()

    async with InMemoryStreamManager(ttl=timedelta(0)) as streams, handler_of(work, streams=streams, store=store) as handler:
        task = await begun(handler, context)
        await until(lambda: bool(said(_stored(handler, task.id))))
        async with anyio.create_task_group() as tasks:
            store.hold = True
            looked = list[Task]()

            async def look() -> None:
                looked.append(await got(handler, task.id, context))

            tasks.start_soon(look)
            await store.is_held.wait()
            may_end.set()
            await until(lambda: (_stored(handler, task.id) or Task()).status.state == COMPLETED)
            await streams.sweep()
            assert not list(await streams.list())
            store.may_answer.set()
        assert [task.status.state for task in looked] == [COMPLETED]
        assert (await got(handler, task.id, context)).status.state == COMPLETED


def _states(store: InMemoryTaskStore) -> list[int]:
    return [task.status.state for task in store._impl.tasks["ada"].values()]


async def test_a_store_that_fails_at_the_end_of_a_turn_fails_no_task(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_a2a_tasks, "RETRY_SECONDS", 0.05)
    context, store, fails = of(), FailingStore(), anyio.Event()

    async def work(task: TaskUpdater, asked: RequestContext) -> None:
        if asked.get_user_input() == "end":
            await task.complete()
            return
        await task.start_work()
        await until(lambda: "ada" in store._impl.tasks and _states(store) == [WORKING])
        caplog.set_level(logging.CRITICAL)
        store.fails = 1
        fails.set()

    async with handler_of(work, store=store) as handler:
        task = await begun(handler, context)
        await fails.wait()
        await until(lambda: store.fails == 0)
        assert (await got(handler, task.id, context)).status.state == WORKING
        answer = await handler.on_message_send(request("end", task), context)
        assert isinstance(answer, Task)
        assert answer.status.state == COMPLETED


@pytest.mark.parametrize("follows", [False, True])
async def test_what_did_not_fit_into_a_stream_is_not_lost_by_who_has_read_the_store_before(follows: bool) -> None:
    """It is only in the store, which a reader must not overwrite by what it has from before and from the streams."""
    context, store, view = of(), Holding(), View()
    may_go_on, may_end = anyio.Event(), anyio.Event()
    words = ["a", "b" * 3000, "c"]

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await may_go_on.wait()
        await tell(task, *words[1:], first=False)
        await may_end.wait()
        await task.complete()

    async def look(handler: StreamRequestHandler, task_id: str) -> None:
        if follows:
            await view.follow(handler, task_id, context)
        else:
            view.task = await got(handler, task_id, context)

    streams = StreamManager(MemoryStorage(), limits=Limits(max_event_bytes=1000))
    async with _entered(streams), handler_of(work, streams=streams, store=store) as handler:
        task = await begun(handler, context)
        await until(lambda: said(_stored(handler, task.id)) == ["a"])
        async with anyio.create_task_group() as tasks:
            store.hold = True
            tasks.start_soon(look, handler, task.id)
            await store.is_held.wait()
            may_go_on.set()
            await until(lambda: said(_stored(handler, task.id)) == words)
            if not follows:
                may_end.set()
                await until(lambda: _states(store) == [COMPLETED])
            store.may_answer.set()
            await until(lambda: view.said == words)
            may_end.set()
        assert (view.state, view.said) == (COMPLETED, words)
        assert said(_stored(handler, task.id)) == words
        assert said(await got(handler, task.id, context)) == words


async def test_who_looks_at_a_task_stores_nothing_of_it_while_its_agent_runs_or_when_it_has_said_how_it_ended() -> None:
    context, may_end, saves = of(), anyio.Event(), list[str]()

    class Noting(InMemoryTaskStore):
        async def save(self, task: Task, context: ServerCallContext) -> None:
            saves.append(getattr(asyncio.current_task(), "get_name", str)())
            await super().save(task, context)

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await may_end.wait()
        await task.complete()

    async with handler_of(work, store=Noting()) as handler, anyio.create_task_group() as tasks:
        task = await begun(handler, context)
        for _ in range(5):
            tasks.start_soon(View().follow, handler, task.id, context)
        await until(lambda: said(_stored(handler, task.id)) == ["a"])
        may_end.set()
    assert saves
    assert {name.partition(":")[0] for name in saves} == {"consumer"}


class Late(TaskStore):
    """One process's way to a store of many, on which saves that say so wait."""

    def __init__(self, store: TaskStore, waits: Callable[[Task], bool]) -> None:
        self._store = store
        self._waits = waits
        self.may_go_on = anyio.Event()

    async def save(self, task: Task, context: ServerCallContext) -> None:
        if self._waits(task):
            await self.may_go_on.wait()
        await self._store.save(task, context)

    async def get(self, task_id: str, context: ServerCallContext) -> Task | None:
        return await self._store.get(task_id, context)

    async def list(self, params: ListTasksRequest, context: ServerCallContext) -> ListTasksResponse:
        return await self._store.list(params, context)

    async def delete(self, task_id: str, context: ServerCallContext) -> None:
        await self._store.delete(task_id, context)


@pytest.mark.parametrize("asks", [False, True], ids=["returns", "asks"])
async def test_what_a_process_stores_of_its_turn_is_stored_before_the_next_turn_begins_elsewhere(asks: bool) -> None:
    """Here, what it stores when the turn is over: it would overwrite what the next one has stored meanwhile."""
    context, store = of(), InMemoryTaskStore()
    late = Late(store, lambda task: "/1/" in str(task.metadata["streamkeep"]))

    async def work(task: TaskUpdater, asked: RequestContext) -> None:
        if asked.get_user_input() == "go":
            await (task.requires_input() if asks else task.start_work())
            return
        await tell(task, "answer")
        await task.complete()

    async with (
        InMemoryStreamManager() as streams,
        handler_of(work, streams=streams, store=late) as here,
        handler_of(work, streams=streams, store=store) as there,
    ):
        task = await begun(here, context)
        await until(lambda: bool(store._impl.tasks) and _states(store) != [TaskState.TASK_STATE_UNSPECIFIED])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(there.on_message_send, request("on", task), context)
            await anyio.sleep(0.2)
            late.may_go_on.set()
        await anyio.sleep(0.05)
        assert _states(store) == [COMPLETED]
        listed = (await there.on_list_tasks(ListTasksRequest(include_artifacts=True), context)).tasks
        assert [said(task) for task in listed] == [["answer"]]


@pytest.mark.parametrize("how", ["slow", "fails", "left"])
async def test_a_task_that_has_completed_is_never_said_to_have_failed_whatever_its_store_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Its stream is kept, whatever `ttl` says, until the store has the end."""
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(_a2a_tasks, "RETRY_SECONDS", 0.4 if how == "fails" else 60)
    context, may_go_on = of(), anyio.Event()

    class Bad(InMemoryTaskStore):
        has_asked = False

        async def save(self, task: Task, context: ServerCallContext) -> None:
            if task.status.state == COMPLETED and not self.has_asked:
                self.has_asked = True
                if how != "slow":
                    raise OSError("no database")
                await may_go_on.wait()
            await super().save(task, context)

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await task.complete()

    store = Bad()
    async with InMemoryStreamManager(ttl=timedelta(0)) as streams, handler_of(work, streams=streams, store=store) as there:
        async with handler_of(work, streams=streams, store=store) as here:
            task = await begun(here, context)
            await until(lambda: store.has_asked)
            await anyio.sleep(0.05)
            await streams.sweep()
            assert _states(store) == [WORKING] or _states(store) == [TaskState.TASK_STATE_UNSPECIFIED]
            for handler in (here, there):
                assert (await got(handler, task.id, context)).status.state == COMPLETED
            may_go_on.set()
            if how != "left":
                await until(lambda: _states(store) == [COMPLETED])
        assert _states(store) == [COMPLETED]
        await streams.sweep()
        assert not list(await streams.list())
        assert (await got(there, task.id, context)).status.state == COMPLETED


@pytest.mark.parametrize("waits", [False, True], ids=["parked", "waiting"])
async def test_the_agents_own_cancel_is_called_only_in_the_process_where_it_runs(waits: bool) -> None:
    """Not where it has waited for its user before, nor where the next message waits."""
    context, store, runs = of(), InMemoryTaskStore(), list[str]()

    async def work(task: TaskUpdater, asked: RequestContext) -> None:
        runs.append(asked.get_user_input())
        if asked.get_user_input() == "ask":
            await task.requires_input()
            return
        await task.start_work()
        await anyio.sleep_forever()

    agent, elsewhere = Agent(work), Agent(work)
    async with (
        InMemoryStreamManager() as streams,
        handler_of(work, agent=agent, streams=streams, store=store) as here,
        handler_of(work, agent=elsewhere, streams=streams, store=store) as there,
        anyio.create_task_group() as tasks,
    ):
        first = await (here if waits else there).on_message_send(request("ask"), context)
        assert isinstance(first, Task)
        tasks.start_soon(here.on_message_send, request("run", first), context)
        await until(lambda: runs == ["ask", "run"])
        if waits:
            tasks.start_soon(_refused, there, request("next", first), context)
            await until(lambda: first.id in there._tasks._waiting)
        canceled = await there.on_cancel_task(CancelTaskRequest(id=first.id), context)
        assert canceled is not None
        assert canceled.status.state == CANCELED
        assert (agent.canceled, elsewhere.canceled) == (1, 0)
        with pytest.raises(TaskNotCancelableError):
            await there.on_cancel_task(CancelTaskRequest(id=first.id), context)
    assert runs == ["ask", "run"]


async def _refused(handler: StreamRequestHandler, asked: SendMessageRequest, context: ServerCallContext) -> None:
    with pytest.raises(UnsupportedOperationError):
        await handler.on_message_send(asked, context)


async def test_who_cancels_at_the_same_time_is_told_the_same() -> None:
    context, store, view = of(), InMemoryTaskStore(), View()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await anyio.sleep_forever()

    async with (
        InMemoryStreamManager() as streams,
        handler_of(work, streams=streams, store=store) as here,
        handler_of(work, streams=streams, store=store) as there,
    ):
        task = await begun(here, context)
        await until(lambda: said(_stored(here, task.id)) == ["a"])
        states = list[int]()

        async def cancel(handler: StreamRequestHandler) -> None:
            canceled = await handler.on_cancel_task(CancelTaskRequest(id=task.id), context)
            states.append(-1 if canceled is None else canceled.status.state)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(view.follow, there, task.id, context)
            for number in range(10):
                tasks.start_soon(cancel, (here, there)[number % 2])
        assert states == [CANCELED] * 10
        assert view.state == CANCELED
        assert all(info.status != "open" for info in await streams.list())


@pytest.mark.parametrize("is_late", [False, True], ids=["in cancel", "in execute"])
@pytest.mark.parametrize("is_there", [False, True], ids=["here", "there"])
async def test_what_an_agent_says_in_its_own_cancel_is_kept_wherever_that_was_asked_for(is_there: bool, is_late: bool) -> None:
    """Or when its `execute` is cancelled then."""
    context, store, view = of(), InMemoryTaskStore(), View()

    async def last_words(task: TaskUpdater) -> None:
        await tell(task, "b", first=False)
        await task.cancel(new_text_message("1 of 2 done"))

    class Telling(Agent):
        async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
            if not is_late:
                await last_words(TaskUpdater(event_queue, context.task_id or "", context.context_id or ""))

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            if is_late:
                await last_words(task)
            raise

    async with (
        InMemoryStreamManager() as streams,
        handler_of(work, agent=Telling(work), streams=streams, store=store) as here,
        handler_of(work, streams=streams, store=store) as there,
    ):
        task = await begun(here, context)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(view.follow, there, task.id, context)
            await until(lambda: view.said == ["a"])
            canceled = await (there if is_there else here).on_cancel_task(CancelTaskRequest(id=task.id), context)
        for known in (canceled, view.task, _stored(here, task.id)):
            assert known is not None
            assert (known.status.state, said(known)) == (CANCELED, ["a", "b"])
            assert known.status.message.parts[0].text == "1 of 2 done"


async def test_a_cancel_of_an_agents_that_takes_too_long_for_who_asks_elsewhere_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_a2a_tasks, "ASK_SECONDS", 0.1)
    context, store, may_return = of(), InMemoryTaskStore(), anyio.Event()

    class Slow(Agent):
        async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
            await may_return.wait()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await tell(task, "a")
        await anyio.sleep_forever()

    async with (
        InMemoryStreamManager() as streams,
        handler_of(work, agent=Slow(work), streams=streams, store=store) as here,
        handler_of(work, streams=streams, store=store) as there,
    ):
        task = await begun(here, context)
        await until(lambda: said(_stored(here, task.id)) == ["a"])
        with anyio.fail_after(5):
            canceled = await there.on_cancel_task(CancelTaskRequest(id=task.id), context)
        assert canceled is not None
        assert canceled.status.state == CANCELED
        may_return.set()
        await until(lambda: not here._tasks._runs)
        assert (await got(here, task.id, context)).status.state == CANCELED


class Pushed(PushNotificationSender):
    """Notes what it is to push."""

    def __init__(self) -> None:
        self.states: list[int] = []

    async def send_notification(self, task_id: str, event: PushNotificationEvent) -> None:
        if not isinstance(event, TaskArtifactUpdateEvent):
            self.states.append(event.status.state)


@pytest.mark.parametrize("how", ["canceled here", "canceled there", "parked", "left", "died"])
async def test_each_end_is_pushed_once(caplog: pytest.LogCaptureFixture, how: str) -> None:
    caplog.set_level(logging.CRITICAL)
    context, store, pushed = of(), InMemoryTaskStore(), Pushed()

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        if how == "parked":
            await task.requires_input()
            return
        await tell(task, "a")
        await anyio.sleep_forever()

    def one(streams: StreamManager) -> StreamRequestHandler:
        return StreamRequestHandler(streams, Agent(work), store, card(), drain=timedelta(0), push_sender=pushed)

    async with InMemoryStreamManager() as streams, one(streams) as there:
        async with one(streams) as here, anyio.create_task_group() as tasks:
            task = await begun(here, context)
            await until(
                lambda: bool(store._impl.tasks) and bool(_states(store)[0] == INPUT_REQUIRED or said(_stored(here, task.id)))
            )
            if how == "died":
                stream = next(info.id for info in await streams.list())
                await here._tasks._turns[stream.rpartition(".")[0]].writer.error(STOPPED)
                for handler in (there, there, there, there):
                    tasks.start_soon(got, handler, task.id, context)
            elif how != "left":
                await (here if how == "canceled here" else there).on_cancel_task(CancelTaskRequest(id=task.id), context)
        end = FAILED if how in {"left", "died"} else CANCELED
        assert _states(store) == [end]
        assert pushed.states.count(end) == 1


async def test_messages_at_once_for_a_task_that_was_stored_without_us_take_turns() -> None:
    context, store, at_once = of(), SlowStore(), Counter[str]()
    task = Task(id="old", context_id="c")
    task.status.state = INPUT_REQUIRED
    await store.save(task, context)

    async def work(updater: TaskUpdater, asked: RequestContext) -> None:
        at_once["now"] += 1
        at_once["most"] = max(at_once["most"], at_once["now"])
        await updater.start_work()
        await anyio.sleep(0.05)
        await updater.add_artifact([Part(text=asked.get_user_input())], artifact_id=asked.get_user_input())
        await updater.requires_input()
        at_once["now"] -= 1

    async with (
        InMemoryStreamManager() as streams,
        handler_of(work, streams=streams, store=store) as here,
        handler_of(work, streams=streams, store=store) as there,
    ):
        async with anyio.create_task_group() as tasks:
            for handler, word in ((here, "a"), (there, "b")):
                tasks.start_soon(handler.on_message_send, request(word, task), context)
        assert sorted(said(await got(here, task.id, context))) == ["a", "b"]
    assert at_once["most"] == 1


async def test_a_turn_that_is_begun_by_what_was_read_too_long_ago_is_not_run() -> None:
    """Its stream has come and gone meanwhile."""
    context, store, runs = of(), Holding(), list[str]()

    async def work(task: TaskUpdater, asked: RequestContext) -> None:
        runs.append(asked.get_user_input())
        await (task.complete() if asked.get_user_input() == "end" else task.requires_input())

    async with (
        InMemoryStreamManager(ttl=timedelta(0)) as streams,
        handler_of(work, streams=streams, store=store) as here,
        handler_of(work, streams=streams, store=store) as there,
    ):
        task = await here.on_message_send(request(), context)
        assert isinstance(task, Task)
        await until(lambda: not there._tasks._turns and not here._tasks._turns)
        async with anyio.create_task_group() as tasks:
            held = RequestContext(context, request("late", task), task.id, task.context_id)
            store.hold = True

            async def begin() -> None:
                with pytest.raises(UnsupportedOperationError):
                    await there._tasks.begin_run(held)

            tasks.start_soon(begin)
            await store.is_held.wait()
            await here.on_message_send(request("end", task), context)
            await until(lambda: _states(store) == [COMPLETED])
            await streams.sweep()
            store.may_answer.set()
        assert runs == ["go", "end"]
        assert _states(store) == [COMPLETED]


async def test_who_follows_a_task_that_was_stored_without_us_has_what_comes() -> None:
    context, store, view = of(), InMemoryTaskStore(), View()
    task = Task(id="old", context_id="c")
    task.status.state = INPUT_REQUIRED
    await store.save(task, context)

    async def work(updater: TaskUpdater, _: RequestContext) -> None:
        await tell(updater, "a")
        await updater.complete()

    async with (
        InMemoryStreamManager() as streams,
        handler_of(work, streams=streams, store=store) as here,
        handler_of(work, streams=streams, store=store) as there,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(view.follow, there, task.id, context)
        await until(lambda: view.events == 1)
        await here.on_message_send(request(task=task), context)
        with anyio.fail_after(5):
            await until(lambda: view.state == COMPLETED)
    assert view.said == ["a"]


@pytest.mark.parametrize("state", [INPUT_REQUIRED, AUTH_REQUIRED])
@pytest.mark.parametrize("is_gone", [False, True], ids=["stopped", "gone"])
async def test_a_task_that_waits_for_its_user_is_not_failed_with_an_agent_that_has_not_returned(
    state: TaskState, is_gone: bool
) -> None:
    context, store, view = of(), InMemoryTaskStore(), View()

    async def work(task: TaskUpdater, asked: RequestContext) -> None:
        if asked.get_user_input() == "end":
            await tell(task, "a")
            await task.complete()
            return
        await task.update_status(state, new_text_message("which?"))
        await anyio.sleep_forever()

    async with InMemoryStreamManager() as streams, InMemoryStreamManager() as others:
        async with handler_of(work, streams=streams, store=store) as here:
            task = await begun(here, context)
            await until(lambda: bool(store._impl.tasks) and _states(store) == [state])
        async with handler_of(work, streams=others if is_gone else streams, store=store) as there:
            assert (await got(there, task.id, context)).status.state == state
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(view.follow, there, task.id, context)
                await until(lambda: view.events > 0)
                await there.on_message_send(request("end", task), context)
    assert (view.state, view.said) == (COMPLETED, ["a"])


async def test_a_task_that_waits_for_its_user_has_not_failed_though_its_process_died_before_its_agent_had_returned() -> None:
    context, storage, store = of(), MemoryStorage(), InMemoryTaskStore()
    short = timedelta(milliseconds=200)

    async def work(updater: TaskUpdater, asked: RequestContext) -> None:
        if asked.get_user_input() == "go":
            await updater.requires_input()
            await anyio.sleep_forever()
        await updater.complete()

    dead = FaultyStorage(storage)
    first = StreamManager(dead, lease=short, grace=short)
    handler = StreamRequestHandler(first, Agent(work), store, card(), drain=timedelta(0))
    await handler.__aenter__()
    try:
        task = await begun(handler, context)
        await until(lambda: bool(store._impl.tasks) and _states(store) == [INPUT_REQUIRED])
        dead.is_down = True  # it is as good as killed
        second = StreamManager(storage, lease=short, grace=short)
        async with handler_of(work, streams=second, store=store, drain=5) as other:
            answer = await other.on_message_send(request("more", task), context)
            assert isinstance(answer, Task)
            assert answer.status.state == COMPLETED
    finally:
        dead.is_down = False
        with suppress(Exception):
            await handler.__aexit__(None, None, None)


async def test_what_could_be_written_and_not_be_read_back_is_given_with_the_task() -> None:
    """JSON is read less deeply than it is written, and a task with such an event could be read by nobody any more."""
    context, view, may_go_on = of(), View(), anyio.Event()
    deep: Any = "x"
    for _ in range(49):
        deep = [deep]

    async def work(task: TaskUpdater, _: RequestContext) -> None:
        await may_go_on.wait()
        await task.update_status(WORKING, metadata={"deep": deep})
        await task.complete()

    async with handler_of(work) as handler:
        task = await begun(handler, context)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(view.follow, handler, task.id, context)
            await until(lambda: view.events > 0)
            may_go_on.set()
        assert view.state == COMPLETED
        kept = await got(handler, task.id, context)
        assert (kept.status.state, list(kept.metadata)) == (COMPLETED, ["deep"])


async def test_an_agent_is_shown_nothing_of_ours_in_the_tasks_that_a_message_refers_to() -> None:
    context, store, seen = of(), InMemoryTaskStore(), list[dict[str, Any]]()

    async def work(task: TaskUpdater, asked: RequestContext) -> None:
        seen.extend(dict(related.metadata) for related in asked.related_tasks)
        await task.complete()

    builder = SimpleRequestContextBuilder(should_populate_referred_tasks=True, task_store=store)
    handler = StreamRequestHandler(InMemoryStreamManager(), Agent(work), store, card(), request_context_builder=builder)
    async with handler:
        task = await handler.on_message_send(request(), context)
        assert isinstance(task, Task)
        asked = request()
        asked.message.reference_task_ids.append(task.id)
        await handler.on_message_send(asked, context)
    assert seen == [{}]


async def test_an_agents_queue_has_what_the_sdks_has() -> None:
    class Looking(Agent):
        async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
            assert isinstance(context.task_id, str)
            await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id))
            assert not event_queue.is_closed()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
            await TaskUpdater(event_queue, context.task_id, context.context_id or "").complete()

    async with handler_of(say_numbers, agent=Looking(say_numbers)) as handler:
        answer = await handler.on_message_send(request(), of())
        assert isinstance(answer, Task)
        assert answer.status.state == COMPLETED


async def test_no_method_of_the_handler_tells_a_client_what_the_app_has_raised(caplog: pytest.LogCaptureFixture) -> None:
    """Each that the SDK's routes may call; also one that a later SDK has."""
    caplog.set_level(logging.CRITICAL)

    class Broken(InMemoryTaskStore):
        async def get(self, task_id: str, context: ServerCallContext) -> Task | None:
            raise OSError("secret")

        async def list(self, params: ListTasksRequest, context: ServerCallContext) -> ListTasksResponse:
            raise OSError("secret")

    async def modified(known: AgentCard, context: ServerCallContext) -> AgentCard:
        raise OSError("secret")

    able, asked = card(), request(task=Task(id="t", context_id="c"))
    able.capabilities.push_notifications = able.capabilities.extended_agent_card = True
    params: dict[str, Any] = {
        "on_get_task": GetTaskRequest(id="t"),
        "on_list_tasks": ListTasksRequest(),
        "on_cancel_task": CancelTaskRequest(id="t"),
        "on_message_send": asked,
        "on_message_send_stream": asked,
        "on_subscribe_to_task": SubscribeToTaskRequest(id="t"),
        "on_create_task_push_notification_config": TaskPushNotificationConfig(task_id="t", id="1", url="http://localhost/"),
        "on_get_task_push_notification_config": GetTaskPushNotificationConfigRequest(task_id="t", id="1"),
        "on_list_task_push_notification_configs": ListTaskPushNotificationConfigsRequest(task_id="t"),
        "on_delete_task_push_notification_config": DeleteTaskPushNotificationConfigRequest(task_id="t", id="1"),
        "on_get_extended_agent_card": GetExtendedAgentCardRequest(),
    }
    assert params.keys() == RequestHandler.__abstractmethods__
    handler = StreamRequestHandler(
        InMemoryStreamManager(),
        Agent(say_numbers),
        Broken(),
        able,
        push_config_store=InMemoryPushNotificationConfigStore(),
        extended_agent_card=able,
        extended_card_modifier=modified,
    )
    async with handler:
        for name, each in params.items():
            given = getattr(handler, name)(each, of())
            with pytest.raises(InternalError) as told:
                await (anext(given) if isinstance(given, AsyncGenerator) else given)
            assert told.value.message == "internal", name
