"""Three workers on one SQLite file behind nginx, as Debian has it: with its default settings, and as people set it up for an app."""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import anyio
import httpx
import pytest
from tests.deploy.servers import Server, running, uvicorn
from tests.engines.process import free_port
from tests.http.servers import STREAM_ID, Reading, without_lives

SOURCE: Final = """
import os
from datetime import timedelta

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from streamkeep import StreamManager
from streamkeep.http import DurableStreaming, SSEFraming, StreamsHTTP, Timeouts

serve = StreamsHTTP(
    StreamManager.connect(os.environ["DEPLOY_STORAGE"], lease=timedelta(seconds=1), grace=timedelta(seconds=1)),
    timeouts=Timeouts(heartbeat=timedelta(milliseconds=200), longest=timedelta(seconds=4)),
)
inner = FastAPI()


async def words(pause: float):
    yield f"from {os.getpid()}"
    for n in range(5):
        await anyio.sleep(pause)
        yield f"word {n}"


@inner.get("/process")
def process() -> int:
    return os.getpid()


@inner.post("/chat/{chat}")
async def ask(request: Request, chat: str, pause: float = 0.1):
    return await serve.respond(request, words(pause), key=chat, owner="ann", framing=SSEFraming())


@inner.get("/chat/{chat}/stream")
async def follow(request: Request, chat: str):
    return await serve.follow(request, key=chat, owner="ann")


@inner.post("/legacy")
async def legacy(pause: float = 0.1):
    async def events():
        async for word in words(pause):
            yield f"event: word\\ndata: {word}\\n\\n"

    return StreamingResponse(events(), media_type="text/event-stream")


app = DurableStreaming(inner, serve)
"""

USUAL: Final = "proxy_http_version 1.1; proxy_set_header Connection ''; proxy_set_header Host $host;"
SETTINGS: Final = {
    "default": "",
    "gzip": "gzip on; gzip_proxied any; gzip_min_length 0; gzip_types text/event-stream application/json;",
    "usual": USUAL,
    "usual with gzip": f"{USUAL} gzip on; gzip_proxied any; gzip_min_length 0; gzip_types text/event-stream application/json;",
}

each_settings = pytest.mark.parametrize(
    "settings",
    [pytest.param(text, id=name, marks=[] if name == "default" else pytest.mark.slow) for name, text in SETTINGS.items()],
)


@asynccontextmanager
async def behind_nginx(directory: Path, settings: str) -> AsyncGenerator[tuple[Server, httpx.AsyncClient]]:
    """Give three workers, and a client of the nginx before them."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        assert not os.environ.get("CI"), "nginx is not installed"
        pytest.skip("nginx is not installed")
    async with running(uvicorn("--workers", "3"), directory, SOURCE) as server:
        port, configuration = free_port(), directory / "nginx.conf"
        configuration.write_text(
            f"daemon off; pid {directory}/nginx.pid; error_log {directory}/nginx.log;\n"
            "events {}\n"
            f"http {{ access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;\n"
            f"fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;\n"
            f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {server.url}; {settings} }} }} }}\n"
        )
        nginx = subprocess.Popen([program, "-c", configuration, "-p", directory, "-e", "stderr"])  # noqa: ASYNC220
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                await until_served(http)
                yield server, http
        finally:
            nginx.terminate()
            nginx.wait()


async def until_served(http: httpx.AsyncClient) -> None:
    with anyio.fail_after(30):
        while True:
            try:
                (await http.get("/process")).raise_for_status()
            except httpx.HTTPError:
                await anyio.sleep(0.05)
            else:
                return


@each_settings
async def test_three_workers_behind_nginx_start_once_show_at_once_and_go_on_where_a_reader_was(
    tmp_path: Path, settings: str
) -> None:
    wholes: list[bytes] = []
    processes: Counter[int] = Counter()
    async with behind_nginx(tmp_path, settings) as (_, http):

        async def start() -> None:
            whole = (await http.post("/chat/c?pause=0.4")).content  # it goes on until the last one has come
            wholes.append(whole.replace(b": \n", b""))  # on a busy machine heartbeats come to one, and not to another
            processes[(await http.get("/process")).json()] += 1

        async with anyio.create_task_group() as starting:
            for _ in range(12):
                starting.start_soon(start)
        assert len(processes) > 1  # nginx and the kernel have spread them
        assert len(set(wholes)) == 1

        # The first word is there long before the last one.
        async with http.stream("POST", "/chat/slow?pause=0.4") as answer:
            reading = Reading(answer)
            await reading.until(b"id: 0\n")
            assert b"word 4" not in reading.body
            cursor = reading._came.decode().partition("\nid: ")[2].partition("\n")[0]
        # Its reader has gone, and comes back, to whichever worker.
        rest = await http.get("/chat/slow/stream", headers={"Last-Event-ID": cursor})
        words = [line for line in rest.text.splitlines() if line.startswith("data: ")]
    assert words == [*(f'data: "word {n}"' for n in range(5)), "data: null"]


@each_settings
async def test_an_endpoint_that_was_there_is_durable_behind_nginx(tmp_path: Path, settings: str) -> None:
    async with behind_nginx(tmp_path, settings) as (_, http):
        async with http.stream("POST", "/legacy", json={}) as answer:
            reading = Reading(answer)
            await reading.until(b"id: 0\n")
            cursor = reading._came.decode().partition("\nid: ")[2].partition("\n")[0]
        again = [await http.post("/legacy", json={}, headers={"Last-Event-ID": cursor}) for _ in range(3)]
        named = await http.post("/legacy", headers={STREAM_ID: answer.headers[STREAM_ID]})
    expected = b"".join(b"event: word\ndata: word %d\nid: %d\n\n" % (n, n + 1) for n in range(5))
    assert [without_lives(rest.content).replace(b": \n", b"") for rest in again] == [expected] * 3
    assert without_lives(named.content).endswith(expected)


async def test_an_answer_that_may_last_no_longer_is_a_cut_through_nginx_if_it_speaks_http_1_1(tmp_path: Path) -> None:
    """By default it speaks 1.0, in which a body ends where the connection does."""
    async with behind_nginx(tmp_path, USUAL) as (_, http), http.stream("POST", "/chat/c?pause=1") as answer:
        assert b"word 0" in await Reading(answer).cut()


@pytest.mark.parametrize("settings", [SETTINGS["default"], USUAL], ids=["default", "usual"])
async def test_what_a_killed_worker_was_producing_ends_for_its_readers(tmp_path: Path, settings: str) -> None:
    async with behind_nginx(tmp_path, settings) as (_, http):
        async with http.stream("POST", "/chat/c?pause=60") as answer:
            reading = Reading(answer)
            body = await reading.until(b"id: 0\n")
            subprocess.run(["kill", "-9", body.partition(b'"from ')[2].partition(b'"')[0].decode()], check=True)  # noqa: ASYNC221

        async def has_ended() -> bool:
            with suppress(httpx.TransportError):  # it is cut after some seconds
                return "ABORTED" in (await http.get("/chat/c/stream?after=0")).text
            return False

        with anyio.fail_after(30):
            while not await has_ended():
                pass
