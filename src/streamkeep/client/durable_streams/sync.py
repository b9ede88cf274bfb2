"""`streamkeep.client.durable_streams` for code that does not await.

    from streamkeep.client.durable_streams.sync import DurableStream

    with DurableStream("https://example.com/v1/stream/answer-42") as stream:
        with stream.read(offset=last_seen) as batches:
            for batch in batches:
                print(batch.messages, batch.offset)

Arguments and errors are those of the same names there, but that a `client` is an `httpx2.Client`. A producer has one batch on its way at a
time, and sends it when it is full, when it is flushed, and when it is left.
"""

import os
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, overload

import msgspec

from ..._background import ran
from ..._durations import check_durations
from ...errors import InvalidArgumentError, StreamkeepError, StreamLostError, UnexpectedAnswerError, fresh
from ...events import ReadAs, decoder_of
from .._calls import READ_TIMEOUT
from .._handles import BlockingHandle
from .._network import BlockingNetwork, Network
from .._reading import Reading
from .._retry import Retry
from ._batches import START, Batch, Events, Mode, Pages, dialect_of, is_json
from ._producer import MAX_BATCH_BYTES
from ._rules import MAX_CLAIMS, Claim, Failed, Stored, Tag, TooSoon, check_producer, epoch_now, meaning
from ._stream import JSON, StreamHead, Target
from ._writing import batchable, joined

if TYPE_CHECKING:
    import httpx2

__all__ = ["Batch", "Batches", "DurableStream", "Mode", "Producer", "Retry", "StreamHead"]

T = TypeVar("T")


class Batches(BlockingHandle[Batch[T]]):
    """What is read of a stream: see `streamkeep.client.durable_streams.Batches`. Iterate in one thread; any may `close` it."""

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
    """A stream of a server: see `streamkeep.client.durable_streams.DurableStream`. Enter it with `with`."""

    def __init__(
        self,
        url: str,
        *,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
        client: "httpx2.Client | None" = None,
        retry: Retry | None = None,
        read_timeout: timedelta | None = READ_TIMEOUT,
    ) -> None:
        self._target = Target(url, dict(headers or {}), content_type, retry or Retry())
        self._client = client
        check_durations(read_timeout=read_timeout)
        self._seconds = None if read_timeout is None else read_timeout.total_seconds()
        self._network: BlockingNetwork | None = None

    def __enter__(self) -> Self:
        if self._network is not None:
            raise RuntimeError("this was entered already")
        self._network = BlockingNetwork(self._client, self._seconds)
        return self

    def __exit__(self, *exc_info: object) -> None:
        network, self._network = self._entered, None
        ran(network.close())

    @property
    def _entered(self) -> BlockingNetwork:
        if self._network is None:
            raise RuntimeError("enter this with `with` first")
        return self._network

    def create(
        self, *messages: object, ttl: timedelta | None = None, expires_at: datetime | None = None, is_closed: bool = False
    ) -> bool:
        """Create the stream. False: it is there, and was created so before."""
        return ran(self._target.create(self._entered, messages, ttl, expires_at, is_closed=is_closed))

    def append(self, *messages: object, seq: str | None = None) -> str:
        """Append messages, all or none, and give the offset behind them. StreamLostError: they may be there or not."""
        return ran(self._target.append(self._entered, messages, seq, closes=False))

    def close(self, *messages: object) -> str:
        """Close the stream, behind some messages if they are given, and give its last offset."""
        return ran(self._target.append(self._entered, messages, None, closes=True))

    def head(self) -> StreamHead:
        """Say what the server knows of the stream."""
        return ran(self._target.head(self._entered))

    def delete(self) -> None:
        """Delete the stream."""
        ran(self._target.delete(self._entered))

    @overload
    def read(self, *, offset: str = START, mode: Mode = "sse") -> Batches[Any]: ...

    @overload
    def read(self, *, offset: str = START, mode: Mode = "sse", message_type: ReadAs[T]) -> Batches[T]: ...

    def read(self, *, offset: str = START, mode: Mode = "sse", message_type: ReadAs[Any] | None = None) -> Batches[Any]:
        """Give what the stream has behind an offset, batch by batch, and what comes, until it is closed."""
        accept = {"Accept": "text/event-stream"} if mode == "sse" else {}
        decode: Callable[[bytes], Any] = msgspec.json.decode if message_type is None else decoder_of(message_type)
        call = self._target.call("GET", accept)
        dialect = dialect_of(call, offset, mode, decode, is_json=is_json(self._target.content_type))
        _ = self._entered
        # Over connections of its own unless the client is the user's, so that closing it from another thread ends only its own.
        return Batches(lambda: Reading(BlockingNetwork(self._client, self._seconds), dialect, self._target.retry), dialect)

    def producer(self, id: str, *, epoch: int | None = None, max_batch_bytes: int = MAX_BATCH_BYTES) -> "Producer":
        """Give what appends messages once and in order, although connections are lost and servers restarted."""
        return Producer(self._entered, self._target, id, epoch, max_batch_bytes=max_batch_bytes)


class Producer:
    """An idempotent producer of one stream: see `streamkeep.client.durable_streams.Producer`. Enter it with `with`; for one thread.

    Attributes:
        id: the producer's id.
        epoch: the one that it writes in.
        offset: behind what is known to be stored; empty before anything is.
    """

    def __init__(self, network: Network, target: Target, id: str, epoch: int | None, *, max_batch_bytes: int) -> None:
        self.epoch = epoch_now() if epoch is None else epoch
        check_producer(id, self.epoch)
        if max_batch_bytes < 1:
            raise InvalidArgumentError("a batch has at least a byte")
        self.id: Final = id
        self.offset = ""
        self._network = network
        self._target = target
        self._claims = MAX_CLAIMS if epoch is None else 0
        self._max_batch_bytes = max_batch_bytes
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._next_seq = 0
        self._failure: StreamkeepError | None = None
        self._is_open = False
        self._process = os.getpid()

    def __enter__(self) -> Self:
        self._is_open = True
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        if exc_type is None and self._is_open:
            self.flush()
        self._is_open = False

    def append(self, *messages: object) -> None:
        """Append messages. They are sent when a batch is full. InvalidArgumentError: one of them cannot be appended; then none is."""
        some = batchable(messages, self._target.content_type)
        self._check()
        for message in some:
            if self._waiting and self._waiting_bytes + len(message) > self._max_batch_bytes:
                self._send(closes=False)
            self._waiting.append(message)
            self._waiting_bytes += len(message) + 1

    def flush(self) -> str:
        """Return when all that was appended is stored, and give the offset behind it."""
        self._check()
        if self._waiting:
            self._send(closes=False)
        return self.offset

    def close(self, *messages: object) -> str:
        """Append these, if there are any, and close the stream, once; give its last offset."""
        last = batchable(messages, self._target.content_type)
        self.flush()
        self._waiting = last
        self._send(closes=True)
        self._is_open = False
        return self.offset

    def _check(self) -> None:
        if self._failure is not None:
            raise fresh(self._failure)
        if os.getpid() != self._process:
            raise RuntimeError(
                "this producer is another process's: its batches and those of this one would have the same numbers"
            )
        if not self._is_open:
            raise RuntimeError("this producer is not entered, or has closed the stream, or was left")

    def _send(self, *, closes: bool) -> None:
        try:
            self.offset = ran(self._until_stored(self._waiting, closes=closes)) or self.offset
        except StreamkeepError as error:
            self._failure = error
            raise
        except BaseException:
            # What is in the next batch would have the number of this one, which may be there.
            self._failure = StreamLostError("sending was interrupted; whether the last batch was stored is unknown")
            raise
        self._waiting, self._waiting_bytes = [], 0
        self._next_seq += 1

    async def _until_stored(self, batch: list[bytes], *, closes: bool) -> str:
        own = {"Stream-Closed": "true"} if closes else {}
        if batch:
            own["Content-Type"] = self._target.content_type
        body = joined(batch, self._target.content_type) if batch else b""
        while True:
            tag = Tag(self.id, self.epoch, self._next_seq)
            call = self._target.call("POST", {**tag.headers(), **own}, body)
            reply = await self._target.reply(self._network, call, is_repeatable=True)
            match meaning(reply, tag, claims=self._claims > 0 and not self._next_seq):
                case Stored(offset):
                    return offset
                case Claim(epoch):
                    self.epoch = epoch
                    self._claims -= 1
                case TooSoon(expected):
                    raise UnexpectedAnswerError(f"the server has lost what it had stored: it wants batch {expected} again")
                case Failed(error):
                    raise error
