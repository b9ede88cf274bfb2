"""Tools that the page runs, as the AI SDK comes: what a replay means for `onToolCall`."""

import json
from collections.abc import Sequence
from datetime import timedelta

import pytest
from tests.clients.chats import CALL, TOOL, Chats, app_of, job_of, served
from tests.clients.programs import NODE, Event, node
from tests.http.servers import serving

from streamkeep import InMemoryStreamManager
from streamkeep.http import StreamsHTTP

pytestmark = pytest.mark.usefixtures("packages")


def names(events: Sequence[Event]) -> list[tuple[str, str]]:
    return [(event["event"], event["data"]) for event in events[:-1]]


async def test_a_replay_calls_on_tool_call_again_under_the_same_id() -> None:
    async with served() as server, node(NODE, "tool-calls.js") as program:
        for ask in (TOOL, "", ""):
            (reading,) = await program.read("", [job_of(server.url, ask=ask)])
            events = await reading.end()
            assert names(events) == [("tool", CALL["toolCallId"])]
            assert events[-1]["event"] == "ready"
            assert [part["state"] for part in json.loads(events[-1]["data"])] == ["input-available"]
    assert server.runs == {TOOL: 1}


async def test_behind_its_ttl_an_answer_is_not_replayed_and_the_chat_stays_ready_with_what_it_has() -> None:
    streams, chats = InMemoryStreamManager(ttl=timedelta(0)), Chats()
    history = [{"id": "a", "role": "assistant", "parts": [{"type": "text", "text": "Nothing "}]}]
    async with serving(app_of(chats, StreamsHTTP(streams))) as url, node(NODE, "tool-calls.js") as program:
        (asked,) = await program.read("", [job_of(url, ask=TOOL)])
        await asked.end()
        (reading,) = await program.read("", [job_of(url, history=history)])
        events = await reading.end()
    assert names(events) == []
    assert (events[0]["event"], json.loads(events[0]["data"])) == ("ready", history[0]["parts"])
    assert chats.requests["GET"] == 1
