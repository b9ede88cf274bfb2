"""`python -m benchmarks.peers PORT PEER URL`: the same answer served by other libraries over Redis, each as its own documentation has it.

For an interpreter that has them: `pip install fastapi-resumable-stream assistant-stream fastapi redis uvicorn uvloop httptools`.
"""

import json
import sys
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from redis.asyncio import Redis

from benchmarks.answer import chunks

CONNECTIONS = 10_000
Answer = Callable[[], Awaitable[Any]]


async def frames() -> AsyncGenerator[str]:
    """Give the answer's frames; that they are numbered is the peer's affair, if it does."""
    async for chunk in chunks():
        yield f"event: chunk\ndata: {json.dumps(chunk)}\n\n"


def fastapi_resumable_stream(url: str) -> Answer:
    from fastapi_resumable_stream import (  # type: ignore[import-not-found]
        ActiveStreamRegistry,
        ResumableStream,
        StopController,
        start_conversation_stream,
    )

    redis: Any = Redis.from_url(url, max_connections=CONNECTIONS)
    stream, registry, stop = ResumableStream(redis), ActiveStreamRegistry(redis), StopController(redis)

    async def answer() -> Any:
        id = str(uuid.uuid4())
        return await start_conversation_stream(stream, registry, stop, id, f"{id}:0", producer=frames)

    return answer


def assistant_stream(url: str) -> Answer:
    from assistant_stream.resumable import (  # type: ignore[import-not-found]
        create_redis_resumable_stream_store,
        create_resumable_stream_context,
    )

    redis: Any = Redis.from_url(url, max_connections=CONNECTIONS)
    context = create_resumable_stream_context(store=create_redis_resumable_stream_store(redis))

    async def encoded() -> AsyncGenerator[bytes]:
        async for frame in frames():
            yield frame.encode()

    async def answer() -> Any:
        return StreamingResponse(await context.run(str(uuid.uuid4()), encoded), media_type="text/event-stream")

    return answer


PEERS = {"fastapi-resumable-stream": fastapi_resumable_stream, "assistant-stream": assistant_stream}


def main() -> None:
    port, peer, url = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    app = FastAPI()
    app.post("/answer", response_model=None)(PEERS[peer](url))
    uvicorn.run(app, port=port, loop="uvloop", http="httptools", log_level="warning", access_log=False, backlog=4_096)


if __name__ == "__main__":
    main()
