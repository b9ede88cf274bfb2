"""Responses of OpenAI's API as their readers have them: as they are now, and as the events that tell of them."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar, assert_never

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from .._info import StreamInfo
from .._manager import StreamManager
from .._subscription import Subscription
from ..errors import HTTP_CODES, OffsetOutOfRangeError, StreamNotFoundError
from ..events import ErrorInfo, StreamEvent, StreamEventType, encode_json
from ..http.framing import one_line
from ._responses import ENDED, Answer, Json, failed, new_response

T = TypeVar("T")

SAID: Final = "response"
"""The name in a stream's metadata under which it is kept what its client has said."""
MAX_KEPT: Final = 32
MAX_KEPT_BYTES: Final = 16 * 1024 * 1024
"""How many Responses are kept as they were when they were last asked for, and of how many bytes of events."""


def begun(info: StreamInfo) -> Json:
    """Give the Response of a stream as it was before its first event."""
    said: Json = {"created_at": int(info.created_at), **msgspec.json.decode(info.metadata.get(SAID, "{}"))}
    return new_response(info.id, **said)


class _Fold:
    """The events of a stream that were added up."""

    def __init__(self, info: StreamInfo) -> None:
        self.life = info.life
        self.answer = Answer(begun(info))
        self.tail = 0
        self.size = 0
        self.lock = anyio.Lock()


class Responses:
    """Gives Responses as they are. One that has ended says so in its last event; of others it is kept what the events before add up to."""

    def __init__(self, streams: StreamManager) -> None:
        self._streams = streams
        self._folds: OrderedDict[str, _Fold] = OrderedDict()

    async def as_it_is(self, info: StreamInfo) -> bytes:
        """Give a Response as JSON. Raises as `subscribe` and reading do."""
        if info.status == "done" and (last := await self._last(info)) is not None:
            return last.data
        response, last = await self._folded(info)
        if last is None:
            return encode_json(response)
        return encode_json(failed(response, last.error)) if last.type is StreamEventType.ERROR else last.data

    async def before_its_end(self, stream: str) -> Json:
        """Give what a Response was before its last event. Raises as `info`, `subscribe` and reading do."""
        response, _ = await self._folded(await self._streams.info(stream))
        return response

    async def _last(self, info: StreamInfo) -> StreamEvent[Any] | None:
        async with self._streams.subscribe(info.id, info.tail - 2 if info.tail > 1 else None, follow=False) as events:
            _check_life(events, info.life)
            batch = await events.batch()
        return batch[-1] if batch and batch[-1].type is StreamEventType.DONE else None

    async def _folded(self, info: StreamInfo) -> tuple[Json, StreamEvent[Any] | None]:
        fold = self._folds.get(info.id)
        if fold is not None and fold.life == info.life:
            with suppress(OffsetOutOfRangeError):  # the storage went back
                response, last = await self._go_on(info.id, fold)
                if last is not None or info.status == "open":
                    return response, last
        fold = self._folds[info.id] = _Fold(info)
        return await self._go_on(info.id, fold)

    async def _go_on(self, stream: str, fold: _Fold) -> tuple[Json, StreamEvent[Any] | None]:
        """Add what has come since, and give the last event if the stream has ended. OffsetOutOfRangeError: less is there than was."""
        last: StreamEvent[Any] | None = None
        async with (
            fold.lock,
            self._streams.subscribe(stream, fold.tail - 1 if fold.tail else None, follow=False) as events,
        ):
            _check_life(events, fold.life)
            while batch := await events.batch():
                for event in batch:
                    if event.is_terminal:
                        last = event
                        break
                    if event.type is not StreamEventType.CHUNK:
                        continue
                    fold.answer.take(msgspec.json.decode(event.data))
                    fold.tail, fold.size = event.offset + 1, fold.size + len(event.data)
                await checkpoint()  # a storage in memory waits for nothing
            self._keep(stream, fold)
            return fold.answer.response, last

    def _keep(self, stream: str, fold: _Fold) -> None:
        if self._folds.get(stream) is fold:
            self._folds.move_to_end(stream)
        while len(self._folds) > MAX_KEPT or sum(kept.size for kept in self._folds.values()) > MAX_KEPT_BYTES:
            self._folds.popitem(last=False)


def _check_life(events: Subscription[Any], life: str) -> None:
    if events.life != life:
        raise StreamNotFoundError("the response was deleted, and another one has its id now")


class _Event(msgspec.Struct):
    type: str = ""


class _Ended(msgspec.Struct):
    status: str = ""


class ResponsesFraming:
    """Events as OpenAI's API sends them.

    Ids are not sent: once OpenAI's SDK for Python has read one, it takes every blank line for an event. A stream that fails ends with
    `response.failed`, one that is stopped with `response.incomplete`, whose Response is `cancelled`. A transport that fails is cut, for
    its clients take a clean end for success.

    Attributes:
        before: what the Response was before its last event; only an ERROR asks for it.
    """

    content_type = "text/event-stream"
    cut_when_broken = True
    cut_when_failed = False
    shows_done = True
    takes_no_content = False
    reads_all = False
    kind = None
    counts = True
    replays = False

    def __init__(self, stream: str) -> None:
        self.before = new_response(stream)

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:  # noqa: ARG002 - it needs neither
        """Give none."""
        return ()

    def preamble(self) -> bytes:
        """Give nothing."""
        return b""

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:  # noqa: ARG002 - its clients name the sequence number
        """Give an event, its offset as its sequence number."""
        match event.type:
            case StreamEventType.CHUNK:
                # As it is stored, and so an object that is not empty: it is decoded for no reader.
                data = b'%b,"sequence_number":%d}' % (event.data.rstrip()[:-1], event.offset)
                return _frame(_text_in(event.data, _Event).encode(), data)
            case StreamEventType.DONE:
                return _end(_text_in(event.data, _Ended), event.offset, event.data)
            case StreamEventType.ERROR:
                response = failed(self.before, event.error)
                return _end(response["status"], event.offset, encode_json(response))
            case StreamEventType.RECOVERING | StreamEventType.RESTARTED:
                return b""
            case _:
                assert_never(event.type)

    def heartbeat(self) -> bytes:
        """Give a comment; without a blank line."""
        return b": \n"

    def error(self, error: ErrorInfo) -> bytes:
        """Give what its clients raise."""
        return b"event: error\ndata: %b\n\n" % one_line(error_json(error))


def error_json(error: ErrorInfo) -> bytes:
    """Give an error in OpenAI's shape."""
    code = HTTP_CODES[error.status]
    kind = _KINDS.get(code, "server_error" if code >= 500 else "invalid_request_error")
    return encode_json({"error": {"message": error.message, "type": kind, "param": None, "code": error.status.lower()}})


_KINDS: Final[Mapping[int, str]] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def _frame(kind: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (one_line(kind), one_line(data))


def _end(status: str, offset: int, response: bytes) -> bytes:
    # OpenAI's SDK for Python knows no `response.cancelled`, and would not make a Response of what is in one.
    kind = b"response.%b" % ("incomplete" if status == "cancelled" or status not in ENDED else status).encode()
    return _frame(kind, b'{"type":"%b","sequence_number":%d,"response":%b}' % (kind, offset, response))


def _text_in(data: bytes, struct: type[_Event] | type[_Ended]) -> str:
    try:
        found = msgspec.json.decode(data, type=struct)
    except msgspec.MsgspecError:
        return ""
    return found.type if isinstance(found, _Event) else found.status
