"""What is asked of servers that send events, and what their answers mean: anybody's server-sent events, and native ones of ours."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, Generic, TypeVar

import msgspec

from ..errors import InvalidArgumentError, RefusedError, UnexpectedAnswerError
from ..events import MAX_OFFSET, StreamEvent, StreamEventType, encode_json
from ..wire import ServerSentEvent, SSEDecoder, error_of, parse_cursor
from ._network import Answer, Call, LostError, is_header_value

T = TypeVar("T")

EVENT_STREAM: Final = "text/event-stream"
OFFSET_HEADER: Final = "x-genkit-stream-offset"
STREAM_ID_HEADER: Final = "x-genkit-stream-id"
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})


class AnyEvents:
    """The events of anybody's endpoint. A `Dialect`.

    Args:
        call: the request to begin with.
        after: the id to begin behind.
        until: whether an event is the last one; without it, the clean end of an answer is the end.
        reconnects_at_end: whether the clean end of an answer is none.
    """

    media_types = frozenset({EVENT_STREAM})
    takes_refusals = True
    oldest: str | None = None
    first_offset: int | None = None

    def __init__(
        self,
        call: Call,
        after: str | None,
        until: Callable[[ServerSentEvent], bool] | None = None,
        *,
        reconnects_at_end: bool = False,
    ) -> None:
        self.stream: str | None = None
        self.position = after
        self.frames = 0
        self.is_over = False
        self.can_go_on = True
        self.retry_seconds: float | None = None
        self._call = call
        self._until = until
        self._ends_cleanly = until is None and not reconnects_at_end
        self._decoder = SSEDecoder()

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be sent again: it changes nothing, is known by its key, or names what it goes on with."""
        return is_repeatable(self._call) or self.position is not None

    def request(self) -> Call:
        """Give the request, with the last id that came."""
        return _behind(self._call, self.position)

    def begin(self, answer: Answer) -> None:
        """Begin to read, with the last id that came (the standard's "last event ID buffer" outlives connections)."""
        self.stream = answer.headers.get(STREAM_ID_HEADER, self.stream)
        self._decoder = SSEDecoder(last_event_id=self.position or "")

    def no_content(self, answer: Answer) -> None:  # noqa: ARG002 - it has nothing to say
        """There is nothing left."""
        self.is_over = True

    def feed(self, data: bytes) -> Iterator[tuple[ServerSentEvent, str | None]]:
        """Give the events."""
        for event in self._decoder.decode(data):
            is_over = self._until is not None and self._until(event)  # which may raise: then the event was not given
            self._note(event.id, event.retry)
            self.can_go_on = self.position is not None
            self.is_over = is_over
            yield event, self.position
            if self.is_over:
                return
        self._note(self._decoder.last_event_id, self._decoder.retry)

    def end(self, *, has_end: bool) -> Iterator[tuple[ServerSentEvent, str | None]]:
        """Take a clean end for the end, unless something else was said to be, or it may be a lost connection."""
        if not (has_end and self._ends_cleanly):
            raise LostError from _EndedError("the answer has ended, and the stream has not")
        self.is_over = True
        return iter(())

    def _note(self, position: str, retry_ms: int | None) -> None:
        self.frames += (position or None) != self.position or retry_ms is not None
        self.position = position or None
        self.retry_seconds = self.retry_seconds if retry_ms is None else retry_ms / 1000


class OurEvents(Generic[T]):
    """The events of a stream of ours, as `GET /{id}` and `follow` send them. A `Dialect`.

    Args:
        call: the request to begin with.
        after: the offset or the cursor to begin behind.
        last: how many of those that are stored to begin with.
        follow: whether to go on behind what is stored.
        decode_chunk: makes chunks of their JSON.
        decode_output: the same for the output.
    """

    media_types = frozenset({EVENT_STREAM})
    takes_refusals = True
    oldest: str | None = None
    can_go_on = True

    def __init__(
        self,
        call: Call,
        after: int | str | None,
        last: int | None,
        decode_chunk: Callable[[bytes], T],
        decode_output: Callable[[bytes], object],
        *,
        follow: bool,
    ) -> None:
        if None not in {after, last}:
            raise InvalidArgumentError("`after` and `last` each say where to begin; give one of them")
        cursor = parse_cursor(after) if isinstance(after, str) else None
        offset = after if cursor is None else cursor.offset
        if isinstance(offset, str) or not -1 <= (0 if offset is None else offset) <= MAX_OFFSET or (last or 0) < 0:
            raise InvalidArgumentError("`after` is an offset or a cursor, `last` a number of events")
        self.stream = None if cursor is None else cursor.stream
        self.position = None if cursor is None else str(after)
        self.frames = 0
        self.is_over = False
        self.retry_seconds: float | None = None
        self.next_offset: int | None = None if last is not None else 0 if offset is None else offset + 1
        """The offset of the event that comes next; None: nobody has said yet."""
        self.first_offset = self.next_offset
        self._life = None if cursor is None else cursor.life
        self._call = call
        self._begins_anywhere = last is not None
        self._last = last
        self._follow = follow
        self._decode_chunk = decode_chunk
        self._decode_output = decode_output
        self._decoder = SSEDecoder()
        self._last_id = ""  # of this answer: what has the same has none of its own

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be sent again: as for `AnyEvents`."""
        return is_repeatable(self._call) or self.position is not None

    def request(self) -> Call:
        """Give the request, with where to go on."""
        query = dict(self._call.query)
        if not self._follow:
            query["follow"] = "false"
        if self.next_offset is None:
            query["last"] = str(self._last)
        elif self.position is None and self.next_offset > 0:
            query["after"] = str(self.next_offset - 1)
        return _behind(replace(self._call, query=query), self.position)

    def begin(self, answer: Answer) -> None:
        """Begin to read. Where that is, the answer says if it was asked for the last ones."""
        self.stream = answer.headers.get(STREAM_ID_HEADER, self.stream)
        before = answer.headers.get(OFFSET_HEADER, "")
        if self.next_offset is None and re.fullmatch(r"-1|[0-9]{1,15}", before):
            self._begin_at(int(before) + 1)
        self._decoder = SSEDecoder()
        self._last_id = ""

    def no_content(self, answer: Answer) -> None:  # noqa: ARG002 - it has nothing to say
        """There is nothing left."""
        self.is_over = True

    def feed(self, data: bytes) -> Iterator[tuple[StreamEvent[T], str | None]]:
        """Give the events."""
        for sent in self._decoder.decode(data):
            self.frames += 1
            if sent.id == self._last_id:
                self._take_word(sent)
                continue
            self._last_id = sent.id
            event = self._event(sent)
            if event is not None:
                self.position = sent.id
                self.is_over = event.is_terminal
                yield event, self.position
                if self.is_over:
                    return
        if self._decoder.retry is not None:
            self.retry_seconds = self._decoder.retry / 1000

    def end(self, *, has_end: bool) -> Iterator[tuple[StreamEvent[T], str | None]]:
        """Take a clean end for the end only where what is stored was asked for."""
        if self._follow or not has_end:
            raise LostError from _EndedError("the answer has ended, and the stream has not")
        self.is_over = True
        return iter(())

    def _begin_at(self, offset: int) -> None:
        self.next_offset = self.first_offset = offset

    def _take_word(self, sent: ServerSentEvent) -> None:
        """Take what has no cursor: a sign of life, or why this answer ends."""
        if sent.event == "error":
            told = error_of(sent.data.encode())
            refused = RefusedError(told.message, status=told.status, details=told.details)
            if told.status in {"NOT_FOUND", "OUT_OF_RANGE"}:  # which a request with a cursor is told in the place of a code
                raise refused
            raise LostError from refused
        if sent.event in _TYPES:
            raise UnexpectedAnswerError("the server has sent an event without an id")

    def _event(self, sent: ServerSentEvent) -> StreamEvent[T] | None:
        """Give the event; None: it was given before."""
        cursor, type_ = parse_cursor(sent.id), _TYPES.get(sent.event)
        if cursor is None or type_ is None:
            raise UnexpectedAnswerError(
                f"these are no events of streamkeep's own; read them with `events` ({sent.event[:40]!r})"
            )
        if (self.stream or cursor.stream, self._life or cursor.life) != (cursor.stream, cursor.life):
            raise UnexpectedAnswerError("the server has sent an event of another stream")
        if self.next_offset is None:
            self._begin_at(cursor.offset)
        assert self.next_offset is not None
        if cursor.offset > self.next_offset:
            raise UnexpectedAnswerError(
                f"the server has left events out, from offset {self.next_offset} to {cursor.offset - 1}"
            )
        self.stream, self._life = cursor.stream, cursor.life
        if cursor.offset < self.next_offset:
            return None
        data = sent.data.encode()
        if type_ is StreamEventType.ERROR:
            data = encode_json(error_of(data))
        else:
            _check_json(data)
        self.next_offset += 1  # what raises was not given
        return StreamEvent(type_, cursor.offset, data, self._decode_chunk, self._decode_output)


_TYPES: Final = {type_.value: type_ for type_ in StreamEventType}


class _EndedError(Exception):
    """An answer that has ended too early, without more of a reason."""


def is_repeatable(call: Call) -> bool:
    """Say whether a request may be sent again that the server may have obeyed."""
    return call.method in _SAFE_METHODS or any(name.lower() == "idempotency-key" for name in call.headers)


def _check_json(data: bytes) -> None:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError("the server has sent an event that is not JSON") from error


def _behind(call: Call, position: str | None) -> Call:
    if position is None:
        return call
    if not is_header_value(position):
        raise UnexpectedAnswerError(
            "the server has given an event an id that no header can hold, so there is no going on behind it"
        )
    return replace(call, headers={**call.headers, "Last-Event-ID": position})
