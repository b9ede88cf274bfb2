"""Pulse: one task for all responses of an app that stream, which sees how long they have been silent, and lasted, and when all must end.

A response that kept time by itself would have a timer set and reset for each event, and tasks that do nothing but wait.
"""

from collections.abc import Awaitable, Callable
from contextvars import Context
from datetime import timedelta
from functools import partial
from typing import Final, Protocol

import anyio

from .._background import Loop, loop_here
from ..events import ErrorInfo

SHUTTING_DOWN: Final = ErrorInfo("UNAVAILABLE", "the server is shutting down; the stream can be resumed by its id")
TOO_LONG: Final = ErrorInfo("DEADLINE_EXCEEDED", "the response took as long as it may; the stream can be resumed by its id")

LONGEST_PAUSE_SECONDS: Final = 1.0
PAUSES: Final = 5
"""How often it looks before a response is due: it may be late by that part."""


class Response(Protocol):
    """What is seen to.

    Attributes:
        sends: how often it has sent something, so far.
        seen_sends: how often it had when that was last seen to grow, and when that was.
        seen_at: see above.
        began_at: when it began, by the event loop's clock.
    """

    sends: int
    seen_sends: int
    seen_at: float
    began_at: float

    def break_silence(self) -> None:
        """Send something meaningless, unless something is being sent."""
        ...

    def end(self, why: ErrorInfo) -> None:
        """End before the stream has."""
        ...


class Pulse:
    """Sees to responses that are `heartbeat` apart from their last send, or last the `longest`; all end when `time_to_end` returns."""

    def __init__(self, heartbeat: timedelta, longest: timedelta, time_to_end: Callable[[], Awaitable[None]]) -> None:
        self._heartbeat_seconds = heartbeat.total_seconds()
        self._longest_seconds = longest.total_seconds()
        self._time_to_end = time_to_end
        self._responses: dict[Response, None] = {}
        self._loop: Loop | None = None
        """Where its task runs."""

    def add(self, response: Response) -> None:
        """See to a response."""
        if self._loop is not None and not self._loop.is_here():  # an event loop may end without a word
            self._loop, self._responses = None, {}
        self._responses[response] = None
        if self._loop is None:
            self._loop = loop_here()
            self._loop.spawn(partial(self._run, self._loop), Context(), partial(self._end, self._loop))

    def remove(self, response: Response) -> None:
        """See to it no more."""
        self._responses.pop(response, None)

    async def _run(self, loop: Loop) -> None:
        pause = min(LONGEST_PAUSE_SECONDS, self._heartbeat_seconds / PAUSES, self._longest_seconds / PAUSES)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._end_all)
            while self._responses:
                await anyio.sleep(pause)
                self._look(anyio.current_time())
            self._end(loop)  # before anything is awaited: who comes from here on is another task's
            tasks.cancel_scope.cancel()

    def _end(self, loop: Loop) -> None:
        if self._loop is loop:
            self._loop = None

    async def _end_all(self) -> None:
        while True:
            await self._time_to_end()
            for response in tuple(self._responses):
                response.end(SHUTTING_DOWN)

    def _look(self, now: float) -> None:
        for response in self._responses:
            if now - response.began_at >= self._longest_seconds:
                response.end(TOO_LONG)
            elif response.sends != response.seen_sends:
                response.seen_sends, response.seen_at = response.sends, now
            elif now - response.seen_at >= self._heartbeat_seconds:
                response.break_silence()
