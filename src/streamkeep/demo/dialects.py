"""The same answer in other words: the framings among which the page lets one choose."""

from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeVar

from ..events import StreamEvent, StreamEventType, encode_json
from ..http import AGUIFraming, Framing, GenkitFraming, SSEFraming, UIMessagesFraming

T = TypeVar("T")

Dialect = Literal["ai-sdk", "ag-ui", "sse", "genkit"]


class TextAGUIFraming(AGUIFraming):
    """A stream whose chunks are text, read from its start, as a run of AG-UI's with one message."""

    def __init__(self) -> None:
        super().__init__()
        self._is_begun = False

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:
        """Give what begins the message before its first chunk, and what ends it at the end."""
        stream, id_line = cursor.partition("/")[0], f"id: {cursor}\n"
        message, run = {"messageId": stream}, {"threadId": stream, "runId": stream}
        match event.type:
            case StreamEventType.CHUNK:
                begun, self._is_begun = self._is_begun, True
                opening = (
                    b""
                    if begun
                    else self._one({"type": "RUN_STARTED", **run})
                    + self._one({"type": "TEXT_MESSAGE_START", **message, "role": "assistant"})
                )
                return opening + self._one({"type": "TEXT_MESSAGE_CONTENT", **message, "delta": event.chunk}, id_line)
            case StreamEventType.DONE:
                return self._one({"type": "TEXT_MESSAGE_END", **message}) + self._one({"type": "RUN_FINISHED", **run}, id_line)
            case _:
                return super().event(event, cursor)

    def _one(self, event: Mapping[str, object], id_line: str = "") -> bytes:
        return self._frame(encode_json(event), id_line)


DIALECTS: Final[Mapping[Dialect, Callable[[], Framing]]] = {
    "ai-sdk": UIMessagesFraming,
    "ag-ui": TextAGUIFraming,
    "sse": SSEFraming,
    "genkit": GenkitFraming,
}
