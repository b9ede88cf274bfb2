"""What the ASGI apps have in common that an app mounts: they answer HTTP alone, and some have a lifespan of their own."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import ClassVar, Final, Self

import anyio

from .._manager import StreamManager
from .response import Receive, Scope, Send
from .shutdown import shutdown_of


class Mounted:
    """An ASGI app that answers HTTP, and refuses all else."""

    _lifespan_hint: ClassVar[str]
    """Said to whoever sends it a lifespan."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        match scope["type"]:
            case "http":
                await self._answer(scope, receive, send)
            case "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})
            case _:
                raise RuntimeError(f"{type(self).__name__} takes HTTP only; {self._lifespan_hint}")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class MountedManager(Mounted):
    """One that is an async context manager, too: it enters its manager, unless that runs already, and ends in time at a shutdown.

    It has no producers, so a shutdown need not wait for any.
    """

    _lifespan_hint = "give its `lifespan` to the outermost app"

    def __init__(self, streams: StreamManager | str) -> None:
        self.streams: Final = StreamManager.connect(streams) if isinstance(streams, str) else streams
        self._shutdown = shutdown_of(self.streams)
        self._ours = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if not self.streams.is_running:
                await stack.enter_async_context(self.streams)
            drained = anyio.Event()
            drained.set()
            stack.enter_context(self._shutdown.draining(drained))
            stack.enter_context(self._shutdown.listening())
            await self._begin(stack)
            self._ours = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._ours.__aexit__(exc_type, exc, traceback)

    @asynccontextmanager
    async def lifespan(self, _app: object) -> AsyncGenerator[None, None]:
        """Run while an app runs; in the form in which Starlette and FastAPI want a lifespan."""
        async with self:
            yield

    async def _begin(self, stack: AsyncExitStack) -> None:
        """Begin what else there is, once the manager runs; it ends with the stack."""
