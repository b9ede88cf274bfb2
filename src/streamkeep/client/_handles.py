"""What users hold of a stream that is read, as far as it is the same whether they await or not."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from .._background import ran
from ..events import ReadAs
from ._flows import Flow
from ._reading import Reading
from ._sse import AnyEvents, OurEvents

E = TypeVar("E")


class Handle(Generic[E]):
    """A reading that begins when it is entered, once."""

    def __init__(self, read: Callable[[], Reading[E]]) -> None:
        self._read = read
        self._reading: Reading[E] | None = None
        self._is_left = False

    async def _enter(self) -> None:
        """Begin. RuntimeError: it has begun, or was closed, before."""
        if self._reading is not None:
            raise RuntimeError("this was entered already; ask for it again")
        if self._is_left:
            raise RuntimeError("this was closed before it was entered; ask for it again")
        self._reading = self._read()
        if self._is_left:  # meanwhile, by another thread
            await self._reading.leave()
        await self._reading.enter()

    async def _leave(self) -> None:
        """Close what has begun, and begin no more."""
        self._is_left = True
        if self._reading is not None:
            await self._reading.leave()

    @property
    def _entered(self) -> Reading[E]:
        """What has begun. RuntimeError: nothing has."""
        if self._reading is None:
            raise RuntimeError("enter this with `with`, or with `async with`, first")
        return self._reading


class AwaitedHandle(Handle[E]):
    """One that is awaited."""

    async def __aenter__(self) -> Self:
        await self._enter()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection, as leaving the block does; any task may, at any time, and again.

        Who iterates, or waits for the output, in another task is woken, and told by a RuntimeError, for this is no end of the stream (as
        anyio's and httpx2's streams tell it). `cursor` and `seen` say how far it came. Who enters it behind that is told so, too.
        """
        await self._leave()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        return await self._entered.next()


class BlockingHandle(Handle[E]):
    """One that blocks."""

    def __enter__(self) -> Self:
        ran(self._enter())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, as leaving the block does; any thread may, at any time, and again.

        Who reads in another thread is woken, and told by a RuntimeError, for this is no end of the stream. While a connection is made that
        takes until it is, 10 seconds at most; over a `client` of your own until the head of an answer is there, and with HTTP/2 until
        anything comes, such as a heartbeat. Who enters it behind that is told so, too.
        """
        ran(self._leave())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> E:
        try:
            return ran(self._entered.next())
        except StopAsyncIteration:
            raise StopIteration from None


class EventsHandle(Handle[E]):
    """The events of a stream."""

    def __init__(self, read: Callable[[], Reading[E]], dialect: AnyEvents | OurEvents[Any]) -> None:
        super().__init__(read)
        self._dialect = dialect

    @property
    def stream(self) -> str | None:
        """The stream's id; None: the server has not said it."""
        return self._dialect.stream

    @property
    def cursor(self) -> str | None:
        """Where to go on behind what was given, as `after`: the id of the last event that had one."""
        return self._dialect.position if self._reading is None else self._reading.position

    @property
    def first_offset(self) -> int | None:
        """The offset of the first event that `subscribe` gives, or will give. None: it is not known, or events have no offsets."""
        return self._dialect.first_offset


class FlowHandle(Handle[E]):
    """A run of a flow."""

    def __init__(self, read: Callable[[], Reading[E]], flow: Flow[E], output_type: ReadAs[Any] | None) -> None:
        super().__init__(read)
        self._flow = flow
        self._output_type = output_type

    @property
    def stream_id(self) -> str | None:
        """What to go on with. None: the server keeps no stream of it."""
        return self._flow.stream

    @property
    def seen(self) -> int:
        """How many chunks of the run were given, those before it was gone on with among them."""
        return self._entered.events
