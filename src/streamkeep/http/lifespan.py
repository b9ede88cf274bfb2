"""The lifespan of an app that is around another."""

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol

from .response import ASGIApp, Message, Receive, Scope, Send


class Running(Protocol):
    """What runs while an app does, unless somebody else has entered it."""

    @property
    def is_running(self) -> bool:
        """Whether it has been entered."""
        ...

    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> bool | None: ...


class Lifespan:
    """The inner app's lifespan, with ours inside it: entered when the inner app has started, left before it shuts down.

    In between, because an inner app that enters the manager itself must come first. An app that knows no lifespan gets ours
    alone.
    """

    def __init__(self, app: ASGIApp, ours: Running) -> None:
        self._app = app
        self._running = ours
        self._ours = AsyncExitStack()
        self._answered = False

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run it (ASGI)."""

        async def receive_for_app() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._ours.aclose()
            return message

        async def send_for_app(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._start()
            self._answered = True
            await send(message)

        async with self._ours:
            try:
                await self._app(scope, receive_for_app, send_for_app)
            except Exception:
                if self._answered:
                    raise  # it knows lifespans, and its start-up or shutdown failed
            if not self._answered:
                await self._run_alone(receive, send)

    async def _start(self) -> None:
        if not self._running.is_running:
            await self._ours.enter_async_context(self._running)

    async def _run_alone(self, receive: Receive, send: Send) -> None:
        try:
            await self._start()
        except Exception as error:
            # Only raising would be taken for an app without a lifespan, and served.
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            raise
        await send({"type": "lifespan.startup.complete"})
        while (await receive())["type"] != "lifespan.shutdown":
            pass
        await self._ours.aclose()
        await send({"type": "lifespan.shutdown.complete"})
