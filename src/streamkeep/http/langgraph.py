"""LangGraph's stream of a run, for `@langchain/langgraph-sdk` and `langgraph-sdk`."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final, TypeVar, assert_never

import msgspec

from ..events import ErrorInfo, StreamEvent, StreamEventType, encode_json
from .framing import one_line

T = TypeVar("T")

ENDS: Final = ("end", "error")
_NAME: Final = re.compile(r"[!-~]([ -~]*[!-~])?")


class LangGraphFraming:
    """A run of LangGraph's: each chunk is a pair, the event's name and its data, as `graph.astream(…, stream_mode=[…])` gives them.

    With `subgraphs=True` or `version="v2"` it is what that gives: an event of a subgraph is named `messages|outer:…`, as LangGraph's
    `RemoteGraph` reads it. A chunk that is none of these, or whose name is that of an end or not ASCII, is of LangGraph's mode `custom`.
    A run ends with `end`; one that fails, or is stopped, with `error`. A transport that fails has no event: the run goes on, and its
    clients would take one for its end. They come back to the URL that the answer's `Location` is. Of a stream that is gone on with when
    its writer has died, there are also `recovering` and `restarted`.
    """

    content_type = "text/event-stream"
    cut_when_broken = True
    cut_when_failed = False
    shows_done = True
    takes_no_content = False
    reads_all = False
    kind = None
    counts = False
    replays = False

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:  # noqa: ARG002 - it needs neither
        """Give none."""
        return ()

    def preamble(self) -> bytes:
        """Give nothing."""
        return b""

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:
        """Give an event, its cursor last; at the end `end` or `error`."""
        match event.type:
            case StreamEventType.CHUNK:
                name, data = _named(event.data)
                return _frame(name, data, cursor)
            case StreamEventType.DONE:
                return _frame("end", b"null", cursor)
            case StreamEventType.ERROR:
                return _frame("error", encode_json({"error": event.error.status, "message": event.error.message}), cursor)
            case StreamEventType.RECOVERING | StreamEventType.RESTARTED:
                return _frame(event.type, event.data, cursor)
            case _:
                assert_never(event.type)

    def heartbeat(self) -> bytes:
        """Give a comment."""
        return b": \n"

    def error(self, error: ErrorInfo) -> bytes:  # noqa: ARG002 - see above
        """Give nothing."""
        return b""


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    """What `astream` gives of `version="v2"`."""

    type: str
    ns: list[str]
    data: msgspec.Raw
    interrupts: object = None


_pair: Final = msgspec.json.Decoder(tuple[str, msgspec.Raw])
_triple: Final = msgspec.json.Decoder(tuple[list[str], str, msgspec.Raw])
_part: Final = msgspec.json.Decoder(_Part)
_BETWEEN: Final = "|"


def _named(data: bytes) -> tuple[str, bytes]:
    name, raw = _read(data)
    return (name, raw) if _NAME.fullmatch(name) and name not in ENDS else ("custom", data)


def _read(data: bytes) -> tuple[str, bytes]:
    """Give the name and the data of what is a chunk of LangGraph's; of another one no name."""
    with suppress(msgspec.MsgspecError):
        name, raw = _pair.decode(data)
        return name, bytes(raw)
    with suppress(msgspec.MsgspecError):
        path, name, raw = _triple.decode(data)
        return _BETWEEN.join((name, *path)), bytes(raw)
    with suppress(msgspec.MsgspecError):
        part = _part.decode(data)
        return _BETWEEN.join((part.type, *part.ns)), bytes(part.data)
    return "", data


def _frame(name: str, data: bytes, cursor: str) -> bytes:
    return b"event: %b\ndata: %b\nid: %b\n\n" % (one_line(name.encode()), one_line(data), cursor.encode())
