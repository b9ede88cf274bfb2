"""More streams than there is room for: what is refused costs nothing, and what runs goes on."""

import json
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Final

import anyio
import anyio.lowlevel
import pytest
from fastapi import FastAPI, Request
from genkit import ActionRunContext
from starlette.responses import Response
from tests.hostile.servers import APPS, ID, STREAMING, House, serve
from tests.hostile.sockets import Answer, Connection, ask, connections, request

from streamkeep import InMemoryStreamManager, LimitExceededError, StreamInput, StreamManager
from streamkeep.http import Runner, StreamsHTTP
from streamkeep.http.runner import MAX_PRODUCERS
from streamkeep.storage import Head
from streamkeep.storages.memory import MemoryStorage

both: Final = pytest.mark.parametrize("app", APPS)
JSON: Final = b"Content-Type: application/json"


class Gate:
    """A flow that goes on when it is let, and says how many of it have run at a time."""

    def __init__(self) -> None:
        self.open = anyio.Event()
        self.running = 0
        self.most = 0

    def flow(self) -> Any:
        """Give it as a function that can be a flow."""

        async def wait(_: None, ctx: ActionRunContext) -> str:
            self.running += 1
            self.most = max(self.most, self.running)
            ctx.send_chunk("begun")
            await self.open.wait()
            self.running -= 1
            return "over"

        return wait


def crowded(app: str, gate: Gate, stack: ExitStack, *, room: int = 3) -> House:
    """Serve that flow where there is little room."""
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams, max_producers=room)
    served = APPS[app](gate.flow(), streams=streams_http)
    return stack.enter_context(serve(served, streams, streams_http, passes_on=app == "DurableStreaming"))


START: Final = request("POST", b"/wait", STREAMING, JSON, body=b'{"data":null}')


@both
def test_a_flood_of_starts_fills_the_room_and_no_more(app: str) -> None:
    gate = Gate()
    with ExitStack() as stack:
        target = crowded(app, gate, stack)
        flood = stack.enter_context(connections(target.address, 30))
        for connection in flood:
            connection.send(START)
        answers = [head_of(connection) for connection in flood]
        assert sorted(answers) == [200] * 3 + [429] * 27
        assert len(target.stream_ids()) == 3  # what was refused has left nothing
        assert target.is_alive()
        target.portal.call(gate.open.set)
        whole = [connection.answer() for connection, code in zip(flood, answers, strict=True) if code == 200]
        assert all(answer.body.endswith(b'data: {"result":"over","offset":1}\n\n') for answer in whole)
        if app == "durable_flow":  # what is inside DurableStreaming has begun to answer before it is known to stream
            assert gate.most == 3
        assert target.comes_to_rest()
        with Connection(target.address) as again:
            again.send(START)
            assert again.answer().code == 200  # there is room again


def head_of(connection: Connection) -> int:
    """Give the code of an answer whose body may be a long time coming."""
    return int(connection.until(b"\r\n\r\n")[9:12])


@both
def test_the_refusal_is_genkits_and_says_why(app: str) -> None:
    gate = Gate()
    with ExitStack() as stack:
        target = crowded(app, gate, stack, room=0)
        with Connection(target.address) as connection:
            connection.send(START)
            answer = connection.answer()
    assert answer.code == 429
    assert json.loads(answer.body)["error"]["status"] == "RESOURCE_EXHAUSTED"
    assert "x-genkit-stream-id" not in answer.headers


@both
def test_where_no_room_is_left_streams_are_still_read_resumed_and_stopped(app: str) -> None:
    gate = Gate()
    with ExitStack() as stack:
        target = crowded(app, gate, stack, room=1)
        first = stack.enter_context(Connection(target.address))
        first.send(START)
        stream = id_in(first.until(b"begun"))
        assert ask(target.address, "POST", b"/wait", STREAMING, JSON, body=b'{"data":null}').code == 429
        resuming = stack.enter_context(Connection(target.address))
        resuming.send(request("POST", b"/wait", ID + stream, body=b""))
        assert b"begun" in resuming.until(b"begun")
        reading = stack.enter_context(Connection(target.address))
        reading.send(request("GET", b"/streams/" + stream))
        assert b"event: chunk" in reading.until(b"event: chunk")
        assert ask(target.address, "DELETE", b"/wait", ID + stream, body=b"").body == b'{"stopped":true}'
        assert b'"CANCELLED"' in first.answer().body
        # (genkit_fastapi leaves tasks behind when it is cancelled.)
        assert target.passes_on or target.comes_to_rest()


def id_in(head: bytes) -> bytes:
    """Give the id that an answer names."""
    return head.lower().partition(b"x-genkit-stream-id: ")[2].partition(b"\r\n")[0]


def test_a_generator_that_finds_no_room_is_never_started() -> None:
    started: list[str] = []

    async def numbers() -> AsyncGenerator[object, None]:
        started.append("yes")
        yield 1

    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams, max_producers=0)
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.post("/numbers")
    async def answer(request: Request) -> Response:
        return await streams_http.respond(request, numbers())

    app.mount("/streams", streams_http)
    with serve(app, streams, streams_http) as target:
        refused: Answer = ask(target.address, "POST", b"/numbers", body=b"")
    assert refused.code == 429
    assert not started


class SlowToOpen(MemoryStorage):
    """Memory in which a commit waits to be let."""

    def __init__(self) -> None:
        super().__init__()
        self.go = anyio.Event()

    async def commit(self, stream: str, seen: int | None, head: Head, records: Any = ()) -> bool:
        """Wait, then do it."""
        await self.go.wait()
        return await super().commit(stream, seen, head, records)


async def test_streams_that_are_being_opened_take_room_too() -> None:
    async def produce(_stream: StreamInput, _stop: anyio.Event) -> None:
        await anyio.sleep_forever()

    async def start(stream: str) -> None:
        try:
            await runner.start(stream, produce)
        except LimitExceededError:
            refused.append(stream)

    refused: list[str] = []
    storage = SlowToOpen()
    with anyio.fail_after(20):
        async with (
            StreamManager(storage) as streams,
            Runner(streams, max_producers=2, drain=timedelta(0), stop_grace=timedelta(0)) as runner,
            anyio.create_task_group() as starting,
        ):
            for number in range(6):
                starting.start_soon(start, f"s{number}")
            await anyio.wait_all_tasks_blocked()
            assert len(refused) == 4
            storage.go.set()
            await anyio.wait_all_tasks_blocked()
            assert len(await streams.list()) == 2


async def test_an_open_that_fails_gives_its_room_back() -> None:
    async with InMemoryStreamManager(max_streams=1) as streams, Runner(streams, max_producers=1) as runner:
        await (await streams.open("only")).done()
        for _ in range(3):
            with pytest.raises(Exception, match="in memory"):
                await runner.start("another", lambda _stream, _stop: anyio.lowlevel.checkpoint())
        await streams.delete("only")
        await runner.start("another", lambda _stream, _stop: anyio.lowlevel.checkpoint())


def test_the_room_is_for_a_thousand_unless_said_otherwise() -> None:
    assert MAX_PRODUCERS == 1_000
