"""Random requests, a fixed number of them: `python -m tests.hostile` sends more."""

from functools import partial
from typing import Final

import pytest
from tests.hostile.fuzz_decoders import Property
from tests.hostile.fuzz_http import VALID, attack, requests
from tests.hostile.servers import House, Target
from tests.hostile.sockets import Connection, request

HANDSHAKE: Final = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


@pytest.mark.parametrize("data", VALID, ids=range(len(VALID)))
def test_what_the_fuzzer_begins_with_is_valid(served: House, data: bytes) -> None:
    codes = attack(served, data)
    assert codes.keys() <= {200, 204}
    assert codes.total() == 1


@pytest.mark.parametrize("path", [b"/streams/known", b"/streams/known/info", b"/few", b"/healthz", b"/"])
def test_a_websocket_is_refused(anywhere: Target, path: bytes) -> None:
    with Connection(anywhere.address) as connection:
        connection.send(request("GET", path, *HANDSHAKE))
        assert connection.answer().code == 403


def test_no_bytes_make_the_server_fail_fall_silent_or_keep_anything(served: House) -> None:
    assert Property(partial(attack, served), {"data": requests()}).holds(seed=1, examples=120) > 0
    assert served.is_alive()
    assert served.comes_to_rest()
