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

    def __init__(self, *, replays: bool = False) -> None:
        self.replays = replays
        self._is_ended = False

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
            case _:
                assert_never(event.type)

    def heartbeat(self) -> bytes:
        """Give a comment."""
        return b": \n"

    def error(self, error: ErrorInfo) -> bytes:
        """Give a `RUN_ERROR` without id: without one its clients take a clean end for success."""
        return self._frame(_run_error(error), "")

    def _frame(self, data: bytes, id_line: str) -> bytes:
        kind = _type_of(data)
        self._is_ended = kind in ENDS or (self._is_ended and kind != "RUN_STARTED")
        return b"%bdata: %b\n\n" % (id_line.encode(), one_line(without_nulls(data, _MAY_BE_NULL)))


class _Event(msgspec.Struct):
    type: str = ""


def _type_of(data: bytes) -> str:
    try:
        return msgspec.json.decode(data, type=_Event).type
    except msgspec.MsgspecError:
        return ""


def _run_error(error: ErrorInfo) -> bytes:
    return encode_json({"type": "RUN_ERROR", "message": error.message, "code": error.status})
