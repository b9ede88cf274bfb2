"""What OpenAI's SDK streams, to be stored: the chunks of chat completions, and the events of Responses. It imports no SDK.

`streamkeep.integrations.openai` is for clients that use OpenAI's SDK; this is for apps that do.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, Final, overload

from ._responses import ENDED
from ._responses_writing import error_of
from ._sdk import AsyncChunks, AsyncStream, Json, SyncChunks, SyncStream, chunks_of, dumped, field_of, objects_of

__all__ = ["checkpoint_of", "chunks"]

_PREFIX: Final = "response."
_EVENTS: Final = frozenset(
    {
        *("audio.delta", "audio.done", "audio.transcript.delta", "audio.transcript.done"),
        *("code_interpreter_call.completed", "code_interpreter_call.in_progress", "code_interpreter_call.interpreting"),
        *("code_interpreter_call_code.delta", "code_interpreter_call_code.done"),
        *("compaction.compacting", "content_part.added", "content_part.done"),
        *("created", "queued", "in_progress", "completed", "incomplete", "cancelled", "failed"),
        *("custom_tool_call_input.delta", "custom_tool_call_input.done"),
        *("file_search_call.completed", "file_search_call.in_progress", "file_search_call.searching"),
        *("function_call_arguments.delta", "function_call_arguments.done"),
        *("image_generation_call.completed", "image_generation_call.generating", "image_generation_call.in_progress"),
        "image_generation_call.partial_image",
        *(
            "mcp_call.completed",
            "mcp_call.failed",
            "mcp_call.in_progress",
            "mcp_call_arguments.delta",
            "mcp_call_arguments.done",
        ),
        *("mcp_list_tools.completed", "mcp_list_tools.failed", "mcp_list_tools.in_progress"),
        *("output_item.added", "output_item.done", "output_text.delta", "output_text.done", "output_text.annotation.added"),
        *("reasoning_summary_part.added", "reasoning_summary_part.done"),
        *("reasoning_summary_text.delta", "reasoning_summary_text.done", "reasoning_text.delta", "reasoning_text.done"),
        *("refusal.delta", "refusal.done"),
        *("shell_call_command.added", "shell_call_command.delta", "shell_call_command.done"),
        *("shell_call_output_content.delta", "shell_call_output_content.done"),
        *("web_search_call.completed", "web_search_call.in_progress", "web_search_call.searching"),
    }
)
"""The types of a Response's events that are stored, behind `response.`. Of each it is known what it has."""
_ITEMS: Final = frozenset(
    {
        *("additional_tools", "apply_patch_call", "apply_patch_call_output", "code_interpreter_call", "compaction"),
        *("computer_call", "computer_call_output", "custom_tool_call", "custom_tool_call_output", "file_search_call"),
        *("function_call", "function_call_output", "image_generation_call", "local_shell_call", "local_shell_call_output"),
        *(
            "mcp_approval_request",
            "mcp_approval_response",
            "mcp_call",
            "mcp_list_tools",
            "message",
            "program",
            "program_output",
        ),
        *("reasoning", "shell_call", "shell_call_output", "tool_search_call", "tool_search_output", "web_search_call"),
    }
)
"""The types of its items that are stored."""
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
    text so far in each event; and events of types that are not known here. What is left are `ChatCompletionChunk`s and Responses' events,
    which `subscribe(chunk_type=)` reads as such.

    Args:
        stream: what `create(stream=True)`, `responses.retrieve(stream=True)` or `.stream()` gives, of either client; of `.stream()` also
            the context manager itself, which is entered as long as this is iterated.

    Raises, while it is iterated: what the SDK raises; and for the events `error` and `response.failed`, which the SDK gives as if they
    were others, RuntimeError, or, where the model's server is asked too much, PublicError. The SDK takes a connection that is closed too
    early for the end; where no last event of a Response has come, or no `finish_reason` of a choice, this raises PublicError, ABORTED.
    """
    return chunks_of(stream, shown, _ends)


def checkpoint_of(event: object, before: Mapping[str, Any] | None = None) -> Json | None:
    """Give where a Response can be gone on with behind an event, as `responses.retrieve(response, starting_after=sequence)` has it.

        kept = checkpoint_of(event, kept)  # {"response": "resp_1", "sequence": 7}
        await stream.write(event, checkpoint=kept)

    Only few events name their Response, so that of the event before is needed as well. None: neither does, or it is no such event.

    Args:
        event: an event of a Response, as the SDK gives it or as it was stored.
        before: what this gave for the event before it.
    """
    named, sequence = field_of(field_of(event, "response"), "id"), field_of(event, "sequence_number")
    response = named if isinstance(named, str) else (before or {}).get("response")
    if response is None or not isinstance(sequence, int):
        return None if before is None else {**before}
    return {"response": response, "sequence": sequence}


def shown(event: object) -> Iterator[Any]:
    """Give what is to be stored of an event, if anything."""
    kind = field_of(event, "type")
    if not isinstance(kind, str):
        if isinstance(field_of(event, "choices"), list):
            yield dumped(event)
    elif kind == "chunk":  # beside which `chat.completions.stream()` gives what it makes of it
        yield dumped(field_of(event, "chunk"))
    elif kind == "error":
        raise error_of(dumped(event))
    elif kind.startswith(_PREFIX) and kind.removeprefix(_PREFIX) in _EVENTS:
        yield from _shown_event(kind, dumped(event, "snapshot", "parsed"))


def shown_item(item: object) -> Json | None:
    """Give an item of a Response without what was added to it, and without the tools that it lists.

    None: it is of a type that nobody has looked at, or was said to the model and not by it.
    """
    if not isinstance(item, Mapping) or item.get("type") not in _ITEMS:
        return None
    if item["type"] != "message":
        return _without_added(item)
    if item.get("role", "assistant") != "assistant":
        return None
    return {**_without_added(item), "content": [_without_added(part) for part in objects_of(item.get("content"))]}


def _without_added(item: Mapping[str, Any]) -> Json:
    left = {name: value for name, value in item.items() if name not in {"parsed", "parsed_arguments"}}
    if "tools" in left:  # what an MCP server has listed, a search has found, or the app has added
        left["tools"] = []
    return left


def _shown_event(kind: str, event: Json) -> Iterator[Json]:
    if kind == "response.failed":
        response = event.get("response")
        raise error_of({"error": field_of(response, "error"), "response": field_of(response, "id")})
    if "item" in event:
        item = shown_item(event["item"])
        if item is None:
            return
        event["item"] = item
    if isinstance(response := event.get("response"), dict):
        event["response"] = _shown_response(response)
    yield event


def _shown_response(response: Json) -> Json:
    told: Json = {name: response[name] for name in _TOLD if name in response}
    told["output"] = [item for item in map(shown_item, objects_of(told.get("output"))) if item is not None]
    return {**told, "tool_choice": "auto", "tools": []}  # or it would be no Response


def _ends(chunk: object) -> Iterable[tuple[Hashable, bool]]:
    choices = field_of(chunk, "choices")
    if isinstance(choices, list):
        for choice in objects_of(choices):
            yield choice.get("index"), choice.get("finish_reason") is not None
    else:
        yield "response", str(field_of(chunk, "type")).removeprefix(_PREFIX) in ENDED
