"""A user's program that strict type checkers read: what it asserts is what they see of the installed package."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_type

from streamkeep import (
    InMemoryStreamManager,
    StreamEvent,
    StreamEventType,
    StreamInfo,
    StreamInput,
    StreamManager,
    StreamPage,
    Subscription,
)
from streamkeep.client import Events, FlowRun, stop, stream_flow, subscribe
from streamkeep.client.sync import subscribe as subscribe_blocking
from streamkeep.http import DurableStreaming, SSEFraming, StreamsHTTP
from streamkeep.storage import Storage
from streamkeep.storages import storage_for
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage
from streamkeep.sync import StreamManager as BlockingStreamManager


@dataclass
class Token:
    """A chunk."""

    text: str


async def write(streams: StreamManager) -> None:
    """Write a stream."""
    async with streams.open("answer", ttl=timedelta(hours=1), metadata={"model": "m"}) as stream:
        assert_type(stream, StreamInput)
        assert_type(await stream.write(Token("word")), int)
        await stream.done()


async def read(streams: StreamManager) -> list[str]:
    """Read it, as what it was."""
    async with streams.subscribe("answer", after=0, chunk_type=Token) as events:
        assert_type(events, Subscription[Token])
        said: list[str] = []
        async for event in events:
            assert_type(event, StreamEvent[Token])
            match event.type:
                case StreamEventType.CHUNK:
                    assert_type(event.chunk, Token)
                    said.append(event.chunk.text)
                case StreamEventType.DONE:
                    assert_type(event.offset, int)
                case StreamEventType.ERROR:
                    assert_type(event.error.message, str)
                case _:
                    assert_type(event.offset, int)
    async with streams.subscribe("answer") as plain:
        assert_type(plain, Subscription[Any])
    return said


async def look(streams: StreamManager) -> None:
    """See what there is."""
    assert_type(await streams.info("answer"), StreamInfo)
    assert_type(await streams.list(owner="ann"), StreamPage)
    assert_type(await streams.cancel("answer"), bool)


async def elsewhere(url: str) -> None:
    """Read from another server."""
    async with subscribe(url, chunk_type=Token) as events:
        assert_type(events, Events[StreamEvent[Token]])
        async for event in events:
            assert_type(event.chunk, Token)
    assert_type(stream_flow(url, "why?", chunk_type=Token), FlowRun[Token])
    assert_type(await stop(url), bool)


def blocking(url: str) -> None:
    """Do it without await."""
    with BlockingStreamManager.connect("sqlite:///streams.db") as streams:
        with streams.open("answer") as stream:
            assert_type(stream.write("word"), int)
        with streams.subscribe("answer", chunk_type=Token) as events:
            for event in events:
                assert_type(event, StreamEvent[Token])
    with subscribe_blocking(url, chunk_type=Token) as there:
        for event in there:
            assert_type(event, StreamEvent[Token])


assert_type(StreamManager.connect("memory://"), StreamManager)
storages: list[Storage] = [MemoryStorage(), SQLiteStorage("streams.db"), storage_for("redis://host")]
managers: list[StreamManager] = [InMemoryStreamManager(), StreamManager(storages[0])]
served = StreamsHTTP(managers[0])
framing = SSEFraming()
durable = DurableStreaming(served, served)
wrong = StreamManager.connect(42)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
