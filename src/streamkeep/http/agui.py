"""AG-UI's events (https://docs.ag-ui.com), for its `HttpAgent`, for CopilotKit, and for TanStack AI, which has taken them over."""

from collections.abc import Mapping, Sequence
from typing import Final, TypeVar, assert_never

import msgspec

from ..events import ErrorInfo, StreamEvent, StreamEventType, encode_json
from .framing import one_line, without_nulls

T = TypeVar("T")

ENDS: Final = ("RUN_FINISHED", "RUN_ERROR")
_MAY_BE_NULL: Final = frozenset(("event", "rawEvent", "result", "snapshot", "value"))
UNFINISHED: Final = ErrorInfo("ABORTED", "the run ended without a RUN_FINISHED")


class AGUIFraming:
    """A run of AG-UI's: each chunk is one of its events, `RUN_STARTED` the first of them. Nulls that its clients refuse are left out.

    A stream that fails, or is stopped, ends with a `RUN_ERROR` whose code is the status, and so does one that has neither that nor a
    `RUN_FINISHED`. The id comes directly before the data, as TanStack AI's client needs it.

    Of a stream that is gone on with when its writer has died, a `CUSTOM` event `recovering` says that it is waited for, and one
    `restarted` that all before it is superseded: what was begun is ended before that, and the run is not started a second time.

    Args:
        replays: whether its client puts a run that begins anew in the place of what it shows, as one that connects to a thread does where
            runs have a `MESSAGES_SNAPSHOT`. So `follow(key=)` shows the thread's newest run when it has ended, too.
    """

    content_type = "text/event-stream"
    cut_when_broken = True
    cut_when_failed = False
    shows_done = True
    takes_no_content = False
    reads_all = True
    kind = None
    counts = False

    def __init__(self, *, replays: bool = False) -> None:
        self.replays = replays
        self._is_ended = self._is_begun = False
        self._open: dict[tuple[str, str], str] = {}  # the kind and the id of what was begun, and how it is ended

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:  # noqa: ARG002 - it needs neither
        """Give none."""
        return ()

    def preamble(self) -> bytes:
        """Give nothing."""
        return b""

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:
        """Give an event; at the end a `RUN_ERROR`, if the run has not said how it ended."""
        match event.type:
            case StreamEventType.CHUNK:
                return self._frame(event.data, f"id: {cursor}\n")
            case StreamEventType.DONE:
                return b"" if self._is_ended else self._frame(_run_error(UNFINISHED), f"id: {cursor}\n")
            case StreamEventType.ERROR:
                return b"" if self._is_ended else self._frame(_run_error(event.error), f"id: {cursor}\n")
            case StreamEventType.RECOVERING | StreamEventType.RESTARTED:
                return self._told(event.type, f"id: {cursor}\n")
            case _:
                assert_never(event.type)

    def heartbeat(self) -> bytes:
        """Give a comment."""
        return b": \n"

    def error(self, error: ErrorInfo) -> bytes:
        """Give a `RUN_ERROR` without id: without one its clients take a clean end for success."""
        return self._frame(_run_error(error), "")

    def _told(self, name: str, id_line: str) -> bytes:
        if self._is_ended or not self._is_begun:
            return b""
        ends = [*map(self._end_of, reversed(self._open))] if name == StreamEventType.RESTARTED else []
        events = [*ends, encode_json({"type": "CUSTOM", "name": name, "value": {}})]
        return b"".join([*(self._frame(data, "") for data in events[:-1]), self._frame(events[-1], id_line)])

    def _frame(self, data: bytes, id_line: str) -> bytes:
        event = _event_in(data)
        if event.type == "RUN_STARTED":
            if self._is_begun and not self._is_ended:
                return b""
            self._is_begun, self._is_ended = True, False
        self._is_ended = self._is_ended or event.type in ENDS
        self._note(event)
        return b"%bdata: %b\n\n" % (id_line.encode(), one_line(without_nulls(data, _MAY_BE_NULL)))

    def _note(self, event: "_Event") -> None:
        """Note what is begun or ended by an event."""
        kind, _, what = event.type.rpartition("_")
        id = event.id_of(kind)
        if kind == "RUN":
            return
        if what in _BEGINS:
            self._open[kind, id] = _BEGINS[what]
        elif what in _BEGINS.values():
            self._open.pop((kind, id), None)

    def _end_of(self, begun: tuple[str, str]) -> bytes:
        kind, id = begun
        return encode_json({"type": f"{kind}_{self._open[begun]}", **({_ID_OF[kind]: id} if kind in _ID_OF else {})})


_BEGINS: Final = {"START": "END", "STARTED": "FINISHED"}
_ID_OF: Final = {
    "TEXT_MESSAGE": "messageId",
    "TOOL_CALL": "toolCallId",
    "STEP": "stepName",
    "REASONING": "messageId",
    "REASONING_MESSAGE": "messageId",
}


class _Event(msgspec.Struct):
    type: str = ""
    messageId: str = ""  # noqa: N815 - AG-UI's names
    toolCallId: str = ""  # noqa: N815
    stepName: str = ""  # noqa: N815

    def id_of(self, kind: str) -> str:
        return str(getattr(self, _ID_OF.get(kind, ""), ""))


def _event_in(data: bytes) -> _Event:
    try:
        return msgspec.json.decode(data, type=_Event)
    except msgspec.MsgspecError:
        return _Event()


def _run_error(error: ErrorInfo) -> bytes:
    return encode_json({"type": "RUN_ERROR", "message": error.message, "code": error.status})
