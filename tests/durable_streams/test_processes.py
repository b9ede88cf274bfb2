"""Servers of durable streams that die, and that are stopped."""

import contextlib
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGTERM
from typing import Final

import anyio
import anyio.to_thread
import httpx
import pytest
from tests.durable_streams.served import Server
from tests.engines.process import free_port
from tests.test_cli import serving

from streamkeep import StreamManager

BOUND_SECONDS: Final = 20
TEXT: Final = {"content-type": "text/plain"}


def producer(seq: int, epoch: int = 0) -> Mapping[str, str]:
    return {**TEXT, "producer-id": "p", "producer-epoch": str(epoch), "producer-seq": str(seq)}


@pytest.fixture
def server(tmp_path: Path) -> Generator[Server]:
    with Server(f"sqlite:///{tmp_path / 'streams.db'}", tmp_path / "server") as server:
        yield server


def client_of(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=BOUND_SECONDS)


@pytest.mark.promise("P27")
async def test_a_producers_session_goes_on_when_its_server_was_killed_in_the_middle(server: Server) -> None:
    async with client_of(server) as client:
        assert (await client.put("s", headers=TEXT)).status_code == 201
        for seq in range(20):
            assert (await client.post("s", headers=producer(seq), content=f"{seq},")).status_code == 200

        async def append_until_killed() -> int:
            for seq in range(20, 10_000):
                try:
                    await client.post("s", headers=producer(seq), content=f"{seq},")
                except httpx.HTTPError:
                    return seq
            raise AssertionError("it was not killed")

        unknown: list[int] = []

        async def run() -> None:
            unknown.append(await append_until_killed())

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                while (await client.head("s")).headers["stream-next-offset"][:16] < f"{40:016d}":
                    pass
                await anyio.to_thread.run_sync(server.kill)
    await anyio.to_thread.run_sync(server.start)
    async with client_of(server) as client:
        again = await client.post("s", headers=producer(unknown[0]), content=f"{unknown[0]},")
        assert again.status_code in {200, 204}
        assert (await client.post("s", headers=producer(unknown[0] + 1), content="end")).status_code == 200
        assert (await client.post("s", headers=producer(3), content="3,")).status_code == 204
        assert (await client.get("s")).text == "".join(f"{seq}," for seq in range(unknown[0] + 1)) + "end"


async def test_a_server_with_open_readers_stops_and_they_go_on_at_another_one(server: Server) -> None:
    async with client_of(server) as client:
        offset = (await client.put("s", headers=TEXT, content="1")).headers["stream-next-offset"]
        ends: list[str] = []
        reading = [anyio.Event() for _ in range(10)]

        async def read(began: anyio.Event) -> None:
            async with client.stream("GET", "s", params={"offset": offset, "live": "sse"}) as response:
                async for line in response.aiter_lines():
                    began.set()
                    ends.append(line)

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                for began in reading:
                    tasks.start_soon(read, began)
                for began in reading:
                    await began.wait()
                await anyio.to_thread.run_sync(server.process.stop, SIGTERM)
    assert "streamClosed" not in "".join(ends)
    assert server.process.log == ""
    await anyio.to_thread.run_sync(server.start)
    async with client_of(server) as client:
        await client.post("s", headers={**TEXT, "stream-closed": "true"}, content="2")
        assert (await client.get("s", params={"offset": offset})).text == "2"


@asynccontextmanager
async def webhook(answer: bytes) -> AsyncGenerator[tuple[str, "list[tuple[dict[str, str], bytes]]", anyio.Event]]:
    """Listen for a webhook, give what has come, and what is set when something has."""
    taken: list[tuple[dict[str, str], bytes]] = []
    came = anyio.Event()

    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            data = b""
            with contextlib.suppress(anyio.EndOfStream):
                while b"\r\n\r\n" not in data:
                    data += await stream.receive()
                head, _, body = data.partition(b"\r\n\r\n")
                lines = head.decode().split("\r\n")[1:]
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                while len(body) < int(headers["content-length"]):
                    body += await stream.receive()
                taken.append((headers, body))
                length = str(len(answer)).encode()
                await stream.send(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: " + length + b"\r\n\r\n" + answer)
                came.set()

    port = free_port()
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port) as listener,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, handle)
        yield f"http://127.0.0.1:{port}/hook?x=1", taken, came
        tasks.cancel_scope.cancel()


@pytest.mark.promise("P27")
async def test_a_wake_that_was_not_delivered_when_the_server_died_is_delivered_by_the_next_one(server: Server) -> None:
    async with webhook(b'{"done": true}') as (url, taken, came):
        silent = free_port()  # nobody listens there yet
        hook = {"type": "webhook", "pattern": "events/**", "webhook": {"url": url}, "lease_ttl_ms": 1_000}
        refused = {**hook, "webhook": {"url": f"http://127.0.0.1:{silent}/"}}
        async with client_of(server) as client:
            assert (await client.put("__ds/subscriptions/refused", json=refused)).status_code == 201
            assert (await client.put("events/a", headers=TEXT, content="1")).status_code == 201
            with anyio.fail_after(BOUND_SECONDS):
                while (await client.get("__ds/subscriptions/refused")).json()["status"] != "failed":
                    pass
            await anyio.to_thread.run_sync(server.kill)
        await anyio.to_thread.run_sync(server.start)
        async with client_of(server) as client:
            there = (await client.get("__ds/subscriptions/refused")).json()
            assert (there["status"], there["streams"][0]["path"]) == ("failed", "events/a")
            listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=silent)
            async with listener, anyio.create_task_group() as tasks:
                woken = anyio.Event()

                async def take(stream: anyio.abc.SocketStream) -> None:
                    async with stream:
                        await stream.receive()
                        woken.set()

                tasks.start_soon(listener.serve, take)
                with anyio.fail_after(BOUND_SECONDS):
                    await woken.wait()
                tasks.cancel_scope.cancel()
            assert not came.is_set()
            assert taken == []


async def test_the_command_serves_the_protocol_if_it_is_told_to(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'streams.db'}"
    async with StreamManager.connect(url) as streams:
        await streams.list()
    for arguments, code in [(["--durable-streams"], 201), ([], 404)]:
        with serving("--storage", url, *arguments) as (_, base):
            async with httpx.AsyncClient(base_url=base, timeout=BOUND_SECONDS) as client:
                answer = await client.put("/v1/stream/a", headers=TEXT, content="1")
                assert answer.status_code == code
                assert "access-control-allow-origin" not in answer.headers
