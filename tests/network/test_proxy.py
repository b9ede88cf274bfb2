"""The bad network does what it is told, so that what clients make of it can be believed."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Final
from urllib.parse import urlsplit

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream
from tests.network.proxy import End, Fate, Network, bad_network

REQUEST: Final = b"0123456789"
ANSWER: Final = REQUEST * 3


class Repeating:
    """A server that answers each request with three times the same."""

    def __init__(self) -> None:
        self.received = b""

    async def answer(self, client: SocketStream) -> None:
        async with client:
            with suppress(anyio.BrokenResourceError):
                async for packet in client:
                    self.received += packet
                    await client.send(packet * 3)


@asynccontextmanager
async def repeating() -> AsyncGenerator[tuple[Repeating, Network]]:
    server = Repeating()
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, server.answer)
        async with bad_network(f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}") as network:
            yield server, network
        tasks.cancel_scope.cancel()


async def exchange(url: str, *, until: int = len(ANSWER) + 1) -> tuple[list[bytes], str]:
    """Send the request; give the packets of the answer until so many bytes are there, and how it ended."""
    packets: list[bytes] = []
    with anyio.fail_after(10):
        async with await anyio.connect_tcp("127.0.0.1", urlsplit(url).port or 0) as connection:
            await connection.send(REQUEST)
            try:
                while sum(map(len, packets)) < until:
                    packets.append(await connection.receive())
            except anyio.EndOfStream:
                return packets, "closed"
            except anyio.BrokenResourceError:
                return packets, "reset"
    return packets, "open"


async def test_without_a_fate_nothing_happens() -> None:
    async with repeating() as (server, network):
        packets, end = await exchange(network.path(), until=len(ANSWER))
    assert (b"".join(packets), end) == (ANSWER, "open")
    assert server.received == REQUEST
    assert (network.connections, network.struck.total()) == (1, 0)


@pytest.mark.parametrize(("end", "seen"), [(End.FIN, "closed"), (End.RST, "reset")])
async def test_an_answer_is_cut_at_exactly_the_byte_that_was_named(end: End, seen: str) -> None:
    async with repeating() as (_, network):
        for after in range(len(ANSWER) + 1):
            packets, how = await exchange(network.path([Fate(end, after)]))
            assert how == seen
            # A reset may destroy what was under way; nothing comes that should not.
            assert b"".join(packets) == ANSWER[:after] or (end is End.RST and ANSWER[:after].startswith(b"".join(packets)))
    assert network.struck == {end: len(ANSWER) + 1}


async def test_an_answer_is_cut_behind_a_landmark() -> None:
    async with repeating() as (_, network):
        packets, end = await exchange(network.path([Fate(End.FIN, b"901")]))
    assert (b"".join(packets), end) == (ANSWER[:12], "closed")


async def test_connections_that_are_open_meet_a_fate_from_now_on_and_later_ones_do_not() -> None:
    async with repeating() as (_, network):
        port = urlsplit(network.path()).port or 0
        async with await anyio.connect_tcp("127.0.0.1", port) as connection:
            await connection.send(REQUEST)
            with anyio.fail_after(10):
                assert len(await connection.receive()) == len(ANSWER)
                network.meet(Fate(End.FIN, 7))
                await connection.send(REQUEST)
                assert await connection.receive() == ANSWER[:7]
                with pytest.raises(anyio.EndOfStream):
                    await connection.receive()
        assert await exchange(f"http://127.0.0.1:{port}", until=len(ANSWER)) == ([ANSWER], "open")
        assert network.struck == {End.FIN: 1}


async def test_a_request_is_cut_before_its_end() -> None:
    async with repeating() as (server, network):
        assert await exchange(network.path([Fate(End.FIN, 4, of_request=True)])) == ([], "closed")
    assert server.received in (REQUEST[:4], b"")  # the server may be gone before it has looked


async def test_an_answer_comes_byte_by_byte() -> None:
    async with repeating() as (_, network):
        packets, _ = await exchange(network.path([Fate(piece=1, pause_seconds=0.001)]), until=len(ANSWER))
    assert b"".join(packets) == ANSWER
    assert len(packets) > 1  # the kernel may put some together


async def test_a_stalled_connection_stays_open_until_the_client_gives_up() -> None:
    async with repeating() as (_, network):
        url = network.path([Fate(End.STALL, 5)])
        packets, end = await exchange(url, until=5)
        assert (b"".join(packets), end) == (ANSWER[:5], "open")
        assert (await exchange(url, until=len(ANSWER)))[1] == "open"
    assert network.struck == {End.STALL: 1}


async def test_connections_are_refused_while_the_network_is_down() -> None:
    async with repeating() as (_, network):
        url = network.path([Fate(End.FIN, 5, down_seconds=60)])
        await exchange(url)
        with pytest.raises(OSError, match=r"refused|failed"):
            await exchange(url)


async def test_after_that_they_are_taken_again() -> None:
    async with repeating() as (_, network):
        url = network.path([Fate(End.FIN, 5, down_seconds=0.01)])
        await exchange(url)
        with anyio.fail_after(10):
            while not await is_up(url):  # noqa: ASYNC110 - only trying tells
                await anyio.sleep(0.01)


async def is_up(url: str) -> bool:
    try:
        return await exchange(url, until=len(ANSWER)) == ([ANSWER], "open")
    except OSError:
        return False


async def test_without_a_server_connections_are_reset() -> None:
    async with bad_network() as network:
        assert await exchange(network.path()) == ([], "reset")
