"""Pydantic AI's documented endpoints inside DurableStreaming, unchanged: AG-UI's events, and UI messages of the AI SDK."""

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Final

import anyio
import httpx
import pytest
from ag_ui.core import Event, EventType
from fastapi import FastAPI, Request, Response
from httpx_sse import EventSource, ServerSentEvent
from pydantic import TypeAdapter
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.ui.ag_ui import AGUIAdapter
from pydantic_ai.ui.vercel_ai import VercelAIAdapter
from tests.http.servers import STREAM_ID, events_of, http_to
from tests.http.test_pass_through import without_ids

from streamkeep import InMemoryStreamManager
from streamkeep.http import DurableStreaming

REQUESTS: Final[dict[str, Any]] = {
    "/ag-ui": {
        "threadId": "t",
        "runId": "r",
        "state": {},
        "messages": [{"id": "m", "role": "user", "content": "why?"}],
        "tools": [],
        "context": [],
        "forwardedProps": None,
    },
    "/vercel-ai": {
        "trigger": "submit-message",
        "id": "c",
        "messages": [{"id": "m", "role": "user", "parts": [{"type": "text", "text": "why?"}]}],
    },
}
PATHS: Final = sorted(REQUESTS)
AG_UI_EVENT: Final[TypeAdapter[Event]] = TypeAdapter(Event)


def app_of(agent: Agent) -> FastAPI:
    """Give the app of Pydantic AI's documentation: nothing in it is ours."""
    app = FastAPI()

    @app.post("/ag-ui")
    async def ag_ui(request: Request) -> Response:
        return await AGUIAdapter.dispatch_request(request, agent=agent)

    @app.post("/vercel-ai")
    async def vercel_ai(request: Request) -> Response:
        return await VercelAIAdapter.dispatch_request(request, agent=agent)

    return app


class Model:
    """A model that says three words, the last one when it may."""

    def __init__(self) -> None:
        self.runs = 0
        self.may_end = anyio.Event()
        self.left = anyio.Event()
        """A run of it is over, in whatever way."""
        self.agent = Agent(FunctionModel(stream_function=self._words))

    async def _words(self, _messages: list[ModelMessage], _info: AgentInfo) -> AsyncIterator[str]:
        self.runs += 1
        try:
            yield "one "
            yield "two "
            await self.may_end.wait()
            yield "three"
        finally:
            self.left.set()


@asynccontextmanager
async def durable(agent: Agent) -> AsyncGenerator[tuple[httpx.AsyncClient, InMemoryStreamManager]]:
    streams = InMemoryStreamManager()
    async with http_to(DurableStreaming(app_of(agent), streams)) as http:
        yield http, streams


@asynccontextmanager
async def asked(
    http: httpx.AsyncClient, path: str, **headers: str
) -> AsyncGenerator[tuple[str, AsyncIterator[ServerSentEvent]]]:
    """Send the request, the first time or to go on: the stream's id, and the events as they come."""
    headers = {"Accept": "text/event-stream", **{name.replace("_", "-"): text for name, text in headers.items()}}
    async with http.stream("POST", path, json=REQUESTS[path], headers=headers) as answer:
        assert answer.status_code == 200
        yield answer.headers[STREAM_ID], EventSource(answer).aiter_sse()


async def until(events: AsyncIterator[ServerSentEvent], text: str) -> list[ServerSentEvent]:
    """Read until this text has come."""
    seen: list[ServerSentEvent] = []
    with anyio.fail_after(10):
        async for event in events:
            seen.append(event)
            if text in event.data:
                return seen
    raise AssertionError(f"{text!r} did not come: {seen}")


async def cut_and_gone_on(
    http: httpx.AsyncClient, model: Model, path: str
) -> tuple[str, list[ServerSentEvent], list[ServerSentEvent]]:
    """Leave an answer in its middle, and come back with the last event's id: the stream, what was seen before, and what then."""
    async with asked(http, path) as (stream, events):
        before = await until(events, "two")
    model.may_end.set()
    async with asked(http, path, Last_Event_ID=before[-1].id) as (again, events):
        assert again == stream
        with anyio.fail_after(10):
            return stream, before, [event async for event in events]


def ids_and_data(events: list[ServerSentEvent]) -> list[tuple[str, str]]:
    return [(event.id, event.data) for event in events]


def plain(body: bytes) -> bytes:
    """Give an answer without what differs from run to run: the times, and random ids but for which are equal."""
    ids: dict[bytes, bytes] = {}
    body = re.sub(rb'"timestamp":(\d+|"[^"]+")', b'"timestamp":0', body)
    return re.sub(
        rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", lambda found: ids.setdefault(found[0], b"id-%d" % len(ids)), body
    )


@pytest.mark.parametrize("path", PATHS)
async def test_an_agent_answers_the_same_events_as_without_us(path: str) -> None:
    agent = Agent(TestModel(custom_output_text="it is the sun"))

    @agent.tool_plain
    def weather(city: str) -> str:
        return f"sun over {city}"

    async with http_to(app_of(agent)) as http:
        bare = await http.post(path, json=REQUESTS[path])
    async with durable(agent) as (http, streams):
        answer = await http.post(path, json=REQUESTS[path])
        await streams.info(answer.headers[STREAM_ID])
    assert b"sun over" in bare.content
    assert plain(without_ids(answer.content)) == plain(bare.content)
    assert answer.headers.get("x-vercel-ai-ui-message-stream") == bare.headers.get("x-vercel-ai-ui-message-stream")


@pytest.mark.parametrize("path", PATHS)
async def test_an_answer_that_was_cut_goes_on_behind_what_was_seen_and_the_agent_has_run_once(path: str) -> None:
    model = Model()
    async with durable(model.agent) as (http, streams):
        stream, before, after = await cut_and_gone_on(http, model, path)
        async with asked(http, path, X_Genkit_Stream_Id=stream) as (_, events):
            whole = [event async for event in events]
        stored = await events_of(streams, stream)
    assert ids_and_data(before + after) == ids_and_data(whole)
    assert [("chunk", {"data": event.data}) for event in whole] + [("done", None)] == stored
    assert len({event.id for event in whole}) == len(whole)
    assert [word for event in whole for word in re.findall("one|two|three", event.data)] == ["one", "two", "three"]
    assert model.runs == 1
    assert whole[-1].data == "[DONE]" or AG_UI_EVENT.validate_json(whole[-1].data).type is EventType.RUN_FINISHED


@pytest.mark.parametrize("path", PATHS)
async def test_an_agent_can_be_stopped_and_its_readers_are_told(path: str) -> None:
    model = Model()
    async with durable(model.agent) as (http, streams), asked(http, path) as (stream, events):
        seen = await until(events, "two")
        stopped = await http.delete(path, headers={STREAM_ID: stream})
        with anyio.fail_after(10):
            # UI messages have a word for it, and an end.
            with nullcontext() if path == "/vercel-ai" else pytest.raises(httpx.RemoteProtocolError):
                seen += [event async for event in events]
                assert [event.data for event in seen[-3:]] == ['{"type":"abort"}', '{"type":"finish"}', "[DONE]"]
            await model.left.wait()
        stored = await events_of(streams, stream)
    assert stopped.json() == {"stopped": True}
    assert not model.may_end.is_set()
    assert stored[-1] == ("error", "CANCELLED")
    assert "three" not in "".join(event.data for event in seen)


async def test_ag_uis_own_types_read_what_is_stored_before_and_after_a_cut() -> None:
    model = Model()
    async with durable(model.agent) as (http, _):
        _, before, after = await cut_and_gone_on(http, model, "/ag-ui")
    read = [[AG_UI_EVENT.validate_json(event.data).type for event in events] for events in (before, after)]
    assert read == [
        [EventType.RUN_STARTED, EventType.TEXT_MESSAGE_START, EventType.TEXT_MESSAGE_CONTENT, EventType.TEXT_MESSAGE_CONTENT],
        [EventType.TEXT_MESSAGE_CONTENT, EventType.TEXT_MESSAGE_END, EventType.RUN_FINISHED],
    ]
