"""The same flows as Genkit's: served by `durable_flow`, and by an unmodified app of genkit_fastapi inside `DurableStreaming`."""

import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import FastAPI
from genkit import ActionRunContext, Genkit
from genkit_fastapi import serve_flow
from tests.deploy.app import connected, served
from tests.deploy.flows import FLOWS, Flow

from streamkeep.http import DurableStreaming, StreamsHTTP
from streamkeep.integrations.fastapi import durable_flow

genkit: Final = Genkit()


def genkit_flow(flow: Flow) -> Callable[[Any, ActionRunContext[Any]], Awaitable[Any]]:
    """Give a flow in the form in which Genkit wants it."""

    async def run(_data: Any, ctx: ActionRunContext[Any]) -> Any:
        return await flow(ctx.send_chunk, ctx.abort_signal)

    return run


ACTIONS: Final = [genkit.flow(name)(genkit_flow(flow)) for name, flow in FLOWS.items()]

durable_streams: Final = connected()
durable_http: Final = served(durable_streams)
durable: Final = FastAPI(lifespan=durable_http.lifespan)
for action in ACTIONS:
    durable.include_router(durable_flow(action, durable_http))
durable.mount("/streams", durable_http)

wrapped_streams: Final = connected()
unaware: Final = FastAPI()
for action in ACTIONS:
    unaware.include_router(serve_flow(action))
unaware.mount("/streams", StreamsHTTP(wrapped_streams))
wrapped: Final = DurableStreaming(unaware, served(wrapped_streams))


@durable.get("/process")
@unaware.get("/process")
async def process() -> int:
    """Say which process answers."""
    return os.getpid()
