"""What streamkeep does with nothing beside it: a stream on SQLite, read by a manager without `await` and over HTTP."""

import asyncio

from streamkeep import StreamEventType, StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.sync import StreamManager as BlockingStreamManager

URL = "sqlite:///streams.db"


async def write() -> None:
    async with StreamManager.connect(URL) as streams, streams.open("answer") as stream:
        for word in ("Nothing", "is", "lost"):
            await stream.write(word)
        await stream.done("Nothing is lost")


async def body_of(app: StreamsHTTP, path: str) -> bytes:
    body = bytearray()

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        assert message.get("status", 200) == 200, message
        part = message.get("body", b"")
        assert isinstance(part, bytes)
        body.extend(part)

    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "query_string": b"", "headers": []}
    async with app:
        await app(scope, receive, send)  # type: ignore[arg-type]  # messages of ASGI are dicts here
    return bytes(body)


asyncio.run(write())
with BlockingStreamManager.connect(URL) as streams, streams.subscribe("answer") as events:
    assert [event.chunk for event in events if event.type is StreamEventType.CHUNK] == ["Nothing", "is", "lost"]
assert b'data: "lost"' in asyncio.run(body_of(StreamsHTTP(URL), "/answer"))
