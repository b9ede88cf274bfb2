"""The page about processes that die: its app, in two processes, against a provider; one is shut down, or killed, in mid-answer."""

import os
import signal
from pathlib import Path
from typing import Final

import anyio
import httpx
import pytest
from tests.deploy.servers import Server, running, uvicorn
from tests.recovery.provider import words_of
from tests.recovery.rounds import Reading
from tests.test_docs import ROOT, blocks

from streamkeep.wire import SSEDecoder

SETTINGS: Final = """
import os


@app.get("/process")
async def process() -> int:
    return os.getpid()
"""
QUESTION: Final = {"text": "why"}


def shown(directory: Path) -> str:
    """Give the page's app, with both of its functions, over a file that its processes share."""
    first, second, *_ = blocks(ROOT / "docs/how-to/recovery.md")
    program = f"{first}\n{second}{SETTINGS}"
    return program.replace(
        '"sqlite:///streams.db"', f'"sqlite:///{directory}/shared.db", drain=__import__("datetime").timedelta()'
    )


async def read(server: Server, reading: Reading, *, at_least: int = 0) -> None:
    """Read on behind what is there, to the end, or until there are so many events."""
    headers = {"last-event-id": reading.last_id} if reading.last_id else {}
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60) as http,
        http.stream("GET", "/chat/c/stream", headers=headers) as response,
    ):
        assert response.status_code == 200
        decoder = SSEDecoder()
        async for data in response.aiter_bytes():
            for event in decoder.decode(data):
                if event.id and event.id != reading.last_id:
                    reading.take(event.event, event.data, event.id)
            if at_least and len(reading.events) >= at_least:
                return


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
async def test_another_process_goes_on_with_the_same_generation(
    tmp_path: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, source = uvicorn(), "from tests.recovery.provider import provider\n\napp = provider()\n"
    async with running(kind, tmp_path / "provider", source) as provider:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{provider.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        app = shown(tmp_path)
        async with running(kind, tmp_path / "one", app) as one, running(kind, tmp_path / "two", app) as two:
            async with (
                httpx.AsyncClient(base_url=one.url, timeout=60) as http,
                http.stream("POST", "/chat/c", json=QUESTION) as response,
            ):
                assert response.status_code == 200
            reading = Reading("c")
            await read(two, reading, at_least=5)
            os.kill(one.pid, how)
            while not reading.is_over:
                await read(two, reading)
            async with httpx.AsyncClient(base_url=provider.url) as http:
                generations = (await http.get("/generations")).json()
    chunks = [data for _, kind, data in reading.events if kind == "chunk"]
    assert chunks == words_of("why")
    assert [kind for _, kind, _ in reading.events if kind != "chunk"] == ["recovering", "done"]
    assert generations == {"why": 1}


async def test_a_stop_ends_the_generation_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, source = uvicorn(), "from tests.recovery.provider import provider\n\napp = provider()\n"
    async with running(kind, tmp_path / "provider", source) as provider:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{provider.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        async with running(kind, tmp_path / "one", shown(tmp_path)) as one:
            async with httpx.AsyncClient(base_url=one.url, timeout=60) as http:
                async with http.stream("POST", "/chat/c", json=QUESTION) as response:
                    assert response.status_code == 200
                reading = Reading("c")
                await read(one, reading, at_least=5)
                assert (await http.delete("/chat/c")).status_code < 300
            async with httpx.AsyncClient(base_url=provider.url) as http:
                for _ in range(100):
                    if (await http.get("/said")).json()["stopped"]:
                        return
                    await anyio.sleep(0.05)
    raise AssertionError("the provider made the answer to its end")
