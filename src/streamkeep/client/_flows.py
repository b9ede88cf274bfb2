"""What is asked of servers of Genkit's flows, ours and theirs, and what their answers mean; and requests whose answer is JSON.

Ours number their chunks, and go on behind a number. Genkit's servers with a durable stream replay it from the start, so that what was seen
is skipped. Without one there is nothing to go on with: a lost connection is the end.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final, Generic, Never, TypeVar

import msgspec

from ..errors import InvalidArgumentError, LimitExceededError, RefusedError, UnexpectedAnswerError
from ..events import ErrorInfo, encode_json
from ..wire import MAX_FRAME_BYTES, Failure, GenkitDecoder, GenkitFrame, Message, Result, error_of
from ._network import Answer, Call, LostError
from ._sse import EVENT_STREAM, OFFSET_HEADER, STREAM_ID_HEADER, is_repeatable

C = TypeVar("C")

_OF_A_TRANSPORT: Final = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})
"""What ours say when an answer ends and its stream does not."""


class Flow(Generic[C]):
    """A run of a flow: its chunks, then its output. A `Dialect`.

    Args:
        call: the request that starts it; its body is not sent to go on.
        stream: the id of a run to go on with instead; then nothing is started.
        seen: how many of its chunks were had before.
        decode_chunk: makes chunks of their JSON.
    """

    # Genkit's Express handler says the second where it starts a flow, and nothing where it goes on.
    media_types = frozenset({EVENT_STREAM, "text/plain", ""})
    takes_refusals = True
    oldest: str | None = None

    def __init__(self, call: Call, stream: str | None, seen: int, decode_chunk: Callable[[bytes], C]) -> None:
        if seen < 0 or (seen and stream is None):
            raise InvalidArgumentError("`seen` is a number of chunks of the run that `stream_id` names")
        self.stream = stream
        self.seen = seen
        self.output: bytes | None = None
        self.frames = 0
        self.is_over = False
        self.retry_seconds: float | None = None
        self._call = call
        self._decode_chunk = checked(decode_chunk)
        self._decoder = GenkitDecoder()
        self._replayed = 0  # how many chunks this answer has had
        self._is_numbered = True  # until a chunk without an offset comes

    @property
    def position(self) -> str | None:
        """How many chunks have come."""
        return str(self.seen) if self.seen else None

    @property
    def can_go_on(self) -> bool:
        """Whether the server has named a stream, or nothing has been given that would come twice."""
        return self.stream is not None or not self.seen

    @property
    def is_repeatable(self) -> bool:
        """Whether the request goes on with a run, or is known by its key."""
        return self.stream is not None or is_repeatable(self._call)

    def request(self) -> Call:
        """Give the request that starts the flow, or goes on."""
        if self.stream is None:
            return self._call
        headers: dict[str, str] = {**self._call.headers, STREAM_ID_HEADER: self.stream}
        if self.seen and self._is_numbered:
            headers[OFFSET_HEADER] = str(self.seen - 1)
        return replace(self._call, headers=headers, body=b"{}")

    def begin(self, answer: Answer) -> None:
        """Begin to read. Not all of Genkit's servers name the stream again."""
        self.stream = self.stream or answer.headers.get(STREAM_ID_HEADER) or None
        self._decoder = GenkitDecoder()
        self._replayed = 0

    def no_content(self, answer: Answer) -> None:  # noqa: ARG002 - it has nothing to say
        """There is no such stream: RefusedError, as Genkit's own client has it."""
        raise RefusedError("Stream not found.", status="NOT_FOUND", http_status=204)

    def feed(self, data: bytes) -> Iterator[tuple[C, str | None]]:
        """Give the chunks that were not seen yet."""
        for frame in self._decoder.decode(data):
            self.frames += 1
            if self._is_new(frame):
                assert isinstance(frame, Message)
                chunk = self._decode_chunk(frame.data)
                self.seen += 1
                yield chunk, self.position

    def end(self, *, has_end: bool) -> Iterator[tuple[C, str | None]]:  # noqa: ARG002 - a frame or the JSON tells
        """There is no end without a result or an error: LostError."""
        raise LostError from UnexpectedAnswerError("the answer has ended without a result")

    def _is_new(self, frame: GenkitFrame) -> bool:
        """Say whether it is a chunk to be given; take a result. RefusedError: the flow has failed. LostError: only this answer has."""
        match frame:
            case Message(_, offset):
                self._is_numbered = offset is not None
                number = self._replayed if offset is None else offset
                self._replayed = number + 1
                if number > self.seen:
                    raise UnexpectedAnswerError(f"the server has left chunks out, from number {self.seen} to {number - 1}")
                return number == self.seen
            case Result(data):
                self.output = data
                self.is_over = True
                return False
            case Failure(error, offset):
                raise self._failure(error, is_of_the_flow=offset is not None)

    def _failure(self, error: ErrorInfo, *, is_of_the_flow: bool) -> RefusedError | LostError:
        refused = RefusedError(error.message, status=error.status, details=error.details)
        if is_of_the_flow or self.stream is None or not self._is_numbered or error.status not in _OF_A_TRANSPORT:
            return refused
        lost = LostError()
        lost.__cause__ = refused
        return lost


class JSONAnswer:
    """One request whose answer is JSON. A `Dialect` that gives no events.

    Args:
        call: the request.
        is_repeatable: whether it may be sent again that the server may have obeyed.
        takes_refusals: whether a server that refuses for now is asked again.
    """

    media_types = frozenset({"application/json"})
    stream: str | None = None
    position: str | None = None
    oldest: str | None = None
    can_go_on = True
    retry_seconds: float | None = None

    def __init__(self, call: Call, *, is_repeatable: bool, takes_refusals: bool) -> None:
        self.is_repeatable = is_repeatable
        self.takes_refusals = takes_refusals
        self.frames = 0
        self.is_over = False
        self._call = call
        self._body = bytearray()

    def request(self) -> Call:
        """Give the request."""
        return self._call

    def begin(self, answer: Answer) -> None:  # noqa: ARG002 - all is in the body
        """Begin to read."""
        self._body.clear()

    def no_content(self, answer: Answer) -> None:  # noqa: ARG002 - it has nothing to say
        """There should be some: UnexpectedAnswerError."""
        raise UnexpectedAnswerError("the server's answer is empty")

    def feed(self, data: bytes) -> Iterator[tuple[Never, str | None]]:
        """Take it; nothing is given."""
        self._body += data
        if len(self._body) > MAX_FRAME_BYTES:
            raise LimitExceededError(f"the server's answer has more than {MAX_FRAME_BYTES} bytes")
        return iter(())

    def end(self, *, has_end: bool) -> Iterator[tuple[Never, str | None]]:  # noqa: ARG002 - a frame or the JSON tells
        """Take it for the end: whether it is will be seen by the JSON."""
        self.is_over = True
        return iter(())

    def field(self, name: str) -> bytes:
        """Give the JSON of a field. RefusedError: there is an error in its place. UnexpectedAnswerError: there is neither."""
        try:
            fields = msgspec.json.decode(bytes(self._body), type=dict[str, msgspec.Raw])
            if "error" in fields and name not in fields:
                told = error_of(bytes(self._body))
                raise RefusedError(told.message, status=told.status, details=told.details)
            return bytes(fields[name])
        except (ValueError, RecursionError, KeyError, InvalidArgumentError) as error:
            raise UnexpectedAnswerError(f"the server's answer is no JSON with a {name!r} in it") from error


def flow_body(data: object, init: object = None) -> bytes:
    """Give the body of a request to a flow; InvalidArgumentError: the input is not JSON. None is no input, as in Genkit's clients."""
    envelope: Mapping[str, object] = {"data": data, "init": init}
    return encode_json({name: value for name, value in envelope.items() if value is not None})


def checked(decode: Callable[[bytes], C]) -> Callable[[bytes], C]:
    """Give a decoder that raises UnexpectedAnswerError where JSON is not of the type that it makes."""

    def decoded(data: bytes) -> C:
        try:
            return decode(data)
        except (ValueError, RecursionError) as error:
            raise UnexpectedAnswerError(f"the server has sent a value that is not of the type asked for: {error}") from error

    return decoded
