"""The app that most servers under test run. It needs no Genkit, so that it starts in a moment; what streams is the same."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final

import anyio
from fastapi import FastAPI, Response
from tests.deploy.flows import FLOWS, PROCESS, Flow

from streamkeep import StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.app import Admits, Output
from streamkeep.http.response import ASGIApp, Message, Receive, Scope, Send, Timeouts
from streamkeep.http.starlette import ASGIResponse
from streamkeep.wire import GenkitRequest

LEASE: Final = timedelta(seconds=1)
GRACE: Final = timedelta(seconds=1)
DRAIN: Final = timedelta(milliseconds=float(os.environ.get("DEPLOY_DRAIN_MS", "400")))


def connected() -> StreamManager:
    """Give a manager over the storage that the environment names."""
    return StreamManager.connect(os.environ["DEPLOY_STORAGE"], lease=LEASE, grace=GRACE)


def served(manager: StreamManager) -> StreamsHTTP:
    """Serve its streams at the pace of these tests."""
    return StreamsHTTP(manager, timeouts=Timeouts(heartbeat=timedelta(milliseconds=200)), drain=DRAIN)


class WithProcess:
    """The app around it, with the answering process named in every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (PROCESS.encode(), str(os.getpid()).encode())]
            await send(message)

        await self._app(scope, receive, send_named)


class FlowWork:
    """A flow as the work of a POST: what `durable_flow` makes of Genkit's."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def check(self, request: GenkitRequest) -> None:
        """Take whatever comes."""

    def detaches(self, request: GenkitRequest) -> bool:
        """Say no."""
        return False

    async def detach(self, request: GenkitRequest, context: Mapping[str, Any], admits: Admits) -> Output:
        """Never be asked to."""
        raise NotImplementedError

    async def run(
        self,
        request: GenkitRequest,
        context: Mapping[str, Any],
        admits: Admits,
        send_chunk: Callable[[object], object],
        stop: anyio.Event,
    ) -> Output:
        """Run the flow."""
        return Output(await self._flow(send_chunk, stop))


streams: Final = connected()
streams_http: Final = served(streams)
app: Final = FastAPI(lifespan=streams_http.lifespan)
app.mount("/streams", streams_http)
app.add_middleware(WithProcess)


@app.get("/process")
async def process() -> int:
    """Say which process answers."""
    return os.getpid()


@app.post("/{name}", response_class=ASGIResponse)
async def run(name: str) -> Response:
    """Start a flow, or resume one."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await streams_http.post(scope, receive, send, FlowWork(FLOWS[name]), {})

    return ASGIResponse(answer)
