"""What Starlette and FastAPI need: a response that is any ASGI app, and counts as a response all the same; and answers to our errors."""

import sys
from collections.abc import Awaitable, Callable
from typing import Final

import anyio

from .._extras import needed_by

with needed_by(__name__, "fastapi"):
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

from ..errors import HTTP_CODES, StreamkeepError
from .framing import error_body
from .response import ASGIApp, Message, code_of, shown_error

__all__ = ["ASGIResponse", "answer_errors"]

OURS: Final = {b"content-length", b"content-type", b"transfer-encoding"}
"""Headers that say how the body is sent, and are not the endpoint's."""


class ASGIResponse(Response):
    """A response that leaves its body to an ASGI app. Headers, cookies, a status and background tasks that it was given count.

    Attributes:
        stream: the id of the stream that it shows; None if it shows none.
        started: whether this very request has started that stream: not if it was there, and was joined, resumed or followed.
    """

    def __init__(self, app: ASGIApp, stream: str | None = None, *, started: bool = False, status: int = 200) -> None:
        super().__init__(status_code=status)
        self.stream = stream
        self.started = started
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app answer; then run the background tasks, if there are any."""
        await self._app(scope, receive, self._adding_to(send))
        if self.background is not None:
            await self.background()

    def _adding_to(self, send: Send) -> Send:
        given = [(name.lower(), value) for name, value in self.raw_headers if name.lower() not in OURS]
        names = {name for name, _ in given}

        def send_with_ours(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                headers = [header for header in message["headers"] if header[0].lower() not in names]
                status = self.status_code if message["status"] == 200 else message["status"]
                message = {**message, "status": status, "headers": [*headers, *given]}
            return send(message)

        return send_with_ours


async def take_over(request: Request, read_body: Callable[[], Awaitable[bytes | None]]) -> bool:
    """Read what is left of a request's body, and let nobody else listen to its client from here on, but who shows the answer.

    False: the client has gone before it had sent all.

    A producer may ask for the body then, and its `is_disconnected` is false: as tutorials have it, it would end the run with its first
    reader. Starlette's own middlewares do the same, and it has no public way.
    """
    kept = vars(request)
    if "_body" not in kept and not kept.get("_stream_consumed"):
        body = await read_body()
        if body is None:
            return False
        kept["_body"] = body

    async def silent() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    kept["_receive"] = silent
    return True


def rest_of(request: Request, receive: Receive) -> Receive:
    """Give the server's messages as if the dependencies had not read the body, as context providers of Genkit's do.

    RuntimeError: they have read it by `request.stream()`, and nobody has it any more.
    """
    if "_body" not in vars(request) and vars(request).get("_stream_consumed"):
        raise RuntimeError(
            "a dependency has read the request's body by `request.stream()` or `form()`, which keep nothing of it: use `request.body()`"
        )
    if (body := vars(request).get("_body")) is None:  # where Starlette keeps it, and says so nowhere else
        return receive
    read: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return read.pop() if read else await receive()

    return receive_again


def answer_errors(app: Starlette) -> None:
    """Have an app answer what its endpoints and dependencies raise of streamkeep's errors: as JSON, by their status.

    So `await streams.info(id)` in an endpoint is a 404 where there is no such stream, and a `PublicError` is what it says; Genkit's
    `PublicError` too, if Genkit is imported by then.
    """
    app.add_exception_handler(StreamkeepError, _answer)
    if genkits := getattr(sys.modules.get("genkit"), "PublicError", None):
        app.add_exception_handler(genkits, _answer)


async def _answer(_request: Request, error: Exception) -> Response:
    info = shown_error(error)
    return Response(error_body(info), code_of(error) or HTTP_CODES[info.status], media_type="application/json")
