"""What is asked of a server of the Durable Streams protocol, and what its answers mean, in each of the three ways to read. No I/O.

Offsets are the server's, and opaque: nothing here makes one. That of an end may be compared with where a reader is (8.).
"""

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

from ...errors import InvalidArgumentError, LimitExceededError, UnexpectedAnswerError
from ...wire import SSEDecoder
from .._flows import checked
from .._handles import Handle
from .._network import Answer, Call, LostError
from .._reading import Reading
from .._sse import EVENT_STREAM

T = TypeVar("T")

Mode = Literal["catch-up", "long-poll", "sse"]
"""How a stream is read: to what there is now, or on and on, by one request after the other or by server-sent events."""

START: Final = "-1"
NOW: Final = "now"
MAX_PAGE_BYTES: Final = 256 << 20
"""The longest answer that is taken; some servers send all that a stream has as one."""
MAX_EVENT_BYTES: Final = 64 << 20
"""The longest server-sent event, whose data may be base64."""
EVENT_BYTES: Final = 64
"""What is counted for an event that is held, beyond its data: there may be many without any."""
MAX_TEXT: Final = 1_024
_RAWS: Final = msgspec.json.Decoder(list[msgspec.Raw])
_RAW: Final = msgspec.json.Decoder(msgspec.Raw)


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """What was read at once: some messages or bytes, and the offset behind them.

    Attributes:
        data: the bytes; of a stream of JSON an array with the messages.
        offset: what goes on behind these, as `offset`. Store it together with what was made of them, and each comes once.
        is_up_to_date: whether there was nothing more, then.
    """

    data: bytes
    offset: str
    is_up_to_date: bool
    _decode: Callable[[bytes], T] = field(default=msgspec.json.decode, repr=False, compare=False)

    @property
    def messages(self) -> list[T]:
        """The messages of a stream of JSON, decoded anew at each call. UnexpectedAnswerError: they are not of the type asked for."""
        decode = checked(self._decode)
        return [decode(bytes(raw)) for raw in checked(_RAWS.decode)(self.data)]


class _Control(msgspec.Struct, rename="camel"):
    stream_next_offset: str
    stream_cursor: str | None = None
    up_to_date: bool = False
    stream_closed: bool = False


_control_decoder: Final = msgspec.json.Decoder(_Control)


class _Batches(Generic[T]):
    """What both dialects are."""

    stream: str | None = None
    takes_refusals = True
    can_go_on = True
    is_repeatable = True

    def __init__(self, call: Call, offset: str, decode: Callable[[bytes], T]) -> None:
        self.position: str | None = checked_offset(offset)
        self.frames = 0
        self.is_over = False
        self.is_closed = False
        self.is_up_to_date = False
        self.retry_seconds: float | None = None
        self._call = call
        self._cursor = ""
        self._decode = decode

    @property
    def oldest(self) -> str | None:
        """See `Dialect`. Who has begun at the beginning, or now, would not find more there."""
        return START if self._is_somewhere else None

    @property
    def _is_somewhere(self) -> bool:
        return self.position not in {None, START, NOW}

    def _asked(self, live: str) -> Call:
        asked = {"cursor": self._cursor, "live": live} if live and self._cursor else {"live": live} if live else {}
        return replace(self._call, query={**asked, "offset": self.position or START})  # in this order for caches (10.1)

    def _go_on(self, offset: str, *, has_data: bool) -> None:
        """Take where to go on. UnexpectedAnswerError: it is nowhere, or where it was, or the stream ends before that."""
        if not offset or len(offset) > MAX_TEXT or not offset.isprintable() or offset in {START, NOW}:
            raise UnexpectedAnswerError("the server does not say where to go on")
        if has_data and offset == self.position:
            raise UnexpectedAnswerError("the server has sent data, and says that nothing has changed")
        if not has_data and self.position is not None and self._is_somewhere and offset < self.position:
            raise UnexpectedAnswerError(
                f"the stream ends at {offset!r}, before {self.position!r}: it is another one now, or the server has lost a part of it"
            )
        self.position = offset

    def _batch(self, data: bytes) -> tuple[Batch[T], str | None]:
        assert self.position is not None
        return Batch(data, self.position, self.is_up_to_date, self._decode), self.position


class Pages(_Batches[T]):
    """Whole answers, one after the other: to what there is now, or with `polls` on and on. A `Dialect`."""

    media_types: frozenset[str] | None = None

    def __init__(self, call: Call, offset: str, decode: Callable[[bytes], T], *, polls: bool) -> None:
        super().__init__(call, offset, decode)
        self._polls = polls
        self._headers: Mapping[str, str] = {}
        self._is_json = False
        self._body = bytearray()

    def request(self) -> Call:
        """Give the request for what is behind the offset. A long-poll begins when there is nothing more to catch up with.

        Nor does it from now on: first is asked where that is. An answer with what has come since might be lost, and all that with it.
        """
        return self._asked("long-poll" if self._polls and self.is_up_to_date else "")

    def begin(self, answer: Answer) -> None:
        """Begin to read."""
        self._headers = answer.headers
        self._is_json = is_json(answer.headers.get("content-type", ""))
        self._body = bytearray()
        if self.position == NOW:
            self._go_on(offset_in(answer), has_data=False)

    def no_content(self, answer: Answer) -> None:
        """Nothing came in time, or nothing will come any more; what came between that and the answer is asked for."""
        self._headers = answer.headers
        if self._is_somewhere and offset_in(answer) not in {"", self.position}:
            self.is_up_to_date = False
        else:
            self._take_head(has_data=False)

    def feed(self, data: bytes) -> Iterator[tuple[Batch[T], str | None]]:
        """Keep it, until all is there: only then it can be gone on behind."""
        self.frames += 1
        self._body += data
        if len(self._body) > MAX_PAGE_BYTES:
            raise LimitExceededError(f"the server's answer has more than {MAX_PAGE_BYTES} bytes")
        return iter(())

    def end(self, *, has_end: bool) -> Iterator[tuple[Batch[T], str | None]]:
        """Give what has come."""
        if not has_end:
            raise LostError from UnexpectedAnswerError("whether the answer is whole cannot be told")
        data, self._body = bytes(self._body), bytearray()
        has_data = _has_messages(data) if self._is_json else bool(data)
        self._take_head(has_data=has_data)
        if has_data:
            yield self._batch(data)

    def _take_head(self, *, has_data: bool) -> None:
        headers = self._headers
        before = self.position
        self._go_on(headers.get("stream-next-offset", ""), has_data=has_data)
        self._cursor = headers.get("stream-cursor", self._cursor)[:MAX_TEXT]
        self.is_closed = is_true(headers, "stream-closed")
        self.is_up_to_date = "stream-up-to-date" in headers or self.is_closed
        if not (has_data or self.is_up_to_date) and before == self.position:
            raise UnexpectedAnswerError("the server has sent nothing, and says that there is more")
        self.is_over = self.is_closed or (self.is_up_to_date and not self._polls)


class Events(_Batches[T]):
    """Server-sent events: data, and behind it where to go on. A `Dialect`."""

    def __init__(self, call: Call, offset: str, decode: Callable[[bytes], T], *, is_json: bool) -> None:
        super().__init__(call, offset, decode)
        self._is_json = is_json
        self._decoder = SSEDecoder(max_event_bytes=MAX_EVENT_BYTES)
        self._is_base64 = False
        self._has_begun = False
        self._held: list[str] = []
        self._held_bytes = 0
        self._tells_place = False

    @property
    def media_types(self) -> frozenset[str] | None:
        """What an answer may be."""
        return None if self.position == NOW else frozenset({EVENT_STREAM})

    def request(self) -> Call:
        """Give the request for what is behind the offset. From now on: first for where that is, so that no lost answer moves it."""
        return self._asked("" if self.position == NOW else "sse")

    def begin(self, answer: Answer) -> None:
        """Begin to read. What came without a place to go on behind comes again."""
        self._tells_place = self.position == NOW
        if self._tells_place:
            self._go_on(offset_in(answer), has_data=False)
            return
        encoding = answer.headers.get("stream-sse-data-encoding", "").strip().lower()
        if encoding not in {"", "base64"}:
            raise UnexpectedAnswerError(f"the server's events are of an unknown encoding ({encoding[:40]!r})")
        self._is_base64 = bool(encoding)
        self._has_begun = False
        self._decoder = SSEDecoder(max_event_bytes=MAX_EVENT_BYTES)
        self._held, self._held_bytes = [], 0

    def no_content(self, answer: Answer) -> None:  # noqa: ARG002 - whatever it says
        """There should be events: UnexpectedAnswerError."""
        raise UnexpectedAnswerError("the server has answered a request for events with nothing")

    def feed(self, data: bytes) -> Iterator[tuple[Batch[T], str | None]]:
        """Give the data that is followed by where to go on."""
        if self._tells_place:
            return
        begun_bytes = self._decoder.begun_bytes
        for event in self._decoder.decode(data):
            self.frames += 1
            match event.event:
                case "data":
                    self._held.append(event.data)
                    self._held_bytes += len(event.data) + EVENT_BYTES
                    if self._held_bytes > MAX_PAGE_BYTES:
                        raise LimitExceededError("the server sends data, and does not say where to go on")
                case "control":
                    yield from self._controlled(event.data)
                    if self.is_over:
                        return
                case _:
                    pass  # of a later version of the protocol
        self.frames += self._decoder.begun_bytes > begun_bytes
        if self._decoder.retry is not None:
            self.retry_seconds = self._decoder.retry / 1000

    def end(self, *, has_end: bool) -> Iterator[tuple[Batch[T], str | None]]:
        """A server may end an answer at any time, and the next one goes on. LostError: it has said nothing, or was cut."""
        if not self._tells_place and (self._held or not (has_end and self._has_begun)):
            raise LostError from UnexpectedAnswerError("the answer has ended, and the stream has not")
        return iter(())

    def _controlled(self, text: str) -> Iterator[tuple[Batch[T], str | None]]:
        try:
            control = _control_decoder.decode(text)
        except (ValueError, RecursionError) as error:
            raise UnexpectedAnswerError("the server has sent a control event that is none") from error
        held, self._held, self._held_bytes = self._held, [], 0
        data = self._decoded(held)
        self._go_on(control.stream_next_offset, has_data=bool(data))
        self._cursor = (control.stream_cursor or self._cursor)[:MAX_TEXT]
        self._has_begun = True
        self.is_closed = self.is_over = control.stream_closed
        self.is_up_to_date = control.up_to_date or control.stream_closed
        if data:
            yield self._batch(data)

    def _decoded(self, held: list[str]) -> bytes:
        if self._is_base64:
            try:
                return b"".join(base64.b64decode(text.replace("\n", ""), validate=True) for text in held)
            except (binascii.Error, ValueError) as error:
                raise UnexpectedAnswerError("the server has sent data that is not base64") from error
        if not self._is_json:
            return "".join(held).encode()
        try:
            messages = [bytes(raw) for text in held for raw in _RAWS.decode(text.encode())]
        except (ValueError, RecursionError) as error:
            raise UnexpectedAnswerError(
                f"the server has sent what is no array of JSON ({error}); of a stream of another type, `content_type` says which"
            ) from error
        return b"[" + b",".join(messages) + b"]" if messages else b""


class BatchesHandle(Handle[Batch[T]]):
    """What users hold of a stream that is read, whether they await or not."""

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


def dialect_of(
    call: Call, offset: str, mode: Mode, decode: Callable[[bytes], Any], *, is_json: bool
) -> "Pages[Any] | Events[Any]":
    """Give what reads in one of the ways. InvalidArgumentError: there is no such way."""
    match mode:
        case "catch-up":
            return Pages(call, offset, decode, polls=False)
        case "long-poll":
            return Pages(call, offset, decode, polls=True)
        case "sse":
            return Events(call, offset, decode, is_json=is_json)
        case _:
            raise InvalidArgumentError("a stream is read by catch-up, long-poll or sse")


def _has_messages(data: bytes) -> bool:
    """Say whether an array of JSON has elements, without making them. UnexpectedAnswerError: it is none."""
    array = bytes(checked(_RAW.decode)(data)).strip()
    if not array.startswith(b"["):
        raise UnexpectedAnswerError("the server's answer is no array of messages")
    return bool(array[1:-1].strip())


def checked_offset(offset: str) -> str:
    if not offset or len(offset) > MAX_TEXT or not offset.isprintable():
        raise InvalidArgumentError("an offset is what a server has given as one, -1 or now")
    return offset


def offset_in(answer: Answer) -> str:
    return answer.headers.get("stream-next-offset", "")


def is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def is_true(headers: Mapping[str, str], name: str) -> bool:
    return headers.get(name, "").strip().lower() == "true"
