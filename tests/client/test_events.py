"""`events`: anybody's server-sent events, read from where they were."""

from datetime import timedelta
from typing import Any

import anyio
import pytest
from tests.client.forms import FAST, Form, Had, answer, cut, silent, told

from streamkeep import InvalidArgumentError, StreamLostError, UnexpectedAnswerError, client
from streamkeep.client import Retry, ServerSentEvent, sync
from streamkeep.wire import MAX_FRAME_BYTES

ONE = b"id: 1\ndata: a\n\n"
TWO = b"id: 2\ndata: b\n\n"
THREE = b"id: 3\nevent: end\ndata: c\n\n"


def data_of(had: Had) -> list[str]:
    return [event.data for event in had.events]


async def test_it_goes_on_behind_the_last_id_and_ends_with_the_answer(form: Form) -> None:
    async with told(cut(ONE), cut(b""), answer(TWO + THREE)) as server:
        had = await form.read("events", server.url)
    assert ([(event.event, event.id) for event in had.events], had.cursor) == (
        [("message", "1"), ("message", "2"), ("end", "3")],
        "3",
    )
    assert server.header("last-event-id") == [None, "1", "1"]
    assert server.header("accept") == ["text/event-stream"] * 3


@pytest.mark.parametrize("rest", [b"id: 2", b"id: 2\n", b"id: 2\ndata: b", b"id: 2\ndata: b\n", b"data: na\xc3", b": \n"])
async def test_what_a_cut_leaves_of_an_event_is_not_one(form: Form, rest: bytes) -> None:
    async with told(cut(ONE + rest), answer(TWO)) as server:
        assert data_of(await form.read("events", server.url)) == ["a", "b"]
    assert server.header("last-event-id") == [None, "1"]


async def test_a_block_without_data_moves_the_place_too(form: Form) -> None:
    async with told(cut(ONE + b"id: 2\n\n"), answer(THREE)) as server:
        assert data_of(await form.read("events", server.url)) == ["a", "c"]
    assert server.header("last-event-id") == [None, "2"]


async def test_an_event_without_an_id_has_the_one_before_also_over_connections(form: Form) -> None:
    async with told(cut(ONE), answer(b"data: ping\n\n" + TWO)) as server:
        had = await form.read("events", server.url)
    assert [event.id for event in had.events] == ["1", "1", "2"]


async def test_it_begins_behind_an_id(form: Form) -> None:
    async with told(answer(TWO)) as server:
        assert data_of(await form.read("events", server.url, after="naïve 1")) == ["b"]
    assert server.header("last-event-id") == ["naïve 1"]


async def test_the_event_that_was_named_is_the_end_whatever_comes_then(form: Form) -> None:
    async with told(answer(ONE), answer(TWO + THREE + ONE)) as server:
        had = await form.read("events", server.url, until=lambda event: event.event == "end")
    assert (data_of(had), had.cursor) == (["a", "b", "c"], "3")
    assert len(server.requests) == 2


async def test_each_new_event_renews_the_budget_of_tries(form: Form) -> None:
    retry = Retry(tries=1, first=timedelta(0))
    async with told(cut(ONE), cut(TWO), cut(THREE), answer(b"")) as server:
        had = await form.read("events", server.url, retry=retry)
    assert (data_of(had), had.error, len(server.requests)) == (["a", "b", "c"], None, 4)
    async with told(cut(ONE), cut(b"retry: 0\n"), answer(TWO)) as server:
        had = await form.read("events", server.url, retry=retry)
    assert isinstance(had.error, StreamLostError)
    assert len(server.requests) == 2


async def test_204_is_the_end(form: Form) -> None:
    async with told(answer(ONE), answer(b"", status=b"204 No Content")) as server:
        had = await form.read("events", server.url, reconnects_at_end=True)
    assert (data_of(had), had.error) == (["a"], None)


async def test_an_answer_whose_end_cannot_be_told_from_a_lost_connection_is_not_taken_for_whole(form: Form) -> None:
    async with told(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + ONE, answer(TWO)) as server:
        assert data_of(await form.read("events", server.url)) == ["a", "b"]


async def test_without_ids_there_is_nothing_to_go_on_with(form: Form) -> None:
    async with told(cut(b"data: a\n\n"), answer(TWO)) as server:
        had = await form.read("events", server.url)
    assert data_of(had) == ["a"]
    assert isinstance(had.error, StreamLostError)
    assert (had.error.events, had.error.cursor) == (1, None)
    assert len(server.requests) == 1


async def test_a_post_is_not_sent_twice_before_an_id_has_come(form: Form) -> None:
    async with told(b"", answer(TWO)) as server:
        had = await form.read("events", server.url, method="POST", json={"q": 1})
    assert isinstance(had.error, StreamLostError)
    assert len(server.requests) == 1


async def test_a_post_that_is_known_by_its_key_or_has_an_id_is_sent_again(form: Form) -> None:
    async with told(b"", cut(ONE), answer(TWO)) as server:
        options: dict[str, Any] = {"method": "POST", "json": {"q": 1}, "headers": {"idempotency-key": "k"}}
        assert data_of(await form.read("events", server.url, **options)) == ["a", "b"]
    assert [request.partition(b"\r\n\r\n")[2] for request in server.requests] == [b'{"q":1}'] * 3
    async with told(cut(ONE), answer(TWO)) as server:
        assert data_of(await form.read("events", server.url, method="POST")) == ["a", "b"]


async def test_a_server_that_has_failed_is_asked_again_where_that_does_no_harm(form: Form) -> None:
    async with told(answer(b"", status=b"502 Bad Gateway"), answer(ONE)) as server:
        assert data_of(await form.read("events", server.url)) == ["a"]
    async with told(answer(b"", status=b"502 Bad Gateway"), answer(ONE)) as server:
        had = await form.read("events", server.url, method="POST")
    assert had.error is not None
    assert (had.error.status, len(server.requests)) == ("UNAVAILABLE", 1)


async def test_headers_of_ones_own_count(form: Form) -> None:
    async with told(answer(ONE)) as server:
        await form.read("events", f"{server.url}/a?b=c", headers={"accept": "text/*", "X-Own": "1"})
    assert (server.header("accept"), server.header("x-own"), server.header("accept-encoding")) == (
        ["text/*"],
        ["1"],
        ["identity"],
    )
    assert server.requests[0].split()[1] == b"/a?b=c"


@pytest.mark.parametrize(
    ("body", "content_type", "sent"),
    [
        ({"json": {"q": "é"}}, "application/json", '{"q":"é"}'.encode()),
        ({"data": {"q": "a b&é", "n": ["1", "2"]}}, "application/x-www-form-urlencoded", b"q=a+b%26%C3%A9&n=1&n=2"),
        ({"content": b"\x00raw"}, None, b"\x00raw"),
        ({"content": "é", "headers": {"Content-Type": "text/plain"}}, "text/plain", "é".encode()),
        ({"data": {}, "headers": {"content-type": "x/y"}}, "x/y", b""),
    ],
)
@pytest.mark.parametrize("name", ["events", "subscribe"])
async def test_a_body_is_sent_as_it_was_given_and_of_its_type(
    form: Form, name: str, body: dict[str, Any], content_type: str | None, sent: bytes
) -> None:
    async with told(answer(b"", status=b"204 None")) as server:
        await form.read(name, server.url, method="POST", **body)
    assert server.header("content-type") == [content_type]
    assert server.requests[0].partition(b"\r\n\r\n")[2] == sent


async def test_two_bodies_are_refused(form: Form) -> None:
    with pytest.raises(InvalidArgumentError, match="give one of them"):
        await form.read("events", "http://127.0.0.1:1/", json=1, data={})


async def test_events_before_one_that_is_too_long_are_given(form: Form) -> None:
    long = b"data: " + b"x" * MAX_FRAME_BYTES + b"\n\n"
    async with told(answer(ONE + TWO + long + THREE), answer(long)) as server:
        had = await form.read("events", server.url)
    assert (data_of(had), had.cursor, len(server.requests)) == (["a", "b"], "2", 1)
    assert isinstance(had.error, UnexpectedAnswerError)


async def test_a_condition_that_raises_loses_no_event(form: Form) -> None:
    failing = {"2"}

    def is_end(event: ServerSentEvent) -> bool:
        if event.id in failing:
            failing.clear()
            raise KeyError(event.id)
        return event.event == "end"

    def read(url: str) -> tuple[list[str], str | None, list[str]]:
        with sync.events(url, until=is_end) as events:
            given = [next(events).data]
            with pytest.raises(KeyError):
                next(events)
            return given, events.cursor, [event.data for event in events]

    async with told(answer(ONE + TWO + THREE), answer(TWO + THREE)) as server:
        if form.is_blocking:
            had = await anyio.to_thread.run_sync(read, server.url)
        else:
            async with client.events(server.url, until=is_end) as events:
                given = [(await anext(events)).data]
                with pytest.raises(KeyError):
                    await anext(events)
                had = given, events.cursor, [event.data async for event in events]
    assert had == (["a"], "1", ["b", "c"])
    assert server.header("last-event-id") == [None, "1"]


async def test_who_iterates_again_behind_a_loss_does_not_send_a_post_twice() -> None:
    async with told(cut(b"data: a\n\n")) as server, client.events(server.url, method="POST", retry=FAST) as events:
        await anext(events)
        for _ in range(2):
            with pytest.raises(StreamLostError):
                await anext(events)
    assert len(server.requests) == 1


async def test_a_post_that_was_cancelled_in_mid_read_is_not_sent_twice() -> None:
    async with told(silent) as server, client.events(server.url, method="POST", retry=FAST) as events:
        with anyio.move_on_after(0.02):
            await anext(events)
        with pytest.raises(StreamLostError, match="not sent twice"):
            await anext(events)
    assert len(server.requests) == 1
