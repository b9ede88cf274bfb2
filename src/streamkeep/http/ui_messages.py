"""UI messages of the AI SDK: what a producer writes, as the parts that `useChat` and the official transports read.

https://ai-sdk.dev/docs/ai-sdk-ui/stream-protocol has the format. Its clients replay from the start: so the parts are made of the whole
log, the same ones each time, and a reader that has some is not sent those again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeVar, assert_never

from ..errors import InvalidArgumentError
from ..events import ErrorInfo, StreamEvent, StreamEventType, encode_json
from .framing import Block, frame_of, one_line, stored_block, without_nulls
from .ui_parts import is_part, type_of

T = TypeVar("T")

MARK: Final = "x-vercel-ai-ui-message-stream"
"""The header by which an answer says that it is one of UI messages."""
START_INDEX: Final = "startIndex"
"""The name in the query under which `WorkflowChatTransport` says how many parts it has."""
OVER: Final = "[DONE]"
EXPOSED: Final = ("access-control-expose-headers", "X-Workflow-Run-Id, X-Resumable-Stream-Id")
_MAY_BE_NULL: Final = frozenset(("data", "input", "messageMetadata", "output"))
_GOES_ON_OVER: Final = ("data-", "message-metadata", "source-")
"""Beginnings of the types of parts that do not end the text before them."""


def start_index(query: Mapping[str, str]) -> int | None:
    """Give how many parts the client has that asks; negative: it wants that many of the last ones; None: it does not say.

    InvalidArgumentError: it is no whole number.
    """
    text = query.get(START_INDEX)
    if text is None:
        return None
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 15):
        raise InvalidArgumentError(f"{START_INDEX} is a whole number, in ASCII digits")
    return int(text)


class UIMessagesFraming:
    """UI messages of the AI SDK, for `useChat`, its `WorkflowChatTransport` and assistant-ui.

    A chunk that is a part (an object with a `type` that the AI SDK knows and the fields that such a one must have, or `data-…`) is sent as
    it is, but without the nulls that its clients refuse. A string is text: a `text-delta`, in a text that is begun and ended around it.
    Anything else is a `data-chunk`.
    A `start` comes first unless the producer has sent one; its `messageId` is the stream's id. What has passed
    through `DurableStreaming` is not looked into.

    At the end comes what the producer gave as its result, if that is a part; a `finish` unless there was one, with a result that is another
    object as `messageMetadata`; and `[DONE]`. ERROR is an `error`, CANCELLED an `abort`, then the same: its official transports resume a
    stream that has no `finish`, again and again.

    Of a stream that is gone on with when its writer has died, a transient part `data-recovering` says that it is waited for, and a part
    `data-restarted` that the parts before it are superseded.

    The answer's `X-Workflow-Run-Id` and `X-Resumable-Stream-Id` are the stream's id. `?startIndex=N` leaves out the first N parts. A
    negative one, which is of the last parts, is answered with all, because their beginnings would be missing; the header
    `X-Workflow-Stream-Tail-Index` is such that its client counts from 0.
    """

    cut_when_broken = True
    cut_when_failed = False
    shows_done = True
    takes_no_content = True
    reads_all = True
    kind = None
    replays = True
    counts = False

    def __init__(
        self,
        *,
        content_type: str = "text/event-stream",
        headers: Sequence[tuple[str, str]] = ((MARK, "v1"),),
        is_passed_through: bool = False,
    ) -> None:
        self.content_type = content_type
        self._is_passed_through = is_passed_through
        self._headers = headers
        self._left_out = 0
        self._is_begun = self._is_finished = self._is_over = False
        self._texts = 0
        self._in_text = False

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:
        """Give the stream's id in the headers where clients look for it; leave out as many parts as they have."""
        given = start_index(query)
        index = given or 0
        self._left_out, self.counts = max(index, 0), given is not None
        ids = [("x-workflow-run-id", stream), ("x-resumable-stream-id", stream), EXPOSED] if stream else []
        tail = [("x-workflow-stream-tail-index", str(-1 - index))] if index < 0 else []
        return [*self._headers, *ids, *tail]

    def preamble(self) -> bytes:
        """Give nothing."""
        return b""

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:
        """Give the parts that an event is, with its cursor as the id of the last one; at the end all that closes the message."""
        match event.type:
            case StreamEventType.CHUNK:
                return self._frames(self._chunk(event.data, cursor), cursor)
            case StreamEventType.DONE:
                return self._frames(self._done(event.data, cursor), cursor)
            case StreamEventType.ERROR:
                parts = [*self._start(cursor), *self._end_text(), _error_part(event.error), *self._end()]
                return self._frames(parts, cursor)
            case StreamEventType.RECOVERING:
                return self._frames([_RECOVERING] if self._is_begun else [], cursor)  # a text may go on behind it
            case StreamEventType.RESTARTED:
                return self._frames([*self._end_text(), _RESTARTED] if self._is_begun else [], cursor)
            case _:
                assert_never(event.type)

    def heartbeat(self) -> bytes:
        """Give a comment."""
        return b": \n"

    def error(self, error: ErrorInfo) -> bytes:
        """Give an `error` without id; nothing to who counts parts: that one comes back by itself, and would count this one as well."""
        return b"" if self.counts else frame_of(_error_part(error))

    def end(self) -> bytes:
        """Give the whole body of an answer that has no message in it."""
        return b"".join(map(frame_of, self._end()))

    def _chunk(self, data: bytes, cursor: str) -> list[Block]:
        if self._is_passed_through and (block := stored_block(data)) is not None:
            return self._own(block)
        if data.startswith(b'"'):
            return [*self._start(cursor), *self._begin_text(), self._text("text-delta", b',"delta":%b' % data)]
        kind = type_of(data)
        if kind == "done":  # which Pydantic AI has for [DONE]
            return []
        if not is_part(data, kind):
            return [*self._start(cursor), Block(_one(b'{"type":"data-chunk","data":%b}' % data))]
        before = [] if kind == "start" else self._start(cursor)
        self._is_begun = True
        self._is_finished = self._is_finished or kind == "finish"
        return [*before, *([] if kind.startswith(_GOES_ON_OVER) else self._end_text()), _part(data)]

    def _own(self, block: Block) -> list[Block]:
        self._is_begun = True
        if block.data == OVER:
            finish = self._finish()
            self._is_over = True
            return [*finish, block]
        self._is_finished = self._is_finished or type_of(block.data.encode()) == "finish"
        return [block]

    def _done(self, output: bytes, cursor: str) -> list[Block]:
        if is_part(output, type_of(output)):
            chunk = self._chunk(output, cursor)
            return [*chunk, *self._end_text(), *self._end()]
        metadata = b',"messageMetadata":%b' % output if output.startswith(b"{") and not type_of(output) else b""
        return [*self._start(cursor), *self._end_text(), *self._end(metadata)]

    def _start(self, cursor: str) -> list[Block]:
        if self._is_begun or self._is_passed_through:
            return []
        self._is_begun = True
        return [Block(encode_json({"type": "start", "messageId": cursor.partition("/")[0]}).decode())]

    def _begin_text(self) -> list[Block]:
        if self._in_text:
            return []
        self._in_text = True
        self._texts += 1
        return [self._text("text-start")]

    def _end_text(self) -> list[Block]:
        if not self._in_text:
            return []
        self._in_text = False
        return [self._text("text-end")]

    def _text(self, kind: str, more: bytes = b"") -> Block:
        return Block(_one(b'{"type":"%b","id":"text-%d"%b}' % (kind.encode(), self._texts, more)))

    def _finish(self, metadata: bytes = b"") -> list[Block]:
        if self._is_finished:
            return []
        self._is_finished = True
        return [Block(_one(b'{"type":"finish"%b}' % metadata))]

    def _end(self, metadata: bytes = b"") -> list[Block]:
        return [] if self._is_over else [*self._finish(metadata), Block(OVER)]

    def _frames(self, blocks: Iterable[Block], cursor: str) -> bytes:
        """Give those that the client has not; the end in any case."""
        left: list[Block] = []
        for block in blocks:
            if self._left_out and not _is_end(block):
                self._left_out -= 1
            else:
                left.append(block)
        return b"".join([*map(frame_of, left[:-1]), *(frame_of(block, cursor) for block in left[-1:])])


_RECOVERING: Final = Block('{"type":"data-recovering","data":{},"transient":true}')
_RESTARTED: Final = Block('{"type":"data-restarted","data":{}}')


def _is_end(block: Block) -> bool:
    return block.data == OVER or type_of(block.data.encode()) == "finish"


def _part(data: bytes) -> Block:
    return Block(_one(without_nulls(data, _MAY_BE_NULL)))


def _error_part(error: ErrorInfo) -> Block:
    part = {"type": "abort"} if error.status == "CANCELLED" else {"type": "error", "errorText": error.message}
    return Block(_one(encode_json(part)))


def _one(data: bytes) -> str:
    return one_line(data).decode()
