"""What the modules of single SDKs share: the chunks of an SDK's stream, of which some is left out.

One rule holds for all of them: an event of a type that nobody has looked at is left out, since nobody knows what it tells readers.
"""

from collections.abc import AsyncIterable, AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Final, Self, cast, final

from ..errors import PublicError
from ..http.sources import Chunks, Expand, Manager, close, close_here, entered, expanded, forget

Json = dict[str, Any]
AsyncStream = AsyncIterable[object] | AbstractAsyncContextManager[AsyncIterable[object]]
SyncStream = Iterable[object] | AbstractContextManager[Iterable[object]]
Ends = Callable[[Any], Iterable[tuple[Hashable, bool]]]
"""Gives what a chunk is a part of, each with whether that is over now."""

_OPTIONS: Final = {"mode": "json", "by_alias": True, "exclude_unset": True, "warnings": False}


def dumped(value: object, *without: str) -> Any:
    """Give a model as its SDK's own JSON has it, which is as it came, without these fields; what is no model is given as it is.

    Of what SDKs make out of several events pydantic would warn: its parts are of other types than their fields are said to be.
    """
    dump = getattr(value, "model_dump", None)
    return dump(**_OPTIONS, exclude={*without}) if callable(dump) else value


def field_of(value: object, name: str) -> object:
    """Give a field of an object, or of what an object was stored as; None if it has none."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def objects_of(value: object) -> list[Json]:
    """Give the objects of what should be a list of objects."""
    return [{**item} for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


@final
class AsyncChunks(AsyncIterator[Any]):
    """What is to be stored of an SDK's stream. Closing it closes the SDK's, and so the provider's connection, begun or not."""

    def __init__(self, source: Chunks | Manager, expand: Expand, ends: Ends | None = None) -> None:
        self._source = source
        self._chunks = cast("AsyncGeneratorType[Any, None]", _read(source, expand, ends))
        self._is_closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            chunk = await anext(self._chunks)
        except Exception:
            if self._is_closed:  # by another task, while this one waited: that is no failure, and no early end
                raise StopAsyncIteration from None
            raise
        if self._is_closed:
            await close(self._chunks)
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Close it, and what it is made of. A task that waits for its next chunk is given none any more."""
        self._is_closed = True
        if not self._chunks.ag_running:
            await close(self._chunks)
        await close(self._source)  # the other one may never have begun


@final
class SyncChunks(Iterator[Any]):
    """The same of an SDK's stream that does not await."""

    def __init__(self, source: Chunks | Manager, expand: Expand, ends: Ends | None = None) -> None:
        self._source = source
        self._chunks = cast("GeneratorType[Any, None, object]", _read(source, expand, ends))
        self._is_closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            chunk = next(self._chunks)
        except Exception:
            if self._is_closed:
                raise StopIteration from None
            raise
        if self._is_closed:
            self._chunks.close()
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Close it, and what it is made of. A thread that waits for its next chunk is given none any more."""
        self._is_closed = True
        try:
            self._chunks.close()
        except ValueError as error:
            if "already executing" not in str(error):  # in another thread, which ends when that has its next chunk
                raise
        finally:
            close_here(self._source)


def chunks_of(stream: Any, expand: Expand, ends: Ends | None = None) -> AsyncChunks | SyncChunks:
    """Give what is to be stored of a stream of either client of an SDK, or of what gives one when it is entered.

    Args:
        stream: the stream, or its context manager.
        expand: gives what is stored of an event.
        ends: says of what is stored whether it is the end. A stream that ends before it is cut off: PublicError, when it is iterated.
    """
    if hasattr(stream, "__aiter__") or hasattr(stream, "__aenter__"):
        return AsyncChunks(stream, expand, ends)
    if hasattr(stream, "__iter__") or hasattr(stream, "__enter__"):
        return SyncChunks(stream, expand, ends)
    forget(stream)
    raise TypeError(
        f"chunks() takes the stream of an SDK, and not a {type(stream).__name__}: a coroutine has to be awaited first"
    )


def _read(source: Chunks | Manager, expand: Expand, ends: Ends | None) -> Chunks:
    if ends is None:
        return expanded(expand, entered(source))
    whole = _Whole(expand, ends)
    return expanded(whole.expand, entered(source), whole.end)


class _Whole:
    """Sees to it that what has begun has an end: a connection that is closed too early looks like one that has been read to its end."""

    def __init__(self, expand: Expand, ends: Ends) -> None:
        self._expand = expand
        self._ends = ends
        self._is_over: dict[Hashable, bool] = {}

    def expand(self, event: object) -> Iterator[object]:
        for chunk in self._expand(event):
            for part, is_over in self._ends(chunk):
                self._is_over[part] = is_over or self._is_over.get(part, False)
            yield chunk

    def end(self) -> None:
        if not self._is_over or not all(self._is_over.values()):
            raise PublicError("ABORTED", "the response ended without its last event")
