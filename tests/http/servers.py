"""Real servers for tests: uvicorn in the test's event loop, or in a process of its own that can be stopped and killed."""

import asyncio
import contextlib
import json
import multiprocessing
import re
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Final, cast

import anyio
import anyio.to_thread
import httpx
import pytest
import uvicorn
from anyio.lowlevel import checkpoint
from fastapi import FastAPI
from genkit import ActionRunContext, Genkit, GenkitError
from genkit.plugin_api import Action
from genkit_fastapi import serve_flow

from streamkeep import InMemoryStreamManager, StreamEvent, StreamEventType, StreamManager
from streamkeep.http import DurableStreaming, StreamsHTTP
from streamkeep.http.response import ASGIApp, Timeouts
from streamkeep.integrations.fastapi import durable_flow

Flow = Action[Any, Any, Any, Any]
Work = Callable[..., Awaitable[object]]


# Apps

genkit: Final = Genkit()


def flow_of(work: Work) -> Flow:
    """Give a function as a Genkit flow of the same name."""
    return genkit.flow(work.__name__)(work)


def durable_app(*flows: Work, streams: StreamManager | StreamsHTTP | None = None, **options: Any) -> ASGIApp:
    """Give a FastAPI app with each function as a durable flow; the streams can be read under /streams."""
    streams = streams or InMemoryStreamManager()
    streams_http = streams if isinstance(streams, StreamsHTTP) else StreamsHTTP(streams)
    app = FastAPI(lifespan=streams_http.lifespan)
    for flow in flows:
        app.include_router(durable_flow(flow_of(flow), streams_http, **options))
    app.mount("/streams", streams_http)
    return app


def wrapped_app(*flows: Work, streams: StreamManager | StreamsHTTP | None = None, **options: Any) -> ASGIApp:
    """Give an unmodified app of genkit_fastapi with each function as a flow, wrapped in DurableStreaming."""
    streams = streams or InMemoryStreamManager()
    app = FastAPI()
    for flow in flows:
        app.include_router(serve_flow(flow_of(flow), **options))
    app.mount("/streams", streams if isinstance(streams, StreamsHTTP) else StreamsHTTP(streams))
    return DurableStreaming(app, streams)


async def count(to: int, ctx: ActionRunContext) -> dict[str, int]:
    """Send the numbers below `to`, at once."""
    for number in range(to):
        ctx.send_chunk(number)
        if number % 64 == 0:
            await checkpoint()
    return {"counted": to}


async def endless(_: int, ctx: ActionRunContext) -> None:
    """Send one chunk, and never end."""
    ctx.send_chunk("begun")
    await anyio.sleep_forever()


def _short_lived(storage_url: str) -> StreamManager:
    second = timedelta(seconds=1)
    return StreamManager.connect(storage_url, lease=second, grace=second)


def _http(storage_url: str) -> StreamsHTTP:
    heartbeat = Timeouts(heartbeat=timedelta(milliseconds=100))
    return StreamsHTTP(_short_lived(storage_url), timeouts=heartbeat, drain=timedelta(milliseconds=200))


def _clients(storage_url: str) -> ASGIApp:
    from tests.clients.served import Served, app_of  # which imports this module

    return app_of(Served(), _http(storage_url))


def _langgraph(storage_url: str) -> ASGIApp:
    from tests.clients.shown import Paced, langgraph_app  # which imports what imports this module

    return langgraph_app(_http(storage_url), Paced())


def _use_stream(storage_url: str) -> ASGIApp:
    from tests.clients.shown import Paced, use_stream_app  # as above

    return use_stream_app(_http(storage_url), Paced())


def _openai(storage_url: str) -> ASGIApp:
    from tests.clients.shown import Paced, openai_app  # as above

    return openai_app(_http(storage_url), Paced())


def _ag_ui(storage_url: str) -> ASGIApp:
    from tests.clients.shown import Paced, ag_ui_app  # as above

    return ag_ui_app(_http(storage_url), Paced())


def _copilotkit(storage_url: str) -> ASGIApp:
    from tests.clients.shown import Paced, copilotkit_app  # as above

    return copilotkit_app(_http(storage_url), Paced())


def _page(storage_url: str) -> ASGIApp:
    from tests.docs.test_browsers import page_app  # as above

    return page_app(_http(storage_url))


def _chats(storage_url: str, which: str = "plain") -> ASGIApp:
    from tests.clients.chats import Chats, Shown, app_of  # which imports this module

    return app_of(Chats(), _http(storage_url), Shown(which))


def _chats_that_drain(storage_url: str) -> ASGIApp:
    from tests.clients.chats import Chats, FileEvent, app_of  # as above

    may_go_on = FileEvent(Path(storage_url.removeprefix("sqlite:///") + ".go-on"))
    return app_of(Chats(may_go_on=may_go_on), StreamsHTTP(_short_lived(storage_url), drain=timedelta(seconds=60)))


def _chats_gone_on_with(storage_url: str) -> ASGIApp:
    from tests.clients.chats import Chats, app_of  # as above

    return app_of(Chats(), _http(storage_url), is_recoverable=True)


def _mcp(storage_url: str) -> ASGIApp:
    from tests.clients.shown import Paced, mcp_app  # as above

    from streamkeep.integrations.mcp import StreamEventStore

    return mcp_app(StreamEventStore(_short_lived(storage_url), drain=timedelta(milliseconds=200)), Paced())


def _agents(storage_url: str) -> ASGIApp:
    from tests.http.agents import Words, filed, ours_app, words_agent  # as above

    return ours_app(words_agent(Words(), filed(f"{storage_url.removeprefix('sqlite:///')}.sessions")), _http(storage_url))


def _a2a(storage_url: str) -> ASGIApp:
    from tests.clients.shown import Paced, a2a_app  # as above
    from tests.clients.tasks import SAID, FileTaskStore

    store = FileTaskStore(storage_url.removeprefix("sqlite:///") + ".tasks")
    return a2a_app(_short_lived(storage_url), Paced(says=SAID), store, drain=timedelta(milliseconds=200))


APPS: Final[dict[str, Callable[[str], ASGIApp]]] = {
    "chats": _chats,
    "chats that drain": _chats_that_drain,
    "chats gone on with": _chats_gone_on_with,
    "an agent of Pydantic AI's": lambda url: _chats(url, "an agent of Pydantic AI's"),
    "Pydantic AI's endpoint in DurableStreaming": lambda url: _chats(url, "Pydantic AI's endpoint in DurableStreaming"),
    "agents": _agents,
    "clients": _clients,
    "ag-ui": _ag_ui,
    "copilotkit": _copilotkit,
    "langgraph": _langgraph,
    "use-stream": _use_stream,
    "page": _page,
    "openai": _openai,
    "mcp": _mcp,
    "a2a": _a2a,
    "durable": lambda url: durable_app(count, endless, streams=_http(url)),
    "wrapped": lambda url: wrapped_app(count, endless, streams=_http(url)),
}


# In the test's event loop


class _Server(uvicorn.Server):
    """Says when it has started, stops at an event instead of looking every tenth of a second, and minds no signals."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = anyio.Event()
        self.stop = anyio.Event()

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]  # a decorated generator there
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stop.wait()


def _listen() -> socket.socket:
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle's algorithm on: 40 ms an answer
    listener.bind(("127.0.0.1", 0))
    return listener


@asynccontextmanager
async def serving(app: ASGIApp, *, timeout_graceful_shutdown: int | None = 1, **config: Any) -> AsyncGenerator[str]:
    """Serve an app on a free port, and give the URL; leaving stops the server as SIGTERM would."""
    listener = _listen()
    # On a busy machine a client may be idle for longer than the 5 seconds after which uvicorn closes connections.
    config = {"log_config": None, "access_log": False, "timeout_keep_alive": 75, **config}
    options = uvicorn.Config(cast("Any", app), timeout_graceful_shutdown=timeout_graceful_shutdown, **config)
    server = _Server(options)
    _forgive_genkit(asyncio.get_running_loop())
    task = asyncio.create_task(server.serve(sockets=[listener]))
    with anyio.fail_after(10):
        await server.up.wait()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop.set()
        with anyio.fail_after(20):
            await task


def _forgive_genkit(loop: asyncio.AbstractEventLoop) -> None:
    """Let pass that Genkit's `Action.stream` never looks at the exception of a future of its own: it would fail some test."""
    report = loop.get_exception_handler()
    if report is None or isinstance(report, _Forgiving):
        return
    loop.set_exception_handler(_Forgiving(report))


class _Forgiving:
    def __init__(self, report: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object]) -> None:
        self._report = report

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), GenkitError) or "never retrieved" not in context["message"]:
            self._report(loop, context)


# In a process of its own

_processes: Final = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])  # importing Genkit and FastAPI takes seconds, and is done once


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that can be stopped, or killed."""

    url: str
    process: ForkServerProcess

    def stop(self) -> None:
        """Send SIGTERM."""
        self.process.terminate()

    async def kill(self) -> None:
        """Send SIGKILL, and wait for its death."""
        self.process.kill()
        await self.wait()

    async def end(self, how: str) -> None:
        """End it in good order, for a `restart`, or as `kill -9` does; return when it has."""
        if how == "restart":
            self.stop()
            await self.wait()
        else:
            assert how == "kill -9"
            await self.kill()

    async def wait(self) -> None:
        """Return when it has ended; TimeoutError if it does not."""
        with anyio.fail_after(20):
            await anyio.wait_readable(self.process.sentinel)


@asynccontextmanager
async def server_process(name: str, storage_url: str) -> AsyncGenerator[ServerProcess]:
    """Run one of `APPS` in a process of its own, and kill that at the end."""
    ours, theirs = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_run_server, args=(name, storage_url, theirs))
    await anyio.to_thread.run_sync(process.start)
    theirs.close()
    try:
        with ours, anyio.fail_after(90):
            await anyio.wait_readable(ours.fileno())
            url = ours.recv()
        yield ServerProcess(url, process)
    finally:
        process.kill()
        process.join()
        process.close()


def _run_server(name: str, storage_url: str, up: Connection) -> None:
    listener = _listen()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            with up:
                up.send(f"http://127.0.0.1:{listener.getsockname()[1]}")

    config = uvicorn.Config(cast("Any", APPS[name](storage_url)), log_level="error")
    Server(config).run(sockets=[listener])


# Requests

STREAMING: Final = {"Accept": "text/event-stream"}
STREAM_ID: Final = "X-Genkit-Stream-Id"
OFFSET: Final = "X-Genkit-Stream-Offset"


@asynccontextmanager
async def http_to(app: ASGIApp, **config: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve an app, and give a client of it."""
    async with serving(app, **config) as url, httpx.AsyncClient(base_url=url, timeout=20, verify=False) as http:
        yield http


async def raw_exchange(http: httpx.AsyncClient, request: bytes) -> bytes:
    """Send bytes to a server, and give all that it answers until it closes the connection."""
    answer = b""
    async with await anyio.connect_tcp(http.base_url.host, http.base_url.port or 80) as connection:
        await connection.send(request)
        with anyio.fail_after(10), contextlib.suppress(anyio.EndOfStream):
            while True:
                answer += await connection.receive()
    return answer


class Reading:
    """An answer that is read packet by packet. Of cursors it gives the offset only."""

    def __init__(self, answer: httpx.Response) -> None:
        self._came = bytearray()
        self._packets = answer.aiter_bytes()

    @property
    def body(self) -> bytes:
        """What has come."""
        return without_lives(bytes(self._came))

    async def until(self, text: bytes = b"\n\n") -> bytes:
        """Read until this text has come, by default the end of a frame."""
        with anyio.fail_after(10):
            while text not in self.body:
                self._came += await anext(self._packets)
        return self.body

    async def whole(self) -> bytes:
        """Read to the end, and give all."""
        with anyio.fail_after(20):
            async for packet in self._packets:
                self._came += packet
        return self.body

    async def cut(self) -> bytes:
        """Read to the end, which must be a cut, and give all."""
        with pytest.raises(httpx.RemoteProtocolError):
            await self.whole()
        return self.body


def without_lives(body: bytes) -> bytes:
    """Give an event stream with offsets for cursors: which life of an id it is nobody can know before."""
    return re.sub(rb"^id: [^/\n]+/[0-9a-f]{8}/(\d+)$", rb"id: \1", body, flags=re.MULTILINE)


def frames_of(body: bytes) -> list[dict[str, object]]:
    """Read a whole answer in Genkit's framing as strictly as its strictest client; the second form of an error is left out."""
    assert body.isascii()
    assert b"\r" not in body
    assert body.endswith(b"\n\n")
    frames: list[dict[str, object]] = []
    for frame in body[:-2].split(b"\n\n"):
        name, colon, data = frame.partition(b": ")
        assert colon, frame
        assert b"\n" not in data, frame
        value: dict[str, object] = json.loads(data)
        if name == b"error":
            assert value["error"] == frames[-1]["error"], body
            continue
        assert name == b"data", frame
        assert not frames or "message" in frames[-1], body
        frames.append(value)
    assert frames[-1].keys() & {"result", "error"}, body
    return frames


async def events_of(streams: StreamManager, stream: str) -> list[tuple[str, object]]:
    """Wait for a stream's end; give its events' types with their chunks, their output, and their error's status."""
    with anyio.fail_after(20):
        async with streams.subscribe(stream) as events:
            return [(event.type.value, content_of(event)) async for event in events]


def content_of(event: StreamEvent[Any]) -> object:
    match event.type:
        case StreamEventType.CHUNK:
            return event.chunk
        case StreamEventType.DONE:
            return event.output
        case StreamEventType.RECOVERING | StreamEventType.RESTARTED:
            return None
        case StreamEventType.ERROR:
            return event.error.status


async def until(condition: Callable[[], object]) -> None:
    """Wait for what no event tells."""
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - see above
            await anyio.sleep(0.01)
