"""Framings: how a stream's events travel in one response. A new client dialect is one class here.

Everything here is sans-I/O. It knows neither ASGI nor managers, and never decides *when* something is sent.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol, TypeVar, assert_never

import msgspec

from ..errors import InvalidArgumentError
from ..events import MAX_OFFSET, ErrorInfo, StreamEvent, StreamEventType, encode_json
from ..wire import ServerSentEvent

T = TypeVar("T")


def parse_offset(text: str | None) -> int | None:
    """Give the offset after which a reader goes on; None, which is from the start, if it names none or says -1.

    For `X-Genkit-Stream-Offset`, `?after=`, and a `Last-Event-ID` that is no cursor. InvalidArgumentError: it is no whole number that
    JavaScript can name.
    """
    if not text or text == "-1":
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_OFFSET))) or int(text) > MAX_OFFSET:
        raise InvalidArgumentError(f"an offset is a whole number from 0 to {MAX_OFFSET}, in ASCII digits")
    return int(text)


class Framing(Protocol):
    """How one response speaks. It may keep the state of a line, so each response has its own.

    Attributes:
        content_type: the response's.
        cut_when_broken: whether a response that its transport ends before the stream has is cut: most clients take every clean end for
            success, and come back after a cut.
        cut_when_failed: whether the response of a stream that ended in ERROR is cut behind that frame, because not all clients know it.
        shows_done: whether there is a frame for the DONE event. Who has all but an event that is never shown has seen all.
        takes_no_content: whether its clients take a 204 for "nothing is left". Others are given an empty answer in this framing.
        reads_all: whether a frame depends on the events before: then it is shown those too that its reader has, and what it gives for them
            is not sent.
        kind: what its frames depend on, but for the event and the cursor. Those that have equal ones give the same, and readers of a stream
            who are equally far are sent what was made once. None: nobody else gives the same.
        counts: whether its clients count what they have been sent. Others are not shown what was superseded before they came.
        replays: whether its clients put an answer that begins anew in the place of what they have. So `follow(key=)` shows one that has
            ended, too; and where a response can be cut, no error is sent that would keep them away.
    """

    content_type: str
    cut_when_broken: bool
    cut_when_failed: bool
    shows_done: bool
    takes_no_content: bool
    reads_all: bool
    counts: bool
    replays: bool

    @property
    def kind(self) -> object:
        """See above."""
        ...

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:
        """Give more headers of the response that shows a stream (empty: none), names in lower case; called before all else.

        What the query of the request says in this format is heard here. Raises InvalidArgumentError: it says what cannot be.
        """
        ...

    def preamble(self) -> bytes:
        """Give what is sent before the first frame."""
        ...

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:
        """Give the whole frame of an event."""
        ...

    def heartbeat(self) -> bytes:
        """Give what keeps an idle connection alive and means nothing to its reader."""
        ...

    def error(self, error: ErrorInfo) -> bytes:
        """Give the frame of a transport that failed: it has no cursor, for the stream itself goes on."""
        ...


def check_framing(framing: object) -> None:
    """Raise TypeError for what is no framing: a class, above all, or the name of one. None is left to who calls."""
    if framing is not None and (isinstance(framing, type) or not hasattr(framing, "preamble")):
        raise TypeError(f"`framing` is an object, such as SSEFraming(), and not {framing!r}")


def kind_of(framing: Framing, own: type[Framing], *settings: object) -> object:
    """Give the kind of a class's framings with these settings; None for a subclass, whose frames may depend on more."""
    return (own, *settings) if type(framing) is own else None


class GenkitFraming:
    """Genkit's frames: LF only, one `data: ` line each, never `id:`, `event:`, `retry:` or a comment.

    Genkit's JS client cuts at blank lines, drops six characters and parses the rest, hence the heartbeat: it opens the next
    frame early and goes on with spaces, which JSON allows. An error is sent twice, because Dart reads only
    `error:` and Java only `data:`. Send it in a packet of its own: the JS client forgets chunks not yet read when it comes.
    """

    content_type = "text/event-stream"
    cut_when_broken = False
    cut_when_failed = False
    shows_done = True
    takes_no_content = True
    reads_all = False
    counts = False
    replays = False

    def __init__(self) -> None:
        self._line_is_open = False

    @property
    def kind(self) -> object:
        """It, unless the next frame's line has begun."""
        return None if self._line_is_open else kind_of(self, GenkitFraming)

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:  # noqa: ARG002 - it needs neither
        """Give none."""
        return ()

    def preamble(self) -> bytes:
        """Give nothing: there is no frame that means nothing."""
        return b""

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:  # noqa: ARG002 - a line of its own would be fatal
        """Give a chunk's frame, the result's, or both forms of the error's."""
        match event.type:
            case StreamEventType.CHUNK:
                return self._frame(b'{"message":%b,"offset":%d}' % (one_line(event.data), event.offset))
            case StreamEventType.DONE:
                return self._frame(b'{"result":%b,"offset":%d}' % (one_line(event.data), event.offset))
            case StreamEventType.ERROR:
                return self._failure(event.error, b',"offset":%d' % event.offset)
            case StreamEventType.RECOVERING | StreamEventType.RESTARTED:
                return b""
            case _:
                assert_never(event.type)

    def heartbeat(self) -> bytes:
        """Give the beginning of the next frame's line, or one more space in it."""
        if self._line_is_open:
            return b" "
        self._line_is_open = True
        return b"data: "

    def error(self, error: ErrorInfo) -> bytes:
        """Give both forms of an error without offset."""
        return self._failure(error, b"")

    def _failure(self, error: ErrorInfo, offset: bytes) -> bytes:
        data = _error_json(error)
        return self._frame(b'{"error":%b%b}' % (data, offset)) + b'error: {"error":%b}\n\n' % data

    def _frame(self, data: bytes) -> bytes:
        opening = b"" if self._line_is_open else b"data: "
        self._line_is_open = False
        return opening + data + b"\n\n"


class SSEFraming:
    """Server-sent events as in the HTML standard: the cursor is the id, and the events are `chunk`, `done` and `error`; also `recovering`
    and `restarted`, of a stream that is gone on with when its writer has died.

    A transport's error has no id, so that a reconnecting `EventSource` names the last event that it has. Only events end in a blank line:
    httpx-sse takes each for an event, and would give empty ones.

    Args:
        retry_seconds: how long an `EventSource` waits before it comes back.
        heartbeat_event: the name of an event, without id, that a page can listen to as the sign of life; None: a comment, which it
            cannot see.
    """

    content_type = "text/event-stream"
    cut_when_broken = True
    cut_when_failed = False
    shows_done = True
    takes_no_content = True
    reads_all = False
    counts = False
    replays = False

    def __init__(self, *, retry_seconds: float = 2.0, heartbeat_event: str | None = None) -> None:
        if heartbeat_event is not None and not _EVENT_NAME.fullmatch(heartbeat_event):
            raise InvalidArgumentError("an event's name is of letters, digits, - and _")
        self.kind = kind_of(self, SSEFraming)
        self._retry_ms = round(retry_seconds * 1000)
        self._heartbeat = b": \n" if heartbeat_event is None else b"event: %b\ndata: \n\n" % heartbeat_event.encode()

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:  # noqa: ARG002 - it needs neither
        """Give none."""
        return ()

    def preamble(self) -> bytes:
        """Give the reconnection time."""
        return b"retry: %d\n" % self._retry_ms

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:
        """Give an event of the same name, its cursor as the id: last, for clients that believe an id before they have the rest."""
        data = _error_json(event.error) if event.type is StreamEventType.ERROR else one_line(event.data)
        return b"%b%b\nid: %b\n\n" % (_SSE_HEADS[event.type], data, cursor.encode())

    def heartbeat(self) -> bytes:
        """Give a comment, or the event."""
        return self._heartbeat

    def error(self, error: ErrorInfo) -> bytes:
        """Give an `error` event without id."""
        return b"event: error\ndata: %b\n\n" % _error_json(error)


_SSE_HEADS: Final = {type_: b"event: %b\ndata: " % type_.encode() for type_ in StreamEventType}


class Block(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A server-sent event as somebody else's server sent it, and as it is stored: without its id, for ids are ours to send."""

    data: str
    event: str = ""
    """Empty if it had no name, which browsers call `message`."""


def block_of(event: ServerSentEvent) -> Block:
    """Give what is kept of a server-sent event."""
    return Block(event.data, "" if event.event == "message" else event.event)


class PassThroughFraming:
    """Somebody's own server-sent events, with our cursors as ids.

    `DurableStreaming` stores each as a chunk `{"data": …, "event": …}`. How a stream failed is told by an event `error`; as not all clients
    know that, the response is then cut. That an answer begins again is told by an event `restarted`.

    Args:
        id_first: whether the id comes directly before the first `data` line, as TanStack AI's client needs it, instead of last.
    """

    content_type = "text/event-stream"
    cut_when_broken = True
    cut_when_failed = True
    shows_done = False
    takes_no_content = True
    reads_all = False
    counts = False
    replays = False

    def __init__(
        self, *, content_type: str = "text/event-stream", headers: Sequence[tuple[str, str]] = (), id_first: bool = False
    ) -> None:
        self.content_type = content_type
        self.kind = kind_of(self, PassThroughFraming, id_first)
        self._headers = headers
        self._id_first = id_first

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:  # noqa: ARG002 - it needs neither
        """Give those that it was made with."""
        return self._headers

    def preamble(self) -> bytes:
        """Give nothing."""
        return b""

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:
        """Give the block of a chunk, or an `error`; nothing for an output. A chunk that is no block is a `data` line."""
        match event.type:
            case StreamEventType.CHUNK:
                return self._frame(stored_block(event.data) or Block(one_line(event.data).decode()), cursor)
            case StreamEventType.DONE:
                return b""
            case StreamEventType.ERROR:
                return self._frame(_error_block(event.error), cursor)
            case StreamEventType.RECOVERING:
                return b""
            case StreamEventType.RESTARTED:
                return self._frame(Block(event.data.decode(), event.type), cursor)
            case _:
                assert_never(event.type)

    def heartbeat(self) -> bytes:
        """Give a comment."""
        return b": \n"

    def error(self, error: ErrorInfo) -> bytes:
        """Give an `error` without id."""
        return self._frame(_error_block(error), "")

    def _frame(self, block: Block, cursor: str) -> bytes:
        return frame_of(block, cursor, id_first=self._id_first)


def frame_of(block: Block, cursor: str = "", *, id_first: bool = False) -> bytes:
    """Give a block as it travels, with a cursor as its id unless that is empty: last, or directly before the data."""
    name = f"event: {_LINE_END.sub(' ', block.event)}\n" if block.event else ""
    lines = "".join(f"data: {line}\n" for line in _LINE_END.split(block.data))
    id_line = f"id: {cursor}\n" if cursor else ""
    return f"{name}{id_line}{lines}\n".encode() if id_first else f"{name}{lines}{id_line}\n".encode()


class TextFraming:
    """Text as it is, chunk by chunk: somebody's own lines, or a model's words. A chunk that is no string is sent as JSON.

    It has no words for a failure, so the response is cut.
    """

    cut_when_broken = True
    cut_when_failed = True
    shows_done = False
    takes_no_content = True
    reads_all = False
    counts = False
    replays = False

    def __init__(self, content_type: str = "text/plain; charset=utf-8", headers: Sequence[tuple[str, str]] = ()) -> None:
        self.content_type = content_type
        self.kind = kind_of(self, TextFraming)
        self._headers = headers

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:  # noqa: ARG002 - it needs neither
        """Give those that it was made with."""
        return self._headers

    def preamble(self) -> bytes:
        """Give nothing."""
        return b""

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:  # noqa: ARG002 - text has no place for it
        """Give a chunk's text; nothing at the end."""
        if event.type is not StreamEventType.CHUNK:
            return b""
        return msgspec.json.decode(event.data, type=str).encode() if event.data.startswith(b'"') else event.data

    def heartbeat(self) -> bytes:
        """Give nothing: all that could be sent is text."""
        return b""

    def error(self, error: ErrorInfo) -> bytes:  # noqa: ARG002 - as above
        """Give nothing."""
        return b""


class NDJSONFraming:
    """A chunk a line, as JSON. The output is not sent; an error is a line `{"error": …}`, and `{"restarted": true}` says that the answer
    begins again.
    """

    content_type = "application/x-ndjson"
    cut_when_broken = True
    cut_when_failed = False
    shows_done = False
    takes_no_content = True
    reads_all = False
    counts = False
    replays = False

    def __init__(self) -> None:
        self.kind = kind_of(self, NDJSONFraming)

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:  # noqa: ARG002 - it needs neither
        """Give none."""
        return ()

    def preamble(self) -> bytes:
        """Give nothing."""
        return b""

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:  # noqa: ARG002 - a line is the app's own
        """Give the line of a chunk or of an error; nothing at the end."""
        match event.type:
            case StreamEventType.CHUNK:
                return one_line(event.data) + b"\n"
            case StreamEventType.DONE:
                return b""
            case StreamEventType.ERROR:
                return self.error(event.error)
            case StreamEventType.RECOVERING:
                return b""
            case StreamEventType.RESTARTED:
                return b'{"restarted":true}\n'
            case _:
                assert_never(event.type)

    def heartbeat(self) -> bytes:
        """Give nothing: not every client takes an empty line."""
        return b""

    def error(self, error: ErrorInfo) -> bytes:
        """Give a line that is an error."""
        return error_body(error) + b"\n"


def media_type_of(content_type: str) -> str:
    """Give the media type of a `Content-Type`, in lower case and without parameters (RFC 9110, 8.3.1)."""
    return content_type.partition(";")[0].strip().lower()


_LINE_END: Final = re.compile(r"\r\n|\r|\n")
_EVENT_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")


def _error_block(error: ErrorInfo) -> Block:
    return Block(error_body(error).decode(), "error")


def stored_block(data: bytes) -> Block | None:
    """Give the block that a chunk is, if it is one."""
    try:
        return msgspec.json.decode(data, type=Block)
    except msgspec.MsgspecError:
        return None


def ascii_json(data: bytes) -> bytes:
    r"""Give UTF-8 JSON in ASCII, by \uXXXX escapes; the same object if it is ASCII already.

    Genkit's JS client corrupts characters that packets split, and its Python client ends lines at U+2028. Nothing is
    parsed: outside its strings JSON is ASCII anyway.
    """
    if data.isascii():
        return data
    return _NON_ASCII.sub(lambda run: json.dumps(run[0])[1:-1], data.decode()).encode()


def result_body(output: bytes) -> bytes:
    """Give the body of an answer that does not stream, around the output's JSON."""
    return b'{"result":%b}' % ascii_json(output)


def error_body(error: ErrorInfo) -> bytes:
    """Give the body of an answer that is an error; its HTTP code is the status's."""
    return b'{"error":%b}' % _error_json(error)


def without_nulls(data: bytes, but: Collection[str]) -> bytes:
    """Give an object of JSON without the fields that are null, as models dump those that were not set; but for some."""
    if b"null" not in data:
        return data
    try:
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError:
        return data
    return msgspec.json.encode({name: value for name, value in fields.items() if bytes(value) != b"null" or name in but})


_NON_ASCII: Final = re.compile(r"[^\x00-\x7f]+")
_NO_LINE_ENDS: Final = bytes.maketrans(b"\r\n", b"  ")


def one_line(data: bytes) -> bytes:
    """Give JSON as one line of ASCII."""
    # A producer may store JSON of its own (`msgspec.Raw`). A line end is only whitespace in JSON, but injection in a frame.
    if not data.isascii():
        data = ascii_json(data)
    return data.translate(_NO_LINE_ENDS) if b"\n" in data or b"\r" in data else data


def _error_json(error: ErrorInfo) -> bytes:
    # `details` is always there: Genkit's JS client would print "undefined". `internal` never is.
    return ascii_json(encode_json({"status": error.status, "message": error.message, "details": error.details}))
