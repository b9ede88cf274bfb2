"""The wire: what Genkit's clients survive is all that we send, the HTML standard's own examples, and hostile input."""

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Final

import httpx
import httpx_sse
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkeep.errors import InvalidArgumentError, LimitExceededError, StreamkeepError
from streamkeep.events import (
    MAX_OFFSET,
    ErrorInfo,
    StreamEvent,
    StreamEventType,
    chunk_record,
    done_record,
    error_record,
    event_of,
)
from streamkeep.http.framing import Framing, GenkitFraming, SSEFraming, ascii_json, error_body, parse_offset, result_body
from streamkeep.wire import (
    Failure,
    GenkitDecoder,
    GenkitFrame,
    GenkitRequest,
    Message,
    Result,
    ServerSentEvent,
    SSEDecoder,
    error_of,
    parse_body,
    wants_stream,
)

SECRET: Final = "postgresql://user:password@db"

texts: Final = st.text(st.characters(codec="utf-8")) | st.text(st.sampled_from('a\r\n\x00\x85\u2028\u2029é世\U0001f44b:"\\ '))
values: Final = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
errors: Final = st.builds(ErrorInfo, st.sampled_from(["NOT_FOUND", "INTERNAL"]), texts, values, st.just(SECRET))
endings: Final = st.one_of(values.map(done_record), errors.map(error_record))


def chunk(value: object, offset: int) -> StreamEvent[object]:
    return event_of(chunk_record(value), offset)


def done(value: object, offset: int) -> StreamEvent[object]:
    return event_of(done_record(value), offset)


def failed(error: ErrorInfo, offset: int) -> StreamEvent[object]:
    return event_of(error_record(error), offset)


def frame_of(framing: Framing, event: StreamEvent[object]) -> bytes:
    return framing.event(event, str(event.offset))


@st.composite
def streams(draw: st.DrawFn) -> list[StreamEvent[object]]:
    chunks = draw(st.lists(values.map(chunk_record), max_size=5))
    first = draw(st.sampled_from([0, 7, MAX_OFFSET - 10]))
    return [event_of(record, first + i) for i, record in enumerate([*chunks, draw(endings)])]


def sent(framing: Framing, events: Sequence[StreamEvent[object]], heartbeats: Sequence[int] = ()) -> bytes:
    """Give the whole body, with so many heartbeats before each event."""
    counts = [*heartbeats, *[0] * len(events)]
    frames = (
        b"".join(framing.heartbeat() for _ in range(count)) + frame_of(framing, event)
        for event, count in zip(events, counts, strict=False)
    )
    return framing.preamble() + b"".join(frames)


def pieces_of(body: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    return [body[start:end] for start, end in pairwise(edges)]


def decoded(*pieces: bytes) -> list[GenkitFrame]:
    decoder = GenkitDecoder()
    return [frame for piece in pieces for frame in decoder.feed(piece)]


def sse_decoded(*pieces: bytes) -> list[ServerSentEvent]:
    decoder = SSEDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def as_the_javascript_client_reads(body: bytes) -> list[dict[str, object]]:
    """Cut at blank lines, drop six characters whatever they are, parse the rest: that is all it does."""
    *frames, rest = body.decode("ascii").split("\n\n")
    assert rest.strip(" ") in ("", "data:")
    return [json.loads(frame[6:]) for frame in frames]


cuts: Final = st.lists(st.integers(0, 500), max_size=12)
heartbeat_counts: Final = st.lists(st.integers(0, 3), max_size=6)
FRAGMENTS: Final = [b"data: ", b"error:", b'{"message":', b"}", b"\n", b"\r", b'"', b"[", b'{"error":{"status":"X"}}\n']
thorough: Final = settings(deadline=None, max_examples=100)


class TestGenkitFraming:
    @pytest.mark.parametrize(
        ("event", "frame"),
        [
            (chunk({"a": 1}, 0), b'data: {"message":{"a":1},"offset":0}\n\n'),
            (chunk(None, 17), b'data: {"message":null,"offset":17}\n\n'),
            (chunk("é\u2028\U0001f44b", 1), b'data: {"message":"\\u00e9\\u2028\\ud83d\\udc4b","offset":1}\n\n'),
            (done("", 2), b'data: {"result":"","offset":2}\n\n'),
            (
                failed(ErrorInfo("NOT_FOUND", "no é", [1]), 3),
                b'data: {"error":%b,"offset":3}\n\nerror: {"error":%b}\n\n'
                % ((b'{"status":"NOT_FOUND","message":"no \\u00e9","details":[1]}',) * 2),
            ),
        ],
    )
    def test_each_event_is_one_line_with_its_offset_and_an_error_comes_in_both_forms(
        self, event: StreamEvent[object], frame: bytes
    ) -> None:
        assert frame_of(GenkitFraming(), event) == frame

    def test_a_transport_error_has_no_offset_and_its_details_are_null(self) -> None:
        data = b'{"error":{"status":"UNAVAILABLE","message":"closing","details":null}}'
        assert GenkitFraming().error(ErrorInfo("UNAVAILABLE", "closing")) == b"data: %b\n\nerror: %b\n\n" % (data, data)

    def test_a_heartbeat_opens_the_next_frame_and_further_ones_are_spaces(self) -> None:
        framing = GenkitFraming()
        assert [framing.heartbeat() for _ in range(3)] == [b"data: ", b" ", b" "]
        assert frame_of(framing, chunk(1, 0)) == b'{"message":1,"offset":0}\n\n'
        assert frame_of(framing, chunk(2, 1)) == b'data: {"message":2,"offset":1}\n\n'
        assert framing.heartbeat() == b"data: "
        assert framing.error(ErrorInfo("ABORTED", "")).startswith(b'{"error"')

    def test_stored_json_is_passed_on_as_it_is(self) -> None:
        stored = b'{"b": 1.50,  "a":1e2, "a":99999999999999999999, "c":"\\u0041"}'
        assert stored in frame_of(GenkitFraming(), StreamEvent(StreamEventType.CHUNK, 0, stored))
        assert stored in frame_of(SSEFraming(), StreamEvent(StreamEventType.DONE, 0, stored))

    def test_nothing_comes_before_the_first_frame(self) -> None:
        assert GenkitFraming().preamble() == b""

    @thorough
    @given(streams(), heartbeat_counts)
    def test_the_javascript_client_reads_every_frame(self, events: list[StreamEvent[object]], heartbeats: list[int]) -> None:
        frames = as_the_javascript_client_reads(sent(GenkitFraming(), events, heartbeats))
        if events[-1].type is StreamEventType.ERROR:
            assert frames.pop() == {"error": frames[-1]["error"]}
        keys = {StreamEventType.CHUNK: "message", StreamEventType.DONE: "result", StreamEventType.ERROR: "error"}
        assert [(*frame, frame["offset"]) for frame in frames] == [(keys[e.type], "offset", e.offset) for e in events]
        shown = [next(iter(frame.values())) for frame in frames]
        assert shown == [_shown(event) for event in events]

    @thorough
    @given(streams(), heartbeat_counts)
    def test_never_an_id_an_event_a_retry_a_comment_a_cr_an_empty_frame_or_a_second_data_line(
        self, events: list[StreamEvent[object]], heartbeats: list[int]
    ) -> None:
        body = sent(GenkitFraming(), events, heartbeats)
        assert body.isascii()
        assert b"\r" not in body
        *frames, rest = body.split(b"\n\n")
        assert rest == b""
        assert all(b"\n" not in frame for frame in frames)
        assert [frame[:6] for frame in frames[: len(events)]] == [b"data: "] * len(events)
        assert [frame[:7] for frame in frames[len(events) :]] == [b"error: "] * (events[-1].type is StreamEventType.ERROR)

    @thorough
    @given(streams(), heartbeat_counts, cuts)
    def test_what_is_encoded_is_decoded_however_it_is_cut(
        self, events: list[StreamEvent[object]], heartbeats: list[int], cuts: list[int]
    ) -> None:
        body = sent(GenkitFraming(), events, heartbeats)
        assert decoded(*pieces_of(body, cuts)) == [_frame_of(event) for event in events]

    @given(heartbeat_counts, errors, cuts)
    def test_a_transport_error_is_decoded_once(self, heartbeats: list[int], error: ErrorInfo, cuts: list[int]) -> None:
        framing = GenkitFraming()
        body = sent(framing, [chunk(0, 0)], heartbeats) + framing.heartbeat() + framing.error(error)
        assert decoded(*pieces_of(body, cuts))[1:] == [Failure(_public(error), None)]


def _public(error: ErrorInfo) -> ErrorInfo:
    return ErrorInfo(error.status, error.message, error.details)


def _shown(event: StreamEvent[object]) -> object:
    if event.type is not StreamEventType.ERROR:
        return json.loads(event.data)
    return {"status": event.error.status, "message": event.error.message, "details": event.error.details}


def _frame_of(event: StreamEvent[object]) -> GenkitFrame:
    match event.type:
        case StreamEventType.CHUNK:
            return Message(ascii_json(event.data), event.offset)
        case StreamEventType.DONE:
            return Result(ascii_json(event.data), event.offset)
        case StreamEventType.ERROR:
            return Failure(_public(event.error), event.offset)
        case _:
            raise AssertionError(event)


class TestEveryFraming:
    @pytest.mark.parametrize("framing", [GenkitFraming(), SSEFraming()], ids=lambda framing: type(framing).__name__)
    def test_internal_never_leaves(self, framing: Framing) -> None:
        error = ErrorInfo("INTERNAL", "internal", None, SECRET)
        for data in (frame_of(framing, failed(error, 0)), framing.error(error), error_body(error)):
            assert b"postgresql" not in data
            assert b'"internal":' not in data

    @pytest.mark.parametrize("framing", [GenkitFraming(), SSEFraming()], ids=lambda framing: type(framing).__name__)
    @pytest.mark.parametrize("line_end", ["\n\n", "\r\n", "\r"])
    def test_stored_json_cannot_break_out_of_its_line(self, framing: Framing, line_end: str) -> None:
        stored = chunk_record(msgspec.Raw(f"[1,{line_end}2]".encode()))
        frame = frame_of(framing, event_of(stored, 0))
        assert frame.count(b"\n") == 2 + (type(framing) is SSEFraming) * 2
        assert b"\r" not in frame
        (data,) = [
            line.partition(b"data: ")[2] or line.partition(b"message: ")[2] for line in frame.split(b"\n") if b"1" in line
        ]
        assert json.loads(data.removesuffix(b',"offset":0}').removeprefix(b'{"message":')) == [1, 2]

    @pytest.mark.parametrize("framing", [GenkitFraming(), SSEFraming()], ids=lambda framing: type(framing).__name__)
    def test_the_content_type_is_an_event_stream(self, framing: Framing) -> None:
        assert framing.content_type == "text/event-stream"


class TestSSEFraming:
    @pytest.mark.parametrize(
        ("event", "frame"),
        [
            (chunk({"a": 1}, 0), b'event: chunk\ndata: {"a":1}\nid: 0\n\n'),
            (done(None, 17), b"event: done\ndata: null\nid: 17\n\n"),
            (
                failed(ErrorInfo("NOT_FOUND", "no"), 3),
                b'event: error\ndata: {"status":"NOT_FOUND","message":"no","details":null}\nid: 3\n\n',
            ),
        ],
    )
    def test_each_event_has_its_offset_as_id_and_its_type_as_name(self, event: StreamEvent[object], frame: bytes) -> None:
        assert frame_of(SSEFraming(), event) == frame

    def test_a_transport_error_has_no_id_so_that_a_reconnect_resumes(self) -> None:
        framing = SSEFraming()
        frame = framing.error(ErrorInfo("UNAVAILABLE", "closing"))
        assert frame == b'event: error\ndata: {"status":"UNAVAILABLE","message":"closing","details":null}\n\n'
        *_, last = sse_decoded(frame_of(framing, chunk(0, 41)), frame)
        assert last.id == "41"

    def test_heartbeats_are_comments_and_the_preamble_is_the_reconnection_time(self) -> None:
        framing = SSEFraming(retry_seconds=1.5)
        assert [framing.heartbeat(), framing.heartbeat()] == [b": \n", b": \n"]
        assert framing.preamble() == b"retry: 1500\n"

    @thorough
    @given(streams(), heartbeat_counts, cuts)
    def test_what_is_encoded_is_decoded_however_it_is_cut(
        self, events: list[StreamEvent[object]], heartbeats: list[int], cuts: list[int]
    ) -> None:
        body = sent(SSEFraming(), events, heartbeats)
        assert body.isascii()
        got = sse_decoded(*pieces_of(body, cuts))
        assert [(e.event, e.id, e.retry) for e in got] == [(e.type.value, str(e.offset), 2000) for e in events]
        assert [json.loads(e.data) for e in got] == [_shown(e) for e in events]
        assert [(e.event, e.id, e.data) for e in got] == httpx_sse_decoded(body)


def httpx_sse_decoded(body: bytes) -> list[tuple[str, str, str]]:
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body)
    events = httpx_sse.EventSource(response).iter_sse()
    # Unlike the standard, it also gives blocks without data.
    return [(event.event, event.id, event.data) for event in events if event.data]


@given(values)
def test_ascii_json_is_the_same_value_in_ascii(value: object) -> None:
    data = json.dumps(value, ensure_ascii=False).encode()
    assert ascii_json(data).isascii()
    assert json.loads(ascii_json(data)) == value


def test_ascii_json_gives_ascii_back_untouched() -> None:
    data = b'{"a": "\\u00e9"}'
    assert ascii_json(data) is data


def test_bodies_of_answers_that_do_not_stream() -> None:
    assert result_body('"é"'.encode()) == b'{"result":"\\u00e9"}'
    assert error_body(ErrorInfo("NOT_FOUND", "é")) == b'{"error":{"status":"NOT_FOUND","message":"\\u00e9","details":null}}'


class TestGenkitDecoder:
    @pytest.mark.parametrize(
        "body",
        [
            b'data: {"message":1}\n\ndata: {"result":2}\n\n',
            b'data:{"message":1}\n\ndata:{"result":2}\n\n',
            b'data: {"message":1}\r\n\r\ndata: {"result":2}\r\n\r\n',
            b'data: {"message":1}\r\rdata: {"result":2}\r\r',
            b'data: {"message":1}\ndata: {"result":2}\n',
            b'\n\n: hello\nid: 7\nevent: x\ndata:    {"message" : 1 , "new":[{}]}  \n\n\ndata\ndata: \n\ndata: {"result":2}\n',
            b'data: {"message":1}\n\ndata: {"ping":1}\n\nping\n\ndata: {"result":2}\n\ndata: {"result":3}\n\ndata: rubbish\n\n',
        ],
        ids=["genkit", "no-space", "CRLF", "CR", "no-blank-lines", "other-fields", "unknown-frames"],
    )
    def test_it_takes_what_servers_send_cut_at_every_byte(self, body: bytes) -> None:
        expected = [Message(b"1", None), Result(b"2", None)]
        assert decoded(body) == expected
        assert decoded(*(bytes([byte]) for byte in body)) == expected
        for cut in range(len(body)):
            assert decoded(body[:cut], b"", body[cut:]) == expected

    def test_a_character_may_be_split_across_packets(self) -> None:
        body = 'data: {"message":"é\u2028\U0001f44b"}\n\n'.encode()
        for cut in range(len(body)):
            assert decoded(body[:cut], body[cut:]) == [Message('"é\u2028\U0001f44b"'.encode(), None)]

    def test_json_is_given_as_it_came(self) -> None:
        (frame,) = decoded(b'data: {"offset":3,"message":{"b" : 1.50, "a":99999999999999999999}}\n\n')
        assert frame == Message(b'{"b" : 1.50, "a":99999999999999999999}', 3)

    @pytest.mark.parametrize("offset", ["-1", "1.5", "true", '"3"', "null", "9007199254740992", "{}", "1" * 30])
    def test_an_offset_that_is_not_ours_is_none(self, offset: str) -> None:
        assert decoded(f'data: {{"message":1,"offset":{offset}}}\n\n'.encode()) == [Message(b"1", None)]

    @pytest.mark.parametrize(
        ("error", "info"),
        [
            ('{"status":"NOT_FOUND","message":"no","details":{"a":1}}', ErrorInfo("NOT_FOUND", "no", {"a": 1})),
            ('{"status":"INTERNAL","message":"no"}', ErrorInfo("INTERNAL", "no")),
            ('{"status":"INTERNAL_SERVER_ERROR","message":"no"}', ErrorInfo("INTERNAL", "no")),
            ('{"error":{"status":"ABORTED","message":"no","details":null}}', ErrorInfo("ABORTED", "no")),
            ('{"code":5,"message":"no"}', ErrorInfo("UNKNOWN", "no")),
            ('{"status":[],"message":{}}', ErrorInfo("UNKNOWN", "")),
            ('"no"', ErrorInfo("UNKNOWN", "no")),
            ('{"error":"no"}', ErrorInfo("UNKNOWN", "no")),
            ("null", ErrorInfo("UNKNOWN", "")),
        ],
    )
    @pytest.mark.parametrize("field", ["data", "error"])
    def test_it_takes_every_form_of_an_error(self, field: str, error: str, info: ErrorInfo) -> None:
        assert decoded(f'{field}: {{"error":{error}}}\n\n'.encode()) == [Failure(info, None)]

    def test_the_two_forms_of_an_error_count_once(self) -> None:
        twins = b'data: {"error":{"status":"ABORTED","message":""},"offset":1}\n\nerror: {"error":{"status":"ABORTED"}}\n\n'
        assert decoded(twins) == [Failure(ErrorInfo("ABORTED", ""), 1)]
        assert decoded(*(bytes([byte]) for byte in twins)) == [Failure(ErrorInfo("ABORTED", ""), 1)]

    def test_finished_tells_whether_the_terminal_frame_has_come(self) -> None:
        decoder = GenkitDecoder(max_frame_bytes=30)
        decoder.feed(b'data: {"message":1}\n\ndata: {"result":1}')
        assert not decoder.finished
        decoder.feed(b"\n")
        assert decoder.finished
        assert decoder.feed(b"x" * 100) == []

    @pytest.mark.parametrize(
        ("body", "info"),
        [
            (b'{"status":"NOT_FOUND","message":"m","details":[1]}', ErrorInfo("NOT_FOUND", "m", [1])),
            (b'{"error":{"status":"ABORTED","message":"m"}}', ErrorInfo("ABORTED", "m")),
            (b'{"error":"words"}', ErrorInfo("UNKNOWN", "words")),
            (b'{"status":7,"message":7}', ErrorInfo("UNKNOWN", "")),
        ],
    )
    def test_an_error_is_read_from_a_body(self, body: bytes, info: ErrorInfo) -> None:
        assert error_of(body) == info

    @pytest.mark.parametrize("body", [b"", b"words", b"[]", b"null", b'{"error":' * 5000, b'{"a":' * 5000])
    def test_a_body_that_is_no_error_is_refused(self, body: bytes) -> None:
        with pytest.raises(InvalidArgumentError):
            error_of(body)

    @pytest.mark.parametrize(
        "payload",
        [
            b"rubbish",
            b"[]",
            b"1",
            b'"message"',
            b"{",
            b'{"message":tru}',
            b'{"message":1}{"message":2}',
            b'{"message":"\xff"}',
            b'{"message":NaN}',
            b'{"error":[]}',
            b'{"message":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        ],
    )
    def test_a_malformed_frame_is_an_error_that_stays(self, payload: bytes) -> None:
        decoder = GenkitDecoder()
        assert decoder.feed(b'data: {"message":1}\n\ndata: %b\n\ndata: {"result":2}\n\n' % payload) == [Message(b"1", None)]
        for data in (b"", b'data: {"result":2}\n\n'):
            with pytest.raises(InvalidArgumentError, match=r"^the server sent a frame that is not Genkit's$"):
                decoder.feed(data)
        assert not decoder.finished

    @pytest.mark.parametrize("size", [1, 7, 1000])
    def test_a_frame_that_is_too_long_is_refused_before_it_has_ended(self, size: int) -> None:
        decoder = GenkitDecoder(max_frame_bytes=40)
        fits = b'data: {"message":%b1}' % (b" " * 21)
        assert decoder.feed(fits + b"\n") == [Message(b"1", None)]
        *accepted, last = [(fits + b" ")[start : start + size] for start in range(0, 41, size)]
        for piece in accepted:
            assert decoder.feed(piece) == []
        with pytest.raises(LimitExceededError, match="more than 40 bytes"):
            decoder.feed(last)

    def test_the_limit_is_eight_mebibytes_unless_said_otherwise(self) -> None:
        largest = b'data: {"message":"%b"}' % (b"x" * (8 * 2**20 - 20))
        (frame,) = decoded(largest + b"\n\n")
        assert isinstance(frame, Message)
        with pytest.raises(LimitExceededError):
            decoded(largest + b" \n\n")

    @thorough
    @given(st.lists(st.binary(max_size=40) | st.sampled_from(FRAGMENTS)))
    def test_garbage_raises_nothing_but_our_errors(self, pieces: list[bytes]) -> None:
        decoder = GenkitDecoder(max_frame_bytes=64)
        for piece in pieces:
            try:
                frames = decoder.feed(piece)
            except StreamkeepError:
                continue
            assert len(frames) <= len(piece)


class TestSSEDecoder:
    def test_events_before_one_that_is_too_long_are_given_and_the_error_comes_then_and_always(self) -> None:
        decoder = SSEDecoder(max_event_bytes=20)
        events = decoder.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n\ndata: " + b"x" * 30 + b"\n\ndata: c\n\n")
        assert [event.data for event in events] == ["a", "b"]
        assert decoder.last_event_id == "2"
        for data in (b"", b"data: d\n\n"):
            with pytest.raises(LimitExceededError):
                decoder.feed(data)

    @pytest.mark.parametrize("decoder", [SSEDecoder(max_event_bytes=30), GenkitDecoder(max_frame_bytes=30)])
    def test_whoever_takes_them_one_by_one_has_the_error_behind_them(self, decoder: SSEDecoder | GenkitDecoder) -> None:
        given = decoder.decode(b'data: {"message":1}\n\ndata: ' + b"x" * 40)
        next(given)
        with pytest.raises(LimitExceededError):
            next(given)

    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ("data: This is the first message.\n\n", [("message", "This is the first message.", "")]),
            (
                "data: This is the second message, it\ndata: has two lines.\n\n",
                [("message", "This is the second message, it\nhas two lines.", "")],
            ),
            (
                "event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n",
                [("add", "73857293", ""), ("remove", "2153", ""), ("add", "113411", "")],
            ),
            ("data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10", "")]),
            (
                ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
                [("message", "first event", "1"), ("message", "second event", ""), ("message", " third event", "")],
            ),
            ("data\n\ndata\ndata\n\ndata:", [("message", "", ""), ("message", "\n", "")]),
            ("data:test\n\ndata: test\n\n", [("message", "test", ""), ("message", "test", "")]),
        ],
    )
    def test_the_examples_of_the_standard(self, body: str, expected: list[tuple[str, str, str]]) -> None:
        assert [(e.event, e.data, e.id) for e in sse_decoded(body.encode())] == expected

    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ("\ufeffdata: bom\n\n", [("bom", "")]),
            ("\ufeff\ufeffdata: two boms\n\n", []),
            ("data: a\n\n\ufeffdata: late bom\n\n", [("a", "")]),
            ("data: a\rdata: b\r\ndata: c\n\r\n", [("a\nb\nc", "")]),
            ("id: 1\ndata: a\n\ndata: b\n\nid: 2\n\ndata: c\n\n", [("a", "1"), ("b", "1"), ("c", "2")]),
            ("id: 1\0\ndata: a\n\n", [("a", "")]),
            ("id: 1\nid: 2\0\nid\n x: y\nDATA: no\ndata : no\ndata: a\n\n", [("a", "")]),
            ("event: x\n\ndata: a\n\n", [("a", "")]),
            ("event: x\nid: 9\n", []),
            ("data: \u2028\u0085\x0b\x0c\n\n", [("\u2028\u0085\x0b\x0c", "")]),
            ("data:  a: b \n\n", [(" a: b ", "")]),
        ],
    )
    def test_the_letter_of_the_standard(self, body: str, expected: list[tuple[str, str]]) -> None:
        for pieces in ([body.encode()], [bytes([byte]) for byte in body.encode()]):
            events = sse_decoded(*pieces)
            assert [(e.data, e.id) for e in events] == expected
            assert {e.event for e in events} <= {"message"}

    @pytest.mark.parametrize("number", ["", "-1", "+5", "1.5", "5 ", "１", "1_0", "x", "9" * 5000])
    def test_a_reconnection_time_that_is_not_digits_is_ignored(self, number: str) -> None:
        (event,) = sse_decoded(f"retry: 10\nretry:{number}\ndata: a\n\n".encode())
        assert event.retry == 10

    def test_blocks_without_data_move_what_a_reconnect_goes_by(self) -> None:
        decoder = SSEDecoder()
        assert decoder.feed(b"id: 5\nretry: 20\n") == []
        assert (decoder.last_event_id, decoder.retry) == ("", 20)
        assert decoder.feed(b"\n") == []
        assert (decoder.last_event_id, decoder.retry) == ("5", 20)
        assert decoder.feed(b"data: a\n\n") == [ServerSentEvent("message", "a", "5", 20)]

    def test_a_reconnect_begins_with_the_id_of_before(self) -> None:
        decoder = SSEDecoder(last_event_id="5")
        assert decoder.feed(b"data: a\n\nid\ndata: b\n\n") == [
            ServerSentEvent("message", "a", "5", None),
            ServerSentEvent("message", "b", "", None),
        ]

    def test_an_event_is_given_at_a_cr_without_waiting_for_what_follows(self) -> None:
        decoder = SSEDecoder()
        assert [e.data for e in decoder.feed(b"data: a\r\r")] == ["a"]
        assert [e.data for e in decoder.feed(b"\ndata: b\n\n")] == ["b"]

    def test_bytes_that_are_not_utf8_are_replaced(self) -> None:
        (event,) = sse_decoded(b"data: \xff\xe4\xb8", b"\n\n")
        assert event.data == "\ufffd\ufffd"

    @thorough
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["data", "id", "event", "comment", "", "data: x"]),
                st.text(st.sampled_from("ab: \u2028é\U0001f44b")),
                st.sampled_from(["\n", "\r\n", "\r"]),
            )
        ),
        cuts,
    )
    def test_it_reads_what_httpx_sse_reads(self, lines: list[tuple[str, str, str]], cuts: list[int]) -> None:
        body = "".join(f"{name}:{value}{end}{end if i % 3 == 0 else ''}" for i, (name, value, end) in enumerate(lines)).encode()
        ours = [(e.event, e.id, e.data) for e in sse_decoded(*pieces_of(body, cuts)) if e.data]
        assert ours == httpx_sse_decoded(body)

    @pytest.mark.parametrize("endless", [b"data: x\n", b"data\n", b"x", b": "])
    def test_an_event_that_is_too_long_is_refused(self, endless: bytes) -> None:
        decoder = SSEDecoder(max_event_bytes=100)
        for _ in range(100 // len(endless.rstrip(b"\n"))):
            assert decoder.feed(endless) == []
        with pytest.raises(LimitExceededError, match="more than 100 bytes"):
            decoder.feed(endless)

    def test_any_number_of_events_within_the_limit_is_taken(self) -> None:
        decoder = SSEDecoder(max_event_bytes=100)
        assert sum(len(decoder.feed(b"data: %b\n: comment\n\n" % (b"x" * 90))) for _ in range(100)) == 100

    @thorough
    @given(st.lists(st.binary(max_size=40) | st.sampled_from([b"data:", b"id: ", b"retry: 1", b"\n", b"\r", b"\n\n"])))
    def test_garbage_raises_nothing_but_our_errors(self, pieces: list[bytes]) -> None:
        decoder = SSEDecoder(max_event_bytes=64)
        for piece in pieces:
            try:
                assert len(decoder.feed(piece)) <= len(piece)
            except LimitExceededError:
                return


@pytest.mark.parametrize(
    ("accept", "query", "expected"),
    [
        ("text/event-stream", {}, True),
        ("application/json, Text/Event-Stream;q=0.9", {}, True),
        ("*/*", {}, False),
        ("", {"stream": "true"}, True),
        ("application/json", {"stream": "True"}, False),
        ("application/json", {"stream": "false", "other": "true"}, False),
    ],
)
def test_a_stream_is_asked_for_by_accept_or_by_query(accept: str, query: dict[str, str], *, expected: bool) -> None:
    assert wants_stream(accept, query) is expected


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        (b"", GenkitRequest(None, None, has_init=False)),
        (b"{}", GenkitRequest(None, None, has_init=False)),
        (b'{"data":null}', GenkitRequest(None, None, has_init=False)),
        (b'{"data":{"a":[1]},"more":2}', GenkitRequest({"a": [1]}, None, has_init=False)),
        (b'{"init":null}', GenkitRequest(None, None, has_init=True)),
        (b' {"data":0,"init":{"sessionId":"s"}} ', GenkitRequest(0, {"sessionId": "s"}, has_init=True)),
    ],
)
def test_a_request_is_genkits_envelope(body: bytes, request_: GenkitRequest) -> None:
    assert parse_body(body) == request_


@pytest.mark.parametrize(
    "body",
    [
        b"secret",
        b"[]",
        b'"secret"',
        b"null",
        b'{"data":"secret',
        b'{"data":"\xff"}',
        b'{"data":1e999}',
        b'{"data":' + b"9" * 5000 + b"}",
        b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"input":"secret"}',
        b'{"message":"secret"}',
        b'{"secret":1}',
    ],
)
def test_any_other_request_is_refused_without_repeating_it(body: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^the request's body ") as refused:
        parse_body(body)
    assert "secret" not in str(refused.value)


@given(st.binary(max_size=60))
def test_a_body_of_garbage_raises_nothing_but_our_error(body: bytes) -> None:
    with suppress(InvalidArgumentError):
        parse_body(body)


@pytest.mark.parametrize(
    ("text", "offset"),
    [(None, None), ("", None), ("-1", None), ("0", 0), ("41", 41), ("007", 7), ("9007199254740991", MAX_OFFSET)],
)
def test_an_offset_is_read(text: str | None, offset: int | None) -> None:
    assert parse_offset(text) == offset


@pytest.mark.parametrize(
    "text", ["-2", "+1", " 1", "1 ", "1.0", "1_0", "0x1", "１", "²", "now", "9007199254740992", "1" * 5000, "1\n", "\0", "--1"]
)
def test_any_other_offset_is_refused(text: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^an offset is a whole number from 0 to 9007199254740991, in ASCII digits$"
    ):
        parse_offset(text)
