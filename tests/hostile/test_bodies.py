"""Bodies that are enormous, deep, strange, or no JSON: bounded memory, and an answer that says it is the client's fault."""

import gzip
import json
from typing import Final

import pytest
from tests.hostile.servers import STREAMING, Apart, House, Target
from tests.hostile.sockets import Answer, Connection, ask, connections, request

from streamkeep.http.app import MAX_BODY_BYTES, MAX_SKIPPED_BYTES

JSON: Final = b"Content-Type: application/json"


def nested(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return b'{"data":' + opening * depth + (b"0" if opening != b"[" else b"") + closing * depth + b"}"


STRANGE: Final = {
    "nothing": b"",
    "spaces": b" " * 10_000,
    "a null byte": b"\0",
    "half of an object": b'{"data":',
    "a number": b"1",
    "a list": b"[1]",
    "null": b"null",
    "two values": b'{"data":1}{"data":2}',
    "NaN": b'{"data":NaN}',
    "infinity": b'{"data":-Infinity}',
    "a huge number": b'{"data":1' + b"0" * 5_000 + b"}",
    "a huge exponent": b'{"data":1e999999999}',
    "a tiny exponent": b'{"data":1e-999999999}',
    "a number of many digits": b'{"data":0.' + b"1" * 100_000 + b"}",
    "beyond 64 bits": b'{"data":18446744073709551616}',
    "a leading zero": b'{"data":007}',
    "the same key twice": b'{"data":1,"data":2}',
    "the same key a thousand times": b"{" + b'"data":1,' * 1_000 + b'"data":1}',
    "a hundred thousand keys": json.dumps({"data": {f"k{n}": n for n in range(100_000)}}).encode(),
    "special keys": b'{"data":{"__proto__":{"x":1},"constructor":1,"__class__":1},"__proto__":1}',
    "a lone surrogate": b'{"data":"\\ud800"}',
    "surrogates the wrong way round": b'{"data":"\\udc00\\ud800"}',
    "a surrogate in UTF-8": b'{"data":"\xed\xa0\x80"}',
    "a character cut in half": b'{"data":"\xe2\x80"}',
    "an overlong slash": b'{"data":"\xc0\xaf"}',
    "line separators": '{"data":"a\u2028b\u2029c\x85d"}'.encode(),
    "escaped line ends": b'{"data":"a\\n\\ndata: {\\"result\\":1}\\n\\n"}',
    "raw line ends": b'{"data":"a\n\ndata: 1\n\n"}',
    "a byte order mark": b'\xef\xbb\xbf{"data":1}',
    "UTF-16": '{"data":1}'.encode("utf-16"),
    "UTF-32": '{"data":1}'.encode("utf-32-be"),
    "latin-1": '{"data":"é"}'.encode("latin-1"),
    "gzip": gzip.compress(b'{"data":1}'),
    "a form": b"data=1&stream=true",
    "XML": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><data>&e;</data>',
    "several parts": b'--b\r\nContent-Disposition: form-data; name="data"\r\n\r\n1\r\n--b--\r\n',
    "an init that is not wanted": b'{"data":1,"init":{}}',
    "another envelope": b'{"input":1}',
}
KINDS: Final = (
    JSON,
    b"Content-Type: text/plain",
    b"Content-Type: application/x-www-form-urlencoded",
    b"Content-Type: multipart/form-data; boundary=b",
    b"Content-Type: application/json; charset=utf-16",
    b"Content-Type: ",
    JSON + b"\r\nContent-Encoding: gzip",
)


def expect_sense(target: Target, answer: Answer, *, said: object) -> None:
    """Check that an answer is an output, Genkit's frames, or an error that blames the client."""
    assert b"Traceback" not in answer.body, said
    if answer.code == 200:
        assert answer.body, said
        return
    if target.passes_on and "x-content-type-options" not in answer.headers:
        return  # genkit_fastapi's own answer; it fails where JSON is broken or deep
    assert 400 <= answer.code < 500, (said, answer)
    assert answer.headers["content-type"] == "application/json", (said, answer)


def post(target: Target, body: bytes, *fields: bytes, path: bytes = b"/echo") -> Answer:
    return ask(target.address, "POST", path, *fields, b"Connection: close", body=body)


@pytest.mark.parametrize("how", [(), (STREAMING,)], ids=["once", "streaming"])
@pytest.mark.parametrize("body", STRANGE.values(), ids=STRANGE)
def test_a_strange_body_is_answered_with_sense(served: House, body: bytes, how: tuple[bytes, ...]) -> None:
    for kind in KINDS[: 1 if len(body) > 10_000 else None]:
        expect_sense(served, post(served, body, kind, *how), said=kind)
    assert served.is_alive()


@pytest.mark.parametrize("how", [(), (STREAMING,)], ids=["once", "streaming"])
def test_json_of_any_depth_is_taken_or_refused(served: House, how: tuple[bytes, ...]) -> None:
    for depth in (10, 300, *range(900, 1_010, 3), 5_000, 100_000, 1_000_000):
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            if len(body := nested(depth, opening, closing)) <= MAX_BODY_BYTES:
                expect_sense(served, post(served, body, JSON, *how), said=depth)
    assert served.is_alive()


def test_what_is_refused_is_never_repeated(served: House) -> None:
    for body in (b'{"marker-7f3a":1}', b'["marker-7f3a"]', b"marker-7f3a", b'{"data":marker-7f3a}'):
        for path in (b"/echo", b"/few"):
            for how in ((), (STREAMING,)):
                assert b"marker-7f3a" not in post(served, body, JSON, *how, path=path).body


# Enormous ones


@pytest.mark.parametrize("how", ["declared", "chunked"])
def test_an_enormous_body_is_413_and_is_not_kept(apart: Apart, how: str) -> None:
    length = b"Content-Length: 10000000000" if how == "declared" else b"Transfer-Encoding: chunked"
    megabyte = b" " * 1_000_000 if how == "declared" else b"f4240\r\n" + b" " * 1_000_000 + b"\r\n"
    before = apart.mebibytes()
    with Connection(apart.address) as connection:
        # The command's server has no POST of that path: what it does not read, it does not keep either.
        # Without an id, what is inside DurableStreaming sees to its bodies itself.
        connection.send(request("POST", b"/count", STREAMING, JSON, b"X-Genkit-Stream-Id: one", length))
        sent = sum(connection.send(megabyte) for _ in range(100))
        answer = connection.answer()
    assert sent == 100
    assert answer.code in {404, 413}
    if answer.code == 413:
        assert json.loads(answer.body)["error"]["status"] == "RESOURCE_EXHAUSTED"
        assert str(MAX_SKIPPED_BYTES) in answer.body.decode()
    assert apart.mebibytes() - before < 50
    assert apart.is_alive()


def test_many_large_bodies_at_once_cost_what_they_may_each(apart: Apart) -> None:
    large = b'{"data":"' + b"x" * (MAX_BODY_BYTES - 20) + b'"}'
    before = apart.mebibytes()
    with connections(apart.address, 10) as opened:
        for connection in opened:
            connection.send(request("POST", b"/count", STREAMING, JSON, b"Content-Length: %d" % len(large)) + large[:-1])
        assert apart.is_alive()
        for connection in opened:
            connection.send(b"}")
        assert {connection.answer().code for connection in opened} <= {200, 404}
    assert apart.mebibytes() - before < 10 * 40
