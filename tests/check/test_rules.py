"""What the rules of a check make of answers: what a defect looks like, and what is only a busy machine."""

import random
from collections.abc import Sequence
from typing import Final

import pytest
from msgspec.structs import replace

from streamkeep.cli._check.advice import ADVICE
from streamkeep.cli._check.exchange import CLEANING_UP, End, Event, Exchange, Made, Request
from streamkeep.cli._check.rules import delays, flaws, is_held, judge
from streamkeep.cli._check.seen import PROBED_HEADERS, PROBED_QUERY, Greeting, Hello, Options, Resumed, Seen, idle_seconds
from streamkeep.events import encode_json
from streamkeep.http.check import TOO_MANY

OPTIONS = Options(seconds=5)
SSE = [("content-type", "text/event-stream"), ("x-genkit-stream-id", "s"), ("transfer-encoding", "chunked")]


def chunk(number: int, came: float, *, took: float = 0.0) -> Event:
    return Event("chunk", number, f"s/00000000/{number}", came, Made(number, number * OPTIONS.pause, took))


def answer(came: Sequence[float], *, ends: bool = True, took: float = 0.0) -> Exchange:
    """Give an answer whose chunks were made at a steady pace, and came then."""
    exchange = Exchange(
        Request("POST", "/streams"),
        status=200,
        version="1.1",
        headers=[*SSE, ("x-streamkeep-answer", f"{random.random()}")],
        head=0.01,
    )
    exchange.events = [chunk(number, at, took=took) for number, at in enumerate(came)]
    exchange.reads = [(at, 130) for at in came]
    exchange.ended = came[-1] + 0.01
    exchange.end = "whole" if ends else "cut"
    if ends:
        exchange.events.append(Event("done", len(came), f"s/00000000/{len(came)}", came[-1], None, "null"))
    return exchange


def cancelled() -> Exchange:
    """Give the answer of a reader whose stream was stopped."""
    exchange = answer(made_at()[:3], ends=False)
    exchange.events.append(Event("error", 3, "s/00000000/3", 0.7, None, '{"status":"CANCELLED"}'))
    exchange.end = "whole"
    return exchange


def seen_of(**steps: object) -> Seen:
    hello = Hello("a/1", 0.0, "/check/hello", "http", "1.1", {}, {}, 15.0, 3600.0, 4 << 20)
    exchange = Exchange(Request("GET", "/hello"), status=200, version="1.1", headers=[("retry-after", "0")], end="whole")
    greeting = Greeting(exchange, hello, 0.0)
    seen = Seen(OPTIONS, greeting, 20.0, [greeting])
    probed = Hello("a/1", 0, "/", "http", "1.1", dict(PROBED_HEADERS), dict(PROBED_QUERY), 15, 3600, 1)
    seen.probe = Greeting(exchange, probed, 0.0)
    for name, value in steps.items():
        setattr(seen, name, value)
    return seen


def found(**steps: object) -> dict[str, str]:
    return {finding.id: finding.seen for finding in judge(seen_of(**steps))}


def made_at(late: float = 0.0) -> list[float]:
    return [number * OPTIONS.pause + late for number in range(OPTIONS.chunks)]


def test_an_answer_that_comes_as_it_is_made_is_sound_however_far_away_it_is() -> None:
    assert found(paces=[answer(made_at(3.0))]) == {}


def test_what_a_busy_machine_does_to_an_answer_is_not_taken_for_buffering() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(20):
        assert "buffered" not in found(paces=[answer(stalled(chance)) for _ in range(3)])


def stalled(chance: random.Random) -> list[float]:
    """Give when chunks come where now and then nothing goes on for a while."""
    came, last = list[float](), 0.0
    for at in made_at():
        last = max(at + (chance.uniform(0, 1.5) if chance.random() < 0.15 else chance.uniform(0, 0.05)), last)
        came.append(last)
    return came


@pytest.mark.parametrize("together", [4, 8, 25])
def test_chunks_that_come_in_a_few_pieces_are_held_back(together: int) -> None:
    came = [made_at()[min(number // together * together + together, OPTIONS.chunks) - 1] for number in range(OPTIONS.chunks)]
    assert is_held(answer(came), OPTIONS)
    assert "buffered" in found(paces=[answer(came)] * 3)


def test_one_answer_that_was_late_and_then_was_not_is_no_finding() -> None:
    assert found(paces=[answer([5.0] * OPTIONS.chunks), answer(made_at())]) == {}


def test_a_slow_storage_is_told_from_what_holds_back() -> None:
    exchange = answer([at + 2.0 for at in made_at()], took=2.0)
    assert max(delays(exchange)) < 2.1
    assert list(found(paces=[exchange] * 3)) == ["slow-storage"]


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([0, 1, 3], "lost: 1 events (2)"),
        ([0, 1, 1, 2], "came twice: 1 events (1)"),
        ([0, 2, 1], "out of order"),
        ([1, 2], "lost: 1 events (0)"),
    ],
)
def test_what_is_wrong_with_the_order_of_events_is_said(offsets: list[int], said: str) -> None:
    assert flaws([chunk(offset, 0.1) for offset in offsets]) == [said]


def test_an_altered_chunk_is_found() -> None:
    exchange = answer(made_at())
    exchange.events[3] = Event("chunk", 3, "s/00000000/3", 0.6, None, "{}")
    assert "altered" in found(paces=[exchange])["lost"]


def test_an_answer_that_is_cut_though_bytes_come_is_no_idle_cut() -> None:
    assert list(found(paces=[answer(made_at()[:10], ends=False)])) == ["cut-short"]


def test_an_answer_that_is_cut_in_silence_is_an_idle_cut() -> None:
    idle = answer(made_at()[:2], ends=False)
    idle.ended = 10.2
    assert "10.0 s without a byte" in found(idle=idle)["idle-cut"]


def test_an_end_that_comes_without_the_last_event_is_a_cut() -> None:
    exchange = answer(made_at()[:10], ends=False)
    exchange.end = "whole"
    assert "as if it were whole" in found(paces=[exchange])["cut-short"]


def test_an_answer_without_end_is_a_hang() -> None:
    exchange = answer(made_at()[:10], ends=False)
    exchange.end = "late"
    assert list(found(paces=[exchange])) == ["hang"]


def test_what_is_turned_away_because_of_other_checks_is_no_limit_of_the_deployment() -> None:
    error = encode_json({"error": {"status": "RESOURCE_EXHAUSTED", "message": TOO_MANY}})
    refused = Exchange(Request("POST", "/streams", about="a start"), status=429, end="whole", body=bytearray(error))
    for steps in ({"paces": [refused]}, {"exchanges": [refused]}):
        assert [(each.id, each.level) for each in judge(seen_of(**steps))] == [("other-checks", "warning")]


def test_an_answer_that_the_app_breaks_off_is_told_in_its_words_and_is_not_whole() -> None:
    broken = answer(made_at()[:10], ends=False)
    broken.request = Request("POST", "/streams", about="an answer")
    broken.events.append(Event("error", None, "s/00000000/9", 2.0, None, '{"status":"UNAVAILABLE","message":"away"}'))
    for step in ({"paces": [broken]}, {"readers": [broken]}, {"idle": broken}, {"exchanges": [broken]}):
        told = found(**step)
        assert list(told) == ["refused"]
        assert "UNAVAILABLE: away" in told["refused"]


def test_an_answer_that_still_flows_is_a_slow_network_and_one_of_heartbeats_alone_a_hang() -> None:
    slow = answer(made_at()[:10], ends=False)
    slow.end, slow.ended = "late", 35.0
    slow.reads += [(at, 1400) for at in (31.0, 33.0, 34.9)]
    slow.request = Request("POST", "/streams", about="an answer")
    assert [(each.id, each.level) for each in judge(seen_of(paces=[slow], exchanges=[slow]))] == [("slow-network", "note")]
    slow.reads[-3:] = [(at / 10, 15) for at in range(300, 350)]
    assert list(found(paces=[slow], exchanges=[slow])) == ["hang"]


def test_a_large_body_that_is_sent_slowly_is_a_slow_network_and_one_that_is_not_answered_is_found() -> None:
    error = b'{"error":{"status":"DEADLINE_EXCEEDED","message":"more than 30 seconds"}}'
    body = Exchange(Request("POST", "/body", body=b"x" * (2 << 20)), status=408, end="whole", body=bytearray(error))
    assert list(found(body=body)) == ["slow-network"]
    body.status, body.end, body.ended, body.body = 0, "late", 60.0, bytearray()
    assert "nothing within 60 s" in found(body=body)["body"]


def test_what_comes_twice_after_a_cut_is_found() -> None:
    first, rest = answer(made_at()[:5], ends=False), answer(made_at())
    first.end = "left"
    assert "came twice" in found(resumed=[Resumed("Last-Event-ID", first, rest)])["resume"]
    assert found(resumed=[Resumed("reload", first, rest)]) == {}


def test_heartbeats_that_are_due_and_do_not_come_are_found() -> None:
    idle = answer([0.0, 0.2])
    idle.reads = [(0.2, 130), (30.4, 260)]
    assert list(found(idle=idle, idle_seconds=30.0)) == ["heartbeats"]
    idle.reads = [(0.2, 130), (15.2, 3), (30.4, 260)]
    assert found(idle=idle, idle_seconds=30.0) == {}


def test_a_heartbeat_that_came_late_has_come() -> None:
    idle = answer([0.0, 30.2])
    idle.reads = [(0.1, 130), (29.0, 3), (30.4, 260)]
    assert found(idle=idle, idle_seconds=30.0) == {}


def test_the_usual_silence_is_long_enough_for_a_heartbeat_to_be_missed() -> None:
    quiet = idle_seconds(OPTIONS, 15.0)
    idle = answer([0.0, quiet + 0.2])
    assert list(found(idle=idle, idle_seconds=quiet)) == ["heartbeats"]


@pytest.mark.parametrize("step", ["paces", "readers", "idle"])
def test_an_answer_that_the_app_ends_as_it_has_said_is_no_defect(step: str) -> None:
    exchange = answer(made_at()[:10], ends=False)
    exchange.ended = 25.2
    seen = seen_of(**{step: exchange if step == "idle" else [exchange]})
    assert judge(seen) != []
    seen.first = Greeting(seen.first.exchange, replace(seen.first.hello, longest=25.0), 0.0)
    assert judge(seen) == []


def test_a_stream_that_some_path_does_not_lead_to_is_another_storage_and_nothing_else() -> None:
    """A balancer that goes by the path always asks the same instance about the same stream."""
    named = [("x-streamkeep-instance", "b/2")]
    reader = Exchange(Request("GET", "/streams/s"), status=204, headers=named, end="whole")
    stop = Exchange(Request("DELETE", "/streams/s"), status=404, headers=named, end="whole")
    by_post = Exchange(
        Request("POST", "/streams/s/cancel"), status=200, headers=[("x-streamkeep-instance", "a/1")], end="whole"
    )
    again = Exchange(
        Request("GET", "/streams/s", about="reading it from its beginning"), status=204, headers=named, end="whole"
    )
    told = found(readers=[reader], stops=[stop, by_post], stopped_after=0.1, stopped=cancelled(), exchanges=[again])
    assert list(told) == ["another-storage"]
    assert "b/2" in told["another-storage"]


def test_an_answer_without_a_chunk_is_no_trouble() -> None:
    exchange = Exchange(Request("POST", "/streams"), status=502, version="1.1", end="whole")
    assert delays(exchange) == []
    assert list(found(paces=[exchange])) == ["refused"]


def test_a_stop_that_met_a_gateway_without_its_app_is_not_refused_for_its_method() -> None:
    away = Exchange(Request("DELETE", "/streams/s"), status=502, end="whole")
    by_post = Exchange(Request("POST", "/streams/s/cancel"), status=200, end="whole")
    told = found(stops=[away, by_post], stopped_after=0.1, stopped=cancelled(), exchanges=[away, by_post])
    assert list(told) == ["refused"]


def test_a_stream_that_was_over_before_its_id_was_known_was_held_back_and_no_stop_has_failed() -> None:
    stop = Exchange(Request("DELETE", "/streams/s"), status=200, body=bytearray(b'{"stopped":false}'), end="whole")
    assert list(found(stops=[stop], stopped_after=0.1, stopped=answer(made_at(45)))) == ["buffered"]


UNLUCKY: Final = [
    ("GET /hello", 502, "whole", "refused"),
    ("GET /hello", 0, "late", "hang"),
    ("GET /hello", 200, "cut", "cut-short"),
    ("GET /streams/s/info", 401, "whole", "refused"),
    ("GET /streams/s/info", 503, "whole", "turned-away"),
    ("POST /streams?chunks=1", 0, "failed", "refused"),
]


@pytest.mark.parametrize(("asked", "status", "end", "id"), UNLUCKY)
def test_one_of_many_requests_that_is_not_answered_is_found(asked: str, status: int, end: End, id: str) -> None:
    method, _, path = asked.partition(" ")
    fine = Exchange(Request(method, path, about="asking"), status=200, end="whole")
    bad = Exchange(Request(method, path, about="asking"), status=status, end=end)
    told = found(exchanges=[fine] * 7 + [bad])
    assert list(told) == [id]
    assert "asking" in told[id]
    assert "1 of 8 times" in told[id]


@pytest.mark.parametrize(
    ("status", "end", "found_id"),
    [
        (200, "cut", None),
        (200, "whole", "hidden-cuts"),
        (404, "whole", None),  # of a CheckHTTP that has no such answer
        (503, "whole", "turned-away"),
        (0, "failed", "refused"),
        (200, "late", "hang"),
    ],
)
def test_an_answer_that_the_app_breaks_off_is_to_come_as_a_cut(status: int, end: End, found_id: str | None) -> None:
    headers = [("transfer-encoding", "chunked")]
    broken = Exchange(Request("GET", "/broken", about="broken off"), status=status, version="1.1", headers=headers, end=end)
    assert list(found(broken=broken, exchanges=[broken])) == ([found_id] if found_id else [])


def test_a_question_after_what_is_not_there_that_met_a_gateway_is_refused_and_no_error_is_replaced() -> None:
    missing = Exchange(Request("GET", "/streams/none/info", about="what is not there"), status=502, end="whole")
    assert found(missing=missing, exchanges=[missing]) == {"refused": "what is not there: answered 502"}
    missing.status = 401
    assert list(found(missing=missing, exchanges=[missing])) == ["errors-replaced"]


def test_what_is_asked_to_clean_up_may_be_answered_as_it_likes() -> None:
    assert found(exchanges=[Exchange(Request("DELETE", "/streams/s", about=CLEANING_UP), status=404, end="whole")]) == {}


def test_one_of_two_ways_that_holds_back_is_found_and_one_late_answer_is_not() -> None:
    comes, later = answer(made_at()), answer(made_at())
    one, other = answer([5.0] * OPTIONS.chunks), answer([5.0] * OPTIONS.chunks)
    assert list(found(exchanges=[comes, one, other])) == ["buffered"]
    assert found(exchanges=[comes, one]) == {}
    later.began = 4.5
    assert found(exchanges=[one, other, later]) == {}, "the machine that checks may have slept"


@pytest.mark.parametrize(
    ("headers", "query", "said"),
    [
        (
            {"last-event-id": "STREAMKEEP-CHECK"},
            {},
            "last-event-id is 'streamkeep-check', and 'STREAMKEEP-CHECK' when it arrives",
        ),
        ({}, {"after": "7 "}, "?after= is '7', and '7 ' when it arrives"),
    ],
)
def test_a_header_that_arrives_as_another_is_found(headers: dict[str, str], query: dict[str, str], said: str) -> None:
    seen = seen_of()
    assert seen.probe is not None
    arrived = replace(seen.probe.hello, headers=dict(PROBED_HEADERS) | headers, query=dict(PROBED_QUERY) | query)
    assert found(probe=Greeting(seen.probe.exchange, arrived, 0.0)) == {"request-headers": said}


def test_events_without_ids_are_found() -> None:
    exchange = answer(made_at())
    exchange.events = [Event(each.name, None, "", each.came, each.made, each.data) for each in exchange.events]
    assert found(paces=[exchange]) == {"lost": f"an answer: without an id: {OPTIONS.chunks + 1} events"}


def test_answers_whose_marks_are_taken_away_are_found_since_caches_cannot_be() -> None:
    exchange = answer(made_at())
    exchange.headers = SSE
    assert list(found(paces=[exchange])) == ["answer-headers"]


def test_clocks_of_instances_are_compared_with_each_other_and_not_with_ours() -> None:
    seen = seen_of()
    one = seen.greetings[0]
    other = Greeting(one.exchange, Hello("b/2", 0, "/check/hello", "http", "1.1", {}, {}, 15, 3600, 1), 100.0)
    assert found(greetings=[Greeting(one.exchange, one.hello, 100.5), other]) == {}
    assert "100.0 s ahead" in found(greetings=[one, other])["clocks"]


def test_each_thing_that_can_be_found_has_a_section_on_the_page(request: pytest.FixtureRequest) -> None:
    page = (request.config.rootpath / "docs/how-to/check.md").read_text()
    assert [id for id in ADVICE if f"### {id}\n" not in page] == []
