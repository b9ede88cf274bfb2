"""What the modules of single SDKs share: the chunks of an SDK's stream, of which some is left out."""

from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Final, Self, cast, final

from ..http.sources import Chunks, Expand, Manager, close, entered, expanded

Json = dict[str, Any]
AsyncStream = AsyncIterable[object] | AbstractAsyncContextManager[AsyncIterable[object]]
SyncStream = Iterable[object] | AbstractContextManager[Iterable[object]]

_OPTIONS: Final = {"mode": "json", "by_alias": True, "exclude_unset": True, "warnings": False}


def dumped(value: object, *without: str) -> Any:
    """Give a model as its SDK's own JSON has it, which is as it came, without these fields; what is no model is given as it is.

    Of what SDKs make out of several events pydantic would warn: its parts are of other types than their fields are said to be.
    """
    dump = getattr(value, "model_dump", None)
    return dump(**_OPTIONS, exclude={*without}) if callable(dump) else value


def objects_of(value: object) -> list[Json]:
    """Give the objects of what should be a list of objects."""
    return [{**item} for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


@final
class AsyncChunks(AsyncIterator[Any]):
    """What is to be stored of an SDK's stream. Closing it closes the SDK's, and so the provider's connection, begun or not."""

    def __init__(self, source: Chunks | Manager, expand: Expand) -> None:
        self._source = source
        self._chunks = cast("AsyncIterator[Any]", expanded(expand, entered(source)))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Close it, and what it is made of."""
        await close(self._chunks)
        await close(self._source)  # the other one may never have begun


@final
class SyncChunks(Iterator[Any]):
    """The same of an SDK's stream that does not await."""

    def __init__(self, source: Chunks | Manager, expand: Expand) -> None:
        self._source = source
        self._chunks = cast("Generator[Any, None, object]", expanded(expand, entered(source)))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return next(self._chunks)

    def close(self) -> None:
        """Close it, and what it is made of."""
        self._chunks.close()
        if callable(closing := getattr(self._source, "close", None)):
            closing()


def chunks_of(stream: Any, expand: Expand) -> AsyncChunks | SyncChunks:
    """Give what is to be stored of a stream of either client of an SDK, or of what gives one when it is entered."""
    is_async = hasattr(stream, "__aiter__") or hasattr(stream, "__aenter__")
    return AsyncChunks(stream, expand) if is_async else SyncChunks(stream, expand)
