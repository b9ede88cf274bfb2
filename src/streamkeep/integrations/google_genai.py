"""What Google's Gen AI SDK streams, to be stored. It imports no SDK."""

from collections.abc import Iterable, Iterator
from typing import Any, Final, overload

from ._sdk import AsyncChunks, AsyncStream, SyncChunks, SyncStream, chunks_of, dumped, field_of, objects_of

__all__ = ["chunks"]

_HIDDEN: Final = ("sdk_http_response", "automatic_function_calling_history")


@overload
def chunks(stream: AsyncStream) -> AsyncChunks: ...


@overload
def chunks(stream: SyncStream) -> SyncChunks: ...


def chunks(stream: Any) -> AsyncChunks | SyncChunks:
    """Give what is to be stored of what `generate_content_stream` gives; closing it closes the stream.

        async def answer():
            return chunks(await client.aio.models.generate_content_stream(model=model, contents=question))

        return await streams_http.respond(request, answer)

    Left out is what readers are not to see: the headers of the provider's answer; and, where Python functions are tools, all that was said
    before, the tools' results among it, which the SDK adds to each chunk behind the first call. What is left are
    `GenerateContentResponse`s, which `subscribe(chunk_type=)` reads as such.

    Args:
        stream: what `generate_content_stream` or a chat's `send_message_stream` gives, of either client.

    Raises, while it is iterated: what the SDK raises. It takes a connection that is closed too early for the end; where no `finishReason`
    of a candidate has come, this raises PublicError, ABORTED.
    """
    return chunks_of(stream, _shown, _ends)


def _shown(chunk: object) -> Iterator[Any]:
    yield dumped(chunk, *_HIDDEN)


def _ends(chunk: object) -> Iterable[tuple[object, bool]]:
    for candidate in objects_of(field_of(chunk, "candidates")):
        yield candidate.get("index", 0), bool(candidate.get("finishReason"))
    if field_of(field_of(chunk, "promptFeedback"), "blockReason"):
        yield "prompt", True
