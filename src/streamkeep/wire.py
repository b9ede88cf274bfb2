"""What comes over HTTP, read from bytes that are cut anywhere: Genkit's frames, server-sent events, Genkit's request, cursors, tokens.

Everything here is sans-I/O, for servers and clients alike. What is sent is written in `http.framing`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from ._depth import MAX_DEPTH, is_deep
from .errors import STATUSES, InvalidArgumentError, LimitExceededError, Status, StreamkeepError, fresh
from .events import MAX_OFFSET, ErrorInfo

T = TypeVar("T")

MAX_FRAME_BYTES: Final = 8 * 1024 * 1024
"""How long a frame may be that a decoder takes, unless it is told otherwise."""


# Decoding Genkit's frames


@dataclass(frozen=True, slots=True)
class Message:
    """A chunk: its JSON as it came, and its offset if the server is one of ours."""

    data: bytes
    offset: int | None


@dataclass(frozen=True, slots=True)
class Result:
    """The output that ends a stream well."""

    data: bytes
    offset: int | None


@dataclass(frozen=True, slots=True)
class Failure:
    """The error that ends a stream, or, without an offset, perhaps only this transport of it."""

    error: ErrorInfo
    offset: int | None


GenkitFrame = Message | Result | Failure


class GenkitDecoder:
    """Reads what Genkit's servers send, ours included, from bytes that are cut anywhere.

    Each `data:` or `error:` line is a frame; all other lines, and frames with none of the known keys, are skipped, as
    Genkit's Dart and Java clients do. `finished` tells whether the terminal frame has come; what follows it, such as an
    error's second form, is skipped too. A body that ends without one is an error, which only the caller can see.
    """

    def __init__(self, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.finished = False
        self._lines = _Lines(max_frame_bytes)
        self._broken: StreamkeepError | None = None

    def feed(self, data: bytes) -> list[GenkitFrame]:
        """Give the frames that these bytes complete.

        InvalidArgumentError: a frame is malformed. LimitExceededError: one is longer than `max_frame_bytes`. Frames
        before it are given first; the error then comes at the next call, and at every later one.
        """
        return _before_error(self.decode(data))

    def decode(self, data: bytes) -> Iterator[GenkitFrame]:
        """Give them one by one, and raise behind them; else it is the same as `feed`."""
        if self._broken is not None:
            raise fresh(self._broken)
        if self.finished:
            return
        try:
            for frame in map(_genkit_frame, self._lines.feed(data)):
                self.finished = isinstance(frame, Result | Failure)
                if frame is not None:
                    yield frame
                if self.finished:
                    return
        except StreamkeepError as error:
            self._broken = error
            raise


class _WireError(msgspec.Struct):
    status: object = None
    message: object = None
    details: object = None
    error: "_WireError | str | None" = None


class _WireFrame(msgspec.Struct):
    message: msgspec.Raw = msgspec.Raw()
    result: msgspec.Raw = msgspec.Raw()
    error: _WireError | str | msgspec.UnsetType | None = msgspec.UNSET
    offset: object = None


_frame_decoder: Final = msgspec.json.Decoder(_WireFrame)
_error_decoder: Final = msgspec.json.Decoder(_WireError)


def _genkit_frame(line: bytes) -> GenkitFrame | None:
    name, _, payload = line.partition(b":")
    if name not in (b"data", b"error") or not payload.strip():
        return None
    frame = _wire_frame(payload)
    offset = frame.offset if type(frame.offset) is int and 0 <= frame.offset <= MAX_OFFSET else None
    if data := bytes(frame.message):
        return Message(data, offset)
    if data := bytes(frame.result):
        return Result(data, offset)
    return None if frame.error is msgspec.UNSET else Failure(_error_of(frame.error), offset)


def _wire_frame(payload: bytes) -> _WireFrame:
    try:
        # Raw checks that it is JSON, but not that it is UTF-8.
        return _frame_decoder.decode(payload.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError("the server sent a frame that is not Genkit's") from error


def error_of(data: bytes) -> ErrorInfo:
    """Give the error that a frame's data or an answer's body is, `{"status", "message", "details"}`, also inside an `error`.

    InvalidArgumentError: it is not one.
    """
    try:
        return _error_of(_error_decoder.decode(data))
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError("this is no error in JSON") from error


def _error_of(error: _WireError | str | None) -> ErrorInfo:
    if isinstance(error, _WireError) and error.error is not None:
        error = error.error  # genkit_fastapi may wrap an error twice
    if not isinstance(error, _WireError):
        return ErrorInfo("UNKNOWN", error or "")
    return ErrorInfo(_status_of(error.status), error.message if isinstance(error.message, str) else "", error.details)


def _status_of(name: object) -> Status:
    if name == "INTERNAL_SERVER_ERROR":
        return "INTERNAL"  # older Genkit for Go
    return STATUSES.get(name, "UNKNOWN") if isinstance(name, str) else "UNKNOWN"


class _Lines:
    """Cuts bytes into lines at LF, CR or CRLF, without their ends, and refuses a line that is too long."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._open = bytearray()
        self._after_cr = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        for line in data.splitlines(keepends=True):
            # A CR ends its line at once, for the LF that may follow it can be a long time coming.
            text = line.rstrip(b"\r\n")
            ends = len(text) < len(line)
            if not (self._after_cr and line == b"\n"):
                yield from self._append(text, ends=ends)
            self._after_cr = line.endswith(b"\r")

    @property
    def begun_bytes(self) -> int:
        return len(self._open)

    def _append(self, text: bytes, *, ends: bool) -> Iterator[bytes]:
        if len(self._open) + len(text) > self._max_line_bytes:
            raise LimitExceededError(f"the server sent a frame of more than {self._max_line_bytes} bytes")
        self._open += text
        if ends:
            line = bytes(self._open)
            self._open.clear()
            yield line


def _before_error(decoded: Iterator[T]) -> list[T]:
    """Give what comes before an error; raise it if that is nothing."""
    given: list[T] = []
    try:
        for each in decoded:
            given.append(each)  # noqa: PERF402 - what was given is kept
    except StreamkeepError:
        if not given:
            raise
    return given


# Decoding server-sent events


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """An event as `EventSource` dispatches it."""

    event: str
    data: str
    id: str
    """The last event id: this event's, or an earlier one's if this has none."""
    retry: int | None
    """The reconnection time in force, in milliseconds; None while the server has named none."""


class SSEDecoder:
    """Reads an event stream by the HTML standard's algorithm (9.2.6), from bytes that are cut anywhere.

    `last_event_id` and `retry` are what a reconnect goes by; a block without data moves them too, though it gives no event.
    What the stream ends in the middle of is dropped, as the standard wants. A reconnect begins with the `last_event_id` of before.
    """

    def __init__(self, *, max_event_bytes: int = MAX_FRAME_BYTES, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self.retry: int | None = None
        self._max_event_bytes = max_event_bytes
        self._lines = _Lines(max_event_bytes)
        self._at_start = True
        self._event = ""
        self._id = last_event_id
        self._data: list[str] = []
        self._data_bytes = 0
        self._broken: LimitExceededError | None = None

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Give the events that these bytes complete.

        LimitExceededError: one is longer than `max_event_bytes`. Events before it are given first; the error then comes at the
        next call, and at every later one.
        """
        return _before_error(self.decode(data))

    def decode(self, data: bytes) -> Iterator[ServerSentEvent]:
        """Give them one by one, and raise behind them; else it is the same as `feed`."""
        if self._broken is not None:
            raise fresh(self._broken)
        try:
            for line in self._lines.feed(data):
                event = self._take_line(line)
                if event is not None:
                    yield event
        except LimitExceededError as error:
            self._broken = error
            raise

    @property
    def begun_bytes(self) -> int:
        """How much there is of the event that is not complete yet, about."""
        return self._data_bytes + self._lines.begun_bytes

    def _take_line(self, line: bytes) -> ServerSentEvent | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            return self._dispatch()
        # An LF or CR is never part of a longer UTF-8 sequence, so that decoding each line is decoding the stream.
        name, _, value = line.decode(errors="replace").partition(":")
        self._take_field(name, value.removeprefix(" "), len(line))
        return None

    def _take_field(self, name: str, value: str, size: int) -> None:
        match name:
            case "event":
                self._event = value
            case "data":
                self._data_bytes += size
                if self._data_bytes > self._max_event_bytes:
                    raise LimitExceededError(f"the server sent an event of more than {self._max_event_bytes} bytes")
                self._data.append(value)
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if _is_number(value, max_digits=_MAX_RETRY_DIGITS):
                self.retry = int(value)
            case _:
                pass  # a comment (its name is empty), a field of the future, a value that the standard wants ignored

    def _dispatch(self) -> ServerSentEvent | None:
        self.last_event_id = self._id
        event, lines = self._event or "message", self._data
        self._event, self._data, self._data_bytes = "", [], 0
        return ServerSentEvent(event, "\n".join(lines), self.last_event_id, self.retry) if lines else None


_MAX_RETRY_DIGITS: Final = 15
"""The standard has no bound, but `int` has, and 30,000 years are enough."""


# Cursors

LIFE_CHARACTERS: Final = 8
_CURSOR: Final = re.compile(r"(?P<stream>[A-Za-z0-9_~.:@=+-]{1,255})/(?P<life>[0-9a-f]{8})/(?P<offset>[0-9]{1,15})")


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a client sends back to go on: the stream, which life of that id, and the offset of the last event that it has.

    As text it is `stream/life/offset`, which clients take as it is: the `id:` of a server-sent event, and so `Last-Event-ID`.
    """

    stream: str
    life: str
    offset: int


def cursor_prefix(stream: str, life: str) -> str:
    """Give what an offset is written behind to make it a cursor. What is left of a life tells it from others of its id."""
    return f"{stream}/{life[:LIFE_CHARACTERS]}/"


def parse_cursor(text: str | None) -> Cursor | None:
    """Give the cursor that a text is, if it is one."""
    match = _CURSOR.fullmatch(text or "")
    return match and Cursor(match["stream"], match["life"], int(match["offset"]))


# Tokens

_SIGNED: Final = re.compile(r"skt[0-9]+\.")


def means_to_be_token(text: str) -> bool:
    """Say whether a text means to be a token of ours, sound or not; what others call one begins otherwise."""
    return _SIGNED.match(text) is not None


# Requests


@dataclass(frozen=True, slots=True)
class GenkitRequest:
    """The body of a POST. `has_init` tells an init of null from none."""

    data: object
    init: object
    has_init: bool


def wants_stream(accept: str, query: Mapping[str, str]) -> bool:
    """Say whether a stream is asked for, as Genkit's servers do: somewhere in `Accept`, or by `?stream=true`."""
    return "text/event-stream" in accept.lower() or query.get("stream") == "true"


def parse_body(body: bytes) -> GenkitRequest:
    """Give the input of a POST; an empty body or object means none.

    Only Genkit's own envelope is read, `{"data": …, "init": …}`, not the other keys that genkit_fastapi takes for an input,
    which no official client sends. InvalidArgumentError: anything else, and JSON deeper than `MAX_DEPTH`; its text repeats
    nothing of the body. Resuming clients may send anything: do not parse theirs.
    """
    fields = parse_object(body or b"{}")
    if fields and not fields.keys() & {"data", "init"}:
        raise InvalidArgumentError('the request\'s body has no "data": wrap the input as {"data": ...}')
    return GenkitRequest(fields.get("data"), fields.get("init"), "init" in fields)


def parse_object(body: bytes) -> dict[str, object]:
    """Give a request's body that is a JSON object. InvalidArgumentError: it is none, or deeper than `MAX_DEPTH`."""
    try:
        fields = _body_decoder.decode(body)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError("the request's body is not a JSON object") from error
    if is_deep(body):
        raise InvalidArgumentError(f"the request's body is nested more than {MAX_DEPTH} levels deep")
    return fields


_body_decoder: Final = msgspec.json.Decoder(dict[str, object])


def _is_number(text: str, *, max_digits: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= max_digits
