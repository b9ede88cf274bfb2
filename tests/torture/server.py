"""A server process: streams over HTTP, and a flow that takes its time; it is read from, and killed."""

import uuid
from multiprocessing.connection import Connection
from typing import Final

import anyio
from genkit import ActionRunContext
from tests.http.servers import APPS, _http, _run_server, durable_app
from tests.torture.stage import Part

_APP: Final = "torture"


async def recite(numbers: int, ctx: ActionRunContext) -> list[object]:
    """Send so many chunks of the form that `journal.event_of` reads, slowly enough to be killed meanwhile."""
    handle = f"flow-{uuid.uuid4().hex}"
    for number in range(numbers):
        ctx.send_chunk([handle, number, ""])
        await anyio.sleep(0.01)
    return [handle, numbers, ""]


APPS[_APP] = lambda url: durable_app(recite, streams=_http(url))


def serve(part: Part, up: Connection) -> None:
    """Play a server, and say under which URL when it is up."""
    _run_server(_APP, part.stage.url, up)
