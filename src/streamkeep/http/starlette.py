"""What Starlette and FastAPI need: a response that is any ASGI app."""

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .response import ASGIApp


class ASGIResponse(Response):
    """A response that leaves everything to an ASGI app, so that an endpoint can return one."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app answer."""
        await self._app(scope, receive, send)
