"""What a run of OpenAI's Agents SDK streams, to be stored. It imports no SDK."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Protocol

from ._sdk import AsyncChunks, dumped
from .openai_sdk import shown, shown_item

__all__ = ["Run", "chunks"]


class Run(Protocol):
    """What is used of the SDK's `RunResultStreaming`."""

    @property
    def is_complete(self) -> bool:
        """Whether it has ended."""
        ...

    def stream_events(self) -> AsyncIterator[Any]:
        """Give its events."""
        ...

    def cancel(self) -> None:
        """End it."""
        ...


def chunks(run: Run) -> AsyncChunks:
    """Give what is to be stored of a run of the Agents SDK; closing it cancels the run, and so closes the provider's connection.

        async def answer():
            return chunks(Runner.run_streamed(agent, question))

        return await streams_http.respond(request, answer)

    They are the SDK's events as objects, with the names and types that it documents. Left out is what readers are not to see: of agents
    all but their names (instructions, tools, models), and of Responses what `openai_sdk.chunks` leaves out; and events and items of types
    that are not known here.

    | `type` | has |
    |---|---|
    | `raw_response_event` | `data`: an event of OpenAI's Responses, whatever the model |
    | `run_item_stream_event` | `name`; `item` with `type`, `agent` by its name, and `raw_item` |
    | `agent_updated_stream_event` | `new_agent` with its `name` |

    Args:
        run: what `Runner.run_streamed` gives: not its `stream_events()`, which, closed too early, would wait for the run's end.

    Raises, while it is iterated: what `stream_events()` raises, and what `openai_sdk.chunks` does.
    """
    return AsyncChunks(_Events(run), _shown)


class _Events:
    """A run's events. Closing them ends the run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._events = run.stream_events()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._events

    async def aclose(self) -> None:
        if not self._run.is_complete:
            self._run.cancel()
        if isinstance(self._events, AsyncGenerator):
            await self._events.aclose()


def _shown(event: Any) -> Iterator[Any]:
    match event.type:
        case "raw_response_event":
            for data in shown(event.data):
                yield {"type": event.type, "data": data}
        case "run_item_stream_event":
            raw = shown_item(dumped(event.item.raw_item))
            if raw is not None:
                item = {"type": event.item.type, "agent": event.item.agent.name, "raw_item": raw}
                yield {"type": event.type, "name": event.name, "item": item}
        case "agent_updated_stream_event":
            yield {"type": event.type, "new_agent": {"name": event.new_agent.name}}
        case _:
            return  # what it holds, nobody has looked at
