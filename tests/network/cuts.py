"""What a server answers, byte for byte, and where it can be cut."""

from urllib.parse import urlsplit

import anyio
from tests.network.proxy import End, Fate


async def exchange(url: str, request: bytes) -> bytes:
    """Send a request, and give the answer as far as it comes."""
    answer = b""
    with anyio.fail_after(10):
        async with await anyio.connect_tcp("127.0.0.1", urlsplit(url).port or 0) as connection:
            await connection.send(request)
            while not answer.endswith(b"\r\n0\r\n\r\n"):
                try:
                    answer += await connection.receive()
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    break
    return answer


async def cuts_of(url: str, request: bytes, *, step: int = 1) -> list[Fate]:
    """Give a cut at each byte of the answer to a request, or at some, from none of it to all of it; in turn by FIN and by RST."""
    places = range(0, len(await exchange(url, request)) + 1, step)
    return [Fate((End.FIN, End.RST)[number % 2], after) for number, after in enumerate(places)]


def seams_in(answer: bytes) -> set[int]:
    """Give the places before, at and behind each end of a line."""
    return {place for at, byte in enumerate(answer) if byte == 0x0A for place in (at, at + 1, at + 2) if place <= len(answer)}
