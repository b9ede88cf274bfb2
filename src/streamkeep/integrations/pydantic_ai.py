"""What a run of Pydantic AI streams, to be stored. It imports no SDK."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ._sdk import AsyncChunks, AsyncStream

__all__ = ["chunks"]


def chunks(stream: AsyncStream) -> AsyncChunks:
    """Give what is to be stored of a run's events; closing it closes the run, and so the provider's connection.

        def answer():
            return chunks(agent.run_stream_events(question))

        return await streams_http.respond(request, answer)

    They are the SDK's `AgentStreamEvent`s, which `subscribe(chunk_type=)` reads as such. The last one has the run's output,
    `{"event_kind": "agent_run_result", "result": {"output": "..."}}`.

    Left out is what readers are not to see: `metadata`, which are the application's; what is said to the model, such as messages that are
    enqueued, a tool's `ToolReturn.content`, and instructions; which tools there are; custom events with `ui=False`, and capabilities'
    events; and events of types that are not known here.

    Args:
        stream: what `agent.run_stream_events()` gives, or another iterable of its events, such as those of a node of `agent.iter()`.

    Raises, while it is iterated: what the SDK raises.
    """
    return AsyncChunks(stream, _shown)


def _shown(event: Any) -> Iterator[Any]:
    match getattr(event, "event_kind", None):
        case "part_start" | "part_end" | "function_tool_call" | "output_tool_call" if not _lists_tools(event.part):
            yield replace(event, part=_without_metadata(event.part))
        case "part_delta" | "final_result":
            yield event
        case "function_tool_result" if not _lists_tools(event.part):
            yield replace(event, part=_without_metadata(event.part), content=None)
        case "output_tool_result":
            yield replace(event, part=_without_metadata(event.part))
        case "deferred_tool_requests":
            yield replace(event, requests=_without_metadata(event.requests))
        case "custom" if event.ui and type(event).__name__ != "UnknownCustomEvent":  # whose class may have said `ui=False`
            payload = event.to_payload()
            fields = payload if isinstance(payload, Mapping) else {"data": payload}
            named = {"name": event.name, "tool_call_id": event.tool_call_id, "tool_name": event.tool_name}
            yield {**fields, **named, "event_kind": "custom"}
        case "agent_run_result":
            output = event.result.output
            if hasattr(output, "approvals") and type(output).__module__.startswith("pydantic_ai."):
                output = _without_metadata(output)
            yield {"result": {"output": output}, "event_kind": "agent_run_result"}
        case _:
            return  # what it holds, nobody has looked at


def _lists_tools(part: Any) -> bool:
    """Say whether a part is what the model is told of tools, or of a capability, which has instructions, and not what one has returned."""
    if not part.part_kind.endswith("tool-return"):
        return False
    if part.tool_kind is not None:
        return "." not in part.tool_kind  # the SDK's own: an app's kinds have a namespace
    return part.part_kind == "builtin-tool-return" and isinstance(part.content, Mapping) and "tools" in part.content


def _without_metadata(value: Any) -> Any:
    """Give a part of the SDK's, or its requests of an approval, without what is the application's own."""
    if not hasattr(value, "metadata"):
        return value
    return replace(value, metadata={} if hasattr(value, "approvals") else None)
