"""`StreamRequestHandler`, called as the SDK's routes call it, where a client cannot bring about what is tested."""

import asyncio
import logging
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
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.context import ServerCallContext
from a2a.server.events import Event, EventQueue
from a2a.server.request_handlers import DefaultRequestHandler, RequestHandler
from a2a.server.routes import create_jsonrpc_routes, create_rest_routes
from a2a.server.tasks import InMemoryPushNotificationConfigStore, InMemoryTaskStore, TaskStore, TaskUpdater
from a2a.server.tasks.task_manager import append_artifact_to_task
from a2a.types import (
    AgentCapabilities,
    AgentCard,
    AgentInterface,
    AgentSkill,
    CancelTaskRequest,
    GetTaskRequest,
    ListTaskPushNotificationConfigsRequest,
    ListTasksRequest,
    Message,
    Part,
    Role,
    SendMessageRequest,
    SubscribeToTaskRequest,
    Task,
    TaskArtifactUpdateEvent,
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


async def begun(handler: DefaultRequestHandler, context: ServerCallContext, task: Task | None = None, text: str = "go") -> Task:
    """Send a message, and leave when its task is there."""
    asked = request(text, task)
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


async def reached(handler: DefaultRequestHandler, task: Task, context: ServerCallContext, state: int) -> None:
    """Wait until a task is in a state."""
    with anyio.fail_after(10):
        while (await got(handler, task.id, context)).status.state != state:  # noqa: ASYNC110 - a request is all that tells
            await anyio.sleep(0.01)


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


async def test_a_store_that_fails_at_the_end_of_a_turn_fails_no_task_that_waits_for_its_user(
    caplog: pytest.LogCaptureFixture,
) -> None:
    context, store, fails = of(), FailingStore(), anyio.Event()

    async def work(task: TaskUpdater, asked: RequestContext) -> None:
        if asked.get_user_input() == "end":
            await task.complete()
            return
        await task.requires_input()
        await until(lambda: "ada" in store._impl.tasks and _states(store) == [INPUT_REQUIRED])
        caplog.set_level(logging.CRITICAL)
        store.fails = 1
        fails.set()

    async with handler_of(work, store=store) as handler:
        task = await begun(handler, context)
        await fails.wait()
        await until(lambda: store.fails == 0)
        assert (await got(handler, task.id, context)).status.state == INPUT_REQUIRED
        answer = await handler.on_message_send(request("end", task), context)
        assert isinstance(answer, Task)
        assert answer.status.state == COMPLETED


class HeldStore(InMemoryTaskStore):
    """A store that can be made to answer late, and to fail.

    Attributes:
        reads: set to let those who have read go on.
        fails: how many times more the end of a task cannot be stored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: anyio.Event | None = None
        self.fails = 0

    async def get(self, task_id: str, context: ServerCallContext) -> Task | None:
        found = await super().get(task_id, context)
        if found is None:
            return None
        task = Task()
        task.CopyFrom(found)
        reads, self.reads = self.reads, None
        if reads is not None:
            await reads.wait()
        return task

    async def save(self, task: Task, context: ServerCallContext) -> None:
        if task.status.state == COMPLETED and self.fails:
            self.fails -= 1
            raise OSError("postgres://secret@host is away")
        await super().save(task, context)


async def test_who_reads_late_deletes_nothing_that_did_not_fit_into_a_stream() -> None:
    context, store, may_go_on = of(), HeldStore(), anyio.Event()

    async def work(updater: TaskUpdater, _: RequestContext) -> None:
        await updater.add_artifact([Part(text="small")], artifact_id="a")
        await may_go_on.wait()
        await updater.add_artifact([Part(text="b" * 2_000)], artifact_id="b")
        await updater.add_artifact([Part(text="behind")], artifact_id="c")
        await updater.complete()

    streams = StreamManager(MemoryStorage(), limits=Limits(max_event_bytes=1_000))
    async with handler_of(work, streams=streams, store=store, drain=5) as handler:
        task = await begun(handler, context)
        with anyio.fail_after(10):
            while said(await got(handler, task.id, context)) != ["small"]:  # noqa: ASYNC110 - a request is all that tells
                await anyio.sleep(0.01)
        late: list[Task] = []

        async def read() -> None:
            late.append(await got(handler, task.id, context))

        async with anyio.create_task_group() as tasks:
            held = store.reads = anyio.Event()
            tasks.start_soon(read)
            await until(lambda: store.reads is None)
            may_go_on.set()
            await reached(handler, task, context, COMPLETED)
            held.set()
        assert [len(text) for text in said(late[0])] == [5, 2_000, 6]
        assert len(said(await got(handler, task.id, context))) == 3


async def test_the_store_has_a_turn_before_the_next_one_can_begin_elsewhere() -> None:
    context, storage, kept = of(), MemoryStorage(), InMemoryTaskStore()
    may_save = anyio.Event()

    class Late(InMemoryTaskStore):
        """Of one process: what ends a turn is stored late."""

        async def get(self, task_id: str, context: ServerCallContext) -> Task | None:
            return await kept.get(task_id, context)

        async def save(self, task: Task, context: ServerCallContext) -> None:
            if "/1/" in str(task.metadata["streamkeep"]):  # that the first turn is over
                await may_save.wait()
            await kept.save(task, context)

    async def work(updater: TaskUpdater, asked: RequestContext) -> None:
        if asked.get_user_input() == "go":
            await updater.requires_input()
        else:
            await tell(updater, "answer")
            await updater.complete()

    async with (
        handler_of(work, streams=StreamManager(storage), store=Late(), drain=5) as one,
        handler_of(work, streams=StreamManager(storage), store=kept) as two,
    ):
        task = await begun(one, context)
        await reached(one, task, context, INPUT_REQUIRED)
        answers: list[Any] = []

        async def follow_up() -> None:
            answers.append(await two.on_message_send(request("two", task), context))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow_up)
            await anyio.sleep(0.1)
            assert not answers  # the turn before is not over
            may_save.set()
        assert (answers[0].status.state, said(answers[0])) == (COMPLETED, ["answer"])
        await anyio.sleep(0.1)
        assert said(await got(two, task.id, context)) == ["answer"]
        assert [each.status.state for each in (await two.on_list_tasks(ListTasksRequest(), context)).tasks] == [COMPLETED]


async def test_that_a_task_has_ended_is_stored_again_while_the_store_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_a2a_tasks, "SAVE_PAUSES", (0.3, 0.3))
    caplog.set_level(logging.CRITICAL)
    context, store = of(), HeldStore()
    store.fails = 2

    async def work(updater: TaskUpdater, _: RequestContext) -> None:
        await tell(updater, "a")
        await updater.complete()

    streams = InMemoryStreamManager(ttl=timedelta(0))
    async with handler_of(work, streams=streams, store=store, drain=5) as handler:
        task = await begun(handler, context)
        await until(lambda: store.fails == 1)
        await streams.sweep()
        held = await got(handler, task.id, context)
        assert (held.status.state, said(held)) == (COMPLETED, ["a"])
        await until(lambda: store.fails == 0)
        await anyio.sleep(0.5)
        await streams.sweep()
        assert [info.id for info in await streams.list()] == []
        assert said(await got(handler, task.id, context)) == ["a"]


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
        await reached(handler, task, context, INPUT_REQUIRED)
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


@pytest.mark.parametrize("waits_here", [False, True])
async def test_a_task_is_cancelled_where_its_agent_runs_though_it_was_known_here_before(
    waits_here: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    context, storage, store = of(), MemoryStorage(), InMemoryTaskStore()

    async def work(updater: TaskUpdater, asked: RequestContext) -> None:
        if asked.get_user_input() == "go":
            await updater.requires_input()
        else:
            await updater.start_work()
            await anyio.sleep_forever()

    here, there = Agent(work), Agent(work)
    async with (
        handler_of(work, streams=StreamManager(storage), store=store, agent=here) as one,
        handler_of(work, streams=StreamManager(storage), store=store, agent=there) as two,
        anyio.create_task_group() as tasks,
    ):
        task = await begun(one, context)
        await reached(one, task, context, INPUT_REQUIRED)
        await begun(two, context, task, "two")
        await reached(one, task, context, WORKING)
        if waits_here:

            async def wait() -> None:
                with suppress(Exception):
                    await one.on_message_send(request("three", task), context)

            tasks.start_soon(wait)
            await anyio.sleep(0.1)
        cancelled = await one.on_cancel_task(CancelTaskRequest(id=task.id), context)
        assert cancelled is not None
        assert cancelled.status.state == CANCELED
        await until(lambda: there.canceled == 1)
        assert here.canceled == 0


def test_whatever_a_request_is_its_errors_are_told_as_little() -> None:
    asked = {name for name in vars(RequestHandler) if name.startswith("on_")}
    assert asked
    assert asked <= vars(StreamRequestHandler).keys()


async def test_what_a_store_of_push_configs_raises_is_told_to_no_client(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)

    class Away(InMemoryPushNotificationConfigStore):
        async def get_info(self, task_id: str, context: ServerCallContext) -> Any:
            raise OSError("postgres://secret@host is away")

    context, agent = of(), Agent(lambda updater, _: updater.complete())
    shown = card()
    shown.capabilities.push_notifications = True
    handler = StreamRequestHandler(InMemoryStreamManager(), agent, InMemoryTaskStore(), shown, push_config_store=Away())
    async with handler:
        task = await begun(handler, context)
        with pytest.raises(InternalError) as told:
            await handler.on_list_task_push_notification_configs(
                ListTaskPushNotificationConfigsRequest(task_id=task.id), context
            )
    assert "secret" not in str(told.value)


async def test_messages_for_a_task_that_was_stored_without_us_wait_for_each_other_and_followers_are_told() -> None:
    context, storage, store, view = of(), MemoryStorage(), InMemoryTaskStore(), View()
    task = Task(id="old", context_id="c")
    task.status.state = INPUT_REQUIRED
    await store.save(task, context)
    at_once: list[int] = []
    running = 0

    async def work(updater: TaskUpdater, asked: RequestContext) -> None:
        nonlocal running
        running += 1
        at_once.append(running)
        word = asked.get_user_input()
        await updater.add_artifact([Part(text=word)], artifact_id=word)
        await anyio.sleep(0.1)
        running -= 1
        await (updater.complete() if len(at_once) == 2 else updater.requires_input())

    async with (
        handler_of(work, streams=StreamManager(storage), store=store, drain=5) as one,
        handler_of(work, streams=StreamManager(storage), store=store, drain=5) as two,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(view.follow, one, task.id, context)
        await until(lambda: view.events == 1)
        for handler, word in ((one, "a"), (two, "b")):
            tasks.start_soon(handler.on_message_send, request(word, task), context)
    assert at_once == [1, 1]
    assert sorted(view.said) == ["a", "b"]
    assert view.state == COMPLETED
