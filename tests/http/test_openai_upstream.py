"""The Responses API around another server's events: what is passed on, what is kept back, and what odd ones come to."""

import logging
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any, Final

import pytest
from openai.types.responses import Response as Model
from tests.http.test_openai import DONE, IN_PART, MESSAGE, PART, UPSTREAM, Json, events_of, passing, served, text_of, types_of

from streamkeep.http.response import Timeouts
from streamkeep.integrations.openai import ResponseRequest

SECRET: Final[Json] = {
    "id": "resp_theirs",
    "object": "response",
    "model": "theirs",
    "status": "failed",
    "output": [],
    "metadata": {"their": "secret"},
    "background": False,
    "previous_response_id": "resp_secret",
    "instructions": "secret",
    "user": "secret",
    "prompt_cache_key": "secret",
    "safety_identifier": "secret",
    "tools": [{"type": "mcp", "authorization": "secret"}],
    "error": {"code": "invalid_prompt", "message": "secret"},
    "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
}
CALL: Final[Json] = {"id": "fc", "type": "function_call", "call_id": "c", "name": "f", "arguments": "", "status": "in_progress"}
THINKING: Final[Json] = {"id": "rs", "type": "reasoning", "summary": [], "status": "in_progress"}
TEXT: Final = {"type": "response.output_text.delta", **IN_PART, "delta": "one", "logprobs": []}


def event(kind: str, **fields: object) -> Json:
    return {"type": f"response.{kind}", **fields}


def in_item(kind: str, name: str, **fields: object) -> Json:
    return event(kind, item_id=name, output_index=0, **fields)


BAD_INDICES: Final[list[Any]] = [-1, 1.5, True, "0", 2**70, []]
ended: Final = event("completed", response={"status": "completed"})


def broken(events: list[Json]) -> Any:
    """Give a producer that passes events on, and fails then."""

    async def produce(_: ResponseRequest) -> AsyncGenerator[Json]:
        for each in events:
            yield {**each}
        raise ValueError("secret")

    return produce


async def test_of_another_servers_response_only_what_came_of_it_is_told_and_what_the_client_has_said_is_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    upstream = [event("in_progress", response=SECRET), event("queued", response=SECRET), event("failed", response=SECRET)]
    async with served(passing(upstream)) as http:
        events = await events_of(http, metadata={"a": "b"}, background=True, previous_response_id="resp_before")
        found = (await http.get(f"/v1/responses/{events[0]['response']['id']}")).json()
    assert types_of(events) == ["created", "in_progress", "queued", "failed"]
    assert "secret" not in str(events)
    assert "'message': 'secret'" in caplog.text
    assert found == events[-1]["response"]
    assert found["error"] == {"code": "invalid_prompt", "message": "internal"}
    assert (found["model"], found["usage"]) == ("theirs", SECRET["usage"])
    assert (found["metadata"], found["background"], found["previous_response_id"]) == ({"a": "b"}, True, "resp_before")


async def test_a_limit_of_the_models_server_is_told_as_one_and_one_of_ours_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)

    class TooManyError(Exception):
        status_code = 429

    async def refused(_: ResponseRequest) -> str:
        raise TooManyError("secret")

    async def long(_: ResponseRequest) -> AsyncGenerator[str]:
        for _number in range(6):
            yield "x" * 1_000_000

    limit = {"code": "rate_limit_exceeded", "message": "the model's server is asked too much"}
    for limited in (refused, passing([{"type": "error", "code": "rate_limit_exceeded", "message": "secret"}])):
        async with served(limited) as http:
            assert (await events_of(http))[-1]["response"]["error"] == limit
    async with served(long) as http:
        last = (await events_of(http))[-1]["response"]
    assert last["error"] == {"code": "server_error", "message": "the response is too long to be stored"}
    assert len(text_of(last)) == 6_000_000


@pytest.mark.parametrize(
    "odd",
    [
        [event("in_progress", response={"id": "x"})],
        [event("in_progress", response={**SECRET, "output": None, "status": "completed"})],
        [event("in_progress", response={**SECRET, "output": [1, None]})],
        [event("output_item.done", output_index=None, item=CALL)],
        [event("output_item.added", output_index=index, item=CALL) for index in BAD_INDICES],
        [event("output_item.added", output_index=0, item=1), event("output_item.added")],
        [event("output_item.added", output_index=0, item={"id": 1, "content": "text", "summary": [1]}), TEXT],
        [event("content_part.added", output_index=0, content_index=None, part=None)],
        [event("content_part.added", output_index=0, content_index=2**70, part={"type": 1}), TEXT],
        [event("output_text.delta", output_index=0, content_index={}, delta=1), event("output_text.done", output_index=0)],
        [event("reasoning_summary_text.delta", output_index=0, summary_index="x", delta="one")],
        [event("function_call_arguments.delta", item_id=1, output_index="", delta={})],
    ],
)
async def test_odd_events_fail_nothing_and_what_is_stored_can_be_read(odd: list[Json]) -> None:
    async with served(broken(odd), timeouts=Timeouts(idle=timedelta(seconds=10))) as http:
        events = await events_of(http)
        id = events[0]["response"]["id"]
        found = await http.get(f"/v1/responses/{id}")
    passed_on = [each for each in types_of(events) if each not in {"created", "in_progress"}]
    assert passed_on == [kind for each in odd if (kind := each["type"][9:]) != "in_progress"] + ["failed"]
    for each in events:
        numbers = [each[name] for name in ("output_index", "content_index", "summary_index") if name in each]
        assert all(type(number) is int and 0 <= number < 65_536 for number in numbers)
    assert found.json() == events[-1]["response"]
    assert found.json()["error"] == {"code": "server_error", "message": "internal"}
    assert all(isinstance(item, dict) for item in found.json()["output"])


@pytest.mark.parametrize(
    ("upstream", "output"),
    [
        pytest.param(
            [
                event("output_item.added", output_index=0, item=THINKING),
                in_item("content_part.added", "rs", content_index=0, part={"type": "reasoning_text", "text": ""}),
                in_item("reasoning_text.delta", "rs", content_index=0, delta="one"),
            ],
            {**THINKING, "status": "completed", "content": [{"type": "reasoning_text", "text": "one"}]},
            id="a part of an item without content",
        ),
        pytest.param(
            [event("output_item.added", output_index=0, item=MESSAGE), TEXT],
            {**MESSAGE, "status": "completed", "content": [{**PART, "text": "one"}]},
            id="a delta without its part",
        ),
        pytest.param(
            [TEXT, TEXT],
            {**MESSAGE, "status": "completed", "content": [{**PART, "text": "oneone"}]},
            id="from the middle on",
        ),
        pytest.param(
            [in_item("content_part.done", "rs", content_index=0, part={"type": "reasoning_text", "text": "one"})],
            {**THINKING, "status": "completed", "content": [{"type": "reasoning_text", "text": "one"}]},
            id="a part of reasoning from the middle on",
        ),
    ],
)
async def test_what_is_missing_of_another_servers_events_is_made_of_what_is_there(upstream: list[Json], output: Json) -> None:
    for end in ([], [ended]):
        async with served(passing([*upstream, *end])) as http:
            last = (await events_of(http))[-1]
        assert (last["type"], last["response"]["output"]) == ("response.completed", [output])


@pytest.mark.parametrize(
    ("upstream", "output"),
    [
        (
            [
                event("output_item.added", output_index=0, item=CALL),
                in_item("function_call_arguments.delta", "fc", delta='{"a":'),
                in_item("function_call_arguments.delta", "fc", delta="1}"),
            ],
            {**CALL, "arguments": '{"a":1}'},
        ),
        (
            [in_item("function_call_arguments.done", "fc", arguments="{}")],
            {**CALL, "call_id": "", "name": "", "arguments": "{}"},
        ),
        (
            [
                event("output_item.added", output_index=0, item=MESSAGE),
                in_item("content_part.added", "msg_1", content_index=0, part={"type": "refusal", "refusal": ""}),
                in_item("refusal.delta", "msg_1", content_index=0, delta="no"),
            ],
            {**MESSAGE, "content": [{"type": "refusal", "refusal": "no"}]},
        ),
        (
            [
                event("output_item.added", output_index=0, item=THINKING),
                in_item("reasoning_summary_part.added", "rs", summary_index=0, part={"type": "summary_text", "text": ""}),
                in_item("reasoning_summary_text.delta", "rs", summary_index=0, delta="so"),
                in_item("reasoning_summary_text.delta", "rs", summary_index=1, delta="lost"),
                in_item("reasoning_summary_text.done", "rs", summary_index=1, text="and"),
            ],
            {**THINKING, "summary": [{"type": "summary_text", "text": text} for text in ("so", "and")]},
        ),
    ],
)
async def test_a_response_so_far_has_all_that_has_grown(upstream: list[Json], output: Json) -> None:
    async with served(broken(upstream)) as http:
        last = (await events_of(http))[-1]
    assert (last["type"], last["response"]["output"]) == ("response.failed", [{**output, "status": "incomplete"}])


async def test_what_was_collected_is_not_lost_by_an_end_that_names_no_output() -> None:
    for end in (ended, event("completed"), event("completed", response={"output": []})):
        async with served(passing([*UPSTREAM, end, {"type": "response.late"}])) as http:
            last = (await events_of(http))[-1]["response"]
        assert (last["status"], text_of(last)) == ("completed", "one")


async def test_events_behind_a_text_take_no_place_of_its() -> None:
    async def mixed(request: ResponseRequest) -> AsyncGenerator[object]:
        yield "zero "
        for each in UPSTREAM:
            yield {**each}
        yield "two "
        yield event("output_item.added", output_index=1, item=CALL)
        if request.body["input"] == "whole":
            yield event("completed", response={**DONE["response"], "output": [*DONE["response"]["output"], CALL]})
        else:
            yield event("completed", response={})

    for how in ("whole", "empty"):
        async with served(mixed) as http:
            events = await events_of(http, input=how)
        added = [each["output_index"] for each in events if each["type"] == "response.output_item.added"]
        last = events[-1]["response"]
        assert (added, [item["type"] for item in last["output"]]) == ([0, 1, 2, 3], [*["message"] * 3, "function_call"])
        assert text_of(last) == "zero onetwo "


async def test_a_list_and_a_whole_response_are_passed_on_as_their_events() -> None:
    whole: Json = {**DONE["response"], "created_at": 1, "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    whole["output"] = [*DONE["response"]["output"], CALL]

    async def at_once(_: ResponseRequest) -> object:
        return Model.model_validate(whole)

    async def listed(_: ResponseRequest) -> object:
        return [*UPSTREAM, DONE]

    async def unfinished(_: ResponseRequest) -> object:
        return {**whole, "status": "queued"}

    expected = {at_once: "one", listed: "one"}
    for produce, text in expected.items():
        async with served(produce) as http:
            events = await events_of(http)
        assert "".join(each.get("delta", "") for each in events) == text
        assert (events[-1]["type"], text_of(events[-1]["response"])) == ("response.completed", text)
    async with served(unfinished) as http:
        assert types_of(await events_of(http)) == ["created", "failed"]
