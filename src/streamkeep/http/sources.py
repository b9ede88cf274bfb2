"""Sources: what an endpoint gives as the chunks of its answer, whatever kind of iterable that is.

Language-model SDKs give async iterators with `aclose`, or with an async `close`, or plain iterators with `close`, or context managers
that are entered to get one of these; apps give generators, and functions that make one of all these.
"""

import inspect
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext, suppress
from contextvars import copy_context
from functools import partial
from threading import Thread
from typing import Any, Final, Protocol, Self, TypeVar, cast

import anyio

from .._background import loop_here
from .._input import StreamInput
from ..errors import LimitExceededError
from ..wire import SSEDecoder
from .framing import block_of
from .recovery import RecoverableCall
from .runner import ChunkWriter, Producer, keep_place, leave

T = TypeVar("T")

logger: Final = logging.getLogger("streamkeep")

Chunks = AsyncIterable[object] | Iterable[object]
Manager = AbstractAsyncContextManager[object] | AbstractContextManager[object]
Source = Chunks | Manager | Callable[[StreamInput], object] | Callable[[], object] | RecoverableCall
"""An iterable of chunks, a context manager that gives one, or a function that makes one of these: see `StreamsHTTP.respond`; or what a
recoverable function was called with.
"""

CLOSE_SECONDS: Final = 5.0
"""How long closing an iterable may take."""
MOST_AHEAD: Final = 256
PAUSE_SECONDS: Final = 0.002
"""How far a thread may be ahead of the storage, and how long it waits when it is."""
AWAY_SECONDS: Final = 2.0
"""When nothing has been stored for so long, a thread goes on, as far as the queue has room: the storage may be away for long."""


Expand = Callable[[object], Iterable[object]]
"""Gives what is stored for a chunk of a source: nothing, or something else, or more."""


class Setting(Protocol):
    """What the code of an app runs in, such as a context of its framework's. It is entered anew for each piece of a source."""

    def in_thread(self) -> AbstractContextManager[object]:
        """Give what surrounds what runs in a thread of its own."""
        ...

    def in_task(self) -> AbstractAsyncContextManager[object]:
        """Give what surrounds what awaits."""
        ...


class _AsItIs:
    def in_thread(self) -> AbstractContextManager[object]:
        return nullcontext()

    def in_task(self) -> AbstractAsyncContextManager[object]:
        return nullcontext()


AS_IT_IS: Final[Setting] = _AsItIs()


def producer_of(source: Source, *, expand: Expand | None = None, setting: Setting = AS_IT_IS) -> Producer:
    """Give what writes a source's chunks to a stream. TypeError: it is no source. A function is called when that runs, in its task.

    `expand` is called for one chunk after the other, in a thread if the source is iterated in one.
    """
    read = _as_they_are if expand is None else partial(expanded, expand)
    if _is_chunks(source) or _is_manager(source):
        chunks = entered(cast("Chunks | Manager", source))
        return lambda stream, _stop: _write_all(stream, read(chunks), setting)
    if not callable(source) or isinstance(source, type):
        forget(source)
        raise TypeError(
            f"a stream is made of an iterable of chunks, async or not, or of a function that makes one, and not of {_kind(source)}"
        )
    return _made_by(source, read, setting)


def entered(source: Chunks | Manager) -> Chunks:
    """Give the chunks of a context manager, which is entered as long as they are iterated; an iterable is given as it is."""
    if not _is_manager(source):
        return cast("Chunks", source)
    if hasattr(source, "__aenter__"):
        return _in_async(cast("AbstractAsyncContextManager[object]", source))
    return _in(cast("AbstractContextManager[object]", source))


async def _in_async(manager: AbstractAsyncContextManager[object]) -> AsyncGenerator[object]:
    async with manager as chunks:
        if not isinstance(chunks, AsyncIterable):
            raise _not_iterable(manager, chunks)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await close(chunks)


def _in(manager: AbstractContextManager[object]) -> Generator[object, None, object]:
    with manager as chunks:
        if not _is_chunks(chunks) or isinstance(chunks, AsyncIterable):
            raise _not_iterable(manager, chunks)
        return (yield from cast("Generator[object, None, object]", chunks))


def _not_iterable(manager: Manager, made: object) -> TypeError:
    return TypeError(f"a stream cannot be made of a {type(manager).__name__}: entered, it gives no chunks but {_kind(made)}")


async def close(source: object, setting: Setting = AS_IT_IS) -> None:
    """Close a source that is iterated no further, or never: in a thread, as it would be iterated, if it does not await.

    A context manager that nobody has entered is not entered for that. What closing raises is logged: what came before matters more.
    """
    forget(source)
    function: Callable[[], object] | None = getattr(source, "aclose", None) or getattr(source, "close", None)
    if not callable(function) or not _is_chunks(source):
        return
    with anyio.move_on_after(CLOSE_SECONDS, shield=True):
        try:
            if isinstance(source, AsyncIterable):
                closing = function()
            else:
                closing = await in_thread("close", function, setting)
            if inspect.isawaitable(closing):
                async with setting.in_task():
                    await closing
        except Exception as error:
            _log_unclosed(source, error)


def forget(source: object) -> None:
    """Close the coroutines that nobody has awaited, of a source that never begins, or Python warns of each.

    SDKs' context managers keep the request that they send when they are entered as one.
    """
    held = vars(source).values() if _is_manager(source) and hasattr(source, "__dict__") else [source]
    for coroutine in held:
        if inspect.iscoroutine(coroutine) and inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
            coroutine.close()


def _log_unclosed(source: object, error: Exception) -> None:
    logger.warning("a stream's source, a %s, could not be closed", type(source).__name__, exc_info=error)


def _made_by(function: Callable[..., object], read: Callable[[Chunks], Chunks], setting: Setting) -> Producer:
    takes_stream, blocks = _takes_argument(function), _may_block(function)

    async def produce(stream: StreamInput, _stop: anyio.Event) -> object:
        call = partial(function, stream) if takes_stream else function
        if blocks:
            # As FastAPI does with what is no coroutine function: a synchronous client waits for its answer's head.
            made = await in_thread(stream.id, lambda: _made_here(stream, call, read), setting)
            return await _rest_of(made, stream, read, setting)
        made = call()
        if not inspect.isawaitable(made):
            return await _rest_of(made, stream, read, setting)
        async with setting.in_task():
            made = _entered_if_manager(await cast("Awaitable[object]", made))
            if isinstance(made, AsyncIterable):
                return await _write_all(stream, read(cast("Chunks", made)), AS_IT_IS)
        return await _rest_of(made, stream, read, setting)

    return produce


def _made_here(stream: StreamInput, call: Callable[[], object], read: Callable[[Chunks], Chunks]) -> object:
    """Call a function, and write all of an iterator that it makes: in one thread and one setting, which it may keep something in."""
    made = _entered_if_manager(call())
    if isinstance(made, AsyncIterable) or not isinstance(made, Iterator):
        return made
    return _write_here(stream, cast("Iterable[object]", read(cast("Chunks", made))))


async def _rest_of(made: object, stream: StreamInput, read: Callable[[Chunks], Chunks], setting: Setting) -> object:
    """Give the result that a function has made, or await it, or write all of what it is to be iterated for."""
    if inspect.isawaitable(made):
        async with setting.in_task():
            made = await cast("Awaitable[object]", made)
    made = _entered_if_manager(made)
    # A list may be a result; what has to be iterated to be known is none.
    if isinstance(made, AsyncIterable | Iterator):
        return await _write_all(stream, read(cast("Chunks", made)), setting)
    return made


def _may_block(function: Callable[..., object]) -> bool:
    plain = function.func if isinstance(function, partial) else function
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
    return not any(is_kind(plain) for is_kind in kinds)


def _takes_argument(function: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some that are written in C
        return False
    required = [parameter for parameter in parameters if parameter.default is parameter.empty and not _is_variadic(parameter)]
    if len(required) > 1 or any(parameter.kind is parameter.KEYWORD_ONLY for parameter in required):
        raise TypeError("a function that makes a stream's chunks takes one argument, the stream, or none")
    return bool(required)


def _is_variadic(parameter: inspect.Parameter) -> bool:
    return parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}


def _is_chunks(source: object) -> bool:
    if isinstance(source, str | bytes | bytearray | Mapping | type):
        return False
    # Futures and Pydantic's models have an `__iter__` for ends of their own.
    is_other = inspect.isawaitable(source) or hasattr(source, "model_dump")
    return isinstance(source, AsyncIterable) or (isinstance(source, Iterable) and not is_other)


def _is_manager(source: object) -> bool:
    """Say whether it is to be entered: much that is iterated is a context manager as well, and closes itself."""
    if _is_chunks(source) or isinstance(source, type) or inspect.isawaitable(source):
        return False
    return hasattr(source, "__aenter__") or hasattr(source, "__enter__")


def _entered_if_manager(made: object) -> object:
    return entered(cast("Manager", made)) if _is_manager(made) else made


def _kind(source: object) -> str:
    name = type(source).__name__
    return f"a {name}: await it first, or give the function" if inspect.isawaitable(source) else f"a {name}"


async def _write_all(stream: StreamInput, chunks: Chunks, setting: Setting) -> object:
    """Write all, and give what a generator returns that does not await, which is its result."""
    if isinstance(chunks, AsyncIterable):
        writer = ChunkWriter(stream)
        async with setting.in_task():
            try:
                async for chunk in chunks:
                    await writer.write(chunk)
            finally:
                leave()
                await close(chunks)  # in this setting
        return None
    return await in_thread(stream.id, lambda: _write_here(stream, chunks), setting)


class _Returning:
    """Chunks, and what their generator has returned when they have all been given."""

    def __init__(self, chunks: Iterable[object]) -> None:
        self.returned: object = None
        self._chunks = iter(chunks)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> object:
        try:
            return next(self._chunks)
        except StopIteration as end:
            self.returned = end.value
            raise


def _as_they_are(chunks: Chunks) -> Chunks:
    return chunks


def expanded(expand: Expand, chunks: Chunks, end: Callable[[], object] = lambda: None) -> Chunks:
    """Give what `expand` makes of chunks, one after the other, as an iterable of the same kind, which closes them.

    `end` is called behind the last one. What it raises is raised. It is not called where this is closed before.
    """

    async def read() -> AsyncGenerator[object]:
        assert isinstance(chunks, AsyncIterable)
        try:
            async for chunk in chunks:
                for part in expand(chunk):
                    yield part
            end()
        finally:
            await close(chunks)

    def read_here() -> Generator[object, None, object]:
        assert isinstance(chunks, Iterable)
        try:
            for chunk in (those := _Returning(chunks)):
                yield from expand(chunk)
            end()
            return those.returned
        finally:
            close_here(chunks)

    return read() if isinstance(chunks, AsyncIterable) else read_here()


def events_of() -> Expand:
    """Give what makes `Block`s of chunks of text that are server-sent events, cut anywhere; other chunks are as they are."""
    return partial(_events_of, SSEDecoder())


def _events_of(decoder: SSEDecoder, chunk: object) -> Iterable[object]:
    match chunk:
        case str():
            return map(block_of, decoder.decode(chunk.encode()))
        case bytes() | bytearray() | memoryview():
            return map(block_of, decoder.decode(bytes(chunk)))
        case _:
            return (chunk,)


async def in_thread(name: str, function: Callable[[], T], setting: Setting = AS_IT_IS) -> T:
    """Call a function in a thread. It cannot be cancelled: it is left alone then, and keeps its producer's place until it returns."""
    loop, over, give_back_place = loop_here(), anyio.Event(), keep_place()
    answers: list[T] = []
    failures: list[BaseException] = []

    def end() -> None:
        over.set()
        give_back_place()

    def run() -> None:
        try:
            with setting.in_thread():
                answers.append(function())
        except (SystemExit, KeyboardInterrupt) as error:  # which in a thread end nothing else
            failure = RuntimeError(f"what runs in a thread has raised {error!r}")
            failure.__cause__ = error
            failures.append(failure)
        except BaseException as error:  # what native libraries raise may be no Exception
            failures.append(error)
        with suppress(RuntimeError):  # its event loop has ended
            loop.call(end)

    try:
        # A daemon: one that blocks for ever must not keep the process from ending.
        Thread(target=copy_context().run, args=[run], name=f"streamkeep-producer-{name}", daemon=True).start()
    except BaseException:
        end()
        raise
    await over.wait()
    for failure in failures:
        raise failure
    return answers[0]


def _write_here(stream: StreamInput, chunks: Iterable[object]) -> object:
    offset = stream.tail - 1
    left_at: int | None = None
    """How much was stored when it was waited for in vain."""
    try:
        for chunk in (those := _Returning(chunks)):
            offset = _write_when_there_is_room(stream, chunk, offset)
            began_at, tail = time.monotonic(), stream.tail
            while offset - stream.tail >= MOST_AHEAD and stream.tail != left_at and not stream.is_closed:
                time.sleep(PAUSE_SECONDS)
                if stream.tail == tail and time.monotonic() - began_at >= AWAY_SECONDS:
                    left_at = tail
        return those.returned
    finally:
        close_here(chunks)


def close_here(chunks: object) -> None:
    """Close what does not await, here. What that raises is logged."""
    function: Any = getattr(chunks, "close", None)
    if callable(function):
        try:
            function()
        except Exception as error:
            _log_unclosed(chunks, error)


def _write_when_there_is_room(stream: StreamInput, chunk: object, last: int) -> int:
    while True:
        is_stored = stream.tail > last
        try:
            return stream.write_soon(chunk)
        except LimitExceededError:
            # Of the storage's queue, which may be shorter than what a thread may be ahead, or of the stream.
            if is_stored:
                raise
        time.sleep(PAUSE_SECONDS)
