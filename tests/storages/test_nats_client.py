"""Our client of NATS understands what a server says, wherever the network cuts it."""

import asyncio

import pytest

from streamkeep.storages.nats._client import Client, Message

SAID = (
    b'INFO {"version":"2.12.0","max_payload":4096,"nonce":"n","connect_urls":["a:1","b:2"],"unknown":{}}\r\n'
    b"MSG a.b 1 5\r\nhe\r\no\r\n"
    b"MSG a.c 1 reply.to 0\r\n\r\n"
    b"HMSG a.d 1 23 27\r\nNATS/1.0\r\nA: b\r\nC:d\r\n\r\nbody\r\n"
    b"HMSG  a.e  1  reply  34  34\r\nNATS/1.0 404 No Results\r\nX: :y\r\n\r\n\r\n"
    b"MSG a.f 9 2\r\nno\r\n"
    b"PING\r\n+OK\r\nPONG\r\n"
    b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n"
    b"MSG a.g 1 3\r\n\r\n\0\r\n"
)
UNDERSTOOD = [
    ("a.b", "", {}, b"he\r\no"),
    ("a.c", "", {}, b""),
    ("a.d", "", {"A": "b", "C": "d"}, b"body"),
    ("a.e", "404", {"X": ":y"}, b""),
    ("a.g", "", {}, b"\r\n\0"),
]


def understood(*parts: bytes) -> list[tuple[str, str, dict[str, str], bytes]]:
    """Give what a client makes of what comes in these parts."""

    async def hear() -> list[tuple[str, str, dict[str, str], bytes]]:
        found: list[tuple[str, str, dict[str, str], bytes]] = []

        def received(message: Message) -> None:
            headers = {name: value for name, value in message.headers.items() if name}
            found.append((message.subject, message.status, headers, message.data))

        client = Client(lambda sentence: None, lambda: None)
        client.subscribe("a.*", received)
        for part in parts:
            client.data_received(part)
        assert client.info.max_payload == 4096
        assert client.info.connect_urls == ["a:1", "b:2"]
        return found

    return asyncio.run(hear())


def test_what_comes_at_once_is_understood() -> None:
    assert understood(SAID) == UNDERSTOOD


def test_what_is_cut_anywhere_is_understood() -> None:
    for place in range(1, len(SAID)):
        assert understood(SAID[:place], SAID[place:]) == UNDERSTOOD, place


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_what_comes_in_small_pieces_is_understood(size: int) -> None:
    assert understood(*(SAID[begin : begin + size] for begin in range(0, len(SAID), size))) == UNDERSTOOD
