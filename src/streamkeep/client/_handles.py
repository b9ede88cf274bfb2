"""What users hold of a stream that is read, as far as it is the same whether they await or not."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

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
