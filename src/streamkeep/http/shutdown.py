"""The server's shutdown, noticed in time to end what streams.

ASGI tells an app of it when the last response has ended, and one that follows a stream may never end. So the signals that stop a
process are handled here as well: whoever handled them handles them as before, and alone when nobody listens any more. Nothing is
stopped here; those who are told stop themselves.
"""

import asyncio
import signal
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Final
from weakref import WeakKeyDictionary

import anyio

from .._manager import StreamManager

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
LAST_RESPONSES_SECONDS: Final = 2.0
"""How long responses may take to end by themselves when the producers have; readers of other processes' streams do not."""
LAST_FRAME_SECONDS: Final = 1.5
"""How long a response may take to say its last words, and a little more."""


class Shutdown:
    """What all that serve one manager's streams know of the end: whether it has begun, and who is still at work.

    Attributes:
        begun: set when no more producers are wanted.
    """

    def __init__(self) -> None:
        self.begun = anyio.Event()
        self._drains: set[anyio.Event] = set()
        self._listeners = 0
        self._listener = ExitStack()
        self._responses = 0
        self._has_ended = anyio.Event()
        """One more response has."""

    @contextmanager
    def listening(self) -> Generator[None]:
        """Begin if the process gets a signal to stop while within."""
        self._listeners += 1
        if self._listeners == 1:
            self._listener.enter_context(_told_of_signals(self._begin))
        elif _listeners:  # somebody may have put a handler on top since
            hear_signals()
        try:
            yield
        finally:
            self._listeners -= 1
            if not self._listeners:
                self._listener.close()

    def _begin(self) -> None:
        self.begun.set()

    @contextmanager
    def draining(self, drained: anyio.Event) -> Generator[None]:
        """While within, let responses go on until an event, and a moment longer. Who comes first after an end begins anew."""
        if not self._drains:
            before, self.begun = self.begun, anyio.Event()
            before.set()  # who waits for that one waits for this one
        self._drains.add(drained)
        try:
            yield
        finally:
            self._drains.discard(drained)

    @contextmanager
    def responding(self) -> Generator[None]:
        """Count a response."""
        self._responses += 1
        try:
            yield
        finally:
            self._responses -= 1
            ended, self._has_ended = self._has_ended, anyio.Event()
            ended.set()

    async def time_to_end(self) -> None:
        """Return when responses must end: the producers have, and readers have had a moment to be told."""
        while True:
            begun = self.begun
            await begun.wait()
            for drained in tuple(self._drains):
                await drained.wait()
            await anyio.sleep(LAST_RESPONSES_SECONDS if begun is self.begun else 0)
            if begun is self.begun:  # else it was begun anew meanwhile
                return

    async def responses_ended(self) -> None:
        """Return when the responses that are being ended have said so, and soon in any case.

        A server that has cancelled them does not wait for that, and may kill its own process next.
        """
        with anyio.move_on_after(LAST_FRAME_SECONDS):
            while self._responses:
                await self._has_ended.wait()


_shutdowns: Final[WeakKeyDictionary[StreamManager, Shutdown]] = WeakKeyDictionary()


def shutdown_of(streams: StreamManager) -> Shutdown:
    """Give the one that all who serve a manager share."""
    return _shutdowns.setdefault(streams, Shutdown())


# Signals

_listeners: Final[dict[object, Callable[[], object]]] = {}


@contextmanager
def _told_of_signals(tell: Callable[[], object]) -> Generator[None]:
    """While within, call a function in this event loop, on asyncio, when the process gets a signal to stop and the main thread hears it."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # another event loop, whose servers have ways of their own
        yield
        return
    listener = object()
    _listeners[listener] = lambda: loop.call_soon_threadsafe(tell)
    hear_signals()
    try:
        yield
    finally:
        del _listeners[listener]
        if not _listeners:
            _stop_listening()


class _Ear:
    """A signal handler that tells the listeners, and leaves the rest to the one before it."""

    def __init__(self, before: Callable[[int, FrameType | None], object]) -> None:
        self.before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for tell in tuple(_listeners.values()):
            with suppress(RuntimeError):  # its event loop is closed
                tell()
        self.before(number, frame)


def hear_signals() -> None:
    """Hear the signals from here on, in the main thread; elsewhere this does nothing. Whoever listens in another thread has it called."""
    with suppress(ValueError):  # not the main thread: whoever handles signals there has another way to stop this one
        for number in SIGNALS:
            before = signal.getsignal(number)
            # Without a handler the signal ends the process, and so it shall. Python's own ends it by a KeyboardInterrupt, at whose end all
            # is drained; and `asyncio.run` has its main task cancelled only where it finds that one.
            if callable(before) and before is not signal.default_int_handler and not isinstance(before, _Ear):
                signal.signal(number, _Ear(before))


def _stop_listening() -> None:
    with suppress(ValueError):
        for number in SIGNALS:
            # Where somebody has put a handler on top of an ear, it stays, deaf, and passes signals on.
            while isinstance(ear := signal.getsignal(number), _Ear):
                signal.signal(number, ear.before)
