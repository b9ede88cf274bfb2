"""A2A's client as its package comes, against the app that `docs/how-to/a2a.md` shows; its table has what these tests say."""

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from a2a.client import A2AClientError, Client, ClientConfig, ClientFactory
from a2a.helpers.proto_helpers import new_text_message
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.tasks import TaskUpdater
from a2a.types import (
    AgentCapabilities,
    AgentCard,
    AgentInterface,
    CancelTaskRequest,
    GetTaskRequest,
    Message,
    Part,
    Role,
    SendMessageRequest,
    Task,
    TaskState,
)
from tests.clients.shown import HELD, WORDS, Paced, a2a_app, run_all
from tests.clients.tasks import SAID, FileTaskStore
from tests.http.servers import server_process, serving, until
from tests.network.proxy import End, Fate, bad_network
from tests.test_docs import ROOT, blocks

from streamkeep import InMemoryStreamManager, StreamManager

COMPLETED: Final = TaskState.TASK_STATE_COMPLETED
WORKING: Final = TaskState.TASK_STATE_WORKING
FAILED: Final = TaskState.TASK_STATE_FAILED
CANCELED: Final = TaskState.TASK_STATE_CANCELED
INPUT_REQUIRED: Final = TaskState.TASK_STATE_INPUT_REQUIRED
AT_ONCE: Final = 30
MANY_TASKS: Final = 100


def shown_client() -> dict[str, Any]:
    """Give what the page shows around the client."""
    shown: dict[str, Any] = {}
    path = ROOT / "docs/how-to/a2a.md"
    (program,) = (block for block in blocks(path) if "def send" in block)
    exec(compile(program, str(path), "exec", dont_inherit=True), shown)
    return shown


SHOWN: Final = shown_client()
send: Final[Callable[..., AsyncGenerator[Task]]] = SHOWN["send"]
follow: Final[Callable[..., AsyncGenerator[Task]]] = SHOWN["follow"]


@asynccontextmanager
async def client_of(url: str, binding: str = "JSONRPC") -> AsyncGenerator[Client]:
    """Give the client, each of whose requests has a connection of its own, so that it is known which one is cut."""
    interface = AgentInterface(url=f"{url}/", protocol_binding=binding, protocol_version="1.0")
    card = AgentCard(name="answers", description="-", version="1", capabilities=AgentCapabilities(streaming=True))
    card.supported_interfaces.append(interface)
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=30) as http:
        yield ClientFactory(ClientConfig(httpx_client=http, supported_protocol_bindings=[binding])).create(card)


def question(number: int = 1, *, holds: bool = False) -> Message:
    return new_text_message(json.dumps({"number": number, "holds": holds}), role=Role.ROLE_USER)


def said(task: Task | None) -> list[str]:
    """Give the words of an answer."""
    return [] if task is None else [part.text for artifact in task.artifacts for part in artifact.parts]


@dataclass(eq=False, slots=True)
class Reading:
    """What a client has of a task, and whether it was ever more than the agent has said by then, or other than that."""

    task: Task | None = None
    states: list[int] = field(default_factory=list[int])
    is_over: bool = False

    async def send(self, client: Client, message: Message) -> None:
        async with aclosing(send(client, message, pause=0.01)) as tasks:
            await self._read(tasks)

    async def subscribe(self, client: Client, task_id: str) -> None:
        async with aclosing(follow(client, task_id, pause=0.01)) as tasks:
            await self._read(tasks)

    async def _read(self, tasks: AsyncGenerator[Task]) -> None:
        async for task in tasks:
            self.task = task
            self.states.append(task.status.state)
            assert said(task) == list(SAID[: len(said(task))])
        self.is_over = True

    def assert_whole(self) -> None:
        assert self.is_over
        assert self.task is not None
        assert self.task.status.state == COMPLETED
        assert said(self.task) == list(SAID)


@asynccontextmanager
async def served() -> AsyncGenerator[tuple[str, Paced]]:
    paced = Paced(says=SAID)
    async with serving(a2a_app(InMemoryStreamManager(), paced)) as url:
        yield url, paced


@dataclass(eq=False, slots=True)
class Over:
    """A task over a network that strikes once, or again and again."""

    fates: Sequence[Fate]
    reading: Reading = field(default_factory=Reading)
    was_struck: bool = False

    async def run(self, url: str, number: int) -> None:
        async with bad_network(url) as network, client_of(network.path(self.fates)) as client:
            await self.reading.send(client, question(number))
            self.was_struck = network.struck.total() > 0


async def sent_over(fates: Sequence[Sequence[Fate]]) -> list[Over]:
    """Send a message over each network, many at once; the agent has run once for each."""
    overs = [Over(each) for each in fates]
    await run_all(served(), overs, AT_ONCE)
    return overs


FEW: Final = range(800, 3600, 160)
MANY: Final = range(800, 3600, 11)


@pytest.mark.cell("cut", "A2A's client in Python")
@pytest.mark.parametrize(
    "places", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(180)])], ids=["few", "many"]
)
async def test_a_client_that_is_cut_comes_back_and_has_each_event_once(places: Sequence[int]) -> None:
    overs = await sent_over([[Fate(End.FIN, place)] for place in places])
    for over in overs:
        over.reading.assert_whole()
    assert sum(over.was_struck for over in overs) > len(places) / 2


@pytest.mark.cell("cut", "A2A's client in Python")
async def test_a_client_that_is_cut_again_and_again_has_each_event_once() -> None:
    places = range(1000, 2200, 60)
    for over in await sent_over(
        [[Fate(End.FIN, place), *[Fate(End.FIN, place // 2 + 40 * n) for n in range(6)]] for place in places]
    ):
        assert over.was_struck
        over.reading.assert_whole()


@dataclass(eq=False, slots=True)
class Served:
    """Processes that serve the same tasks: each has a manager of its own over one storage, all in this process."""

    storage_url: str
    tasks_path: str
    paced: Paced = field(default_factory=lambda: Paced(says=SAID))

    @asynccontextmanager
    async def one(self, agent: AgentExecutor | None = None) -> AsyncGenerator[str]:
        streams = StreamManager.connect(self.storage_url)
        async with serving(a2a_app(streams, self.paced, FileTaskStore(self.tasks_path), agent)) as url:
            yield url


@pytest.fixture
def shared(sqlite_url: str, tmp_path: Path) -> Served:
    return Served(sqlite_url, str(tmp_path / "tasks.db"))


async def held(reading: Reading) -> str:
    """Return when an answer that is held is there up to that; give its task's id."""
    await until(lambda: len(said(reading.task)) == HELD)
    assert reading.task is not None
    return reading.task.id


@pytest.mark.cell("reload", "A2A's client in Python")
@pytest.mark.cell("second tab", "A2A's client in Python")
async def test_who_subscribes_in_another_process_has_what_was_and_what_comes(shared: Served) -> None:
    first, *others = readings = [Reading() for _ in range(4)]
    async with (
        shared.one() as here,
        shared.one() as there,
        client_of(here) as client,
        client_of(there) as other,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(first.send, client, question(holds=True))
        task_id = await held(first)
        for reading, at in zip(others, [client, other, other], strict=True):
            tasks.start_soon(reading.subscribe, at, task_id)
            await held(reading)
        shared.paced.may_go_on.set()
        with anyio.fail_after(20):
            await until(lambda: all(reading.is_over for reading in readings))
        assert (await other.get_task(GetTaskRequest(id=task_id))).status.state == COMPLETED
    for reading in readings:
        reading.assert_whole()
    assert shared.paced.runs == {1: 1}


async def test_the_agent_goes_on_when_its_client_leaves(shared: Served) -> None:
    reading, again = Reading(), Reading()
    async with shared.one() as url, client_of(url) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reading.send, client, question(holds=True))
            task_id = await held(reading)
            tasks.cancel_scope.cancel()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(again.subscribe, client, task_id)
            await held(again)
            shared.paced.may_go_on.set()
    again.assert_whole()
    assert shared.paced.runs == {1: 1}


@pytest.mark.cell("restart", "A2A's client in Python")
@pytest.mark.cell("kill -9", "A2A's client in Python")
@pytest.mark.parametrize("how", [pytest.param("restart", marks=pytest.mark.slow), "kill -9"])
async def test_a_task_whose_process_was_stopped_or_killed_has_failed(how: str, sqlite_url: str) -> None:
    """Who reads in the other process is told, and so is who asks there."""
    reading, other_reading = Reading(), Reading()
    async with (
        server_process("a2a", sqlite_url) as first,
        server_process("a2a", sqlite_url) as second,
        bad_network(first.url) as network,
        client_of(network.path()) as client,
        client_of(second.url) as other,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(reading.send, client, question(holds=True))
        task_id = await held(reading)
        tasks.start_soon(other_reading.subscribe, other, task_id)
        await held(other_reading)
        network.url = second.url
        await first.end(how)
        with anyio.fail_after(20):
            await until(lambda: reading.is_over and other_reading.is_over)
        task = await other.get_task(GetTaskRequest(id=task_id))
    for known in (reading.task, other_reading.task, task):
        assert known is not None
        assert known.status.state == FAILED
        assert said(known) == list(SAID[:HELD])
        assert "stopped" in known.status.message.parts[0].text
    assert "streamkeep" not in task.metadata


@pytest.mark.slow
async def test_a_task_that_nobody_follows_when_its_process_is_killed_has_failed_for_who_asks(sqlite_url: str) -> None:
    reading = Reading()
    async with server_process("a2a", sqlite_url) as first, server_process("a2a", sqlite_url) as second:
        async with client_of(first.url) as client, anyio.create_task_group() as tasks:
            tasks.start_soon(reading.send, client, question(holds=True))
            task_id = await held(reading)
            tasks.cancel_scope.cancel()
        await first.kill()
        async with client_of(second.url) as other:
            with anyio.fail_after(20):
                while (task := await other.get_task(GetTaskRequest(id=task_id))).status.state == WORKING:  # noqa: ASYNC110
                    await anyio.sleep(0.1)
    assert task.status.state == FAILED


@pytest.mark.cell("Stop", "A2A's client in Python")
@pytest.mark.parametrize("where", ["here", "there"])
async def test_a_task_is_canceled_from_any_process(shared: Served, where: str) -> None:
    readings = [Reading(), Reading(), Reading()]
    async with (
        shared.one() as here,
        shared.one() as there,
        client_of(here) as client,
        client_of(there) as other,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(readings[0].send, client, question(holds=True))
        task_id = await held(readings[0])
        tasks.start_soon(readings[1].subscribe, client, task_id)
        tasks.start_soon(readings[2].subscribe, other, task_id)
        for reading in readings[1:]:
            await held(reading)
        task = await (client if where == "here" else other).cancel_task(CancelTaskRequest(id=task_id))
        assert task.status.state == CANCELED
        with anyio.fail_after(20):
            await until(lambda: all(reading.is_over for reading in readings))
        for at in (client, other):
            task = await at.get_task(GetTaskRequest(id=task_id))
            assert (task.status.state, said(task)) == (CANCELED, list(SAID[:HELD]))
    for reading in readings:
        assert reading.task is not None
        assert (reading.task.status.state, said(reading.task)) == (CANCELED, list(SAID[:HELD]))


@dataclass(eq=False, slots=True)
class Asking(AgentExecutor):
    """Asks twice, and then says what it was told. Says what was canceled."""

    canceled: list[str] = field(default_factory=list[str])
    held: anyio.Event | None = None

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        task, current = TaskUpdater(event_queue, context.task_id or "", context.context_id or ""), context.current_task
        if current is None:
            await event_queue.enqueue_event(
                Task(id=context.task_id, context_id=context.context_id, history=[context.message] if context.message else [])
            )
        told = [message for message in current.history if message.role == Role.ROLE_USER] if current else []
        await task.start_work()
        if self.held is not None:
            await self.held.wait()
        await task.add_artifact([Part(text=context.get_user_input())], artifact_id="answer", append=len(told) > 0)
        if len(told) < 2:
            await task.requires_input(new_text_message(f"question {len(told)}", role=Role.ROLE_AGENT))
        else:
            await task.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        self.canceled.append(context.task_id or "")


def text_of(text: str, task: Task | None = None) -> Message:
    message = new_text_message(text, role=Role.ROLE_USER)
    if task is not None:
        message.task_id, message.context_id = task.id, task.context_id
    return message


async def sent(client: Client, text: str, task: Task | None = None) -> Task:
    """Give a task as the client has it when a message for it was answered, or one that began it."""
    message = text_of(text, task)
    async with aclosing(send(client, message, task)) as tasks:
        async for each in tasks:
            task = each
    assert task is not None
    known = Task()
    known.CopyFrom(task)  # the client changes its own by what comes
    return known


async def test_a_task_of_several_messages_goes_on_in_any_process(shared: Served) -> None:
    last: list[Task] = []
    async with (
        shared.one(Asking()) as here,
        shared.one(Asking()) as there,
        client_of(here) as client,
        client_of(there) as other,
    ):
        task = await sent(client, "one")
        assert task.status.state == INPUT_REQUIRED

        async def read(at: Client) -> None:
            async with aclosing(follow(at, task.id)) as tasks:
                each = await anext(tasks)
                known.set()
                async for each in tasks:  # noqa: B007
                    pass
            last.append(each)

        async with anyio.create_task_group() as tasks:
            for at in (client, other):
                known = anyio.Event()
                tasks.start_soon(read, at)
                await known.wait()
            second = await sent(other, "two", task)
            third = await sent(client, "three", task)
        assert [each.status.state for each in (second, third, *last)] == [INPUT_REQUIRED, COMPLETED, COMPLETED, COMPLETED]
        kept = [await at.get_task(GetTaskRequest(id=task.id)) for at in (client, other)]
        for known_task in (*last, *kept):
            assert [part.text for part in known_task.artifacts[0].parts] == ["one", "two", "three"]
        assert kept[0] == kept[1]
        assert [message.parts[0].text for message in kept[0].history] == ["one", "question 0", "two", "question 1", "three"]


async def test_a_task_that_waits_for_its_user_is_canceled_and_is_not_failed_by_a_restart(shared: Served) -> None:
    async with shared.one(Asking()) as here, client_of(here) as client:
        task, other_task = await sent(client, "one"), await sent(client, "one")
    async with shared.one(Asking()) as there, client_of(there) as client:
        assert (await client.get_task(GetTaskRequest(id=task.id))).status.state == INPUT_REQUIRED
        assert (await client.cancel_task(CancelTaskRequest(id=task.id))).status.state == CANCELED
        assert (await client.get_task(GetTaskRequest(id=task.id))).status.state == CANCELED
        await sent(client, "two", other_task)
        assert (await sent(client, "three", other_task)).status.state == COMPLETED


async def test_a_message_for_a_task_that_is_worked_on_in_another_process_waits(shared: Served) -> None:
    agent = Asking(held=anyio.Event())
    answers: list[Task] = []
    async with shared.one(agent) as here, shared.one(Asking()) as there, client_of(here) as client, client_of(there) as other:
        reading = Reading()

        async def send_there() -> None:
            assert reading.task is not None
            answers.append(await sent(other, "two", reading.task))

        async with anyio.create_task_group() as tasks:
            first: list[Task] = []

            async def send_here() -> None:
                async with aclosing(send(client, text_of("one"))) as updates:
                    async for each in updates:
                        reading.task = each
                        first.append(each)

            tasks.start_soon(send_here)
            await until(lambda: reading.task is not None and reading.task.status.state == WORKING)
            tasks.start_soon(send_there)
            await anyio.sleep(0.3)
            assert not answers
            assert agent.held is not None
            agent.held.set()
    (task,) = answers
    assert [part.text for part in task.artifacts[0].parts] == ["one", "two"]


async def test_an_agent_is_told_to_stop_by_its_own_cancel_when_another_process_cancels(shared: Served) -> None:
    agent, elsewhere = Asking(held=anyio.Event()), Asking()
    last: list[Task] = []
    async with shared.one(agent) as here, shared.one(elsewhere) as there, client_of(here) as client, client_of(there) as other:

        async def send_here() -> None:
            async with aclosing(send(client, text_of("one"))) as updates:
                async for each in updates:
                    last.append(each)  # noqa: PERF401 - it is looked at meanwhile

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_here)
            await until(lambda: bool(last) and last[-1].status.state == WORKING)
            await other.cancel_task(CancelTaskRequest(id=last[-1].id))
    assert last[-1].status.state == CANCELED
    assert agent.canceled == [last[-1].id]
    assert elsewhere.canceled == []


async def test_a_message_without_its_task_goes_on_with_that_and_who_follows_late_has_all_of_it(shared: Served) -> None:
    async with shared.one(Asking()) as url, client_of(url) as client:
        task = await sent(client, "one")
        last: Task | None = None
        for text in ("two", "three"):
            async with aclosing(send(client, text_of(text, task))) as updates:
                async for last in updates:  # noqa: B007
                    pass
        async with aclosing(follow(client, task.id)) as tasks:
            (kept,) = [each async for each in tasks]
    for known in (last, kept):
        assert known is not None
        assert known.status.state == COMPLETED
        assert [part.text for part in known.artifacts[0].parts] == ["one", "two", "three"]


async def test_a_message_that_is_the_answer_is_given(shared: Served) -> None:
    class Answering(Asking):
        async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
            await event_queue.enqueue_event(new_text_message("hello", context_id=context.context_id))

    async with shared.one(Answering()) as url, client_of(url) as client, aclosing(send(client, text_of("one"))) as answers:
        (answer,) = [each async for each in answers]
    assert isinstance(answer, Message)
    assert answer.parts[0].text == "hello"


async def test_many_tasks_at_once(shared: Served) -> None:
    readings = [Reading() for _ in range(MANY_TASKS)]
    async with shared.one() as url, client_of(url) as client, anyio.create_task_group() as tasks:
        for number, reading in enumerate(readings):
            tasks.start_soon(reading.send, client, question(number))
    for reading in readings:
        reading.assert_whole()
    assert shared.paced.runs == dict.fromkeys(range(MANY_TASKS), 1)


async def test_a_separator_of_lines_is_what_the_client_alone_cannot_read() -> None:
    # A defect of theirs: `parse_sse_stream` splits lines where `str.splitlines` does. When this fails, they have mended it.
    paced = Paced(says=WORDS)
    async with serving(a2a_app(InMemoryStreamManager(), paced)) as url, client_of(url) as client:
        with pytest.raises(A2AClientError, match="Unterminated string"):
            async for _ in client.send_message(SendMessageRequest(message=question())):
                pass
