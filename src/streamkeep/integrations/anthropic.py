"""What `messages.stream()` of Anthropic's SDK gives, to be stored. It imports no SDK.

What `messages.create(stream=True)` gives needs nothing of this.
"""

from collections.abc import Iterator
from typing import Any, Final, overload

from ._sdk import AsyncChunks, AsyncStream, SyncChunks, SyncStream, chunks_of, dumped

_MADE: Final = frozenset({"citation", "input_json", "signature", "text", "thinking"})
"""The types of events that `.stream()` makes of those that came, beside them; most have the whole text so far."""
_ADDED: Final = {"content_block_stop": "content_block", "message_stop": "message"}
"""What it adds to one that came."""


@overload
def chunks(stream: AsyncStream) -> AsyncChunks: ...


@overload
def chunks(stream: SyncStream) -> SyncChunks: ...


def chunks(stream: Any) -> AsyncChunks | SyncChunks:
    """Give the events of a stream of Anthropic's SDK as objects of the size in which they came; closing it closes the stream.

        async def answer():
            return chunks(client.messages.stream(model=model, max_tokens=1024, messages=messages))

        return await streams_http.respond(request, answer)

    Left out is what `.stream()` adds: events that repeat others with the whole text so far, and at the end the whole message, which
    `get_final_message()` still has. What is left are `RawMessageStreamEvent`s, which `subscribe(chunk_type=)` reads as such.

    Args:
        stream: what `messages.stream()` gives, entered or not, of either client; if not, it is entered as long as this is iterated. Also
            what `messages.create(stream=True)` gives.

    Raises, while it is iterated: what the SDK raises.
    """
    return chunks_of(stream, _shown)


def _shown(event: object) -> Iterator[Any]:
    kind = getattr(event, "type", "")
    if kind not in _MADE:
        yield dumped(event, *([_ADDED[kind]] if kind in _ADDED else []))
