"""`stream_flow` and `run_flow` over Genkit's own server as its packages come, `@genkit-ai/express`: durable flows, and others."""

import json
import random
import subprocess
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Final

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from tests.client.forms import SILENCE, Form
from tests.http.conftest import install_packages
from tests.network.proxy import End, Fate, bad_network

from streamkeep import RefusedError, StreamLostError

PROGRAM: Final = Path(__file__).parent / "genkit_server"
BYTES_PER_CHUNK: Final = 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def packages(requires: Callable[[str], str]) -> None:
    """Have Node, and Genkit's server."""
    requires("node")
    install_packages(requires("npm"), PROGRAM)


@pytest.fixture
async def url(packages: None) -> AsyncGenerator[str]:
    async with await anyio.open_process(["node", "server.js"], cwd=PROGRAM, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with anyio.fail_after(60):
            line = await BufferedByteReceiveStream(process.stdout).receive_until(b"\n", 1_000)
        yield f"http://127.0.0.1:{json.loads(line)['port']}"
        await process.stdin.aclose()


def cuts_on_the_way(cuts: int, chunks: int) -> Iterator[Fate]:
    """Give so many connections that are lost, the first behind a chunk: each later one, for it begins at the start again."""
    chance = random.Random(cuts)
    yield Fate(End.RST, b'"message":2}')
    for number in range(1, cuts):
        end = chance.choices(list(End), [49, 49, 2])[0]
        yield Fate(end, chance.randrange(chunks * BYTES_PER_CHUNK * number // cuts + 1), piece=chance.choice((0, 0, 7)))


@pytest.mark.parametrize("cuts", [60, 500])
async def test_a_durable_flow_is_whole_and_has_run_once_after_any_number_of_cuts(form: Form, url: str, cuts: int) -> None:
    chunks = cuts * 2
    async with bad_network(url) as network:
        path = network.path(cuts_on_the_way(cuts, chunks)) + "/durable/count"
        had = await form.read("stream_flow", path, chunks, read_timeout=SILENCE, seconds=250)
        assert (had.events, had.output, had.error) == (list(range(chunks)), {"counted": chunks, "runs": 1}, None)
        assert network.struck.total() > cuts // 2  # some are behind the end


async def test_a_run_is_gone_on_with_behind_what_was_seen(form: Form, url: str) -> None:
    first = await form.read("stream_flow", f"{url}/durable/count", 5)
    again = await form.read("stream_flow", f"{url}/durable/count", stream_id=first.stream, seen=3)
    assert [(had.events, had.output, had.error) for had in (first, again)] == [
        ([0, 1, 2, 3, 4], {"counted": 5, "runs": 1}, None),
        ([3, 4], {"counted": 5, "runs": 1}, None),
    ]


async def test_a_flow_that_is_not_durable_is_lost_with_its_connection(form: Form, url: str) -> None:
    whole = await form.read("stream_flow", f"{url}/plain/count", 5)
    assert (whole.events, whole.output, whole.stream) == ([0, 1, 2, 3, 4], {"counted": 5, "runs": 1}, None)
    async with bad_network(url) as network:
        cut = await form.read("stream_flow", network.path([Fate(End.FIN, b'"message":2}\n\n')]) + "/plain/count", 5)
    assert isinstance(cut.error, StreamLostError)
    assert (cut.events, cut.error.events) == ([0, 1, 2], 3)


@pytest.mark.parametrize("kind", ["durable", "plain"])
async def test_a_flow_that_fails_is_refused_with_its_status(form: Form, url: str, kind: str) -> None:
    had = await form.read("stream_flow", f"{url}/{kind}/fail", "used up")
    assert had.events == ["begun"]
    assert isinstance(had.error, RefusedError)
    assert (had.error.status, had.error.message, had.error.details) == ("RESOURCE_EXHAUSTED", "used up", {"a": 1})


async def test_an_unknown_run_is_not_found(form: Form, url: str) -> None:
    had = await form.read("stream_flow", f"{url}/durable/count", stream_id="unknown")
    assert isinstance(had.error, RefusedError)
    assert had.error.status == "NOT_FOUND"


async def test_it_is_run_without_a_stream(form: Form, url: str) -> None:
    assert await form.call("run_flow", f"{url}/plain/count", 3) == {"counted": 3, "runs": 1}
    with pytest.raises(RefusedError, match="RESOURCE_EXHAUSTED: used up") as failed:
        await form.call("run_flow", f"{url}/plain/fail", "used up")
    assert failed.value.http_status == 429
