"""Streams of any server of the Durable Streams protocol: created, appended to, read to their end, whatever becomes of connections.

    from streamkeep.client.durable_streams import DurableStream

    async with DurableStream("https://example.com/v1/stream/answer-42") as stream:
        async with stream.read(offset=last_seen) as batches:
            async for batch in batches:
                print(batch.messages, batch.offset)

`streamkeep.client.durable_streams.sync` is the same for code that does not await. Of what is raised, see
`streamkeep.errors.RemoteError`. Extra: `streamkeep[client]`.
"""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import msgspec

from ..._durations import check_durations
from ...events import ReadAs, decoder_of
from .._calls import READ_TIMEOUT
from .._handles import AwaitedHandle
from .._network import AsyncNetwork
from .._reading import Reading
from .._retry import Retry
from ._batches import START, Batch, Events, Mode, Pages, dialect_of, is_json
from ._producer import MAX_BATCH_BYTES, MAX_IN_FLIGHT, Producer
from ._stream import JSON, StreamHead, Target

if TYPE_CHECKING:
    import httpx2

__all__ = ["Batch", "Batches", "DurableStream", "Mode", "Producer", "Retry", "StreamHead"]

T = TypeVar("T")


class Batches(AwaitedHandle[Batch[T]]):
    """What is read of a stream, as `DurableStream.read` gives it.

    Enter it with `async with`, which raises RefusedError if the server refuses it, and iterate. The iteration ends where the stream is
    closed; of a catch-up also where there is nothing more yet. One task at a time may iterate, and any may leave, by `aclose()`; a
    cancelled wait loses nothing. After a StreamLostError, iterating goes on trying.
    """

    def __init__(self, read: Callable[[], Reading[Batch[T]]], dialect: Pages[T] | Events[T]) -> None:
        super().__init__(read)
        self._dialect = dialect

    @property
    def offset(self) -> str:
        """Where to go on behind what was given."""
        return (self._dialect.position if self._reading is None else self._reading.position) or START

    @property
    def is_closed(self) -> bool:
        """Whether the stream is known to be closed."""
        return self._dialect.is_closed


class DurableStream:
    """A stream of a server of the Durable Streams protocol. Enter it with `async with`; leaving closes its connections, not the stream.

    Args:
        url: the stream's.
        content_type: what is appended to it, and what it is created as: of `application/json` messages are JSON values, of all else they
            are bytes, or text.
        headers: more headers, such as `Authorization`; no other server ever gets them.
        client: the client to use, with its headers, authentication, proxies and certificates; it is not closed. It needs as many
            connections as reads and batches are on their way at a time. Unless given, one is opened.
        retry: when to come back, and when to give up. What a server asks for by `Retry-After` is waited.
        read_timeout: a connection that brings nothing for so long, not even a heartbeat, is lost. None: never.

    What is asked raises RefusedError (with `http_status`, and `status`: NOT_FOUND, also for a stream that is gone; FAILED_PRECONDITION for
    one that is closed, or is of another type), StreamLostError, UnexpectedAnswerError, InvalidArgumentError.
    """

    def __init__(
        self,
        url: str,
        *,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
        client: "httpx2.AsyncClient | None" = None,
        retry: Retry | None = None,
        read_timeout: timedelta | None = READ_TIMEOUT,
    ) -> None:
        self._target = Target(url, dict(headers or {}), content_type, retry or Retry())
        self._client = client
        check_durations(read_timeout=read_timeout)
        self._seconds = None if read_timeout is None else read_timeout.total_seconds()
        self._network: AsyncNetwork | None = None

    async def __aenter__(self) -> Self:
        if self._network is not None:
            raise RuntimeError("this was entered already")
        self._network = AsyncNetwork(self._client, self._seconds)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        network, self._network = self._entered, None
        await network.close()

    @property
    def _entered(self) -> AsyncNetwork:
        if self._network is None:
            raise RuntimeError("enter this with `async with` first")
        return self._network

    async def create(
        self, *messages: object, ttl: timedelta | None = None, expires_at: datetime | None = None, is_closed: bool = False
    ) -> bool:
        """Create the stream, with some messages if they are given. False: it is there, and was created so before, maybe by an earlier try.

        Args:
            messages: what it begins with.
            ttl: how long it lives from the last time that it was read or written, in whole seconds.
            expires_at: when it expires, instead.
            is_closed: nothing is to be appended to it.

        RefusedError with FAILED_PRECONDITION: there is another one.
        """
        return await self._target.create(self._entered, messages, ttl, expires_at, is_closed=is_closed)

    async def append(self, *messages: object, seq: str | None = None) -> str:
        """Append messages, all or none, and give the offset behind them.

        StreamLostError: the connection was lost, and they may be there or not; they are not sent twice. A `producer` knows.
        `seq`: text that is greater than that of the append before, for writers who take turns (`Stream-Seq`).
        """
        return await self._target.append(self._entered, messages, seq, closes=False)

    async def close(self, *messages: object) -> str:
        """Close the stream, behind some messages if they are given, and give its last offset. Without any it can be done again."""
        return await self._target.append(self._entered, messages, None, closes=True)

    async def head(self) -> StreamHead:
        """Say what the server knows of the stream."""
        return await self._target.head(self._entered)

    async def delete(self) -> None:
        """Delete the stream."""
        await self._target.delete(self._entered)

    @overload
    def read(self, *, offset: str = START, mode: Mode = "sse") -> Batches[Any]: ...

    @overload
    def read(self, *, offset: str = START, mode: Mode = "sse", message_type: ReadAs[T]) -> Batches[T]: ...

    def read(self, *, offset: str = START, mode: Mode = "sse", message_type: ReadAs[Any] | None = None) -> Batches[Any]:
        """Give what the stream has behind an offset, batch by batch, and what comes, until it is closed.

        Args:
            offset: that of the last batch that was seen, `-1` for all, `now` for what comes from now on.
            mode: `sse` and `long-poll` follow; `catch-up` ends at what there is. Line ends of text are kept by the latter two only.
            message_type: what `batch.messages` are decoded into: a pydantic model, a dataclass, …; JSON values otherwise.

        Each batch comes once. RefusedError, when entered or later: there is no such stream, or it is gone, or none of what is behind
        the offset is there any more (`http_status` 410).
        """
        accept = {"Accept": "text/event-stream"} if mode == "sse" else {}
        decode: Callable[[bytes], Any] = msgspec.json.decode if message_type is None else decoder_of(message_type)
        call = self._target.call("GET", accept)
        dialect = dialect_of(call, offset, mode, decode, is_json=is_json(self._target.content_type))
        network = self._entered
        return Batches(lambda: Reading(network.another(), dialect, self._target.retry), dialect)

    def producer(
        self,
        id: str,
        *,
        epoch: int | None = None,
        max_batch_bytes: int = MAX_BATCH_BYTES,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> Producer:
        """Give what appends messages once and in order, although connections are lost and servers restarted.

        Args:
            id: the producer's; one producer at a time writes under it.
            epoch: greater than any that was used under this id before. Who had a smaller one cannot write any more. None: it is made of
                the time; if the server knows a greater one, or that one, the next is taken. So a producer that is restarted takes over
                from itself.
            max_batch_bytes: about how much is sent at once.
            max_in_flight: how many batches are on their way at a time.
        """
        return Producer(
            self._entered,
            self._target,
            id,
            epoch,
            max_batch_bytes=max_batch_bytes,
            max_in_flight=max_in_flight,
        )
