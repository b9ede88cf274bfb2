"""Genkit's official JavaScript client, in a Node process of its own, for tests against whatever serves HTTP."""

import fcntl
import json
import math
import subprocess
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Self

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

pytest.register_assert_rewrite("tests.http.genkit_client_suite")

PROGRAM: Final = Path(__file__).parent / "genkit_client"
MAX_LINE_BYTES: Final = 64 * 1024 * 1024

Line = dict[str, object]


class RunningGenkitClient:
    """A client that is under way: its lines as they come, by `async for` or one by one; `terminate` ends it in mid-answer."""

    def __init__(self, process: Process, *, timeout_seconds: float) -> None:
        assert process.stdout is not None
        self._process = process
        self._stdout = BufferedByteReceiveStream(process.stdout)
        self._deadline = anyio.current_time() + timeout_seconds

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Line:
        if self._deadline == -math.inf:
            raise StopAsyncIteration
        with anyio.CancelScope(deadline=self._deadline):
            return await self._receive()
        self.terminate()
        self._deadline = -math.inf
        return {"hang": True}

    async def next_line(self) -> Line:
        """Give the next line; AssertionError if there are no more."""
        async for line in self:
            return line
        raise AssertionError("the client has ended")

    def terminate(self) -> None:
        """Kill the process, without a goodbye to the server."""
        if self._process.returncode is None:
            self._process.kill()

    async def _receive(self) -> Line:
        try:
            line: Line = json.loads(await self._stdout.receive_until(b"\n", MAX_LINE_BYTES))
        except (anyio.EndOfStream, anyio.IncompleteRead):
            raise StopAsyncIteration from None
        return line


class GenkitClient:
    """Runs `streamFlow` (op "stream") and `runFlow` (op "run") of the official client.

    Commands are client.mjs's, as keywords. Every run is bounded: one that takes longer than `timeout_seconds` ends with the
    line `{"hang": True}`, said by the program itself or, where it spins so that no timer of its fires, by us after killing it.
    """

    async def __call__(self, op: str = "stream", *, timeout_seconds: float = 20, **command: object) -> list[Line]:
        """Run to the end and give all its lines."""
        async with self.live(op, timeout_seconds=timeout_seconds, **command) as client:
            return [line async for line in client]

    @asynccontextmanager
    async def live(
        self, op: str = "stream", *, timeout_seconds: float = 20, **command: object
    ) -> AsyncGenerator[RunningGenkitClient]:
        """Start it and give its lines live; leaving the block kills it."""
        argument = json.dumps({"op": op, "timeoutMs": round(timeout_seconds * 1000), **command})
        process = await anyio.open_process(["node", "client.mjs", argument], stdin=subprocess.DEVNULL, stderr=None, cwd=PROGRAM)
        client = RunningGenkitClient(process, timeout_seconds=timeout_seconds + 1)
        async with process:
            try:
                yield client
            finally:
                client.terminate()


@pytest.fixture(scope="session")
def genkit_client(requires: Callable[[str], str]) -> GenkitClient:
    """Give Genkit's official client, installed by npm where it is missing or of another lock file."""
    requires("node")
    install_packages(requires("npm"))
    return GenkitClient()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of the client the time that installing it may take."""
    for item in items:
        if "genkit_client" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(300))


def install_packages(npm: str, directory: Path = PROGRAM, *, optional: bool = False) -> None:
    """Have a directory's packages of npm, those of its lock file, `optional` ones too; where they are there already nothing is done."""
    stamp = directory / "node_modules" / ".streamkeep-lock.json"
    with (directory / "package-lock.json").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes that share the tests, one installs
        wanted = lock.read()
        if stamp.exists() and stamp.read_bytes() == wanted:
            return
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        command += [] if optional else ["--omit=optional"]
        subprocess.run(command, cwd=directory, timeout=280, check=True)
        stamp.write_bytes(wanted)
