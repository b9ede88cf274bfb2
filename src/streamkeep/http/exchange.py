"""One POST of an app that knows nothing of streams: passed through until it is seen to stream, and apart from its request from then on.

The app runs in a task of its own from the beginning, because it cannot be moved to one later. Until its answer has begun, it has the
server's messages and the client its own; then either that goes on, or the answer becomes a stream, whose producer is whoever waits for
the app's end.
"""

import codecs
import inspect
import logging
import re
import uuid
import zlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextvars import copy_context
from typing import Final, Protocol

import anyio
import msgspec

from .._background import loop_here, not_ours
from .._input import StreamInput
from ..errors import STATUSES, InvalidArgumentError, KeyInUseError, StreamkeepError
from ..events import ErrorInfo, hidden_error
from ..wire import Failure, GenkitDecoder, Result, SSEDecoder, wants_stream
from ..wire import Message as Chunk
from .app import StreamsHTTP, framing_of, naming
from .cancellation import Cancellation
from .claim import Claim
from .framing import Block, GenkitFraming, block_of, media_type_of
from .kept import ANSWER, KeptAnswer, keep_answer
from .logged import OneLine
from .place import query_of
from .response import (
    OWN_ANSWER,
    STREAM_ID_HEADER,
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    disconnected,
    errors_answered,
    headers_of,
    longer,
)
from .runner import SAVE_SECONDS, SHUT_DOWN, ChunkWriter

logger: Final = logging.getLogger("streamkeep")

NO_TERMINAL_FRAME: Final = ErrorInfo("ABORTED", "the response ended before the stream was completed")
FIRST_FRAME_SECONDS: Final = 1.0
"""How long the head of an answer that may be Genkit's waits for the frame that tells."""
EVENT_STREAM: Final = "text/event-stream"
SEEN_BODY_BYTES: Final = 1 << 16
"""How much of a request's body is looked at, to know Genkit's and JSON-RPC."""
FRAME_FACTOR: Final = 6
"""How much longer than its UTF-8 a text may be in a frame, if it is written in escapes."""
_GENKITS_INPUT: Final = re.compile(rb'\s*\{\s*(\}\s*|"(data|init)"\s*:.*)', re.DOTALL)
_JSON_RPC: Final = re.compile(rb'"jsonrpc"\s*:\s*"2\.0"')
_BLANK_LINE: Final = re.compile(rb"\n[\r\n]|\r\r")
_NOT_KEPT: Final = frozenset(
    (
        "content-length",
        "content-encoding",
        "transfer-encoding",
        "connection",
        "content-type",
        "cache-control",
        "x-accel-buffering",
        STREAM_ID_HEADER,
    )
)
"""Headers of the app's answer that say how its body is sent, or name a stream that it shows itself."""


class Exchange:
    """The one request, its app, and its answer."""

    def __init__(
        self,
        http: StreamsHTTP,
        app: ASGIApp,
        scope: Scope,
        media_types: Collection[str],
        kept_headers: Collection[str],
        claim: Claim,
    ) -> None:
        self._http = http
        self._app = app
        self._scope = scope
        self._media_types = media_types
        self._kept_headers = kept_headers
        self._claim = claim
        self._body = _SeenBody()
        self._send: Send = _nobody
        self._messages = _Messages()
        self._passes = False
        self._head: Message | None = None
        self._may_be_genkits = False
        self._first = bytearray()
        self._first_is_whole = anyio.Event()
        self._answered = anyio.Event()
        """The app's answer is known to stream, or not to, or the app has ended."""
        self._begun = anyio.Event()
        """There is a stream, or there will be none."""
        self._is_called = False
        self._over = anyio.Event()
        self._stop: anyio.Event | None = None
        self._stream: StreamInput | None = None
        self._writer: ChunkWriter | None = None
        self._decode: _Decode | None = None
        self._parser: _Parser | None = None
        self._own_answer = anyio.Event()
        self._app_scope: Scope = {}
        """The app's, in which its router says what it has found."""
        self._is_refused = False
        self._is_whole = False
        self._failure: BaseException | None = None
        self._cancellation = Cancellation()

    async def answer(self, receive: Receive, send: Send) -> None:
        """Run the app and answer with what it answers. Raises what it raises, as long as that is its client's alone.

        Where the same request was sent before, that one's stream is the answer, and the app is not run.
        """
        self._send = send
        refusal: Exception | None = None
        try:
            async with anyio.create_task_group() as request:
                request.start_soon(self._messages.take_from, receive)
                try:
                    await self._answer()
                except Exception as error:
                    refusal = error
                request.cancel_scope.cancel()
        finally:
            try:
                if self._stream is None:
                    await self._end_app()
            finally:
                self._claim.end()
        if refusal is not None:
            async with errors_answered(send):
                raise refusal
        elif self._stream is None and self._failure is not None:
            raise self._failure

    # In the request's task

    async def _answer(self) -> None:
        """Answer with what was started before, or what the app answers. Raises before the answer has begun only."""
        try:
            started = await self._claim.take(self._messages.client_gone)
        except BrokenPipeError:
            return
        if started is not None:
            await self._show_again(started)
            return
        self._is_called = True
        loop_here().spawn(self._run_app, copy_context(), self._end)
        await self._answered.wait()
        if self._head is not None:
            await self._answer_with_stream(self._head)
        else:
            await self._over.wait()

    async def _answer_with_stream(self, head: Message) -> None:
        """Open the stream, and show it. Raises before the answer has begun only."""
        is_genkits = await self._is_genkits()
        headers = _headers_of(head)
        answer = KeptAnswer(
            headers["content-type"], tuple((name, text) for name, text in headers.items() if name in self._kept_headers)
        )
        most_bytes = FRAME_FACTOR * self._http.streams.limits.max_event_bytes
        if is_genkits:
            self._parser = _GenkitParser(most_bytes)
        else:
            self._parser = _parser_of(answer, most_bytes, hides_errors=self._asks_as_genkits())
        kept = "" if is_genkits else keep_answer(answer)
        stream = str(uuid.uuid4())
        try:
            await self._http.launch(self._scope, stream, self._produce, {}, {ANSWER: kept})
        except BaseException as error:
            self._is_refused = True
            self._begun.set()
            if not isinstance(error, KeyInUseError):
                raise
            # The same request has come twice, without a claim, and the other one was quicker: its stream is the answer to both.
            await self._end_app()
            await self._show_again(error.stream)
            return
        self._claim.end()
        framing = framing_of(kept, self._scope, GenkitFraming)
        shown = [(name.decode("latin-1"), text.decode("latin-1")) for name, text in _shown_headers(head, answer.headers)]
        await self._http.show(
            self._scope, self._messages.for_reader, self._send, stream, framing=framing, headers=[*naming(stream), *shown]
        )

    async def _show_again(self, stream: str) -> None:
        self._claim.end()
        self._messages.forget()
        await self._http.show_again(self._scope, self._messages.for_reader, self._send, stream)

    async def _is_genkits(self) -> bool:
        if not self._may_be_genkits:
            return False
        endpoint = _endpoint_in(self._app_scope)
        if _is_of_genkit(endpoint):
            return True
        with anyio.move_on_after(FIRST_FRAME_SECONDS):
            await self._first_is_whole.wait()
            return _is_genkit_frame(bytes(self._first))
        return endpoint is None

    def _answers_as_genkits(self, headers: Mapping[str, str]) -> bool:
        """Say whether Genkit's endpoint answers, or this is asked as its clients ask, and answered as its server answers, which says
        nothing of caches.
        """
        if media_type_of(headers["content-type"]) != EVENT_STREAM:
            return False
        return _is_of_genkit(_endpoint_in(self._app_scope)) or ("cache-control" not in headers and self._asks_as_genkits())

    def _asks_as_genkits(self) -> bool:
        """Say whether this is asked as Genkit's clients ask, who always send a body."""
        try:
            accepts = wants_stream(headers_of(self._scope).get("accept", ""), query_of(self._scope))
        except InvalidArgumentError:
            return False  # what its query means is the app's affair
        return accepts and _GENKITS_INPUT.fullmatch(self._body.beginning) is not None

    async def _end_app(self) -> None:
        """Cancel the app, whose answer nobody is there for, unless it has ended, or was not called."""
        if self._over.is_set() or not self._is_called:
            return
        self._cancellation.cancel()
        with anyio.move_on_after(SAVE_SECONDS, shield=True):
            await self._over.wait()

    # In the producer's task

    async def _produce(self, stream: StreamInput, stop: anyio.Event) -> None:
        self._stream, self._stop = stream, stop
        self._writer = ChunkWriter(stream)
        self._messages.leave()
        self._begun.set()
        try:
            await self._over.wait()
        except anyio.get_cancelled_exc_class():
            await self._end_app()
            raise
        if self._failure is not None:
            raise self._failure
        if not stream.is_closed:
            await self._writer.error(SHUT_DOWN if stop.is_set() else NO_TERMINAL_FRAME)

    # In the app's task

    async def _run_app(self) -> None:
        try:
            with self._cancellation:
                self._app_scope = {**_plainly_asking(self._scope), OWN_ANSWER: self._own_answer}
                await self._app(self._app_scope, self._receive, self._take)
        except anyio.get_cancelled_exc_class():
            pass
        except not_ours():
            raise
        except BaseException as error:  # what native libraries raise may be no Exception
            if not self._is_refused:  # else it says what we have told it
                self._failure = self._failure or error

    def _end(self) -> None:
        self._over.set()
        self._answered.set()
        self._first_is_whole.set()

    async def _receive(self) -> Message:
        message = await self._messages.for_app()
        if message is None:
            assert self._stop is not None
            await self._stop.wait()
            return {"type": "http.disconnect"}
        if message["type"] == "http.request":
            self._body.see(message.get("body", b""))
        return message

    async def _take(self, message: Message) -> None:
        """Take a message of the app's: one of an answer that passes, or that streams."""
        is_head = message["type"] == "http.response.start"
        if self._head is None:
            if is_head:
                message = {**message, "headers": list(message.get("headers", ()))}  # which may be given once
            if not is_head or self._passes or not self._is_durable(message):
                await self._pass_on(message, is_head=is_head)
                return
            self._head = message
            self._may_be_genkits = self._answers_as_genkits(_headers_of(message))
            if not self._may_be_genkits:
                self._first_is_whole.set()
            self._answered.set()
            return
        if is_head or (message["type"] == "http.response.body" and self._is_whole):
            raise RuntimeError(
                f"an app must not send {message['type']} here: its answer has {'ended' if self._is_whole else 'begun'}"
            )
        if message["type"] != "http.response.body":
            return  # such as trailers
        self._is_whole = not message.get("more_body", False)
        body = message.get("body", b"")
        if not self._begun.is_set() and not self._first_is_whole.is_set():
            self._first += body
            if not self._is_whole and not _BLANK_LINE.search(self._first) and len(self._first) < SEEN_BODY_BYTES:
                return
            body = b""
        self._first_is_whole.set()
        await self._begun.wait()
        if self._is_refused or self._failure is not None:
            raise BrokenPipeError("the client has gone")
        first, self._first = bytes(self._first), bytearray()
        await self._store(first + body)

    async def _pass_on(self, message: Message, *, is_head: bool) -> None:
        if is_head:
            self._passes = True
            self._claim.end()
        await self._send(message)

    def _is_durable(self, head: Message) -> bool:
        headers = _headers_of(head)
        if head["status"] != 200 or media_type_of(headers.get("content-type", "")) not in self._media_types:
            return False
        if (
            self._own_answer.is_set()
            or STREAM_ID_HEADER in headers
            or "mcp-session-id" in headers
            or "mcp-protocol-version" in headers_of(self._scope)
            or self._body.is_json_rpc
        ):
            return False
        encoding = headers.get("content-encoding", "")
        self._decode = _decoding(encoding)
        if self._decode is None:
            logger.warning(
                "the answer of POST %s is in the encoding %s, which cannot be read here, and so is not made durable: put what"
                " compresses around DurableStreaming, not inside",
                OneLine(self._scope["path"]),
                OneLine(encoding),
            )
            return False
        return True

    async def _store(self, body: bytes) -> None:
        assert self._writer is not None
        assert self._parser is not None
        assert self._decode is not None
        try:
            await self._parser.store(self._writer, self._decode(body, is_last=self._is_whole), is_last=self._is_whole)
            if self._is_whole and self._parser.ends_with_body:
                # Here, for the app may go on for long behind its answer, and may fail then.
                await self._writer.done()
        except StreamkeepError as error:
            self._failure = self._failure or error  # also if the app does not mind
            raise


class _SeenBody:
    """As much of a request's body as it takes to know what speaks."""

    def __init__(self) -> None:
        self.beginning = b""
        self._end = b""
        self._size = 0

    def see(self, body: bytes) -> None:
        """Look at the next bytes of it."""
        self.beginning += body[: SEEN_BODY_BYTES - len(self.beginning)]
        self._end = (self._end + body)[-SEEN_BODY_BYTES:]
        self._size += len(body)

    @property
    def is_json_rpc(self) -> bool:
        """Whether it is a JSON-RPC message, or a batch of them; of a long one, whether it looks like one at its beginning or end."""
        if not (_JSON_RPC.search(self.beginning) or _JSON_RPC.search(self._end)):
            return False
        if self._size > SEEN_BODY_BYTES:
            return True
        try:
            messages = msgspec.json.decode(self.beginning)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        messages = messages if isinstance(messages, list) else [messages]
        return any(isinstance(message, dict) and "jsonrpc" in message for message in messages)


class _Messages:
    """What the server has to say. The request's body is the app's alone; that the client has gone is told to the app as long as nobody
    else shows what it has begun, and to whoever does from then on.
    """

    def __init__(self) -> None:
        self._body: deque[Message | Exception] = deque()
        self._body_bytes = 0
        self._is_whole = False
        self._is_gone = False
        self._is_left = False
        self._asked = anyio.Event()
        self._came = anyio.Event()

    async def take_from(self, receive: Receive) -> None:
        """Ask the server whenever somebody asks here, and never more than that."""
        pause = 0.0
        try:
            while True:
                await self._asked.wait()
                self._asked = anyio.Event()
                is_repeated = self._is_whole
                try:
                    self._take(await receive())
                except Exception as error:  # such as a middleware's that finds the body too long
                    self._body.append(error)
                    self._is_gone = True
                if is_repeated and not self._is_gone:
                    # Whoever waits for the client to go asks again at once.
                    await anyio.sleep(pause)
                    pause = longer(pause)
                self._tell()
        finally:
            self._is_gone = True  # as far as anybody can say from here on
            self._tell()

    async def for_app(self) -> Message | None:
        """Give the app the next message; None when there is none but that the client has gone, and that is another one's to know."""
        while not self._body:
            if self._is_left and self._is_whole:
                return None
            if self._is_gone:
                return {"type": "http.disconnect"}
            await self._ask()
        message = self._body.popleft()
        if isinstance(message, Exception):
            raise message
        self._body_bytes -= len(message.get("body", b""))
        self._tell()
        return message

    async def for_reader(self) -> Message:
        """Give who shows the stream the next message, of which it matters only whether the client has gone.

        It looks ahead for it, but not far, where the app has not read the body.
        """
        if not self._is_gone:
            if self._body_bytes < SEEN_BODY_BYTES:
                self._asked.set()
            await self._came.wait()
        return {"type": "http.disconnect" if self._is_gone else "http.request"}

    async def client_gone(self) -> None:
        """Return when the client has gone, and the app has not to be told anything else. It looks as far ahead as who shows the stream."""
        await disconnected(self.for_reader)
        if any(isinstance(message, Exception) for message in self._body):
            await anyio.sleep_forever()

    def leave(self) -> None:
        """Tell the app no more that its client has gone."""
        self._is_left = True
        self._tell()

    def forget(self) -> None:
        """Keep nothing of the body, which no app will read."""
        self._body.clear()
        self._body_bytes = 0
        self._is_left = self._is_whole = True

    def _take(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self._is_gone = True
        elif not (self._is_whole and (self._is_left or self._body)):  # some middlewares give the same body again and again
            self._body.append(message)
            self._body_bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)

    async def _ask(self) -> None:
        came = self._came
        self._asked.set()
        await came.wait()

    def _tell(self) -> None:
        self._came.set()
        self._came = anyio.Event()


class _Decode(Protocol):
    def __call__(self, data: bytes, /, *, is_last: bool) -> bytes: ...


class _Parser(Protocol):
    """What an answer's body becomes in the log."""

    ends_with_body: bool
    """Whether a body that ends well is all that it takes to complete the stream."""

    async def store(self, writer: ChunkWriter, body: bytes, *, is_last: bool) -> None:
        """Store what these bytes complete. Raises StreamkeepError."""
        ...


class _GenkitParser:
    """Frames of Genkit's: chunks, and the output or the error."""

    ends_with_body = False

    def __init__(self, most_bytes: int) -> None:
        self._decoder = GenkitDecoder(max_frame_bytes=most_bytes)

    async def store(self, writer: ChunkWriter, body: bytes, *, is_last: bool) -> None:  # noqa: ARG002 - a frame says so
        for frame in self._decoder.decode(body):
            match frame:
                case Chunk(data, _):
                    await writer.write(_in_utf8(data))
                case Result(data, _):
                    await writer.done(_in_utf8(data))
                case Failure(error, _):
                    # The inner app puts exceptions' texts into its frames; only the status is for everybody.
                    logger.error("stream %s failed: %s: %s", writer.stream.id, error.status, OneLine(error.message))
                    await writer.error(hidden_error(error.status, error.message))


class _EventsParser:
    """Somebody's server-sent events, each a `Block`. Where Genkit's client asks, one that is an error of Genkit's is hidden: its server
    puts exceptions' texts into it, and was not known when the answer began.
    """

    ends_with_body = True

    def __init__(self, most_bytes: int, *, hides_errors: bool) -> None:
        self._hides_errors = hides_errors
        self._decoder = SSEDecoder(max_event_bytes=most_bytes)

    async def store(self, writer: ChunkWriter, body: bytes, *, is_last: bool) -> None:  # noqa: ARG002 - half an event is none
        for event in self._decoder.decode(body):
            block = block_of(event)
            if self._hides_errors and '"error"' in event.data and (told := _genkit_error_in(event.data)) is not None:
                logger.error("stream %s: its producer failed: %s", writer.stream.id, OneLine(event.data))
                block = Block(told, block.event)
            await writer.write(block)


class _TextParser:
    """Somebody's text, as it comes."""

    ends_with_body = True

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    async def store(self, writer: ChunkWriter, body: bytes, *, is_last: bool) -> None:
        try:
            text = self._decoder.decode(body, final=is_last)
        except UnicodeDecodeError as error:
            raise InvalidArgumentError("an answer that is kept as text is not UTF-8") from error
        if text:
            await writer.write(text)


def _parser_of(answer: KeptAnswer, most_bytes: int, *, hides_errors: bool) -> _Parser:
    return _EventsParser(most_bytes, hides_errors=hides_errors) if answer.is_sse else _TextParser()


def _in_utf8(data: bytes) -> msgspec.Raw:
    r"""Give JSON that may be written in \uXXXX escapes, which are up to three times as long, without them."""
    return msgspec.Raw(msgspec.json.encode(msgspec.json.decode(data)) if b"\\u" in data else data)


def _endpoint_in(scope: Scope) -> object:
    """Give the function that answers, as the routers of Starlette and FastAPI name it; None if they name none, or a mounted app."""
    endpoint = scope.get("endpoint")
    while (inner := getattr(endpoint, "__wrapped__", None) or getattr(endpoint, "func", None)) is not None:
        endpoint = inner
    return endpoint if inspect.isroutine(endpoint) else None


def _is_of_genkit(endpoint: object) -> bool:
    """Say whether an endpoint is one of `genkit_fastapi`'s."""
    return str(getattr(endpoint, "__globals__", {}).get("__name__", "")).partition(".")[0] == "genkit_fastapi"


def _genkit_error_in(data: str) -> str | None:
    """Give what is told of the error that an event of Genkit's is, if it is one."""
    if not _is_genkit_frame(b"data:" + data.encode()):
        return None
    status = msgspec.json.decode(data)["error"]["status"]
    hidden = hidden_error(status, "")
    return msgspec.json.encode({"error": {"status": status, "message": hidden.message, "details": None}}).decode()


def _is_genkit_frame(block: bytes) -> bool:
    """Say whether an answer that begins so is Genkit's: an object with one of its three keys, and nothing that is not its own; the
    status of an error is one of Genkit's.
    """
    line = block.lstrip(b"\r\n").splitlines()[:1]
    name, _, payload = line[0].partition(b":") if line else (b"", b"", b"")
    try:
        frame = msgspec.json.decode(payload, type=dict[str, msgspec.Raw])
        told = msgspec.json.decode(frame["error"], type=dict[str, msgspec.Raw]) if "error" in frame else {}
        is_error = msgspec.json.decode(told.get("status", b'""'), type=str) in STATUSES
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    keys = frame.keys() - {"offset"}
    return name in (b"data", b"error") and (keys in ({"message"}, {"result"}) or (keys == {"error"} and is_error))


# Encodings


def _decoding(encoding: str) -> _Decode | None:
    """Give what undoes a content encoding (RFC 9110, 8.4.1), piece by piece; None: it is not known here."""
    match encoding.strip().lower():
        case "" | "identity":
            return lambda data, *, is_last: data  # noqa: ARG005
        case "gzip" | "x-gzip" | "deflate":
            return _Inflating()
        case _:
            return None


_ANY_HEADER: Final = 47
"""For zlib: gzip's or its own, as the data says."""


class _Inflating:
    def __init__(self) -> None:
        self._inflater = zlib.decompressobj(wbits=_ANY_HEADER)
        self._is_between = True  # members, or before the first

    def __call__(self, data: bytes, /, *, is_last: bool) -> bytes:
        inflated = bytearray()
        try:
            while data:
                self._is_between = False
                inflated += self._inflater.decompress(data)
                data = self._inflater.unused_data
                if self._inflater.eof:  # another member may follow (RFC 1952, 2.2)
                    self._inflater = zlib.decompressobj(wbits=_ANY_HEADER)
                    self._is_between = True
        except zlib.error as error:
            raise InvalidArgumentError("the answer is not compressed as it says") from error
        if is_last and not self._is_between:
            raise InvalidArgumentError("the answer ends in the middle of what is compressed")
        return bytes(inflated)


# Heads


def _headers_of(head: Message) -> dict[str, str]:
    return {name.decode("latin-1").lower(): text.decode("latin-1") for name, text in head.get("headers", ())}


def _shown_headers(head: Message, kept: Collection[tuple[str, str]]) -> Iterator[tuple[bytes, bytes]]:
    """Give those of the app's headers that are sent with a body that is sent otherwise."""
    sent_anyway = {name.encode("latin-1") for name, _ in kept}
    for name, text in head.get("headers", ()):
        if name.lower() not in sent_anyway and name.lower().decode("latin-1") not in _NOT_KEPT:
            yield name, text


def _plainly_asking(scope: Scope) -> Scope:
    """Give the inner app an `Accept` of event streams in one line and lower case: `genkit_fastapi` finds it in no other form."""
    lines = [text for name, text in scope["headers"] if name.lower() == b"accept"]
    accept = b", ".join(lines).lower()
    if b"text/event-stream" not in accept or lines == [accept]:
        return scope
    headers = [header for header in scope["headers"] if header[0].lower() != b"accept"]
    return {**scope, "headers": [*headers, (b"accept", accept)]}


async def _nobody(_message: Message) -> None:
    """Take what an app says before anybody listens."""
