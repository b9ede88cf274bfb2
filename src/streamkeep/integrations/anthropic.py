"""What `messages.stream()` of Anthropic's SDK gives, to be stored. It imports no SDK.

What `messages.create(stream=True)` gives can be stored without this, too; but then an answer that is cut off is stored as a whole one.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, overload

from ._sdk import AsyncChunks, AsyncStream, SyncChunks, SyncStream, chunks_of, dumped, field_of

__all__ = ["chunks"]

_LAST: Final = "message_stop"
_CAME: Final[Mapping[str, tuple[str, ...] | None]] = {
    "message_start": None,
    "message_delta": None,
    _LAST: ("type",),
    "content_block_start": None,
    "content_block_delta": None,
    "content_block_stop": ("type", "index"),
}
"""The types of events that come from the provider, and the fields of those to which `.stream()` adds some. Others it has made of these;
most have the whole text so far."""


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
    `get_final_message()` still has. What is left are `RawMessageStreamEvent`s, which `subscribe(chunk_type=)` reads as such; events of
    types that are none of these are left out.

    Args:
        stream: what `messages.stream()` gives, entered or not, of either client; if not, it is entered as long as this is iterated. Also
            what `messages.create(stream=True)` gives.

    Raises, while it is iterated: what the SDK raises; and PublicError, ABORTED, where it ends without `message_stop`: it was cut off.
    """
    return chunks_of(stream, _shown, _ends)


def _shown(event: object) -> Iterator[Any]:
    kind = field_of(event, "type")
    if isinstance(kind, str) and kind in _CAME:
        names = _CAME[kind]
        yield dumped(event) if names is None else {name: field_of(event, name) for name in names}


def _ends(event: object) -> Iterable[tuple[str, bool]]:
    yield "message", field_of(event, "type") == _LAST
