"""What we send, fed to Genkit's real JavaScript client: it takes every frame of ours, and what we never send, it does not."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from streamkeep.errors import Status
from streamkeep.events import ErrorInfo, StreamEvent, chunk_record, done_record, error_record, event_of
from streamkeep.http.framing import GenkitFraming, error_body, result_body

if TYPE_CHECKING:
    from tests.http.conftest import GenkitClient

HEAD: Final = "HTTP/1.1 {} X\r\nContent-Type: {}\r\nX-Genkit-Stream-Id: s-1\r\nTransfer-Encoding: chunked\r\n\r\n"
STARTED: Final[dict[str, object]] = {"streamId": "s-1"}

Answer = Callable[[], AsyncIterator[bytes]]


@asynccontextmanager
async def served(answer: Answer, *, code: int = 200, content_type: str = "text/event-stream") -> AsyncGenerator[str]:
    """Serve one URL, whose every answer is these packets, each an HTTP chunk of its own, and give the URL."""

    async def handle(connection: SocketStream) -> None:
        async with connection:
            await _read_request(connection)
            await connection.send(HEAD.format(code, content_type).encode())
            async for packet in answer():
                await connection.send(b"%x\r\n%b\r\n" % (len(packet), packet))
            await connection.send(b"0\r\n\r\n")

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        yield f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}/flow"
        tasks.cancel_scope.cancel()


async def _read_request(connection: SocketStream) -> None:
    received = b""
    while b"\r\n\r\n" not in received:
        received += await connection.receive()
    head, _, body = received.partition(b"\r\n\r\n")
    (length,) = (int(line.partition(b":")[2]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += await connection.receive()


def packets(*frames: bytes) -> Answer:
    async def answer() -> AsyncIterator[bytes]:
        for frame in frames:
            yield frame

    return answer


def chunk(value: object, offset: int) -> StreamEvent[object]:
    return event_of(chunk_record(value), offset)


def done(value: object, offset: int) -> StreamEvent[object]:
    return event_of(done_record(value), offset)


def failed(status: Status, message: str, details: object, offset: int) -> StreamEvent[object]:
    return event_of(error_record(ErrorInfo(status, message, details, "the traceback")), offset)


def frame_of(framing: GenkitFraming, event: StreamEvent[object]) -> bytes:
    return framing.event(event, str(event.offset))


async def lines_of(client: "GenkitClient", *frames: bytes) -> list[dict[str, object]]:
    """Give what the client says of a body of these packets, beside the stream's id."""
    async with served(packets(*frames)) as url:
        first, *lines = await client(url=url, input={"question": 1})
    assert first == STARTED
    return lines


async def test_chunks_and_the_result_arrive_in_order(genkit_client: "GenkitClient") -> None:
    framing = GenkitFraming()
    body = [frame_of(framing, event) for event in (chunk({"text": "a"}, 0), chunk({"text": "b"}, 1), done({"text": "ab"}, 2))]
    expected = [{"chunk": {"text": "a"}}, {"chunk": {"text": "b"}}, {"output": {"text": "ab"}}]
    assert await lines_of(genkit_client, *body) == expected
    assert await lines_of(genkit_client, b"".join(body)) == expected


async def test_heartbeats_are_not_seen(genkit_client: "GenkitClient") -> None:
    framing = GenkitFraming()
    body = [framing.preamble(), framing.heartbeat(), framing.heartbeat(), framing.heartbeat(), frame_of(framing, chunk(1, 0))]
    body += [frame_of(framing, chunk(2, 1)), framing.heartbeat(), frame_of(framing, done(3, 2)), framing.heartbeat()]
    assert await lines_of(genkit_client, *filter(None, body)) == [{"chunk": 1}, {"chunk": 2}, {"output": 3}]


@pytest.mark.parametrize("nothing", [None, 0, False, "", [], {}], ids=repr)
async def test_values_that_are_false_arrive(genkit_client: "GenkitClient", nothing: object) -> None:
    framing = GenkitFraming()
    body = [frame_of(framing, chunk(nothing, 0)), frame_of(framing, done(nothing, 1))]
    assert await lines_of(genkit_client, *body) == [{"chunk": nothing}, {"output": nothing}]


async def test_any_character_arrives_whole_though_every_byte_is_a_packet(genkit_client: "GenkitClient") -> None:
    text = "\u2028\u2029\u0085 é 世界 \U0001f44b\U0001f3fd \x00\x7f\\ \"'\r\n\n data: "
    framing = GenkitFraming()
    body = frame_of(framing, chunk({text: text}, 0)) + frame_of(framing, done(text, 1))
    assert await lines_of(genkit_client, *(bytes([byte]) for byte in body)) == [{"chunk": {text: text}}, {"output": text}]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            lambda framing: frame_of(framing, failed("NOT_FOUND", "no such é", {"a": 1}, 1)),
            "NOT_FOUND: no such é\n[object Object]",
        ),
        (lambda framing: frame_of(framing, failed("INTERNAL", "internal", None, 1)), "INTERNAL: internal\nnull"),
        (lambda framing: framing.error(ErrorInfo("UNAVAILABLE", "closing")), "UNAVAILABLE: closing\nnull"),
        (
            lambda framing: framing.heartbeat() + framing.error(ErrorInfo("UNAVAILABLE", "closing")),
            "UNAVAILABLE: closing\nnull",
        ),
    ],
    ids=["with-details", "without-details", "of-the-transport", "after-a-heartbeat"],
)
async def test_an_error_in_a_packet_of_its_own_loses_no_chunk(
    genkit_client: "GenkitClient", error: Callable[[GenkitFraming], bytes], says: str
) -> None:
    framing = GenkitFraming()
    seen = anyio.Event()

    async def answer() -> AsyncIterator[bytes]:
        yield frame_of(framing, chunk("before", 0))
        await seen.wait()
        yield error(framing)

    async with served(answer) as url, genkit_client.live(url=url) as client:
        assert [await client.next_line(), await client.next_line()] == [STARTED, {"chunk": "before"}]
        seen.set()
        assert [line async for line in client] == [{"error": says}]


async def silence() -> AsyncIterator[bytes]:
    """Answer with a head, and nothing after it."""
    await anyio.sleep_forever()
    yield b""


async def test_a_client_that_aborts_is_told_so_and_ends(genkit_client: "GenkitClient") -> None:
    framing = GenkitFraming()

    async def answer() -> AsyncIterator[bytes]:
        yield frame_of(framing, chunk(0, 0)) + frame_of(framing, chunk(1, 1))
        await anyio.sleep_forever()

    async with served(answer) as url:
        *received, late = await genkit_client(url=url, abortAfter=2)
    async with served(silence) as url:
        started, early = await genkit_client(url=url, abortAfter=0)
    assert received == [STARTED, {"chunk": 0}, {"chunk": 1}]
    assert started == STARTED
    assert all("operation was aborted" in str(line["error"]) for line in (late, early))  # the rest is Node's, and has changed


async def test_run_flow_takes_our_bodies(genkit_client: "GenkitClient") -> None:
    async with served(packets(result_body('{"é":null}'.encode())), content_type="application/json") as url:
        assert await genkit_client("run", url=url, input=1) == [{"output": {"é": None}}]
    body = error_body(ErrorInfo("NOT_FOUND", "no"))
    async with served(packets(body), code=404, content_type="application/json") as url:
        assert await genkit_client("run", url=url) == [{"error": f"Server returned: 404: {body.decode()}"}]


# What we never send, and why: the client's own defects, which a new release of it may mend.


@pytest.mark.parametrize(
    "never_sent",
    [
        b": comment\n\n",
        b"id: 0\n",
        b"event: message\n",
        b"retry: 1000\n\n",
        b"\n\n",
        b'data:{"message":0}\n\n',
        b"data: 1\ndata: 2\n\n",
    ],
    ids=["comment", "id", "event", "retry", "empty", "no-space", "two-lines"],
)
async def test_the_client_dies_of_other_framing(genkit_client: "GenkitClient", never_sent: bytes) -> None:
    (line,) = await lines_of(genkit_client, never_sent + frame_of(GenkitFraming(), done("never", 0)))
    assert line.keys() == {"error"}


@pytest.mark.parametrize(
    "body",
    [(frame_of(GenkitFraming(), chunk(1, 0)),), (frame_of(GenkitFraming(), done(1, 0)).replace(b"\n", b"\r\n"),)],
    ids=["no-terminal-frame", "CRLF"],
)
async def test_the_client_spins_for_ever_and_is_killed(genkit_client: "GenkitClient", body: Sequence[bytes]) -> None:
    async with served(packets(*body)) as url, genkit_client.live(url=url) as client:
        assert await client.next_line() == STARTED
        with anyio.move_on_after(1) as spinning:
            assert not [line async for line in client if line.keys() & {"output", "error"}]
    assert spinning.cancelled_caught


async def test_a_silent_server_is_reported_by_the_program_itself(genkit_client: "GenkitClient") -> None:
    async with served(silence) as url:
        assert await genkit_client(url=url, timeout_seconds=3) == [STARTED, {"hang": True}]


async def test_a_live_client_can_be_terminated(genkit_client: "GenkitClient") -> None:
    async def answer() -> AsyncIterator[bytes]:
        yield frame_of(GenkitFraming(), chunk(0, 0))
        await anyio.sleep_forever()

    async with served(answer) as url, genkit_client.live(url=url) as client:
        assert [await client.next_line(), await client.next_line()] == [STARTED, {"chunk": 0}]
        client.terminate()
        assert [line async for line in client] == []
