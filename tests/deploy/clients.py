"""Clients as servers meet them: they start streams, follow, come late, read slowly, or not at all, and note all that they see."""

import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal

import anyio
import httpx
from tests.deploy.flows import PROCESS, number_of
from tests.deploy.servers import WAIT_SECONDS
from tests.http.servers import OFFSET, STREAM_ID, STREAMING

Way = Literal["start", "resume", "get"]


class Ending(StrEnum):
    """How an answer ended, as its client sees it."""

    DONE = "done"
    """The stream has its result."""
    ERROR = "error"
    """The stream has ended with an error."""
    COME_BACK = "come back"
    """Told in a last frame that the server goes, and the stream stays; or an EventSource's connection that just ends."""
    CUT = "cut"
    """The connection broke, as its client can see."""
    REFUSED = "refused"
    """Another answer than a stream, or no connection at all."""
    GONE = "gone"
    """There is no such stream (any more)."""
    SILENT = "silent"
    """An answer to a POST that ended well, without a terminal frame: its client takes what there is for the whole."""
    HANGING = "hanging"
    """Nothing came for longer than anybody waits."""


UNDERSTOOD: Final = frozenset(Ending) - {Ending.SILENT, Ending.HANGING, Ending.GONE}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of either framing."""

    kind: str
    offset: int | None
    data: Any


class Client:
    """A client: `read` until its answer ends, then again to come back, with what it has seen.

    Attributes:
        flow: what it starts, or what its stream runs.
        way: how it asks the first time. Who has started a stream resumes it.
        stream: the stream's id, when it is known.
        offset: the last offset that it has seen.
        ending: how its last answer ended; None while it reads.
        process: which one answered.
        status: of the error that it was told.
        faults: what it has seen and must not see.
        begun: set when something has come, or nothing will.
    """

    def __init__(
        self, flow: str, way: Way, stream: str | None = None, *, pause_seconds: float = 0.0, counts: bool = True
    ) -> None:
        self.flow = flow
        self.way: Way = way
        self.stream = stream
        self.offset = -1
        self.ending: Ending | None = None
        self.status: str | None = None
        self.process = 0
        self.faults: list[str] = []
        self.begun = anyio.Event()
        self._pause_seconds = pause_seconds
        self._counts = counts  # whether its flow does

    def __str__(self) -> str:
        return f"{self.way} {self.flow} {self.stream}, seen {self.offset}: {self.ending} {self.status or ''}"

    @property
    def knows_the_end(self) -> bool:
        """Whether it has been told how its stream ended."""
        return self.ending in (Ending.DONE, Ending.ERROR)

    async def read(self, url: str) -> None:
        """Ask, and read until the answer ends in whatever way."""
        self.ending = self.status = None
        try:
            async with (
                httpx.AsyncClient(base_url=url, timeout=WAIT_SECONDS, verify=False) as http,
                self._answer(http) as response,
            ):
                await self._read(response)
        except httpx.TimeoutException:
            self.ending = Ending.HANGING
        except httpx.ConnectError:
            self.ending = Ending.REFUSED
        except httpx.TransportError:
            self.ending = self.ending or Ending.CUT
        self.begun.set()

    @asynccontextmanager
    async def _answer(self, http: httpx.AsyncClient) -> AsyncGenerator[httpx.Response]:
        if self.way == "get":
            seen = {"Last-Event-ID": str(self.offset)} if self.offset >= 0 else {}
            request = http.build_request("GET", f"/streams/{self.stream}", headers=seen)
        else:
            known = {} if self.stream is None else {STREAM_ID: self.stream}
            seen = {OFFSET: str(self.offset)} if self.offset >= 0 else {}
            request = http.build_request("POST", f"/{self.flow}", json={"data": "why?"}, headers={**STREAMING, **known, **seen})
        response = await http.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def _read(self, response: httpx.Response) -> None:
        if response.status_code != 200:
            self.ending = Ending.GONE if response.status_code == 204 else Ending.REFUSED
            return
        self.stream = response.headers.get(STREAM_ID, self.stream)
        self.process = int(response.headers.get(PROCESS, 0))
        rest = ""
        async for text in response.aiter_text():
            *blocks, rest = (rest + text).split("\n\n")
            for frame in filter(None, map(_frame_of, blocks)):
                self._take(frame)
            await anyio.sleep(self._pause_seconds)
        if self.ending is None:
            self.ending = Ending.COME_BACK if self.way == "get" else Ending.SILENT

    def _take(self, frame: Frame) -> None:
        if self.ending is not None:
            self.faults.append(f"{self}: {frame} came after its end")
        if frame.kind == "chunk":
            self._take_chunk(frame)
        elif frame.offset is None:
            self.ending, self.status = Ending.COME_BACK, frame.data["status"]
        else:
            self._take_end(frame)
        self.begun.set()

    def _take_chunk(self, frame: Frame) -> None:
        if frame.offset != self.offset + 1 or (self._counts and number_of(frame.data) != frame.offset):
            self.faults.append(f"{self}: got {str(frame.data)[:20]} at {frame.offset}")
        self.offset += 1

    def _take_end(self, frame: Frame) -> None:
        if frame.offset != self.offset + 1:
            self.faults.append(f"{self}: its end came at {frame.offset}")
        self.ending = Ending.DONE if frame.kind == "done" else Ending.ERROR
        self.status = frame.data["status"] if frame.kind == "error" else None


class Stalled:
    """A client that starts a stream and then reads nothing, like a laptop whose lid was closed."""

    def __init__(self, url: str) -> None:
        address = httpx.URL(url)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(WAIT_SECONDS)
        self._socket.connect((address.host, address.port))
        self._socket.sendall(
            b"POST /broad HTTP/1.1\r\nHost: here\r\nAccept: text/event-stream\r\nContent-Length: 10\r\n\r\n" + b'{"data":1}'
        )
        self._socket.recv(64)

    def close(self) -> None:
        """Go away."""
        self._socket.close()


def _frame_of(block: str) -> Frame | None:
    fields = {name: value for name, _, value in (line.partition(": ") for line in block.split("\n"))}
    if "data" not in fields:
        return None  # what Genkit's clients in Dart read of an error
    value = json.loads(fields["data"])
    if "event" in fields:
        return Frame(fields["event"], int(fields["id"].rpartition("/")[2]) if "id" in fields else None, value)
    kinds: dict[str, str] = {"message": "chunk", "result": "done", "error": "error"}
    (kind,) = kinds.keys() & value.keys()
    return Frame(kinds[kind], value.get("offset"), value[kind])
