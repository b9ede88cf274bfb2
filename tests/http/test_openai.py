"""The Responses API: its events, its states, who may, and what is refused. Its real clients are in `tests/clients/test_openai.py`."""

import json
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any, Final

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI, Header, Request
from openai.types.responses import Response as Model
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import TypeAdapter
from tests.http.servers import http_to

from streamkeep import InMemoryStreamManager, PublicError
from streamkeep.http import Access, StreamsHTTP
from streamkeep.http.response import Timeouts
from streamkeep.integrations.openai import OpenAIResponses, ResponseRequest

Json = dict[str, Any]
Produce = Callable[[ResponseRequest], object]
STREAM: Final = {"model": "any", "input": "hi", "stream": True}


def asking(access: Access) -> str:
    return access.headers.get("authorization", "").removeprefix("Bearer ")


@asynccontextmanager
async def served(produce: Produce, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    streams_http = StreamsHTTP(InMemoryStreamManager(), authorize=asking, **options)
    app = FastAPI(lifespan=streams_http.lifespan)
    app.mount("/streams", streams_http)
    app.mount("/v1", OpenAIResponses(streams_http, produce))
    async with http_to(app) as http:
        yield http


def events_in(body: str) -> list[Json]:
    """Give the events of an answer, in which a number follows the other."""
    events: list[Json] = []
    for frame in body.split("\n\n")[:-1]:
        lines = [line for line in frame.split("\n") if line != ": "]
        (name, data) = lines
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    return events


async def events_of(http: httpx.AsyncClient, **body: object) -> list[Json]:
    answer = await http.post("/v1/responses", json={**STREAM, **body})
    assert answer.headers["content-type"] == "text/event-stream"
    return events_in(answer.text)


def types_of(events: list[Json]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def text_of(response: Json) -> str:
    TypeAdapter(Model).validate_python(response, strict=False)  # it is what OpenAI's SDK takes for one
    return "".join(part["text"] for item in response["output"] for part in item.get("content", ()))


async def words(_: ResponseRequest) -> AsyncGenerator[str]:
    for word in ("one ", "", "two"):
        yield word


class Holding:
    """Says a word, and says that it is stored."""

    def __init__(self) -> None:
        self.is_stored = anyio.Event()

    async def words(self, _: ResponseRequest) -> AsyncGenerator[str]:
        yield "one "
        self.is_stored.set()
        await anyio.sleep_forever()


def in_a_thread(_: ResponseRequest) -> Generator[str]:
    yield from ("one ", "two")


def at_once(_: ResponseRequest) -> str:
    return "one two"


async def awaited(request: ResponseRequest) -> AsyncGenerator[str]:
    return words(request)


@pytest.mark.parametrize("produce", [words, in_a_thread, at_once, awaited])
async def test_text_becomes_a_whole_response(produce: Produce) -> None:
    async with served(produce) as http:
        events = await events_of(http, metadata={"a": "b"})
        id = events[0]["response"]["id"]
        again = events_in((await http.get(f"/v1/responses/{id}?stream=true")).text)
        rest = events_in((await http.get(f"/v1/responses/{id}?stream=true&starting_after=3")).text)
        none = await http.get(f"/v1/responses/{id}?stream=true&starting_after={len(events) - 1}")
        whole = (await http.get(f"/v1/responses/{id}")).json()
    begin, end = types_of(events)[:4], types_of(events)[-4:]
    assert begin == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(types_of(events)[4:-4]) == {"output_text.delta"}
    assert end == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert again == events
    assert rest == events[4:]
    assert (none.status_code, none.text) == (200, "")
    assert whole == events[-1]["response"]
    assert (whole["status"], whole["model"], whole["metadata"], text_of(whole)) == ("completed", "any", {"a": "b"}, "one two")


async def test_a_response_without_a_stream_is_whole_or_in_the_background_as_it_is() -> None:
    async with served(words) as http:
        whole = (await http.post("/v1/responses", json={"input": "hi"})).json()
    holding = Holding()
    async with served(holding.words) as http:
        begun = (await http.post("/v1/responses", json={"input": "hi", "model": "any", "background": True})).json()
        with anyio.fail_after(10):
            await holding.is_stored.wait()
        so_far = (await http.get(f"/v1/responses/{begun['id']}")).json()
        stopped = (await http.post(f"/v1/responses/{begun['id']}/cancel")).json()
        events = events_in((await http.get(f"/v1/responses/{begun['id']}?stream=true&starting_after=4")).text)
        deleted = (await http.delete(f"/v1/responses/{begun['id']}")).json()
        gone = await http.get(f"/v1/responses/{begun['id']}")
    assert (whole["status"], text_of(whole)) == ("completed", "one two")
    assert begun["model"] == "any"
    assert begun["status"] in {"queued", "in_progress"}
    assert (so_far["status"], text_of(so_far)) == ("in_progress", "one ")
    assert (stopped["status"], text_of(stopped), stopped["output"][0]["status"]) == ("cancelled", "one ", "incomplete")
    assert [(event["type"], event["response"]) for event in events] == [("response.incomplete", stopped)]
    assert deleted == {"id": begun["id"], "object": "response", "deleted": True}
    assert gone.status_code == 404


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("secret"), {"code": "server_error", "message": "internal"}),
        (PublicError("RESOURCE_EXHAUSTED", "too much"), {"code": "rate_limit_exceeded", "message": "too much"}),
    ],
)
async def test_a_failure_is_told_behind_what_there_was(error: Exception, shown: Json) -> None:
    async def failing(_: ResponseRequest) -> AsyncGenerator[str]:
        yield "one "
        raise error

    async with served(failing) as http:
        last = (await events_of(http))[-1]
        found = (await http.get(f"/v1/responses/{last['response']['id']}")).json()
    assert (last["type"], last["response"]["error"], text_of(last["response"])) == ("response.failed", shown, "one ")
    assert found == last["response"]


THEIRS: Final = {"id": "resp_theirs", "object": "response", "model": "theirs", "status": "in_progress", "output": []}
MESSAGE: Final = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
PART: Final = {"type": "output_text", "text": "", "annotations": []}
IN_PART: Final = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
UPSTREAM: Final[list[Json]] = [
    {"type": "response.created", "response": THEIRS},
    {"type": "response.in_progress", "response": THEIRS},
    {"type": "response.output_item.added", "output_index": 0, "item": MESSAGE},
    {"type": "response.content_part.added", **IN_PART, "part": PART},
    {"type": "response.output_text.delta", **IN_PART, "delta": "one", "logprobs": []},
    {"type": "response.something_new", "any": 1},
]
DONE: Final[Json] = {
    "type": "response.completed",
    "response": {**THEIRS, "status": "completed", "output": [{**MESSAGE, "content": [{**PART, "text": "one"}]}]},
}


def passing(events: list[Json]) -> Produce:
    async def produce(_: ResponseRequest) -> AsyncGenerator[object]:
        for number, event in enumerate(events):
            numbered = {**event, "sequence_number": number}
            yield ResponseTextDeltaEvent.model_validate(numbered) if event["type"] == "response.output_text.delta" else numbered

    return produce


async def test_events_of_another_server_are_passed_on_under_our_id_and_their_numbers() -> None:
    async with served(passing([*UPSTREAM, DONE, {"type": "response.late"}])) as http:
        events = await events_of(http)
    id = events[0]["response"]["id"]
    assert id.startswith("resp_")
    assert [event["sequence_number"] for event in events] == list(range(len(UPSTREAM) + 1))
    for event, theirs in zip(events[1:], [*UPSTREAM[1:], DONE], strict=True):
        if "response" in theirs:
            ours = {**theirs["response"], "id": id}
            assert (event["type"], {name: event["response"][name] for name in ours}) == (theirs["type"], ours)
        else:
            assert {**theirs, "sequence_number": event["sequence_number"]} == event


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (UPSTREAM, "the response ended without its last event"),
        ([*UPSTREAM, {"type": "error", "message": "secret"}], "internal"),
        ([*UPSTREAM, {"type": 1}], "internal"),
        ([*UPSTREAM, {"no": "type"}], "internal"),
        ([*UPSTREAM, {"type": "response.output_text.done", "response": 1}], "internal"),
    ],
)
async def test_what_ends_too_early_or_is_no_event_has_failed_with_its_output(events: list[Json], message: str) -> None:
    async with served(passing(events)) as http:
        last = (await events_of(http))[-1]
    assert (last["type"], last["response"]["error"]["message"]) == ("response.failed", message)
    assert last["response"]["output"][0]["content"][0]["text"] == "one"


async def test_a_chunk_that_is_neither_text_nor_an_event_fails() -> None:
    async def numbers(_: ResponseRequest) -> AsyncGenerator[int]:
        yield 1

    async with served(numbers) as http:
        events = await events_of(http)
    assert (events[-1]["type"], events[-1]["response"]["error"]["message"]) == ("response.failed", "internal")


async def test_events_go_between_texts_and_the_whole_is_completed() -> None:
    call = {"id": "fc_1", "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"}

    async def mixed(_: ResponseRequest) -> AsyncGenerator[object]:
        yield "one"
        yield {"type": "response.output_item.added", "output_index": 1, "item": call}
        yield {"type": "response.output_item.done", "output_index": 1, "item": call}
        yield "two"

    async with served(mixed) as http:
        last = (await events_of(http))[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["message", "function_call", "message"]
    assert (last["status"], text_of(last)) == ("completed", "onetwo")


async def test_what_is_somebody_elses_is_not_there() -> None:
    hers, his = {"Authorization": "Bearer her"}, {"Authorization": "Bearer him"}

    async def whose(request: ResponseRequest) -> AsyncGenerator[str]:
        yield f"{request.owner} {request.id}"

    async with served(whose) as http:
        response = (await http.post("/v1/responses", json={"input": "hi"}, headers=hers)).json()
        id = response["id"]
        stream = (await http.get("/streams/", headers=hers)).json()["streams"][0]["id"]
        for method, path in [("GET", ""), ("GET", "?stream=true"), ("POST", "/cancel"), ("DELETE", "")]:
            theirs = await http.request(method, f"/v1/responses/{id}{path}", headers=his)
            unknown = await http.request(method, f"/v1/responses/resp_unknown{path}", headers=his)
            assert (theirs.status_code, theirs.content) == (404, unknown.content)
            assert theirs.json()["error"].keys() == {"message", "type", "param", "code"}
        assert (await http.get(f"/v1/responses/{id}", headers=hers)).json() == response
        elsewhere = await http.get(f"/v1/other/responses/{id}", headers=hers)
    assert (text_of(response), stream, elsewhere.status_code) == (f"her {id}", id, 404)


async def test_a_route_of_fastapis_says_who_asks_by_a_dependency_that_may_read_the_body() -> None:
    async def user(request: Request, x_user: Annotated[str, Header()]) -> str:
        await request.body()
        return x_user

    streams_http = StreamsHTTP(InMemoryStreamManager())
    responses = OpenAIResponses(streams_http, words)
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.api_route("/v1/responses{rest:path}", methods=["GET", "POST", "DELETE"])
    async def answer(request: Request, owner: Annotated[str, Depends(user)]) -> Any:
        return responses.respond(request, owner=owner)

    async with http_to(app) as http:
        id = (await http.post("/v1/responses", json={"input": "hi"}, headers={"x-user": "her"})).json()["id"]
        hers = await http.get(f"/v1/responses/{id}", headers={"x-user": "her"})
        his = await http.get(f"/v1/responses/{id}", headers={"x-user": "him"})
        nobodys = await http.get(f"/v1/responses/{id}")
    assert (text_of(hers.json()), his.status_code, nobodys.status_code) == ("one two", 404, 422)


async def test_one_idempotency_key_starts_one_response() -> None:
    async with served(words) as http:
        ids = [
            (await http.post("/v1/responses", json={"input": "hi"}, headers={"Idempotency-Key": key})).json()["id"]
            for key in ("a", "a", "b")
        ]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"a":' + b"[" * 300 + b"]" * 300 + b"}",
        b"[" * 100_000,
        b'{"stream": "yes"}',
        b'{"background": 1}',
        b'{"model": {}}',
        b'{"input": 1}',
        b'{"metadata": {"a": 1}}',
        b'{"metadata": []}',
        b'{"metadata": {"a": "%s"}}' % (b"x" * 513),
        b'{"previous_response_id": 1}',
        b'{"model": "%s"}' % (b"x" * 257),
        b'{"previous_response_id": "%s"}' % (b"x" * 257),
    ],
)
async def test_a_body_that_is_not_one_of_openais_is_refused_in_its_words(body: bytes) -> None:
    async with served(words, timeouts=Timeouts(body=timedelta(seconds=5))) as http:
        answer = await http.post("/v1/responses", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("number", ["-2", "x", "1.5", "99", "9" * 30, "9007199254740991", "٣"])
async def test_a_number_that_the_response_has_not_is_refused(number: str) -> None:
    async with served(words) as http:
        id = (await http.post("/v1/responses", json={"input": "hi"})).json()["id"]
        answer = await http.get(f"/v1/responses/{id}", params={"stream": "true", "starting_after": number})
        neither = await http.get(f"/v1/responses/{id}?stream=maybe")
    assert (answer.status_code, neither.status_code) == (400, 400)
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_other_paths_and_methods_are_not_there() -> None:
    async with served(words) as http:
        assert (await http.get("/v1/models")).status_code == 404
        assert (await http.get("/v1/responses/a/input_items")).status_code == 404
        for method, path, allow in [("GET", "", "POST"), ("PUT", "/a", "GET, DELETE"), ("GET", "/a/cancel", "POST")]:
            answer = await http.request(method, f"/v1/responses{path}")
            assert (answer.status_code, answer.headers["allow"]) == (405, allow)
            assert allow in answer.json()["error"]["message"]


async def test_another_path_of_openais_api_is_told_what_there_is() -> None:
    async with served(words) as http:
        for path in ("/chat/completions", "/a/responses/b/responses", "/responses/a/responses"):
            answer = await http.post(f"/v1{path}", json={"input": "hi"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
            assert "only /responses" in answer.json()["error"]["message"]
