"""Four clients that read streams to their end over a network that loses connections, each as its own users would drive it.

Genkit's official client in Node, `EventSource` in Chromium, curl, and httpx with httpx-sse. A reader gives, for each stream, an
`Outcome`: all that its application was given, in order. None of them judges.
"""

import json
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import httpx_sse
from anyio.abc import ByteSendStream
from playwright.async_api import Page, async_playwright
from tests.demo.conftest import ARGUMENTS
from tests.http.conftest import PROGRAM
from tests.http.servers import OFFSET, STREAM_ID, STREAMING

HERE: Final = Path(__file__).parent
SILENCE_SECONDS: Final = 10.0
"""How long a client waits for something to come before it gives the connection up."""
READ_SECONDS: Final = 120.0
"""How long reading everything may take until it counts as a hang."""
PAUSE_SECONDS: Final = 0.05
HANG: Final = "hang"

Job = Mapping[str, object]


@dataclass(slots=True)
class Outcome:
    """What a client gave to its application.

    Attributes:
        chunks: in the order in which they came.
        output: the stream's, if it ended well.
        error: how the stream ended if not well, or why the client gave up; HANG if it did not even do that.
        stream: its id, if a client that did not know it came to know it.
        reopened: how often the application had to begin anew because the client would not have come back by itself.
    """

    chunks: list[Any] = field(default_factory=list[Any])
    output: object = None
    error: str | None = None
    stream: str | None = None
    reopened: int = 0

    def take(self, event: str, value: Any) -> bool:
        """Add an event; True if it was the last."""
        match event:
            case "chunk":
                self.chunks.append(value)
            case "done":
                self.output = value
            case _:
                self.error = value["status"]
        return event != "chunk"


Reader = Callable[[], Awaitable[Outcome]]


async def all_read(readers: Sequence[Reader], *, seconds: float = READ_SECONDS, at_once: int = 16) -> list[Outcome]:
    """Run readers side by side."""
    outcomes = [Outcome(error=HANG) for _ in readers]
    limit = anyio.CapacityLimiter(at_once)

    async def run(number: int, reader: Reader) -> None:
        async with limit:
            outcomes[number] = await reader()

    with anyio.move_on_after(seconds):
        async with anyio.create_task_group() as tasks:
            for number, reader in enumerate(readers):
                tasks.start_soon(run, number, reader)
    return outcomes


# Genkit's client


async def read_by_genkit(jobs: Sequence[Job], *, seconds: float = READ_SECONDS) -> list[Outcome]:
    """Have one Node process do these jobs of genkit_reader.mjs, all at once."""
    outcomes = [Outcome(error=HANG) for _ in jobs]
    command = ["node", str(HERE / "genkit_reader.mjs")]
    told = b""
    with anyio.move_on_after(seconds):
        async with await anyio.open_process(command, stdin=subprocess.PIPE, stderr=None, cwd=PROGRAM) as process:
            assert process.stdin
            assert process.stdout
            async with anyio.create_task_group() as sending:
                sending.start_soon(_send_jobs, jobs, process.stdin)
                async for data in process.stdout:
                    told += data
    for line in told.splitlines():
        number, outcome = json.loads(line)
        outcomes[number] = Outcome(**outcome)
    return outcomes


async def _send_jobs(jobs: Sequence[Job], stdin: ByteSendStream) -> None:
    async with stdin:
        for number, job in enumerate(jobs):
            await stdin.send(json.dumps([number, job]).encode() + b"\n")


# EventSource


@asynccontextmanager
async def chromium_page(executable: str, url: str) -> AsyncGenerator[Page]:
    """Give a page of Chromium that shows `url`."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=ARGUMENTS, headless=True)
        try:
            page = await browser.new_page()
            await page.goto(url)
            yield page
        finally:
            await browser.close()


async def read_by_event_source(
    page: Page, urls: Sequence[str], *, silence_seconds: float = SILENCE_SECONDS, seconds: float = READ_SECONDS
) -> list[Outcome]:
    """Have a page read these URLs, all at once, each until the server has told it to stay closed."""
    script = (HERE / "event_source.js").read_text()
    with anyio.move_on_after(seconds):
        told: list[dict[str, Any]] = await page.evaluate(script, [list(urls), round(silence_seconds * 1000)])
        return [Outcome(**outcome) for outcome in told]
    return [Outcome(error=HANG) for _ in urls]


# curl

CURL: Final = (
    "curl",
    "--silent",
    "--no-buffer",
    "--noproxy",
    "*",
    "--write-out",
    "%{stderr}%{http_code}",
    "--speed-limit",
    "1",
)
GENKIT_EVENTS: Final = {"message": "chunk", "result": "done", "error": "error"}


async def read_by_curl(url: str, *, by_header: bool = True, silence_seconds: float = SILENCE_SECONDS) -> Outcome:
    """GET a stream's events; come back by `Last-Event-ID`, or by `?after=`."""
    outcome = Outcome()
    last = ""
    while True:
        place = ["--header", f"Last-Event-ID: {last}", url] if by_header else [f"{url}?after={last}"]
        code, body = await _curl(silence_seconds, *place)
        for frame in whole_frames(body):
            last = frame["id"]
            if outcome.take(frame["event"], json.loads(frame["data"])):
                return outcome
        if _says_no(code):
            outcome.error = f"HTTP {code}"
            return outcome
        await anyio.sleep(PAUSE_SECONDS)


async def read_flow_by_curl(
    url: str, data: object, stream: str | None = None, silence_seconds: float = SILENCE_SECONDS
) -> Outcome:
    """POST to a flow; come back by `X-Genkit-Stream-Id` and `X-Genkit-Stream-Offset`."""
    outcome = Outcome(stream=stream)
    offset = ""
    request = ["--include", "--json", json.dumps({"data": data}), "--header", f"Accept: {STREAMING['Accept']}", url]
    while True:
        resume = ["--header", f"{STREAM_ID}: {outcome.stream}", "--header", f"{OFFSET}: {offset}"] if outcome.stream else []
        code, answer = await _curl(silence_seconds, *resume, *request)
        head, end_of_head, body = answer.partition(b"\r\n\r\n")
        if end_of_head and outcome.stream is None:
            outcome.stream = _headers_in(head)[STREAM_ID.lower()]
        for frame in whole_frames(body):
            told = json.loads(frame["data"])
            offset = str(told.pop("offset", offset))
            ((key, value),) = told.items()
            if outcome.take(GENKIT_EVENTS[key], value):
                return outcome
        if outcome.stream is None or _says_no(code):
            outcome.error = f"HTTP {code}"
            return outcome
        await anyio.sleep(PAUSE_SECONDS)


async def _curl(silence_seconds: float, *arguments: str) -> tuple[int, bytes]:
    """Give the answer's HTTP code, 0 if it has none, and what curl has printed of it."""
    ran = await anyio.run_process([*CURL, "--speed-time", str(round(silence_seconds)), *arguments], check=False)
    return int(ran.stderr), ran.stdout


def _says_no(code: int) -> bool:
    return code == 204 or code >= 400  # 204: nothing is left, which who has not seen the end should never hear


def whole_frames(body: bytes) -> Iterator[dict[str, str]]:
    """Give the fields of each frame; what a cut has left of the last one is dropped, as the standard for server-sent events says."""
    *frames, _rest = body.decode().split("\n\n")
    for frame in frames:
        lines = (line.partition(": ") for line in frame.split("\n"))
        yield {name: value for name, _, value in lines if name}


def _headers_in(head: bytes) -> Mapping[str, str]:
    lines = (line.partition(": ") for line in head.decode().split("\r\n")[1:])
    return {name.lower(): value for name, _, value in lines}


# httpx


async def read_by_httpx(url: str, *, silence_seconds: float = SILENCE_SECONDS) -> Outcome:
    """GET a stream's events with httpx-sse; come back by `Last-Event-ID`."""
    outcome = Outcome()
    headers: dict[str, str] = {}
    async with httpx.AsyncClient(timeout=silence_seconds, verify=False, trust_env=False) as http:
        while True:
            with suppress(httpx.TransportError):
                async with httpx_sse.aconnect_sse(http, "GET", url, headers=headers) as source:
                    if _says_no(source.response.status_code):
                        outcome.error = f"HTTP {source.response.status_code}"
                        return outcome
                    async for event in source.aiter_sse():
                        headers = {"Last-Event-ID": event.id}
                        if outcome.take(event.event, event.json()):
                            return outcome
            await anyio.sleep(PAUSE_SECONDS)
