"""The tutorial: its program is served, and its steps are done, with the page's own commands."""

import gc
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import httpx_sse
import pytest
from playwright.async_api import async_playwright, expect
from tests.test_docs import ROOT, named_files

PAGE: Final = ROOT / "docs/tutorial/first-endpoint.md"
COMMANDS: Final = re.findall(r"^```sh\n(.*?)\n```$", PAGE.read_text(), re.MULTILINE)
SHOWN: Final = re.search(r"^```text\n(retry: .*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
WORDS: Final = ["You", "asked:", "Why?", "Nothing", "is", "lost."]


@asynccontextmanager
async def served(directory: Path, port: int) -> AsyncGenerator[httpx.AsyncClient]:
    """Run the page's command, on a port of our own; leaving stops the server as Ctrl-C does."""
    async with serving(directory, port) as (server, http):
        yield http
        server.terminate()
        with anyio.fail_after(20):
            await anyio.to_thread.run_sync(server.wait)


@asynccontextmanager
async def serving(directory: Path, port: int) -> AsyncGenerator[tuple[subprocess.Popen[bytes], httpx.AsyncClient]]:
    """The same, and give the server's process as well; leaving kills it."""
    command = [sys.executable, "-m", *shlex.split(COMMANDS[1]), "--port", str(port), "--log-level", "error"]
    server = subprocess.Popen(command, cwd=directory)  # noqa: ASYNC220
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            with anyio.fail_after(30):
                while not await is_up(http):  # noqa: ASYNC110 - no event tells
                    await anyio.sleep(0.05)
            yield server, http
    finally:
        server.kill()
        server.wait()


async def is_up(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/")).status_code == 200
    except httpx.TransportError:
        return False


def request_of(command: str, **names: str) -> dict[str, Any]:
    """Give what a curl command sends, with names put in."""
    for name, value in names.items():
        command = command.replace(name, value)
    curl, n, *words = shlex.split(command)
    assert (curl, n) == ("curl", "-N")
    method = words.pop(words.index("-X") + 1) if "-X" in words else "GET"
    headers = dict([words.pop(words.index("-H") + 1).split(": ")]) if "-H" in words else {}
    (url,) = [word for word in words if word.startswith("http://127.0.0.1:8000/")]
    return {"method": method, "url": url.removeprefix("http://127.0.0.1:8000"), "headers": headers}


async def events_of(http: httpx.AsyncClient, request: dict[str, Any], count: int = 100) -> list[httpx_sse.ServerSentEvent]:
    """Give the first events of an answer, and cut it; or all of them."""
    events: list[httpx_sse.ServerSentEvent] = []
    async with httpx_sse.aconnect_sse(http, **request) as source:
        async for event in source.aiter_sse():
            events.append(event)
            if len(events) == count:
                break
    return events


def without_cursors(text: str) -> str:
    """Give an answer with what differs from stream to stream made the same."""
    return re.sub(r"^id: .*/(\d+)$", r"id: STREAM/LIFE/\1", text, flags=re.MULTILINE)


def words_of(events: list[httpx_sse.ServerSentEvent]) -> list[str]:
    return [event.json()["text"] for event in events if event.event == "chunk"]


def test_the_page_installs_what_its_program_needs() -> None:
    assert COMMANDS[:2] == ['pip install "streamkeep[fastapi]" uvicorn', "uvicorn main:app"]
    assert len(COMMANDS) == 7


@pytest.mark.timeout(120)
async def test_the_tutorials_steps(tmp_path: Path, free_tcp_port: int) -> None:
    (tmp_path / "main.py").write_text(named_files(PAGE)["main.py"])
    _, _, ask, go_on, read, _, _ = COMMANDS
    async with served(tmp_path, free_tcp_port) as http:
        seen = await events_of(http, request_of(ask), count=2)
        rest = await events_of(http, request_of(go_on, CURSOR=seen[-1].id))
        page = (await http.get("/")).text
        stream = seen[0].id.partition("/")[0]
        async with httpx_sse.aconnect_sse(http, **request_of(ask)) as source:  # and another, which is watched twice
            other = (await anext(source.aiter_sse())).id.partition("/")[0]
        watched: list[list[str]] = []

        async def watch() -> None:
            watched.append(words_of(await events_of(http, request_of(read, STREAM=other))))

        async with anyio.create_task_group() as windows:
            windows.start_soon(watch)
            windows.start_soon(watch)
    async with served(tmp_path, free_tcp_port) as http:
        again = await events_of(http, request_of(read, STREAM=stream))
        again_as_text = (await http.request(**request_of(read, STREAM=stream))).text
    assert SHOWN
    assert without_cursors(again_as_text) == without_cursors(SHOWN[1])
    assert words_of([*seen, *rest]) == words_of(again) == WORDS
    assert watched == [WORDS, WORDS]
    assert [rest[-1].event, again[-1].event] == ["done", "done"]
    assert stream != other
    assert 'new EventSource("/streams/" + location.hash.slice(1))' in page


@pytest.mark.slow  # 15 seconds until the writer counts as dead
@pytest.mark.timeout(120)
async def test_what_was_shown_before_kill_9_is_there_and_then_an_end(tmp_path: Path, free_tcp_port: int) -> None:
    (tmp_path / "main.py").write_text(named_files(PAGE)["main.py"])
    kill, read = COMMANDS[5:]
    shown = re.search(r"^```text\n(event: error\n.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert shown
    assert kill.startswith("kill -9 ")
    assert kill.endswith(f'"{COMMANDS[1]}")')
    async with serving(tmp_path, free_tcp_port) as (server, http):
        seen = await events_of(http, request_of(COMMANDS[2]), count=2)
        server.kill()
    async with served(tmp_path, free_tcp_port) as http:
        stored = await http.request(**request_of(read, STREAM=seen[0].id.partition("/")[0]))
    words = re.findall(r'^data: {"text":"(.*)"}$', stored.text, re.MULTILINE)
    assert words == WORDS[: len(words)]
    assert len(words) >= 2
    assert stored.text[stored.text.index("event: error") :].startswith(shown[1])


@pytest.mark.slow  # a word a second, twice
@pytest.mark.timeout(120)
async def test_the_page_shows_the_whole_answer_after_a_reload(
    tmp_path: Path, free_tcp_port: int, requires: Callable[[str], str]
) -> None:
    (tmp_path / "main.py").write_text(named_files(PAGE)["main.py"])
    async with (
        served(tmp_path, free_tcp_port) as http,
        async_playwright() as playwright,
        httpx_sse.aconnect_sse(http, **request_of(COMMANDS[2])) as source,
    ):
        stream = (await anext(source.aiter_sse())).id.partition("/")[0]
        browser = await playwright.chromium.launch(executable_path=requires("chromium"), args=["--no-sandbox"])
        page = await browser.new_page()
        await page.goto(f"http://127.0.0.1:{free_tcp_port}/#{stream}")
        await expect(page.locator("#words")).to_contain_text("You asked:")
        await page.reload()
        await expect(page.locator("#words")).to_have_text(" ".join(WORDS) + " ", timeout=20_000)
        await browser.close()


MISTAKES: Final = (
    ("lifespan=streams_http.lifespan", ""),
    ('@app.post("/ask")', '@app.get("/ask")'),
    ("framing=SSEFraming()", 'framing=SSEFraming(), when_running="refuse"'),
    ("return await streams_http", "return streams_http"),
)
"""What is made of the program's text, in the order of the table."""


@pytest.mark.parametrize("row", range(len(MISTAKES)))
async def test_a_mistake_is_told_in_the_log_and_answered_500(row: int) -> None:
    said = re.findall(r"^\| `(.*?)` \|", PAGE.read_text(), re.MULTILINE)
    right, wrong = MISTAKES[row]
    program = named_files(PAGE)["main.py"].replace("sqlite:///streams.db", "memory://")
    assert (program.count(right), len(said)) == (1, len(MISTAKES))
    shown: dict[str, Any] = {}
    exec(program.replace(right, wrong), shown)
    app, method = shown["app"], "GET" if "get" in wrong else "POST"

    async def answered(*, raises: bool) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=raises)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, "/ask", params={"question": "Why?"})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of what is not awaited
        async with app.router.lifespan_context(app):
            with pytest.raises((RuntimeError, TypeError, ValueError), match=re.escape(said[row])):
                await answered(raises=True)
            answer = await answered(raises=False)
        gc.collect()
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
