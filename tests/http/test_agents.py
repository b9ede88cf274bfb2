"""Genkit's agents, driven by both of its own clients: as Genkit's server answers, and durably."""

import asyncio
import json
import logging
import re
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from time import sleep
from typing import TYPE_CHECKING, Any, Final

import anyio
import httpx
import pytest
from genkit import ActionRunContext, Message, Part
from genkit import PublicError as GenkitPublicError
from genkit.exp import Genkit
from genkit.exp.agent import (
    Agent,
    AgentClient,
    AgentFinishReason,
    AgentInput,
    AgentResult,
    AgentStreamChunk,
    InMemorySessionStore,
    SessionRunner,
    SessionSnapshot,
    SessionState,
    TurnContext,
    TurnResult,
    remote_agent,
)
from genkit.model import ModelResponseChunk
from pydantic import BaseModel, model_serializer
from tests.http.agents import (
    HELD,
    WORDS,
    Words,
    careful_agent,
    official_app,
    ours_app,
    stored,
    texts,
    words_agent,
)
from tests.http.servers import STREAM_ID, STREAMING, events_of, frames_of, http_to, server_process, serving, until
from tests.http.test_context_providers import traced
from tests.network.proxy import End, Fate, bad_network

from streamkeep import InMemoryStreamManager, Limits, PublicError, StreamEventType, StreamManager
from streamkeep.client import stream_flow
from streamkeep.http import Access, StreamsHTTP
from streamkeep.http.response import ASGIApp
from streamkeep.http.sources import AS_IT_IS, Setting
from streamkeep.integrations import _genkit_agents
from streamkeep.integrations.genkit import WorkIn, work_of
from streamkeep.storage import Head
from streamkeep.storages.memory import MemoryStorage

if TYPE_CHECKING:
    from tests.http.conftest import GenkitClient, Line

HELLO: Final = {"message": {"role": "user", "content": [{"text": "hello"}]}}
HOLD: Final = {"message": {"role": "user", "content": [{"text": "hold it"}]}}
DETACHED: Final = {**HOLD, "detach": True}


def turn(data: object = HELLO, **init: object) -> dict[str, object]:
    return {"data": data, "init": init}


TRACES: Final = ("x-genkit-trace-id", "x-genkit-span-id")


def same(lines: object) -> Any:
    """Give what two runs have in common: ids are numbered as they come, times are left out."""
    text, numbers = json.dumps(lines, sort_keys=True), dict[str, str]()
    text = re.sub(
        r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", lambda id_: numbers.setdefault(id_[0], f"#{len(numbers)}"), text
    )
    return json.loads(re.sub(r'"\d{4}-\d\d-\d\dT[^"]*"', '"then"', text))


@asynccontextmanager
async def held(
    agent: Agent[Any], words: Words, **options: Any
) -> AsyncGenerator[tuple[httpx.AsyncClient, InMemoryStreamManager]]:
    """Serve an agent, and let its turns go on at the end."""
    streams = InMemoryStreamManager()
    async with http_to(ours_app(agent, streams, **options)) as http:
        try:
            yield http, streams
        finally:
            words.gate.set()


async def begun(streams: InMemoryStreamManager, stream: str) -> list[Any]:
    """Return when a held turn waits at the gate, with its chunks so far."""
    chunks: list[Any] = []
    async with streams.subscribe(stream) as events:
        async for event in events:
            assert event.type is StreamEventType.CHUNK
            chunks.append(event.chunk)
            if len(texts(chunks)) == HELD:
                break
    return chunks


async def start(http: httpx.AsyncClient, data: object = HOLD) -> str:
    """Start a turn, leave when it has begun, and give its stream's id."""
    async with http.stream("POST", "/words", json=turn(data), headers=STREAMING) as answer:
        assert answer.status_code == 200
        return answer.headers[STREAM_ID]


# As Genkit's server

CHAT: Final = (
    ["send", "hello"],
    ["send", "again"],
    ["snapshot"],
    ["detach", "in the background"],
    ["wait"],
    ["abort"],
    ["send", "more"],
    ["abort", "unknown"],
)


async def test_the_javascript_client_has_of_ours_what_it_has_of_genkits(genkit_client: "GenkitClient") -> None:
    async def said_by(app: ASGIApp) -> "list[Line]":
        async with serving(app) as url:
            lines = await genkit_client("agent", url=f"{url}/words", steps=CHAT)
            session = next(line["sessionId"] for line in lines if "sessionId" in line)
            lines += await genkit_client("agent", url=f"{url}/words", steps=[["load", {"sessionId": session}], ["send", "on"]])
        return lines

    theirs = await said_by(official_app(words_agent(Words(), stored())))
    assert same(await said_by(ours_app(words_agent(Words(), stored())))) == same(theirs)
    assert [line["step"] for line in theirs if "step" in line] == [*(step for step, *_ in CHAT), "load", "send"]
    assert not any("error" in line for line in theirs)


async def test_the_javascript_client_keeps_the_state_of_an_agent_without_a_store(genkit_client: "GenkitClient") -> None:
    async def said_by(app: ASGIApp) -> "list[Line]":
        async with serving(app) as url:
            return await genkit_client("agent", url=f"{url}/words", steps=[["send", "hello"], ["send", "again"]])

    theirs = await said_by(official_app(words_agent(Words())))
    assert same(await said_by(ours_app(words_agent(Words())))) == same(theirs)
    assert theirs[-2]["state"] == {"turns": 2}


async def test_a_tool_that_asks_is_answered(genkit_client: "GenkitClient") -> None:
    answer = {"respond": [{"toolResponse": {"name": "pay", "ref": "1", "output": "paid"}}]}
    steps = [["send", "pay 5"], ["resume", answer], ["resume", {"restart": [{"toolRequest": {"name": "pay", "input": 9}}]}]]

    async def said_by(app: ASGIApp) -> "list[Line]":
        async with serving(app) as url:
            return [line for line in await genkit_client("agent", url=f"{url}/careful", steps=steps) if "step" in line]

    theirs = await said_by(official_app(careful_agent(stored())))
    ours = await said_by(ours_app(careful_agent(stored())))
    assert theirs[0]["interrupts"] == [{"name": "pay", "ref": "1", "input": 5}]
    assert theirs[1]["text"] == "It was paid"
    assert same(ours[:2]) == same(theirs[:2])
    assert [line["status"] for line in (ours[2], theirs[2])] == ["INVALID_ARGUMENT"] * 2


@pytest.mark.parametrize("app_of", [official_app, ours_app])
async def test_the_python_client_is_served(app_of: Callable[..., ASGIApp]) -> None:
    words = Words()
    async with serving(app_of(words_agent(words, stored()))) as url:
        client: AgentClient[Any] = remote_agent(f"{url}/words", state_management="server")
        chat = client.chat()
        said = [chunk.text async for chunk in chat.send_stream("hello").stream]
        assert [text for text in said if text] == [*WORDS]
        task = await chat.detach("hold it")
        pending = await client.get_snapshot(snapshot_id=task.snapshot_id)
        assert pending is not None
        assert pending.status == "pending"
        assert await task.abort() == "pending"
        assert (await task.wait()).status == "aborted"
        assert await client.get_snapshot(snapshot_id="unknown") is None
        again = client.chat(session_id=pending.session_id)
        assert (await again.send("again")).text == "".join(WORDS)


# Durably


async def test_a_turn_that_is_cut_goes_on_and_is_read_by_a_second_client_too(genkit_client: "GenkitClient") -> None:
    words = Words()
    async with serving(ours_app(words_agent(words, stored()))) as url:
        async with genkit_client.live(url=f"{url}/words", input=HOLD, init={}) as cut:
            stream = (await cut.next_line())["streamId"]
            assert "customPatch" in str(await cut.next_line())
        async with genkit_client.live(url=f"{url}/words", streamId=stream) as second:
            words.gate.set()
            lines = [line async for line in second]
        assert await genkit_client(url=f"{url}/words", streamId=stream) == lines
    assert texts([line["chunk"] for line in lines if "chunk" in line]) == [*WORDS]
    assert lines[-1]["output"]["finishReason"] == "stop"  # type: ignore[index]
    assert words.runs == {"hold it": 1}


@pytest.mark.parametrize("has_store", [True, False])
async def test_stop_ends_a_turn_and_all_its_readers(*, has_store: bool) -> None:
    words, store = Words(), stored()
    async with held(words_agent(words, store if has_store else None), words) as (http, streams):
        stream = await start(http)
        await begun(streams, stream)
        assert (await http.delete("/words", headers={STREAM_ID: stream})).json() == {"stopped": True}
        with anyio.fail_after(5):
            await words.aborted.wait()
        assert (await events_of(streams, stream))[-1] == ("error", "CANCELLED")
    assert not any("".join(WORDS) in snapshot.model_dump_json() for snapshot in store.snapshots.values())


async def test_a_turn_that_minds_no_signal_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words()
    words.ignores_abort = True
    ended = anyio.Event()
    async with held(words_agent(words, stored()), words) as (http, streams):
        agent_fn = words.__call__

        async def noting(*arguments: Any) -> Any:
            try:
                return await agent_fn(*arguments)
            finally:
                ended.set()

        monkeypatch.setattr(Words, "__call__", lambda _self, *arguments: noting(*arguments))
        stream = await start(http)
        await begun(streams, stream)
        await http.delete("/words", headers={STREAM_ID: stream})
        with anyio.fail_after(5):
            await ended.wait()


@pytest.mark.cell("reload", "Genkit's remoteAgent")
@pytest.mark.cell("second tab", "Genkit's remoteAgent")
async def test_a_detached_turn_keeps_its_chunks_under_its_snapshots_id(genkit_client: "GenkitClient") -> None:
    words = Words()
    async with serving(ours_app(words_agent(words, stored()))) as url:
        attached = await genkit_client("agent", url=f"{url}/words", steps=[["send", "hello"]])
        task = (await genkit_client("agent", url=f"{url}/words", steps=[["detach", "hold it"]]))[0]
        async with genkit_client.live(url=f"{url}/words", streamId=task["snapshotId"]) as reader:
            assert await reader.next_line() == {"streamId": task["snapshotId"]}
            early = [await reader.next_line() for _ in range(1 + HELD)]
            words.gate.set()
            lines = early + [line async for line in reader]
        later = await genkit_client(url=f"{url}/words", streamId=task["snapshotId"])
        snapshot = await genkit_client("agent", url=f"{url}/words", steps=[["snapshot", task["snapshotId"]]])
    assert later[1:] == lines
    assert same(lines[:-1]) == same([line for line in attached if "chunk" in line])
    output: Any = lines[-1]["output"]
    assert output["message"]["content"] == [{"text": "".join(WORDS)}]
    assert (output["finishReason"], output["snapshotId"]) == ("stop", task["snapshotId"])
    assert (snapshot[0]["snapshot"]["status"], snapshot[0]["snapshot"]["sessionId"]) == ("completed", output["sessionId"])  # type: ignore[index]
    assert words.runs["hold it"] == 1


@pytest.mark.cell("cut", "Genkit's remoteAgent")
async def test_the_javascript_client_reads_its_detached_turn_over_a_connection_that_is_cut(
    genkit_client: "GenkitClient",
) -> None:
    words = Words()
    async with serving(ours_app(words_agent(words, stored()))) as server, bad_network(server) as network:
        steps = [["detach", "hold it"], ["read"]]
        async with genkit_client.live("agent", url=f"{network.path()}/words", steps=steps) as client:
            assert (await client.next_line())["step"] == "detach"
            early = [await client.next_line() for _ in range(1 + HELD)]
            network.meet(Fate(End.FIN, b"data: {"))
            words.gate.set()
            lines = early + [line async for line in client]
    assert network.struck.total() > 0
    assert texts([line["chunk"] for line in lines if "chunk" in line]) == [*WORDS]
    assert lines[-2]["output"]["finishReason"] == "stop"  # type: ignore[index]
    assert words.runs == {"hold it": 1}


@pytest.mark.cell("Stop", "Genkit's remoteAgent")
async def test_the_javascript_client_aborts_its_detached_turn(genkit_client: "GenkitClient") -> None:
    words = Words()
    async with serving(ours_app(words_agent(words, stored()))) as url:
        steps = [["detach", "hold it"], ["abort"], ["read"], ["wait"]]
        lines = [line for line in await genkit_client("agent", url=f"{url}/words", steps=steps) if "step" in line]
        await words.aborted.wait()
    assert lines[1]["status"] == "pending"
    assert lines[2]["error"] == "CANCELLED: the stream was cancelled\nnull"
    assert lines[3]["snapshot"]["status"] == "aborted"  # type: ignore[index]


@pytest.mark.cell("restart", "Genkit's remoteAgent")
@pytest.mark.cell("kill -9", "Genkit's remoteAgent")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_ends_tells_whoever_reads_a_detached_turn(
    how: str, genkit_client: "GenkitClient", sqlite_url: str
) -> None:
    async with server_process("agents", sqlite_url) as server, server_process("agents", sqlite_url) as other:
        (task, _) = await genkit_client("agent", url=f"{server.url}/words", steps=[["detach", "hold it"]])
        read = [["read", task["snapshotId"]]]
        async with genkit_client.live("agent", url=f"{other.url}/words", steps=read) as reader:
            early = [await reader.next_line() for _ in range(1 + HELD)]
            await server.end(how)
            *_, last, _ = [line async for line in reader]
    assert texts([line["chunk"] for line in early]) == [*WORDS[:HELD]]
    assert str(last["error"]).startswith("ABORTED: ")


async def test_the_python_client_reads_its_detached_turn() -> None:
    words = Words()
    async with serving(ours_app(words_agent(words, stored()))) as url:
        client: AgentClient[Any] = remote_agent(f"{url}/words", state_management="server")
        task = await client.chat().detach("hold it")
        words.gate.set()
        async with stream_flow(f"{url}/words", stream_id=task.snapshot_id) as run:
            chunks = [chunk async for chunk in run]
            output = await run.output()
    assert texts(chunks) == [*WORDS]
    assert output["finishReason"] == "stop"


@pytest.mark.slow
async def test_a_detached_turn_is_aborted_through_another_process(genkit_client: "GenkitClient", sqlite_url: str) -> None:
    async with server_process("agents", sqlite_url) as server, server_process("agents", sqlite_url) as other:
        (task, _) = await genkit_client("agent", url=f"{server.url}/words", steps=[["detach", "hold it"]])
        snapshot = task["snapshotId"]
        (abort, _) = await genkit_client("agent", url=f"{other.url}/words", steps=[["abort", snapshot]])
        steps = [["read", snapshot], ["snapshot", snapshot]]
        *_, read, found, _ = await genkit_client("agent", url=f"{server.url}/words", steps=steps)
    assert abort["status"] == "pending"
    assert read["error"] == "CANCELLED: the stream was cancelled\nnull"
    assert found["snapshot"]["status"] == "aborted"  # type: ignore[index]


@pytest.mark.parametrize("how", ["abort", "stop"])
async def test_a_detached_turn_is_ended_by_its_abort_and_by_stop(how: str) -> None:
    words, store = Words(), stored()
    async with held(words_agent(words, store), words) as (http, streams):
        detached = (await http.post("/words", json=turn(DETACHED))).json()["result"]
        snapshot = detached["snapshotId"]
        assert detached["finishReason"] == "detached"
        await begun(streams, snapshot)
        if how == "abort":
            ended = await http.post("/words/abort", json={"data": {"snapshotId": snapshot}})
            assert ended.json() == {"result": {"snapshotId": snapshot, "status": "pending"}}
            again = await http.post("/words/abort", json={"data": snapshot})
            assert again.json() == {"result": {"snapshotId": snapshot, "status": "aborted"}}
        else:
            assert (await http.delete("/words", headers={STREAM_ID: snapshot})).json() == {"stopped": True}
        with anyio.fail_after(5):
            await words.aborted.wait()
        assert (await events_of(streams, snapshot))[-1] == ("error", "CANCELLED")
        await until(lambda: store.snapshots[snapshot].status == "aborted")
        found = (await http.post("/words/getSnapshot", json={"data": {"snapshotId": snapshot}})).json()["result"]
    assert (found["status"], found["snapshotId"]) == ("aborted", snapshot)


async def test_a_detached_turn_that_minds_no_signal_is_cancelled_and_its_snapshot_aborted() -> None:
    words, store = Words(), stored()
    words.ignores_abort = True
    async with held(words_agent(words, store), words) as (http, streams):
        snapshot = (await http.post("/words", json=turn(DETACHED))).json()["result"]["snapshotId"]
        await begun(streams, snapshot)
        await http.delete("/words", headers={STREAM_ID: snapshot})
        with anyio.fail_after(5):
            await words.aborted.wait()
        await until(lambda: not running())
    assert store.snapshots[snapshot].status == "aborted"


class Slow(InMemorySessionStore[Any]):
    """A store that takes longer to save, when it is slow, than a turn may go on that was stopped."""

    is_slow = False

    async def save_snapshot(self, *arguments: Any, **options: Any) -> SessionSnapshot | None:
        await anyio.sleep(1.3 if self.is_slow else 0)
        return await super().save_snapshot(*arguments, **options)


async def test_a_detached_turn_that_is_stopped_is_aborted_in_a_slow_store_too() -> None:
    words, store = Words(), Slow()
    async with held(words_agent(words, store), words) as (http, streams):
        snapshot = (await http.post("/words", json=turn(DETACHED))).json()["result"]["snapshotId"]
        await begun(streams, snapshot)
        store.is_slow = True
        await http.delete("/words", headers={STREAM_ID: snapshot})
        await until(lambda: not running())
    assert store.snapshots[snapshot].status == "aborted"


def running() -> list[str]:
    """Give the tasks of an agent's turns."""
    names = (getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
    return [name for name in names if "AgentRuntime" in name or "_Runtime" in name]


async def test_a_detached_turn_whose_chunks_cannot_be_kept_is_ended() -> None:
    words, store = Words(), stored()
    streams = StreamManager(MemoryStorage(), limits=Limits(max_event_bytes=60))
    async with http_to(ours_app(words_agent(words, store), streams)) as http:
        snapshot = (await http.post("/words", json=turn(DETACHED))).json()["result"]["snapshotId"]
        assert (await events_of(streams, snapshot))[-1][0] == "error"
        await until(lambda: not running())
    assert store.snapshots[snapshot].status == "failed"


class Takes(BaseModel):
    """What takes a while to be made JSON of."""

    number: int

    @model_serializer
    def slowly(self) -> dict[str, int]:
        sleep(0.005)
        return {"number": self.number}


async def test_a_detached_turn_keeps_in_order_what_its_agent_sends_from_a_thread() -> None:
    ai = Genkit()

    async def fn(session: SessionRunner[Any], ctx: ActionRunContext[Any]) -> AgentResult:
        def send() -> None:
            for number in range(20):
                ctx.send_chunk(AgentStreamChunk(model_chunk=ModelResponseChunk(custom=Takes(number=number), content=[])))

        async def turn(*_: object) -> TurnResult:
            await asyncio.to_thread(send)
            return TurnResult(finish_reason=AgentFinishReason.STOP)

        await session.run(turn)
        return await session.result()

    streams = InMemoryStreamManager()
    async with http_to(ours_app(ai.define_custom_agent("words", fn, store=stored()), streams)) as http:
        snapshot = (await http.post("/words", json=turn(DETACHED))).json()["result"]["snapshotId"]
        chunks: list[Any] = [chunk for kind, chunk in await events_of(streams, snapshot) if kind == "chunk"]
    sent = [chunk["modelChunk"]["custom"]["number"] for chunk in chunks if "modelChunk" in chunk]
    assert sent == [*range(20)]


async def test_a_detached_turn_that_ends_at_once_has_the_snapshot_that_its_agent_was_told_of() -> None:
    ai, told, store = Genkit(), list[str | None](), stored()

    async def fn(session: SessionRunner[Any], _: ActionRunContext[Any]) -> AgentResult:
        async def turn(_: AgentInput, turn: TurnContext) -> None:
            told.append(turn.snapshot_id)

        await session.run(turn)
        return await session.result()

    streams = InMemoryStreamManager()
    async with http_to(ours_app(ai.define_custom_agent("words", fn, store=store), streams)) as http:
        snapshot = (await http.post("/words", json=turn(DETACHED))).json()["result"]["snapshotId"]
        assert (await events_of(streams, snapshot))[-1][0] == "done"
    assert told == [snapshot] == [*store.snapshots]


ANSWER: Final = Message(role="model", content=[Part.from_text("the answer")])
NOTE: Final = Message(role="tool", content=[Part.from_text("what a tool said")])


def of_its_own(fails: bool, says: bool, **options: Any) -> Agent[Any]:
    """Give an agent whose result is its own, or else what is last in the session."""
    ai = Genkit()

    async def fn(session: SessionRunner[Any], _: ActionRunContext[Any]) -> AgentResult:
        async def turn(*_: object) -> TurnResult:
            if fails:
                raise ValueError("secret://db-password")
            await session.add_messages([NOTE])
            return TurnResult(finish_reason=AgentFinishReason.STOP)

        await session.run(turn)
        return AgentResult(message=ANSWER, finish_reason=AgentFinishReason.STOP) if says else await session.result()

    return ai.define_custom_agent("words", fn, store=stored(), **options)


@pytest.mark.parametrize("transform", [None, lambda state: state.model_copy(update={"messages": []})])
@pytest.mark.parametrize("fails", [True, False])
async def test_a_detached_turns_output_is_that_of_an_attached_one(*, fails: bool, transform: Any) -> None:
    outputs: list[dict[str, Any]] = []
    output: Any
    for detach in (True, False):
        streams = InMemoryStreamManager()
        async with http_to(ours_app(of_its_own(fails, says=True, state_transform=transform), streams)) as http:
            output = (await http.post("/words", json=turn({**HOLD, "detach": detach}))).json()["result"]
            if detach:
                snapshot = output["snapshotId"]
                _, output = (await events_of(streams, snapshot))[-1]
                assert output["snapshotId"] == snapshot
            outputs.append({name: output.get(name) for name in ("message", "artifacts", "finishReason", "error")})
    assert outputs[0] == outputs[1]
    assert outputs[0]["message"] == ANSWER.model_dump(mode="json", by_alias=True, exclude_none=True)


async def test_the_question_is_not_what_a_detached_turn_that_fails_has_answered() -> None:
    streams = InMemoryStreamManager()
    async with http_to(ours_app(of_its_own(fails=True, says=False), streams)) as http:
        snapshot = (await http.post("/words", json=turn(DETACHED))).json()["result"]["snapshotId"]
        output: Any = (await events_of(streams, snapshot))[-1][1]
    assert (output["finishReason"], output.get("message")) == ("failed", None)


async def test_a_turn_whose_store_fails_does_not_go_on() -> None:
    class Failing(InMemorySessionStore[Any]):
        fails = True

        async def save_snapshot(self, *arguments: Any, **options: Any) -> SessionSnapshot | None:
            if self.fails:
                raise OSError("secret://db-password")
            return await super().save_snapshot(*arguments, **options)

    words, store = Words(), Failing()
    async with held(words_agent(words, store), words) as (http, streams):
        named = {"Idempotency-Key": "1"}
        answer = await http.post("/words", json=turn(DETACHED), headers=named)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "internal")
        await until(lambda: not running())
        assert [*await streams.list()] == []
        store.fails = False
        again = await http.post("/words", json=turn(DETACHED), headers=named)
        assert [*store.snapshots] == [again.json()["result"]["snapshotId"]]


class FailsAtTheEnd(InMemorySessionStore[Any]):
    """A store that takes the first of a turn's snapshots, and none after it."""

    async def save_snapshot(self, snapshot_id: str, *arguments: Any, **options: Any) -> SessionSnapshot | None:
        if snapshot_id in self.snapshots:
            raise OSError("secret://db-password")
        return await super().save_snapshot(snapshot_id, *arguments, **options)


class OfNativeCode(BaseException):
    """What is no Exception, as some libraries raise it."""


@pytest.mark.parametrize("fails", [None, OfNativeCode(), asyncio.CancelledError()])
async def test_a_detached_turn_whose_end_is_not_kept_has_failed_and_was_not_aborted(
    fails: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, store = Words(), stored() if fails else FailsAtTheEnd()

    async def ends(*_: object) -> None:
        await words.gate.wait()
        if fails is not None:
            raise fails

    monkeypatch.setattr(words, "_held", ends)
    async with held(words_agent(words, store), words) as (http, streams):
        snapshot = (await http.post("/words", json=turn(DETACHED))).json()["result"]["snapshotId"]
        await begun(streams, snapshot)
        words.gate.set()
        assert (await events_of(streams, snapshot))[-1] == ("error", "INTERNAL")
    assert store.snapshots[snapshot].status == "pending"


async def test_a_client_that_leaves_a_turn_without_a_stream_ends_it() -> None:
    words = Words()
    async with held(words_agent(words, stored()), words) as (http, _):
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(partial(http.post, "/words", json=turn(HOLD)))
            await until(lambda: words.runs)
            leaving.cancel_scope.cancel()
        with anyio.fail_after(5):
            await words.aborted.wait()
        await until(lambda: not running())


async def test_a_server_that_stops_aborts_detached_turns() -> None:
    words, store = Words(), stored()
    streams_http = StreamsHTTP(InMemoryStreamManager(), drain=timedelta(0))
    async with http_to(ours_app(words_agent(words, store), streams_http)) as http:
        snapshot = (await http.post("/words", json=turn(DETACHED))).json()["result"]["snapshotId"]
    assert store.snapshots[snapshot].status == "aborted"
    assert words.aborted.is_set()


async def test_the_answer_to_a_detached_turn_names_its_stream_and_is_nothing_but_the_output() -> None:
    words = Words()
    async with held(words_agent(words, stored()), words) as (http, _):
        streamed = await http.post("/words", json=turn(DETACHED), headers=STREAMING)
        whole = await http.post("/words", json=turn(DETACHED))
    (frame,) = frames_of(streamed.content)
    results: list[Any] = [frame["result"], whole.json()["result"]]
    for answer, result in zip((streamed, whole), results, strict=True):
        assert result.keys() == {"sessionId", "snapshotId", "finishReason"}
        assert answer.headers[STREAM_ID] == result["snapshotId"]


async def test_a_detached_turn_that_is_sent_twice_runs_once() -> None:
    words = Words()
    async with held(words_agent(words, stored()), words) as (http, _):
        headers = {"Idempotency-Key": "1"}
        first, second = [await http.post("/words", json=turn(DETACHED), headers=headers) for _ in range(2)]
    assert first.json() == second.json()
    assert words.runs == {"hold it": 1}


async def test_of_detached_turns_that_are_sent_at_once_with_one_key_one_goes_on() -> None:
    words, store = Words(), stored()
    async with held(words_agent(words, store), words) as (http, _):
        answers = set[str]()

        async def send() -> None:
            answers.add((await http.post("/words", json=turn(DETACHED), headers={"Idempotency-Key": "1"})).text)

        async with anyio.create_task_group() as sending:
            for _ in range(4):
                sending.start_soon(send)
        (answer,) = answers
        going_on = [snapshot for snapshot in store.snapshots.values() if snapshot.status == "pending"]
        assert [snapshot.snapshot_id for snapshot in going_on] == [json.loads(answer)["result"]["snapshotId"]]


async def test_without_a_store_nothing_is_detached() -> None:
    words = Words()
    async with held(words_agent(words), words) as (http, _):
        answer = await http.post("/words", json=turn(DETACHED))
        lookup = await http.post("/words/getSnapshot", json={"data": "1"})
    assert (answer.status_code, answer.json()["error"]["status"]) == (400, "FAILED_PRECONDITION")
    assert lookup.status_code == 404
    assert not words.runs


async def test_a_turn_that_cannot_begin_says_so_as_genkits_does() -> None:
    words = Words()
    async with held(words_agent(words, stored()), words) as (http, streams):
        for data in (HELLO, DETACHED):
            answer = await http.post("/words", json=turn(data, snapshotId="unknown"))
            assert answer.json()["result"] == {
                "finishReason": "failed",
                "error": {"status": "NOT_FOUND", "message": "not found"},
            }
        assert [*await streams.list()] == []


async def test_where_no_producer_is_taken_no_turn_is_detached() -> None:
    words = Words()
    streams_http = StreamsHTTP(InMemoryStreamManager(), max_producers=1)
    async with http_to(ours_app(words_agent(words, stored()), streams_http)) as http:
        assert (await http.post("/words", json=turn(DETACHED))).status_code == 200
        assert (await http.post("/words", json=turn(DETACHED))).status_code == 429
        words.gate.set()
    assert words.runs == {"hold it": 1}


@pytest.mark.parametrize("data", [DETACHED, HOLD])
async def test_a_turn_that_swallows_its_cancellation_keeps_its_place(data: object, monkeypatch: pytest.MonkeyPatch) -> None:
    words, told = Words(), anyio.Event()

    async def goes_on(*_: object) -> None:
        while not words.gate.is_set():
            with suppress(asyncio.CancelledError):
                await words.gate.wait()

    monkeypatch.setattr(words, "_held", goes_on)
    monkeypatch.setattr(_genkit_agents, "CANCEL_SECONDS", 0.01)
    streams_http = StreamsHTTP(InMemoryStreamManager(), max_producers=1, on_end=lambda _: told.set())
    async with http_to(ours_app(words_agent(words, stored()), streams_http)) as http:
        async with http.stream("POST", "/words", json=turn(data), headers=STREAMING) as answer:
            stream = answer.headers[STREAM_ID]
        await until(lambda: words.runs)
        await http.delete("/words", headers={STREAM_ID: stream})
        with anyio.fail_after(5):
            await told.wait()
        refused = await http.post("/words", json=turn(HELLO), headers=STREAMING)
        words.gate.set()
        assert refused.status_code == 429
        await until(lambda: not running())
        assert (await http.post("/words", json=turn(HELLO), headers=STREAMING)).status_code == 200


async def test_a_detached_turn_that_can_be_no_stream_does_not_begin() -> None:
    words, store = Words(), stored()

    class Refusing(MemoryStorage):  # which no stream can be opened in
        async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
            raise OSError("secret://db-password")

    async with http_to(ours_app(words_agent(words, store), StreamManager(Refusing()))) as http:
        assert (await http.post("/words", json=turn(DETACHED))).status_code == 503
        await until(lambda: not running())
    assert (store.snapshots, words.runs) == ({}, {})


@pytest.mark.parametrize("setting", [None, AS_IT_IS])
async def test_a_request_that_is_cancelled_wherever_it_is_leaves_no_detached_turn_behind(setting: Setting | None) -> None:
    body = json.dumps(turn(DETACHED)).encode()
    scope = {"type": "http", "method": "POST", "path": "/words", "query_string": b"", "headers": []}

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body}

    answering = anyio.Event()

    async def send(_: object) -> None:
        answering.set()

    seen = set[str]()
    for steps in range(1000):
        words, store = Words(), Yielding()
        work = work_of(words_agent(words, store))
        async with StreamsHTTP(InMemoryStreamManager(), drain=timedelta(0)) as streams_http:
            posting = asyncio.create_task(
                streams_http.post(scope, receive, send, work if setting is None else WorkIn(work, setting), {})
            )
            for _ in range(steps):
                await asyncio.sleep(0)
            posting.cancel()
            await asyncio.wait({posting})
            if answering.is_set():
                break
            await until(lambda: not running())
            assert [*await streams_http.streams.list()] == []
            statuses = {str(snapshot.status) for snapshot in store.snapshots.values()}
            assert statuses <= {"aborted"}
            seen |= statuses
    assert answering.is_set()
    assert seen == {"aborted"}


class Yielding(InMemorySessionStore[Any]):
    """A store that takes a moment, before and after it saves."""

    async def save_snapshot(self, *arguments: Any, **options: Any) -> SessionSnapshot | None:
        await asyncio.sleep(0)
        saved = await super().save_snapshot(*arguments, **options)
        await asyncio.sleep(0)
        return saved


# What is told of errors


@pytest.mark.parametrize("detach", [True, False])
async def test_what_a_turn_raises_is_told_by_its_status_only_unless_it_is_public(
    *, detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    words = Words()
    fail = {"message": {"role": "user", "content": [{"text": "fail"}]}, "detach": detach}
    async with held(words_agent(words, stored()), words) as (http, streams):
        result = (await http.post("/words", json=turn(fail))).json()["result"]
        if detach:
            async with streams.subscribe(result["snapshotId"]) as events:
                result = [event async for event in events][-1].output
        found = await http.post("/words/getSnapshot", json={"data": {"sessionId": result["sessionId"]}})
    assert result["error"] == {"status": "INTERNAL", "message": "internal"}
    assert (found.json()["result"]["status"], found.json()["result"]["error"]) == ("failed", result["error"])
    assert "secret" not in found.text
    assert "secret://db-password" in caplog.text


@pytest.mark.parametrize(
    "error", [PublicError("UNAVAILABLE", "come back later"), GenkitPublicError("UNAVAILABLE", "come back later")]
)
async def test_what_is_public_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words()

    async def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(words, "_held", fails)
    async with held(words_agent(words, stored()), words) as (http, _):
        result = (await http.post("/words", json=turn(HOLD))).json()["result"]
    assert result["error"] | {"details": None} == {"status": "UNAVAILABLE", "message": "come back later", "details": None}


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("secret://db-password"), ("INTERNAL", "internal")),
        (PublicError("UNAVAILABLE", "come back later"), ("UNAVAILABLE", "come back later")),
        (GenkitPublicError("UNAVAILABLE", "come back later"), ("UNAVAILABLE", "come back later")),
    ],
)
async def test_what_an_agents_function_raises_beside_its_turn_ends_the_stream(
    error: Exception, told: tuple[str, str], *, detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streamkeep")  # what is public is no error of the server's
    ai = Genkit()

    async def fn(session: SessionRunner[Any], _: ActionRunContext[Any]) -> AgentResult:
        await session.run(lambda *_: asyncio.sleep(0))
        raise error

    streams_http = StreamsHTTP(InMemoryStreamManager())
    async with http_to(ours_app(ai.define_custom_agent("words", fn, store=stored()), streams_http)) as http:
        answer = await http.post("/words", json=turn({**HELLO, "detach": detach}), headers=STREAMING)
        read = await http.post("/words", headers={STREAM_ID: answer.headers[STREAM_ID]})
        shown: Any = frames_of(read.content)[-1]["error"]
        found = (await http.post("/words/getSnapshot", json={"data": answer.headers[STREAM_ID]})).text
    assert (shown["status"], shown["message"]) == told
    assert "secret" not in read.text + found
    assert str(error) in caplog.text


async def test_what_an_agents_function_raises_when_its_turn_has_failed_is_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ai = Genkit()

    async def fails(*_: object) -> None:
        raise ValueError("the turn")

    async def fn(session: SessionRunner[Any], _: ActionRunContext[Any]) -> AgentResult:
        await session.run(fails)
        raise ValueError("behind it")

    async with http_to(ours_app(ai.define_custom_agent("words", fn, store=stored()))) as http:
        result = (await http.post("/words", json=turn(HELLO))).json()["result"]
    assert result["error"]["message"] == "internal"
    assert "ValueError: the turn" in caplog.text
    assert "ValueError: behind it" in caplog.text


# Whose


class Tenants(InMemorySessionStore[Any]):
    """A store in which each tenant of the context has snapshots of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.of = dict[str, str]()

    async def get_snapshot(self, *, context: dict[str, Any] | None = None, **lookup: Any) -> SessionSnapshot | None:
        found = await super().get_snapshot(**lookup)
        return found if found is None or self.of[found.snapshot_id] == (context or {})["name"] else None

    async def save_snapshot(
        self, snapshot_id: str, fn: Any, *, context: dict[str, Any] | None = None
    ) -> SessionSnapshot | None:
        if self.of.setdefault(snapshot_id, (context or {})["name"]) != (context or {})["name"]:
            return None
        return await super().save_snapshot(snapshot_id, fn)


def name(request: Any) -> dict[str, Any]:
    """Give a context, as a context provider does."""
    if "x-name" not in request.headers:
        raise GenkitPublicError("UNAUTHENTICATED", "who are you?")
    return {"name": request.headers["x-name"]}


def authorize(access: Access) -> object:
    return access.context.get("name")


@pytest.mark.parametrize("has_tenants", [True, False])
async def test_to_a_stranger_anothers_detached_turn_does_not_exist(*, has_tenants: bool) -> None:
    words, store = Words(), Tenants() if has_tenants else stored()
    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=authorize)
    async with http_to(ours_app(words_agent(words, store), streams_http, context_provider=name)) as http:
        ada, eve = {"X-Name": "ada"}, {"X-Name": "eve"}
        mine = (await http.post("/words", json=turn(DETACHED), headers=ada)).json()["result"]
        lookups = [{"data": {"snapshotId": mine["snapshotId"]}}, {"data": {"sessionId": mine["sessionId"]}}]
        for lookup in lookups:
            assert (await http.post("/words/getSnapshot", json=lookup, headers=eve)).status_code == 404
            assert (await http.post("/words/getSnapshot", json=lookup, headers=ada)).status_code == 200
            assert (await http.post("/words/getSnapshot", json=lookup)).json()["error"]["message"] == "who are you?"
        named = {STREAM_ID: mine["snapshotId"]}
        assert (await http.post("/words", headers=eve | named)).status_code == 204
        assert (await http.delete("/words", headers=eve | named)).status_code == 404
        for lookup in lookups:
            unknown = {"data": dict.fromkeys(lookup["data"], "unknown")}
            answers = [await http.post("/words/getSnapshot", json=data, headers=eve) for data in (lookup, unknown)]
            assert answers[0].content == answers[1].content
        nothing = {"result": {"snapshotId": mine["snapshotId"], "status": None}}
        assert (await http.post("/words/abort", json=lookups[0], headers=eve)).json() == nothing
        assert not words.aborted.is_set()
        assert (await http.post("/words/abort", json=lookups[0], headers=ada)).json()["result"]["status"] == "pending"
        with anyio.fail_after(5):
            await words.aborted.wait()


@pytest.mark.parametrize("is_pending", [True, False])
async def test_a_stranger_cannot_go_on_from_anothers_detached_turn(*, is_pending: bool) -> None:
    words, store = Words(), stored()
    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=authorize)
    async with http_to(traced(ours_app(words_agent(words, store), streams_http, context_provider=name))) as http:
        ada, eve = {"X-Name": "ada"}, {"X-Name": "eve"}
        mine = (await http.post("/words", json=turn(DETACHED, sessionId="of ada"), headers=ada)).json()["result"]
        if not is_pending:
            words.gate.set()
            await events_of(streams_http.streams, mine["snapshotId"])
        before = {**store.snapshots}

        async def gone_on(data: object, how: dict[str, str], **init: object) -> tuple[object, ...]:
            answer = await http.post("/words", json=turn(data, **init), headers=eve | how)
            traces = {header: answer.headers.get(header) for header in TRACES}
            return answer.status_code, answer.text, traces

        for data, how in ((HELLO, {}), (HELLO, STREAMING), (DETACHED, {}), (DETACHED, STREAMING)):
            unknown = await gone_on(data, how, snapshotId="unknown")
            assert "NOT_FOUND" in str(unknown)
            assert await gone_on(data, how, snapshotId=mine["snapshotId"]) == unknown
            assert await gone_on(data, how, snapshot_id=mine["snapshotId"]) == unknown
            assert await gone_on(data, how, snapshotId=mine["snapshotId"], sessionId="of ada") == unknown
            assert await gone_on(data, how, snapshotId=mine["snapshotId"], sessionId="another") == unknown
            assert await gone_on(data, how, sessionId="of ada") == unknown
            state = [await gone_on(data, how, snapshotId=which, state={}) for which in ("unknown", mine["snapshotId"])]
            assert state[0] == state[1]
        assert store.snapshots == before
        words.gate.set()
        await events_of(streams_http.streams, mine["snapshotId"])
        for init in ({"snapshotId": mine["snapshotId"]}, {"sessionId": "of ada"}):
            result = (await http.post("/words", json=turn(HELLO, **init), headers=ada)).json()["result"]
            assert result["finishReason"] == "stop"
    assert words.runs == {"hold it": 1, "hello": 2}


async def test_a_stranger_cannot_go_on_from_it_where_turns_are_genkits_either(monkeypatch: pytest.MonkeyPatch) -> None:
    words, agent = Words(), words_agent(Words(), stored())
    words.gate.set()
    streams = InMemoryStreamManager()
    await agent.chat(session_id="s").send("hello")
    (snapshot,) = agent.store.snapshots  # type: ignore[union-attr]
    has_moved(monkeypatch, agent)
    async with http_to(ours_app(agent, StreamsHTTP(streams, authorize=authorize), context_provider=name)) as http:
        await (await streams.open(snapshot, owner="ada")).done()  # as a process has it that runs another release
        results = [
            (await http.post("/words", json=turn(HELLO, snapshotId=which), headers={"X-Name": who})).json()["result"]
            for which, who in (("unknown", "eve"), (snapshot, "eve"), (snapshot, "ada"))
        ]
    assert results[1] == results[0]
    assert results[2]["finishReason"] == "stop"


class Watched(InMemorySessionStore[Any]):
    """A store that is watched when it has saved: `seen` is awaited with each snapshot before its saver knows."""

    seen: Callable[[SessionSnapshot], Awaitable[None]]

    async def save_snapshot(self, *arguments: Any, **options: Any) -> SessionSnapshot | None:
        saved = await super().save_snapshot(*arguments, **options)
        if saved is not None and saved.status == "pending":
            await self.seen(saved)
        return saved


async def test_a_detached_turn_is_its_owners_as_soon_as_it_can_be_seen_from_another_process_too() -> None:
    words, store, storage = Words(), Watched(), MemoryStorage()
    ada, eve = {"X-Name": "ada"}, {"X-Name": "eve"}
    answers: list[Any] = []
    async with AsyncExitStack() as stack:
        here, there = [
            await stack.enter_async_context(
                http_to(
                    ours_app(
                        words_agent(words, store),
                        StreamsHTTP(StreamManager(storage), authorize=authorize),
                        context_provider=name,
                    )
                )
            )
            for _ in range(2)
        ]

        async def look(snapshot: SessionSnapshot) -> None:
            named, in_session = ({"data": {"snapshotId": snapshot.snapshot_id}}, {"data": {"sessionId": "of ada"}})
            found = [
                await http.post("/words/getSnapshot", json=lookup, headers=who)
                for http, who in ((here, eve), (there, eve), (there, ada))
                for lookup in (named, in_session)
            ]
            aborts = [await http.post("/words/abort", json=named, headers=eve) for http in (here, there)]
            answers.extend(answer.status_code for answer in found)
            answers.extend(answer.json()["result"]["status"] for answer in aborts)

        store.seen = look
        mine = (await here.post("/words", json=turn(DETACHED, sessionId="of ada"), headers=ada)).json()["result"]
        assert store.snapshots[mine["snapshotId"]].status == "pending"
        words.gate.set()
        await until(lambda: store.snapshots[mine["snapshotId"]].status == "completed")
    assert answers == [404, 404, 404, 404, 200, 200, None, None]


async def test_nothing_of_a_detached_turn_can_be_seen_while_its_stream_is_opened() -> None:
    words, store = Words(), stored()

    class Held(MemoryStorage):
        opening = anyio.Event()
        may_open = anyio.Event()

        async def commit(self, *arguments: Any, **options: Any) -> bool:
            self.opening.set()
            await self.may_open.wait()
            return await super().commit(*arguments, **options)

    storage = Held()
    async with http_to(ours_app(words_agent(words, store), StreamManager(storage))) as http:
        async with anyio.create_task_group() as posting:
            posting.start_soon(partial(http.post, "/words", json=turn(DETACHED)))
            await storage.opening.wait()
            await anyio.sleep(0.05)
            assert (store.snapshots, words.runs) == ({}, {})
            storage.may_open.set()
        assert [str(snapshot.status) for snapshot in store.snapshots.values()] == ["pending"]
        words.gate.set()


async def test_answers_about_an_agents_turns_name_their_trace() -> None:
    words = Words()
    async with http_to(traced(ours_app(words_agent(words, stored())))) as http:
        detached = await http.post("/words", json=turn(DETACHED))
        refused = await http.post("/words", json=turn(DETACHED, snapshotId="unknown"))
        snapshot = {"data": detached.json()["result"]["snapshotId"]}
        calls = [await http.post(f"/words/{call}", json=snapshot) for call in ("getSnapshot", "abort")]
        for answer in (detached, refused, *calls):
            assert (answer.status_code, answer.headers["x-genkit-trace-id"]) == (200, format(5 << 64, "032x"))
            assert "x-genkit-span-id" in answer.headers
        streamed = await http.post("/words", json=turn(DETACHED), headers=STREAMING)
        unknown = await http.post("/words/abort", json={"data": "unknown"})
        assert not {*TRACES} & {*streamed.headers, *unknown.headers}


async def test_a_store_has_the_context_in_all_that_is_asked_of_it() -> None:
    words, store = Words(), Tenants()
    words.gate.set()
    async with held(words_agent(words, store), words, context_provider=name) as (http, streams):
        ada = {"X-Name": "ada"}
        detached = (await http.post("/words", json=turn(DETACHED), headers=ada)).json()["result"]
        assert (await events_of(streams, detached["snapshotId"]))[-1][0] == "done"
        eve = await http.post("/words", json=turn(HELLO, snapshotId=detached["snapshotId"]), headers={"X-Name": "eve"})
    assert eve.json()["result"]["error"]["status"] == "NOT_FOUND"
    assert {*store.of.values()} == {"ada"}
    assert [context["name"] for context in words.contexts] == ["ada"]


# Requests that cannot be


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        1,
        [],
        "",
        " ",
        {"snapshotId": ""},
        {"snapshotId": 1},
        {"snapshot_id": " "},
        {"snapshotId": 1, "sessionId": "b"},
        {"snapshotId": "a", "session_id": "b"},
    ],
)
async def test_a_lookup_that_names_nothing_or_too_much_is_refused(data: object) -> None:
    words = Words()
    async with held(words_agent(words, stored()), words) as (http, _):
        answer = await http.post("/words/getSnapshot", json={"data": data})
        abort = await http.post("/words/abort", json={"data": data})
    assert (answer.status_code, answer.json()["error"]["status"]) == (400, "INVALID_ARGUMENT")
    assert abort.status_code == (200 if data == {"snapshotId": "a", "session_id": "b"} else 400)


OF_S: Final = SessionSnapshot(snapshot_id="s", created_at="2026-01-01T00:00:00Z", state=SessionState(session_id="of s"))


@pytest.mark.parametrize(
    "data",
    [
        "s",
        {"snapshotId": "s"},
        {"snapshot_id": "s"},
        {"sessionId": "of s"},
        {"session_id": "of s"},
        {"snapshotId": "", "snapshot_id": "s"},
        {"snapshotId": None, "sessionId": "of s"},
        {"snapshotId": "s", "snapshot_id": "unknown"},
        {"snapshotId": "s", "session_id": "of s"},
        {"snapshot_id": "s", "sessionId": "of s"},
        {"snapshot_id": "s", "session_id": "of s"},
        {"snapshotId": "s", "sessionId": " "},
        {"snapshotId": "unknown"},
        {"session_id": "unknown"},
    ],
)
async def test_a_lookup_is_answered_as_genkits_server_answers_it(data: object) -> None:
    answers: list[list[Any]] = []
    for app_of in (official_app, ours_app):
        words, store = Words(), stored()
        words.gate.set()
        agent = words_agent(words, store)
        await store.save_snapshot("s", lambda _: OF_S)
        async with http_to(app_of(agent)) as http:
            found, abort = [await http.post(f"/words/{call}", json={"data": data}) for call in ("getSnapshot", "abort")]
            answers.append([found.json()["result"]["snapshotId"] if found.status_code == 200 else found.status_code == 404])
            answers[-1].append(abort.json()["result"] if abort.status_code == 200 else None)
    assert answers[1] == answers[0]


# Where Genkit is made otherwise


def has_moved(monkeypatch: pytest.MonkeyPatch, agent: Agent[Any]) -> None:
    monkeypatch.delitem(sys.modules, "streamkeep.integrations._genkit_turns", raising=False)
    monkeypatch.setitem(sys.modules, "genkit._ai._agents._runtime", None)


def names_snapshots_otherwise(monkeypatch: pytest.MonkeyPatch, agent: Agent[Any]) -> None:
    monkeypatch.setattr("streamkeep.integrations._genkit_turns.NAMES_SNAPSHOT", "next_snapshot_id")


def is_wrapped(monkeypatch: pytest.MonkeyPatch, agent: Agent[Any]) -> None:
    made = agent.bidi_fn

    async def bidi_fn(*arguments: Any) -> Any:
        return await made(*arguments)

    monkeypatch.setattr(agent, "bidi_fn", bidi_fn)


@pytest.mark.parametrize("made", [has_moved, is_wrapped, names_snapshots_otherwise])
async def test_an_agent_that_is_made_otherwise_is_served_as_genkits(
    made: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = Words()
    words.gate.set()
    agent = words_agent(words, stored())
    made(monkeypatch, agent)
    async with held(agent, words) as (http, _):
        answer = await http.post("/words", json=turn(HELLO), headers=STREAMING)
        detached = await http.post("/words", json=turn(DETACHED), headers=STREAMING)
    assert texts([frame["message"] for frame in frames_of(answer.content)[:-1]]) == [*WORDS]
    assert frames_of(detached.content)[-1]["result"]["finishReason"] == "detached"  # type: ignore[index]
    assert "is made otherwise" in caplog.text


async def test_this_genkits_agents_are_made_as_we_know_it() -> None:
    for agent in (words_agent(Words(), stored()), words_agent(Words()), careful_agent(stored())):
        assert _genkit_agents._turns_of(agent) is not None
