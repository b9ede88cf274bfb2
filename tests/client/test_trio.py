"""The client runs in trio as it does in asyncio."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import anyio
import pytest
from tests.client.forms import HEAD, answer, cut, free_port, silent, told

from streamkeep import StreamLostError
from streamkeep.client import Retry, events, run_flow, stop, stream_flow, subscribe

# httpcore2 leaves its innermost generator to trio's garbage collection where an answer is left before its end.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator 'httpcore2:ResourceWarning")


@pytest.fixture
def anyio_backend() -> str:
    return "trio"


@pytest.fixture
def url() -> Iterator[str]:
    """Give a server in a process of its own: the whole of `streamkeep serve` would need a storage that is there."""
    port = free_port()
    program = (
        "import uvicorn\nfrom tests.http.servers import count, durable_app\n"
        f"uvicorn.run(durable_app(count), port={port}, log_level='error')"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGKILL)


async def test_all_of_it_works_in_trio(url: str) -> None:
    async with stream_flow(f"{url}/count", 4, retry=Retry(tries=100)) as run:
        assert [chunk async for chunk in run] == [0, 1, 2, 3]
        assert await run.output() == {"counted": 4}
    async with subscribe(f"{url}/streams/{run.stream_id}", after=2) as read:
        assert [event.offset async for event in read] == [3, 4]
    assert await run_flow(f"{url}/count", 2) == {"counted": 2}
    assert await stop(f"{url}/streams/{run.stream_id}") is False


async def test_it_comes_back_and_gives_up_in_trio() -> None:
    async with told(cut(b"id: 1\ndata: a\n\n"), answer(b"id: 2\ndata: b\n\n")) as server, events(server.url) as read:
        assert [event.data async for event in read] == ["a", "b"]
    async with told(cut(b"")) as server:
        with pytest.raises(StreamLostError):
            async with events(server.url, retry=Retry(tries=0)) as read:
                await anext(read)


async def test_a_cancelled_wait_loses_nothing_in_trio() -> None:
    async def one(connection: anyio.abc.SocketStream) -> None:
        await connection.send(HEAD + b"e\r\nid: 1\ndata: a\n\r\n")
        await anyio.sleep_forever()

    async with told(one, answer(b"id: 1\ndata: a\n\n")) as server, events(server.url) as read:
        with anyio.move_on_after(0.2) as waited:
            await anext(read)
        assert waited.cancelled_caught
        assert (await anext(read)).data == "a"


async def test_who_waits_is_woken_when_another_leaves_in_trio() -> None:
    async with told(silent) as server, anyio.create_task_group() as tasks, events(server.url) as read:

        async def wait() -> None:
            with pytest.raises(RuntimeError, match="left"):
                await anext(read)
            tasks.cancel_scope.cancel()

        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(10):
            await read.aclose()
            await anyio.sleep_forever()
