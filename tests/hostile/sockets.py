"""Clients that keep to no rule: raw sockets with a bound on every wait, and answers read by the letter of HTTP/1.1.

It never repairs what it sends, and forgives nothing in what it reads.
"""

import re
import socket
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Self

Address = tuple[str, int]

WAIT_SECONDS: Final = 20.0
"""How long anything may take before it counts as a hang."""

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 (\d{3})(?: [ -~]*)?")
_FIELD_LINE: Final = re.compile(rb"([a-z][a-z0-9-]*): ([ -~]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `fields` are as they came, without the date."""

    code: int
    fields: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def headers(self) -> Mapping[str, str]:
        """The fields by name."""
        return dict(self.fields)


class Connection:
    """One TCP connection to a server."""

    def __init__(self, address: Address, *, receive_buffer: int | None = None) -> None:
        self._socket = socket.socket()
        self._socket.settimeout(WAIT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.connect(address)
        self._received = bytearray()
        self.is_closed = False
        """Whether the server has closed its half."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> bool:
        """Send it all; False: the server has closed the connection."""
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def finish_sending(self) -> None:
        """Close our half."""
        with suppress(OSError):  # the server may have closed it all
            self._socket.shutdown(socket.SHUT_WR)

    def until(self, text: bytes) -> bytes:
        """Read until this has come, and give all that has."""
        while text not in self._received:
            if not self._receive():
                raise AssertionError(f"closed before {text!r} came: {bytes(self._received)!r}")
        return bytes(self._received)

    def rest(self) -> bytes:
        """Read until the server closes the connection."""
        while self._receive():
            pass
        return bytes(self._received)

    def is_silent_for(self, seconds: float) -> bool:
        """Wait so long for anything to come, and keep it."""
        self._socket.settimeout(seconds)
        try:
            return not self._receive()
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(WAIT_SECONDS)

    def has_more(self) -> bool:
        """Say whether anything has come that has not been taken."""
        return bool(self._received)

    def answer(self, *, to_head: bool = False) -> Answer:
        """Read one answer, whole, and none of what follows it."""
        head = self._take_to(b"\r\n\r\n")
        status_line, *field_lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        status = _STATUS_LINE.fullmatch(status_line)
        assert status is not None, head
        code = int(status[1])
        fields = tuple(field for line in field_lines if (field := _field(line))[0] != "date")
        if code == 100:
            return self.answer(to_head=to_head)
        return Answer(code, fields, b"" if to_head or code in (204, 304) else self._body(dict(fields)))

    def _body(self, headers: Mapping[str, str]) -> bytes:
        assert not {"content-length", "transfer-encoding"} <= headers.keys(), headers
        if "content-length" in headers:
            return self._take(int(headers["content-length"]))
        if headers.get("transfer-encoding") == "chunked":
            return self._chunks()
        assert headers.get("connection") == "close", headers
        self.rest()
        return self._take(len(self._received))

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._take_to(b"\r\n"), 16):
            body += self._take(size)
            assert self._take(2) == b"\r\n"
        assert self._take(2) == b"\r\n"
        return body

    def _take_to(self, text: bytes) -> bytes:
        self.until(text)
        return self._take(self._received.index(text) + len(text))

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            if not self._receive():
                raise AssertionError(f"closed {size - len(self._received)} bytes too early: {bytes(self._received)!r}")
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _receive(self) -> bool:
        try:
            data = self._socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        self._received += data
        self.is_closed = not data
        return not self.is_closed


def _field(line: bytes) -> tuple[str, str]:
    field = _FIELD_LINE.fullmatch(line)
    assert field is not None, line
    return field[1].decode().lower(), field[2].decode()


def request(method: str, target: bytes, *fields: bytes, body: bytes | None = None) -> bytes:
    """Give the bytes of a request as they are, whatever is wrong with them; with a body its length is added."""
    lines = [method.encode() + b" " + target + b" HTTP/1.1", b"Host: streams.example", *fields]
    if body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


def ask(address: Address, method: str, target: bytes, *fields: bytes, body: bytes | None = None) -> Answer:
    """Send one request over a connection of its own, and give the answer."""
    with Connection(address) as connection:
        connection.send(request(method, target, *fields, body=body))
        return connection.answer(to_head=method == "HEAD")


@contextmanager
def connections(address: Address, count: int, *, receive_buffer: int | None = None) -> Generator[list[Connection]]:
    """Open many connections, and close them all at the end."""
    with ExitStack() as opened:
        yield [opened.enter_context(Connection(address, receive_buffer=receive_buffer)) for _ in range(count)]
