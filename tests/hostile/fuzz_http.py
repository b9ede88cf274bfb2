"""Random requests against a real server: valid ones, cut, doubled, swapped, and with bytes in them that mean something somewhere.

The server may answer what it likes that is HTTP and blames the client; it may not fail, fall silent, or keep anything.
"""

import json
import re
from collections import Counter
from typing import Final

from hypothesis import strategies as st
from tests.hostile.servers import ID, KNOWN, STREAMING, Target
from tests.hostile.sockets import Answer, Connection, request

from streamkeep.wire import GenkitDecoder, SSEDecoder

SILENCE_SECONDS: Final = 0.25
"""How long a server that will not answer is listened to before we hang up; what then becomes of its answer is not looked at."""

FIELD_NAMES: Final = {
    *("content-type", "content-length", "transfer-encoding", "connection", "cache-control", "server", "allow", "location"),
    *(
        "x-accel-buffering",
        "x-content-type-options",
        "x-genkit-stream-id",
        "access-control-expose-headers",
        "sec-websocket-accept",
    ),
    "upgrade",
}
_GIVEN_ID: Final = re.compile(r"[0-9a-f-]{36}|" + KNOWN)

_JSON: Final = b"Content-Type: application/json"
_CLOSE: Final = b"Connection: close"
_KNOWN: Final = f"/streams/{KNOWN}".encode()

VALID: Final = (
    request("POST", b"/few", STREAMING, _JSON, _CLOSE, body=b'{"data":3}'),
    request("POST", b"/few?stream=true", _JSON, _CLOSE, body=b'{"data": 3, "unknown": null}'),
    request("POST", b"/few", _JSON, _CLOSE, body=b'{"data":3}'),
    request("POST", b"/echo", STREAMING, _JSON, _CLOSE, body=b'{"data":{"a":[1,"\\u2028",null]}}'),
    request("POST", b"/few", ID + KNOWN.encode(), b"X-Genkit-Stream-Offset: 0", _CLOSE, body=b"{}"),
    request("DELETE", b"/few", ID + KNOWN.encode(), _CLOSE),
    request("GET", _KNOWN, b"Last-Event-ID: 0", _CLOSE),
    request("GET", _KNOWN + b"?after=-1", _CLOSE),
    request("GET", _KNOWN + b"/info", _CLOSE),
    request("DELETE", _KNOWN, _CLOSE),
    request("POST", _KNOWN + b"/cancel", _CLOSE, body=b""),
    request("POST", b"/few", STREAMING, _JSON, _CLOSE, b"Transfer-Encoding: chunked") + b'a\r\n{"data":3}\r\n0\r\n\r\n',
)
WORDS: Final = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"/",
        b"%00",
        b"%0d%0a",
        b"%2f",
        b"..",
        b"?",
        b"&",
        b"=",
        b";",
        b",",
        b"#",
    ),
    *(
        b"\xff",
        b"\xc0\xaf",
        b"\xe2\x80\xa8",
        b"\\ud800",
        b"NaN",
        b"1e999",
        b"-1",
        b"9" * 30,
        b"[" * 500,
        b'{"a":' * 500,
        b'"',
        b"\\",
    ),
    *(
        b"chunked",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"Expect: 100-continue\r\n",
        b"Connection: Upgrade\r\n",
    ),
    *(
        b"Upgrade: websocket\r\n",
        b"Accept: text/event-stream\r\n",
        ID + b"x\r\n",
        b"Last-Event-ID: 1\r\n",
        b"HTTP/1.0",
        b"HTTP/2.0",
    ),
    *(b"PUT", b"OPTIONS", b"TRACE", b"CONNECT", b"text/event-stream", b"stream=true", b"a" * 300, b"a" * 70_000),
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Give one or two valid requests with a few changes, anywhere."""
    data = b"".join(draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=2)))
    for _ in range(draw(st.integers(0, 4))):
        at, until = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
        word = draw(st.sampled_from(WORDS) | st.binary(max_size=8))
        short = min(until, at + 12)
        data = draw(
            st.sampled_from(
                (
                    data[:at] + word + data[at:],
                    data[:at] + word + data[short:],
                    data[:at] + data[short:],
                    data[:until] + data[at:],
                    data[:until],
                )
            )
        )
    return data


def attack(target: Target, data: bytes) -> Counter[int]:
    """Send this, and check all that comes back; give how often which code came. AssertionError: something must not be."""
    with Connection(target.address) as connection:
        connection.send(data)
        hung_up = not _closes_by_itself(connection)
        if hung_up:
            connection.finish_sending()
            connection.rest()  # TimeoutError: it does not even mind that
        codes: Counter[int] = Counter()
        while connection.has_more():
            try:
                answer = connection.answer(to_head=b"HEAD" in data)
            except AssertionError:
                if hung_up:
                    break  # it was not done, and we did not wait
                raise
            check(target, answer)
            codes[answer.code] += 1
    return codes


def _closes_by_itself(connection: Connection) -> bool:
    while not connection.is_silent_for(SILENCE_SECONDS):
        if connection.is_closed:
            return True
    return connection.is_closed


def check(target: Target, answer: Answer) -> None:
    """Raise AssertionError unless an answer is one that may be given to anything."""
    passed_on = target.passes_on and "x-content-type-options" not in answer.headers
    assert answer.code < 500 or passed_on, answer
    assert answer.headers.keys() <= FIELD_NAMES, answer
    assert b"Traceback" not in answer.body, answer
    if (stream := answer.headers.get("x-genkit-stream-id")) is not None:
        assert _GIVEN_ID.fullmatch(stream), answer
    match answer.headers.get("content-type", ""):
        case "application/json":
            json.loads(answer.body)
        case "text/event-stream":
            check_stream(answer)
        case _:
            pass


def check_stream(answer: Answer) -> None:
    """Raise AssertionError unless a stream is whole, in its framing, up to its last frame."""
    assert answer.body.isascii()
    if "x-genkit-stream-id" in answer.headers:
        decoder = GenkitDecoder()
        decoder.feed(answer.body)
        assert decoder.finished, answer
        return
    events = SSEDecoder().feed(answer.body)
    assert events[-1].event in {"done", "error"}, answer
