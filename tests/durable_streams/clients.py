"""The protocol's own clients, in Node, as their packages come."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream
from tests.clients.programs import NODE

PACKAGES: Final = Path(__file__).parent / "node"
BOUND_SECONDS: Final = 50
MAX_LINE_BYTES: Final = 1 << 24


@dataclass(slots=True)
class Reader:
    """A client in a process of its own, and what it was given so far."""

    lines: BufferedByteReceiveStream
    items: list[Any] = field(default_factory=list[Any])
    offset: str = ""

    async def until(self, items: int) -> list[Any]:
        """Give what it was given, when that are so many."""
        while len(self.items) < items:
            said = await self._said()
            assert "items" in said, said
        return self.items

    async def end(self) -> dict[str, Any]:
        """Give how it has ended."""
        while "items" in (said := await self._said()):
            pass
        return said

    async def _said(self) -> dict[str, Any]:
        with anyio.fail_after(BOUND_SECONDS):
            said: dict[str, Any] = json.loads(await self.lines.receive_until(b"\n", MAX_LINE_BYTES))
        self.items += said.get("items", ())
        self.offset = said.get("offset", self.offset)
        return said


@asynccontextmanager
async def reader(mode: str, url: str, *offset: str) -> AsyncGenerator[Reader]:
    """Read a stream with npm's `@durable-streams/client`: `catch-up`, `long-poll`, `sse`, or `auto`."""
    async with await anyio.open_process([NODE, "read.js", mode, url, *offset], cwd=PACKAGES, stderr=None) as process:
        assert process.stdout is not None
        try:
            yield Reader(BufferedByteReceiveStream(process.stdout))
        finally:
            if process.returncode is None:
                process.kill()
