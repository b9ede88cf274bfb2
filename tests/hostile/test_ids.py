"""Ids that belong to others, are guessed, or are no ids: the answer is that for an unknown one, byte for byte, and nothing else moves."""

import itertools
import re
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import Final
from urllib.parse import quote, unquote_to_bytes

import pytest
from tests.hostile.servers import APPS, ID, KNOWN, STREAMING, House, Target, house
from tests.hostile.sockets import Answer, Connection, ask, request

from streamkeep import StreamManager
from streamkeep.errors import PublicError
from streamkeep.http import Access

Way = tuple[str, bytes, tuple[bytes, ...]]
"""A method, a path and fields, with `%b` where the id goes."""

ALICE: Final = "alice"
MALLORY: Final = "mallory"
NOBODY: Final = ""


def who_asks(access: Access) -> str:
    """Let in who says a name."""
    if "authorization" not in access.headers:
        raise PublicError("UNAUTHENTICATED", "sign in")
    return access.headers["authorization"]


@pytest.fixture(scope="module", params=APPS)
def guarded(request: pytest.FixtureRequest) -> Generator[House]:
    """Give a server that asks who is there."""
    with house(request.param, authorize=who_asks) as target:
        yield target


# Others'

METHODS: Final = ("GET", "POST", "DELETE", "PUT", "HEAD")
TARGETS: Final = (
    b"/echo",
    b"/echo?stream=true",
    b"/few",
    b"/few/",
    b"//echo",
    b"/nowhere",
    b"/echo/%b",
    b"/streams/%b",
    b"/streams/%b/info",
    b"/streams/%b/cancel",
    b"/streams/%b?after=-1",
    b"/streams/%b?after=99",
    b"/streams/%b/",
    b"/streams//%b",
    b"/streams/./%b",
    b"/streams/x/../%b",
    b"/streams/%b%2finfo",
    b"/streams/%b;x=y",
    b"/echo?streamId=%b&x-genkit-stream-id=%b",
)
FIELDS: Final[tuple[tuple[bytes, ...], ...]] = (
    (),
    (ID + b"%b",),
    (ID + b"%b", STREAMING),
    (ID + b"%b", b"X-Genkit-Stream-Offset: 0"),
    (ID + b"%b", b"X-Genkit-Stream-Offset: 99"),
    (ID + b"%b", b"Last-Event-ID: x"),
    (b"Last-Event-ID: %b",),
    (b"Last-Event-ID: 1",),
    (b"X-Genkit-Stream-Offset: %b",),
    (ID + b"%b", b"X-HTTP-Method-Override: DELETE", b"X-Original-URL: /streams/%b/cancel"),
    (b"Cookie: x-genkit-stream-id=%b", b"Referer: http://streams.example/streams/%b"),
)
EVERY_WAY: Final[Sequence[Way]] = tuple(itertools.product(METHODS, TARGETS, FIELDS))


def asking(target: Target, name: str, stream_ids: Sequence[str], ways: Sequence[Way]) -> Iterator[Answer]:
    """Ask for streams, one id after the other, in all these ways; a connection is used again, as clients do."""
    who = (b"Authorization: " + name.encode(),) if name else ()
    with ExitStack() as stack:
        connection = stack.enter_context(Connection(target.address))
        for (method, path, fields), stream in zip(ways, itertools.cycle(stream_ids), strict=False):
            put = [part.replace(b"%b", stream.encode()) for part in (path, *fields)]
            connection.send(request(method, put[0], *put[1:], *who, body=b'{"data":0}'))
            answer = connection.answer(to_head=method == "HEAD")
            yield without(answer, stream)
            if answer.headers.get("connection") == "close":
                connection = stack.enter_context(Connection(target.address))


def without(answer: Answer, stream: str) -> Answer:
    """Take out the id that was asked for: who is sent to another path is told it again."""
    fields = tuple((name, value.replace(stream, "ID")) for name, value in answer.fields)
    return Answer(answer.code, fields, answer.body.replace(stream.encode(), b"ID"))


def told_apart(target: House, name: str, stream_ids: Sequence[str], ways: Sequence[Way]) -> list[Way]:
    """Give the ways in which the answer is not that for an unknown id."""
    unknown = [str(uuid.uuid4())]
    compared = zip(ways, asking(target, name, stream_ids, ways), asking(target, name, unknown, ways), strict=True)
    return [way for way, answer, expected in compared if answer != expected and "x-genkit-stream-id" not in expected.headers]


async def leave_streams_of_alice(house: House) -> list[str]:
    """Give the ids of streams in each state that were started through /echo; a chunk of each is secret."""
    stream_ids = [str(uuid.uuid4()) for _ in range(3)]
    handles = [await house.streams.open(stream, owner=ALICE, metadata={"route": "/echo"}) for stream in stream_ids]
    house.kept.append(handles[0])
    for handle in handles:
        await handle.write("secret")
    await handles[1].done("secret")
    await handles[2].error(PublicError("ABORTED", "secret"))
    return stream_ids


async def states(streams: StreamManager, stream_ids: Sequence[str]) -> list[tuple[str, int]]:
    """Say how streams stand."""
    infos = [await streams.info(stream) for stream in stream_ids]
    return [(info.status, info.tail) for info in infos]


@pytest.mark.parametrize("name", [MALLORY, NOBODY], ids=["another-user", "nobody"])
def test_a_stream_of_another_is_an_unknown_one_in_every_way_of_asking(guarded: House, name: str) -> None:
    stream_ids = guarded.run(leave_streams_of_alice, guarded)
    before = guarded.run(states, guarded.streams, stream_ids)
    assert told_apart(guarded, name, stream_ids, EVERY_WAY) == []
    assert guarded.run(states, guarded.streams, stream_ids) == before


def test_a_stream_of_another_route_is_an_unknown_one_even_to_its_owner(guarded: House) -> None:
    stream_ids = guarded.run(leave_streams_of_alice, guarded)
    before = guarded.run(states, guarded.streams, stream_ids)
    elsewhere = [way for way in EVERY_WAY if not way[1].startswith((b"/echo", b"/streams"))]
    assert told_apart(guarded, ALICE, stream_ids, elsewhere) == []
    assert guarded.run(states, guarded.streams, stream_ids) == before


def test_its_owner_is_told_it_apart_in_the_ways_that_are_meant(guarded: House) -> None:
    """The comparison above sees what there is to see."""
    stream_ids = guarded.run(leave_streams_of_alice, guarded)[1:2]
    plainly = [way for way in EVERY_WAY if way[2] in FIELDS[:3]]
    seen = {(method, path) for method, path, _ in told_apart(guarded, ALICE, stream_ids, plainly)}
    by_header = {(method, path) for method in ("POST", "DELETE") for path in TARGETS if path.startswith(b"/echo")}
    assert seen >= {("GET", b"/streams/%b"), ("GET", b"/streams/%b/info"), ("DELETE", b"/streams/%b")}
    assert seen >= {("POST", b"/streams/%b/cancel"), ("POST", b"/echo"), ("DELETE", b"/echo")}
    assert {way for way in seen if not way[1].startswith(b"/streams")} <= by_header


def test_who_is_rejected_is_rejected_before_anything_is_said_of_a_stream(guarded: House) -> None:
    stream = guarded.run(leave_streams_of_alice, guarded)[0]
    ours = [
        ("GET", b"/streams/%b"),
        ("GET", b"/streams/%b/info"),
        ("DELETE", b"/streams/%b"),
        ("POST", b"/streams/%b/cancel"),
        ("POST", b"/echo"),
        ("DELETE", b"/echo"),
    ]
    for method, path in ours:
        for known in (stream, str(uuid.uuid4())):
            answer = ask(guarded.address, method, path.replace(b"%b", known.encode()), ID + known.encode(), STREAMING, body=b"")
            assert answer.code == 401
            assert b"sign in" in answer.body


# Guessed


def start(target: Target, *fields: bytes, path: bytes = b"/few") -> Answer:
    """Ask for a new stream."""
    kind = (STREAMING, b"Content-Type: application/json")
    return ask(target.address, "POST", path, *kind, *fields, body=b'{"data":0}')


def test_an_id_is_122_bits_that_nobody_has_chosen(served: House) -> None:
    given = [start(served).headers["x-genkit-stream-id"] for _ in range(50)]
    assert len(set(given)) == 50
    assert {(uuid.UUID(stream).version, uuid.UUID(stream).variant) for stream in given} == {(4, uuid.RFC_4122)}


def test_a_client_cannot_choose_the_id_of_a_new_stream(served: House) -> None:
    chosen = "chosen-by-me"
    before = served.stream_ids()
    assert start(served, ID + chosen.encode()).code == 204  # that is a resume, of nothing
    assert served.stream_ids() == before
    ways = [b"X-Stream-Id", b"Stream-Id", b"X-Genkit-Stream_Id", b"X_Genkit_Stream_Id", b"Last-Event-ID", b"X-Request-Id"]
    for field in ways:
        start(served, field + b": " + chosen.encode())
    for path in (b"/few?streamId=" + chosen.encode(), b"/few?x-genkit-stream-id=" + chosen.encode()):
        start(served, path=path)
    assert chosen not in served.stream_ids()


def test_an_id_that_is_named_twice_names_nothing(served: House) -> None:
    for method in ("POST", "DELETE"):
        answer = ask(served.address, method, b"/few", ID + KNOWN.encode(), ID + KNOWN.encode(), body=b"")
        assert answer.code == 400


# No ids

PIECES: Final = (
    *(b"..", b".", b"/", b"//", b"%2f", b"%2e%2e", b"%252e%252e%252f", b";", b"?", b"#", b"\\", b"%5c", b" "),
    *(b"%00", b"%0d%0aX-Injected:%20yes", b"%0aX-Injected:%20yes", b"%e2%80%a8", b"%c0%ae", b"%ff", b"%", b"%zz", b"\xff"),
)
LOOK_ALIKES: Final = (
    "ｋnown",
    "knоwn",
    "known\u200b",
    "known\u0301",
    "ｋｎｏｗｎ",
    "\u202eknown",
    "ﬁle",
    "\u2024\u2024",
    "\u2215",
    "K\u212a",
)
HOSTILE_IDS: Final = (
    *(piece + KNOWN.encode() for piece in PIECES),
    *(KNOWN.encode() + piece for piece in PIECES),
    *(piece + KNOWN.encode() + piece for piece in PIECES),
    *PIECES,
    *(text.encode() for text in LOOK_ALIKES),
    *(quote(text).encode() for text in LOOK_ALIKES),
    b"k" * 255,
    b"k" * 256,
    b"k" * 8_000,
    b"KNOWN",
    b"known,known",
)
FIELD_NAMES: Final = {
    "content-type",
    "content-length",
    "transfer-encoding",
    "connection",
    "cache-control",
    "server",
    "allow",
    "location",
}
OUR_NAMES: Final = FIELD_NAMES | {
    "x-accel-buffering",
    "x-content-type-options",
    "x-genkit-stream-id",
    "access-control-expose-headers",
}


def answers_to(target: Target, data: bytes) -> bytes:
    """Send this as it is, and give everything that comes back; the server may also just hang up."""
    with Connection(target.address) as connection:
        connection.send(data)
        return connection.rest()


def expect_nothing_but_a_refusal(received: bytes, asked: bytes) -> None:
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert re.match(rb"HTTP/1\.1 (2|3|4)\d\d ", lines[0]), (asked, received)
    names = {line.partition(b":")[0].decode().lower() for line in lines[1:]} - {"date"}
    assert names <= OUR_NAMES, (asked, received)
    assert b"Traceback" not in body
    if b"event: done" in body:  # another spelling of the same id, and not another stream
        assert body.endswith(b'event: done\ndata: "known"\n\n') or b'"known"' in body, (asked, received)


@pytest.mark.parametrize("place", ["path", "info", "header", "offset", "last-event-id", "after"])
def test_what_is_no_id_or_offset_is_refused_wherever_it_stands_and_injects_nothing(anywhere: Target, place: str) -> None:
    for hostile in HOSTILE_IDS:
        expect_nothing_but_a_refusal(answers_to(anywhere, placed(place, hostile)), hostile)
    assert anywhere.is_alive()


def placed(place: str, hostile: bytes) -> bytes:
    """Give a request with this in some place."""
    close = b"Connection: close"
    known = f"/streams/{KNOWN}".encode()
    match place:
        case "path":
            return request("GET", b"/streams/" + hostile, close)
        case "info":
            return request("GET", b"/streams/" + hostile + b"/info", close)
        case "header":
            return request("POST", b"/few", close, ID + unquote_to_bytes(hostile), body=b"")
        case "offset":
            return request("POST", b"/few", close, ID + KNOWN.encode(), b"X-Genkit-Stream-Offset: " + hostile, body=b"")
        case "last-event-id":
            return request("GET", known, close, b"Last-Event-ID: " + unquote_to_bytes(hostile))
        case _:
            return request("GET", known + b"?after=" + hostile, close)


def test_a_path_that_pretends_to_be_mounted_elsewhere_leads_nowhere_else(anywhere: Target) -> None:
    for path in (
        b"/streams/streams/known",
        b"/known",
        b"/STREAMS/known",
        b"/streams",
        b"/streams/",
        b"/xstreams/known",
        b"*",
        b"/",
    ):
        answer = ask(anywhere.address, "GET", path, b"X-Forwarded-Prefix: /streams", b"X-Script-Name: /streams")
        assert answer.code in {307, 400, 404}, path
    absolute = ask(anywhere.address, "GET", b"http://elsewhere.example/streams/known", b"Connection: close")
    assert absolute.code in {200, 400, 404}


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "PROPFIND", "SUBSCRIBE"])
def test_another_method_does_nothing(anywhere: Target, method: str) -> None:
    overrides = (b"X-HTTP-Method-Override: DELETE", b"X-Method-Override: DELETE", b"X-HTTP-Method: DELETE")
    for path in (f"/streams/{KNOWN}".encode(), f"/streams/{KNOWN}/cancel".encode(), b"/few?_method=DELETE"):
        answer = ask(anywhere.address, method, path, *overrides, ID + KNOWN.encode(), b"Connection: close", body=b"")
        is_read = method == "HEAD" and path.endswith(KNOWN.encode())
        assert answer.code in ({200} if is_read else {404, 405}), (path, answer)
        assert b"Override" not in answer.body  # a TRACE would repeat what was sent, cookies included
    assert anywhere.is_alive()
