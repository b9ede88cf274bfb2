"""Random bytes for whatever reads bytes: only the errors that are documented come out, and how packets are cut changes nothing.

`tests/http/test_wire.py` has what well-formed and plainly broken input gives; here are valid inputs with a few bytes changed, on which
a decoder comes far before it fails. Each property is a strategy and a check, for the tests and for `python -m tests.hostile`.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import anyio
import msgspec
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from tests.http.servers import frames_of

from streamkeep import InMemoryStreamManager, StreamEvent, StreamEventType
from streamkeep._depth import MAX_DEPTH
from streamkeep._lifecycle import life_of
from streamkeep.errors import InvalidArgumentError, LimitExceededError, StorageCorruptError
from streamkeep.events import MAX_OFFSET, ErrorInfo, chunk_record, done_record, error_record, event_of
from streamkeep.http import DurableStreaming
from streamkeep.http.framing import GenkitFraming, SSEFraming, parse_offset
from streamkeep.http.place import query_of
from streamkeep.http.response import Message, Receive, Scope, Send, headers_of
from streamkeep.storage import Head
from streamkeep.wire import Failure, GenkitDecoder, SSEDecoder, parse_body, wants_stream

GENKIT: Final = (
    b'data: {"message":{"text":"\\u00e9"},"offset":0}\n\n',
    b'data: {"message":null}\n\n',
    b'data:   {"message":[1,2,{"a":"b"}],"offset":9007199254740991}\r\n\r\n',
    b'data: {"result":"\\ud83d\\ude00"}\n\n',
    b'data: {"error":{"status":"NOT_FOUND","message":"no","details":{"a":1}},"offset":3}\n\n',
    b'error: {"error":{"status":"INTERNAL","message":"x","details":null}}\n\n',
    b'error: {"error":{"error":{"status":"X"}}}\n\n',
    b": comment\n\n",
    'data: {"message":"é\u2028"}\n\n'.encode(),
)
SSE: Final = (
    b"retry: 2000\nevent: chunk\ndata: 1\nid: 0\n\n",
    b"data: a\ndata: b\r\n\r\n",
    b"id\nevent: done\rdata\r\r",
    b"\xef\xbb\xbfdata: x\n\n",
    b": \n",
)
BODIES: Final = (
    b'{"data":{"a":[1,2.5,"\\u2028",null,true]}}',
    b'{"data":1,"init":{"sessionId":"s"}}',
    b'{"init":null}',
    b"{}",
    b'{"data":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}",
)
STATES: Final = (
    b'{"created_at":1.5,"writer":"w","lease_until":2.5,"status":"open","error":null,"metadata":{"owner":"\xc3\xa9"}}',
    b'{"created_at":1,"status":"error","error":"ABORTED","x":[[[]]]}',
    b'{"created_at":1}',
)
RECORDS: Final = (
    chunk_record({"a": ["é", None]}),
    done_record("x"),
    error_record(ErrorInfo("ABORTED", "gone", {"a": 1}, "internal")),
)
WORDS: Final = (
    *(
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"\0",
        b'"',
        b"\\",
        b"\\ud800",
        b"\xff",
        b"\xe2\x80\xa8",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b":",
        b" ",
    ),
    *(
        b"data: ",
        b"error: ",
        b"id: ",
        b"{",
        b"}",
        b"[" * 400,
        b'{"a":' * 400,
        b"[" * 5_000,
        b"1e999",
        b"-0",
        b"9" * 400,
        b"null",
        b"NaN",
    ),
)


def changed(valid: tuple[bytes, ...], *, most: int = 3) -> st.SearchStrategy[bytes]:
    """Give some of these in a row, with a few changes."""

    @st.composite
    def draw_from(draw: st.DrawFn) -> bytes:
        data = b"".join(draw(st.lists(st.sampled_from(valid), min_size=1, max_size=most)))
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, len(data)))
            until = min(len(data), at + draw(st.integers(0, 6)))
            data = data[:at] + draw(st.sampled_from(WORDS) | st.binary(max_size=4)) + data[until:]
        return data

    return draw_from()


CUTS: Final = st.lists(st.integers(0, 400), max_size=6)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut bytes at these places."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


# Checks


def reads_genkit_alike_however_cut(data: bytes, cuts: list[int]) -> None:
    """Frames, error and end are those of the whole."""
    assert genkit_read([data]) == genkit_read(pieces(data, cuts)) == genkit_read([bytes([byte]) for byte in data])


def genkit_read(packets: list[bytes]) -> tuple[list[object], str, bool]:
    decoder = GenkitDecoder(max_frame_bytes=4_000)
    frames: list[object] = []
    for packet in (*packets, b""):
        try:
            frames += decoder.feed(packet)
        except (InvalidArgumentError, LimitExceededError) as error:
            return frames, type(error).__name__, decoder.finished
    return frames, "", decoder.finished


def reads_sse_alike_however_cut(data: bytes, cuts: list[int]) -> None:
    """So are events, error and what a reconnect goes by."""
    assert sse_read([data]) == sse_read(pieces(data, cuts)) == sse_read([bytes([byte]) for byte in data])


def sse_read(packets: list[bytes]) -> object:
    decoder = SSEDecoder(max_event_bytes=4_000)
    events: list[object] = []
    try:
        for packet in [*packets, b""]:  # an error behind events comes with what is fed next
            events += decoder.feed(packet)
    except LimitExceededError:
        return events, "too long"
    return events, decoder.last_event_id, decoder.retry


def takes_or_refuses_a_body(data: bytes) -> None:
    """A body is Genkit's envelope, of bounded depth, or refused."""
    with suppress(InvalidArgumentError):
        request = parse_body(data)
        msgspec.json.encode(request.data)
        assert not _deeper_than(request.data, MAX_DEPTH)


def _deeper_than(value: object, depth: int) -> bool:
    match value:
        case dict():
            return depth == 0 or any(_deeper_than(inner, depth - 1) for inner in value.values())
        case list():
            return depth == 0 or any(_deeper_than(inner, depth - 1) for inner in value)
        case _:
            return False


def takes_or_refuses_a_head(data: bytes) -> None:
    """Headers and a query of any bytes are read, or refused; so is an offset in them."""
    scope: Scope = {
        "headers": [(b"Accept", data), (data, b"x"), (b"accept", b"y"), (b"Last-Event-ID", data)],
        "query_string": data,
    }
    headers = headers_of(scope)
    query: Mapping[str, str] = {}
    with suppress(InvalidArgumentError):
        query = query_of(scope)
    assert isinstance(wants_stream(headers["accept"], query), bool)
    for text in (headers["last-event-id"], query.get("after"), data.decode(errors="replace")):
        with suppress(InvalidArgumentError):
            offset = parse_offset(text)
            assert offset is None or 0 <= offset <= MAX_OFFSET


def reads_a_head_or_calls_it_corrupt(data: bytes) -> None:
    """A storage may hold anything under a head's state."""
    with suppress(StorageCorruptError):
        life_of(Head(1, 0, data, 0.0))


def reads_a_record_or_calls_it_corrupt(data: bytes) -> None:
    """A storage may hold anything in its log."""
    with suppress(StorageCorruptError):
        event: StreamEvent[object] = event_of(data, 0)
        assert event.data == data[1:]


def writes_one_frame(chunk: bytes) -> None:
    """Whatever JSON a producer brings, with whatever spaces and line ends in it: one frame, and that chunk in it."""
    event: StreamEvent[object] = event_of(chunk_record(msgspec.Raw(chunk)), 7)
    for framing, decoder in ((GenkitFraming(), GenkitDecoder()), (SSEFraming(), SSEDecoder())):
        sent = framing.event(event, "7")
        assert sent.isascii()
        assert b"\r" not in sent
        assert b"\0" not in sent
        assert sent.find(b"\n\n") == len(sent) - 2
        (frame,) = decoder.feed(sent)
        assert not isinstance(frame, Failure)
        assert msgspec.json.decode(frame.data) == msgspec.json.decode(chunk)


def ends_the_stream_whatever_the_inner_app_sends(data: bytes, cuts: list[int]) -> None:
    """An app inside `DurableStreaming` may send anything as its stream: the reader gets whole frames, and one end."""
    events, sent, is_genkits = anyio.run(_around, pieces(data, cuts))
    assert events[-1] in (StreamEventType.DONE, StreamEventType.ERROR)
    assert set(events[:-1]) <= {StreamEventType.CHUNK}
    if is_genkits:
        assert len(frames_of(sent)) == len(events)
    else:
        assert len(SSEDecoder().feed(sent)) == len(events) - (events[-1] is StreamEventType.DONE)


async def _around(packets: list[bytes]) -> tuple[list[StreamEventType], bytes, bool]:
    async def inner(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for packet in packets:
            await send({"type": "http.response.body", "body": packet, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive() -> Message:
        if not asked:
            asked.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    asked: list[bool] = []
    sent: list[bytes] = []
    scope: Scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/",
        "query_string": b"stream=true",
        "headers": [],
    }
    with anyio.fail_after(20):
        async with InMemoryStreamManager() as streams:
            app = DurableStreaming(inner, streams)
            async with app._http:
                await app(scope, receive, send)
                (info,) = await streams.list()
                async with streams.subscribe(info.id) as subscription:
                    events = [event.type async for event in subscription]
    return events, b"".join(sent), not info.metadata["answer"]


# JSON as no encoder of ours would write it

_SPACE: Final = st.text(st.sampled_from(" \t\n\r"), max_size=3)
_TEXT: Final = st.text(st.characters(codec="utf-8") | st.sampled_from('\x7f\x85\u2028\u2029"\\/'), max_size=6)
_VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def loose_json(draw: st.DrawFn) -> bytes:
    """Give JSON with spaces and line ends between its tokens."""

    def written(value: object) -> str:
        match value:
            case dict():
                items = ",".join(f"{spaced(key)}:{spaced(inner)}" for key, inner in value.items())
                return f"{{{items or draw(_SPACE)}}}"
            case list():
                return f"[{','.join(map(spaced, value)) or draw(_SPACE)}]"
            case _:
                return msgspec.json.encode(value).decode()

    def spaced(value: object) -> str:
        return draw(_SPACE) + written(value) + draw(_SPACE)

    return spaced(draw(_VALUES)).encode()


# How slow, large or picky a strategy is says nothing of what is tested.
_SUPPRESSED: Final = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
]


@dataclass(frozen=True, slots=True)
class Property:
    """What holds of all that a strategy gives."""

    check: Callable[..., object]
    given: Mapping[str, st.SearchStrategy[Any]]
    cost: int = 1
    """How many examples of others one of these is worth."""

    def holds(self, *, seed: int, examples: int) -> int:
        """Try so many examples, and give how many; raises what the check raises, on the smallest example found."""
        count = 0

        @seeded(seed)
        @settings(
            max_examples=-(-examples // self.cost),
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=_SUPPRESSED,
        )
        @given(**self.given)
        def attempt(**values: Any) -> None:
            nonlocal count
            count += 1
            self.check(**values)

        attempt()
        return count


PROPERTIES: Final = {
    found.check.__name__: found
    for found in (
        Property(reads_genkit_alike_however_cut, {"data": changed(GENKIT), "cuts": CUTS}),
        Property(reads_sse_alike_however_cut, {"data": changed(SSE), "cuts": CUTS}),
        Property(takes_or_refuses_a_body, {"data": changed(BODIES, most=1)}),
        Property(
            takes_or_refuses_a_head,
            {"data": st.binary(max_size=60) | changed((b"after=1&stream=true", b"text/event-stream", b"41"))},
        ),
        Property(reads_a_head_or_calls_it_corrupt, {"data": changed(STATES, most=1)}),
        Property(reads_a_record_or_calls_it_corrupt, {"data": st.binary(max_size=20) | changed(RECORDS, most=1)}),
        Property(writes_one_frame, {"chunk": loose_json()}),
        Property(ends_the_stream_whatever_the_inner_app_sends, {"data": changed(GENKIT), "cuts": CUTS}, cost=5),
    )
}
