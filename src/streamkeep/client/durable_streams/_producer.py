"""Producer: what is appended through it is in the stream once and in order, whatever becomes of connections and of the server.

Batches are made of what is there when one may be sent, so that who appends much sends few. Several may be on their way; the server
takes them in order, and one that overtook another is sent again. A batch that cannot be stored ends the producer: what comes behind it
would leave a gap.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Final, Self

import anyio
from anyio.abc import TaskGroup

from ...errors import InvalidArgumentError, StreamkeepError, StreamLostError, UnexpectedAnswerError, fresh
from .._network import Network
from ._rules import MAX_CLAIMS, Claim, Failed, Stored, Tag, TooSoon, check_producer, epoch_above, epoch_now, meaning
from ._stream import Target
from ._writing import batchable, fits, joined

MAX_BATCH_BYTES: Final = 1 << 20
MAX_WAITING_BYTES: Final = 4 << 20
MAX_IN_FLIGHT: Final = 5
MESSAGE_BYTES: Final = 64
"""What is counted for a message that waits, beyond its own bytes."""

logger: Final = logging.getLogger("streamkeep")


class Producer:
    """An idempotent producer of one stream, as `DurableStream.producer` gives it.

    Enter it with `async with`. Leaving the block waits until all is stored; if an exception leaves it, what was not sent is dropped, and
    what was on its way may be stored or not. Any task may append.

    Once something could not be stored, everything raises what was the reason: RefusedError (`ABORTED`: another producer of this id has
    taken over, `FAILED_PRECONDITION`: the stream is closed), StreamLostError, UnexpectedAnswerError.

    Attributes:
        id: the producer's id.
        epoch: the one that it writes in.
        offset: behind what is known to be stored; empty before anything is.
    """

    def __init__(
        self,
        network: Network,
        target: Target,
        id: str,
        epoch: int | None,
        *,
        max_batch_bytes: int,
        max_in_flight: int,
    ) -> None:
        self.epoch = epoch_now() if epoch is None else epoch
        check_producer(id, self.epoch)
        if max_batch_bytes < 1 or max_in_flight < 1:
            raise InvalidArgumentError("a batch has at least a byte, and at least one is on its way at a time")
        self.id: Final = id
        self.offset = ""
        self._network = network
        self._target = target
        self._claims = MAX_CLAIMS if epoch is None else 0
        self._max_batch_bytes = max_batch_bytes
        self._max_in_flight = max_in_flight
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._next_seq = 0
        self._appended = 0  # how many messages there have been
        self._sent = 0  # how many of them are in batches
        self._stored = 0  # how many of them are stored, and all before them
        self._ahead: dict[int, tuple[str, int]] = {}  # of stored batches, before which others are not: what is behind them
        self._stored_below = 0
        """All batches before this one are stored."""
        self._failure: StreamkeepError | None = None
        self._is_over = False
        self._changed = anyio.Event()
        self._tasks: TaskGroup | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise RuntimeError("this producer was entered already; ask for another one")
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._tasks is not None
        failure: StreamkeepError | None = None
        try:
            if exc is None:
                try:
                    await self._until(lambda: not self._waiting and self._stored_below == self._next_seq)
                except StreamkeepError as error:  # raised below, where no task group makes another one of it
                    failure = error
        finally:
            self._is_over = True
            self._tasks.cancel_scope.cancel()
            await self._stack.__aexit__(None, None, None)
        if failure is not None:
            raise failure

    async def append(self, *messages: object) -> None:
        """Append messages: JSON values, or bytes and text. It returns when they are on their way, and waits only if too many are.

        InvalidArgumentError: one of them cannot be appended; then none is.
        """
        some = batchable(messages, self._target.content_type)
        self._check()
        while self._waiting_bytes > MAX_WAITING_BYTES:
            await self._changed.wait()
            self._check()
        self._waiting += some
        self._appended += len(some)
        self._waiting_bytes += sum(map(_weight, some))
        self._send_more()

    async def flush(self) -> str:
        """Return when all that was appended before this is stored, and give an offset behind it."""
        self._check()
        appended = self._appended
        return await self._until(lambda: self._stored >= appended)

    async def close(self, *messages: object) -> str:
        """Append these, if there are any, and close the stream, once; give its last offset. Nothing can be appended behind it.

        If this is cancelled when all before it is stored, the stream is closed nevertheless, and leaving the block waits for that.
        """
        last = batchable(messages, self._target.content_type)
        self._check()
        await self._until(lambda: not self._waiting and self._stored_below == self._next_seq)
        self._check()
        assert self._tasks is not None
        self._is_over = True
        self._appended += len(last)
        self._send(last, closes=True)
        return await self._until(lambda: self._stored_below == self._next_seq)

    # Sending

    async def _until(self, is_stored: Callable[[], bool]) -> str:
        """Wait until so much is stored, and give the offset behind it. Raises the reason if it cannot be."""
        while self._failure is None and not is_stored():
            await self._changed.wait()
        if self._failure is not None:
            raise fresh(self._failure)
        return self.offset

    def _check(self) -> None:
        if self._failure is not None:
            raise fresh(self._failure)
        if self._tasks is None or self._is_over:
            raise RuntimeError("this producer is not entered, or has closed the stream, or was left")

    def _send_more(self) -> None:
        """Send what waits, as long as more batches may be on their way."""
        # Until the first one is stored the epoch is not sure, and those behind it would be of another one.
        most = self._max_in_flight if self._stored_below else 1
        while self._waiting and self._failure is None and self._next_seq - self._stored_below < most:
            self._send(self._batch())

    def _send(self, batch: Sequence[bytes], *, closes: bool = False) -> None:
        assert self._tasks is not None
        self._sent += len(batch)
        self._tasks.start_soon(partial(self._store, batch, self._next_seq, self._sent, closes=closes))
        self._next_seq += 1

    def _batch(self) -> Sequence[bytes]:
        """Take what is sent next: at least one message, and no more bytes than a batch may have if that can be."""
        batch: list[bytes] = []
        size = 0
        while self._waiting and (not batch or fits(size, self._waiting[0], self._max_batch_bytes)):
            message = self._waiting.popleft()
            batch.append(message)
            size += len(message) + 1
            self._waiting_bytes -= _weight(message)
        return batch

    async def _store(self, batch: Sequence[bytes], seq: int, sent: int, *, closes: bool) -> None:
        """Send a batch until it is stored, or cannot be. Nothing is raised: whoever waits is told."""
        try:
            self._ahead[seq] = await self._until_stored(batch, seq, closes=closes), sent
            self._go_on()
        except StreamkeepError as error:
            self._failure = self._failure or error
        except Exception as error:  # of a client or a transport of the user's; it is no reason to end other tasks
            logger.exception("a producer could not send a batch")
            lost = StreamLostError(f"whether the last batches were stored is unknown: {error!r}")
            lost.__cause__ = error
            self._failure = self._failure or lost
        self._tell()
        if not closes and not self._is_over:
            self._send_more()

    async def _until_stored(self, batch: Sequence[bytes], seq: int, *, closes: bool) -> str:
        """Give the offset behind it."""
        content_type = self._target.content_type
        own = {"Stream-Closed": "true"} if closes else {}
        if batch:
            own["Content-Type"] = content_type
        body = joined(batch, content_type) if batch else b""
        while True:
            tag = Tag(self.id, self.epoch, seq)
            stored_below = (
                self._stored_below
            )  # as the server has known when it answers, for answers may overtake one another, too
            call = self._target.call("POST", {**tag.headers(), **own}, body)
            reply = await self._target.reply(self._network, call, is_repeatable=True)
            match meaning(reply, tag, claims=self._claims > 0 and not self._stored_below):
                case Stored(offset):
                    return offset
                case TooSoon(expected):
                    if expected < stored_below:
                        lost = f"the server has lost what it had stored: it wants batch {expected} again"
                        raise UnexpectedAnswerError(lost)
                    await self._until_before(seq)
                case Claim(other):
                    self.epoch = epoch_above(other)
                    self._claims -= 1
                case Failed(error):
                    raise error

    async def _until_before(self, seq: int) -> None:
        """Wait until all batches before this one are stored."""
        while self._stored_below < seq:
            if self._failure is not None:
                raise fresh(self._failure)
            await self._changed.wait()

    def _go_on(self) -> None:
        """Note what is stored with all that is before it."""
        while self._stored_below in self._ahead:
            offset, self._stored = self._ahead.pop(self._stored_below)
            self.offset = offset or self.offset
            self._stored_below += 1

    def _tell(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()


def _weight(message: bytes) -> int:
    return len(message) + MESSAGE_BYTES
