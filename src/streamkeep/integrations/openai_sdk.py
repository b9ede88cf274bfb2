"""What OpenAI's SDK streams, to be stored: the chunks of chat completions, and the events of Responses. It imports no SDK.

`streamkeep.integrations.openai` is for clients that use OpenAI's SDK; this is for apps that do.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final, overload

from ._responses_writing import error_of
from ._sdk import AsyncChunks, AsyncStream, Json, SyncChunks, SyncStream, chunks_of, dumped, objects_of

_OF_CHAT: Final = ("content.", "logprobs.", "refusal.", "tool_calls.")
"""How the types of events begin that `chat.completions.stream()` makes of the chunks, beside them."""
_TOLD: Final = (
    *("id", "object", "created_at", "completed_at", "status", "background", "incomplete_details", "model", "output", "usage"),
    *("max_output_tokens", "max_tool_calls", "parallel_tool_calls", "reasoning", "service_tier", "temperature", "top_logprobs"),
    *("top_p", "truncation"),
)
"""What is stored of a Response: how it goes, what comes of it, and the settings of its model."""


@overload
def chunks(stream: AsyncStream) -> AsyncChunks: ...


@overload
def chunks(stream: SyncStream) -> SyncChunks: ...


def chunks(stream: Any) -> AsyncChunks | SyncChunks:
    """Give what is to be stored of a stream of OpenAI's SDK, as objects of the size in which they came; closing it closes the stream.

        async def answer():
            return chunks(await client.responses.create(model=model, instructions=instructions, input=question, stream=True))

        return await streams_http.respond(request, answer)

    Left out is what readers are not to see: of each Response what it was asked for, such as `instructions`, `tools`, `prompt` and
    `metadata`; the tools that its items list, such as those of an MCP server; and what `.stream()` adds to what came, such as the whole
    text so far in each event. What is left are `ChatCompletionChunk`s and Responses' events, which `subscribe(chunk_type=)` reads as such.

    Args:
        stream: what `create(stream=True)`, `responses.retrieve(stream=True)` or `.stream()` gives, of either client; of `.stream()` also
            the context manager itself, which is entered as long as this is iterated.

    Raises, while it is iterated: what the SDK raises; and for the events `error` and `response.failed`, which the SDK gives as if they
    were others, RuntimeError, or, where the model's server is asked too much, PublicError.
    """
    return chunks_of(stream, shown)


def checkpoint_of(event: object, before: Mapping[str, Any] | None = None) -> Json | None:
    """Give where a Response can be gone on with behind an event, as `responses.retrieve(response, starting_after=sequence)` has it.

        kept = checkpoint_of(event, kept)  # {"response": "resp_1", "sequence": 7}
        await stream.write(event, checkpoint=kept)

    Only few events name their Response, so that of the event before is needed as well. None: neither does, or it is no such event.

    Args:
        event: an event of a Response, as the SDK gives it or as it was stored.
        before: what this gave for the event before it.
    """
    named, sequence = _field(_field(event, "response"), "id"), _field(event, "sequence_number")
    response = named if isinstance(named, str) else (before or {}).get("response")
    if response is None or not isinstance(sequence, int):
        return None if before is None else {**before}
    return {"response": response, "sequence": sequence}


def shown(event: object) -> Iterator[Any]:
    """Give what is to be stored of an event, if anything."""
    kind = _field(event, "type")
    if not isinstance(kind, str):
        yield dumped(event)
    elif kind == "chunk":
        yield dumped(_field(event, "chunk"))
    elif not kind.startswith(_OF_CHAT):
        yield _shown_event(kind, dumped(event, "snapshot", "parsed"))


def shown_item(item: Json) -> Json:
    """Give an item of a Response without what was added to it, and without the tools that it lists."""
    left = {name: value for name, value in item.items() if name not in {"parsed", "parsed_arguments"}}
    if "tools" in left:  # what an MCP server has listed, a search has found, or the app has added
        left["tools"] = []
    if left.get("type") == "message":
        left["content"] = [shown_item(part) for part in objects_of(left.get("content"))]
    return left


def _shown_event(kind: str, event: Json) -> Json:
    if kind == "error":
        raise error_of(event)
    if kind == "response.failed":
        response = event["response"]
        raise error_of({"error": response.get("error"), "response": response.get("id")})
    if isinstance(item := event.get("item"), dict):
        event["item"] = shown_item(item)
    if isinstance(response := event.get("response"), dict):
        event["response"] = _shown_response(response)
    return event


def _shown_response(response: Json) -> Json:
    told: Json = {name: response[name] for name in _TOLD if name in response}
    told["output"] = [shown_item(item) for item in objects_of(told.get("output"))]
    return {**told, "tool_choice": "auto", "tools": []}  # or it would be no Response


def _field(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
