"""The app whose processes are killed: answers that are gone on with in three ways."""

import os
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Final, Literal, get_args

import anyio
from fastapi import FastAPI, Request, Response
from openai import AsyncOpenAI
from tests.recovery.provider import WORD_SECONDS, words_of

from streamkeep import StreamInput, StreamManager
from streamkeep.http import Recoverable, SSEFraming, StreamsHTTP

Way = Literal["attached", "counted", "again"]
"""By attaching to a provider's generation; from where it was; from the start."""
WAYS: Final[tuple[Way, ...]] = get_args(Way)
ATTEMPTS: Final = 1_000
LEASE: Final = timedelta(seconds=1.5)
GRACE: Final = timedelta(seconds=0.5)
AT_ONCE: Final = timedelta(0)


def app_of(provider: str) -> FastAPI:
    """Give the app, over `DEPLOY_STORAGE` and a provider's URL."""
    streams = StreamManager.connect(os.environ["DEPLOY_STORAGE"], lease=LEASE, grace=GRACE)
    streams_http = StreamsHTTP(streams, drain=timedelta(seconds=0.2))
    client = AsyncOpenAI(base_url=f"{provider}/v1", api_key="none", max_retries=0)
    app = FastAPI(lifespan=streams_http.lifespan)

    @streams_http.recoverable("attached", attempts=ATTEMPTS, backoff=AT_ONCE)
    async def attached(stream: StreamInput, question: str) -> object:
        kept = stream.checkpoint
        if kept is None:
            events = await client.responses.create(model="any", input=question, background=True, stream=True)
        else:
            events = await client.responses.retrieve(kept["response"], stream=True, starting_after=kept["after"])
            kept = dict(kept)
        async for event in events:
            match event.type:
                case "response.created":
                    kept = {"response": event.response.id, "after": event.sequence_number}
                    await stream.save_checkpoint(kept)
                case "response.output_text.delta":
                    assert kept is not None
                    await stream.write(event.delta, checkpoint={**kept, "after": event.sequence_number})
                case "response.completed":
                    return event.response.output_text
                case "response.failed" | "response.incomplete":
                    raise RuntimeError(event.type)
                case _:
                    pass
        raise RuntimeError("the provider's answer has no end")

    @streams_http.recoverable("counted", attempts=ATTEMPTS, backoff=AT_ONCE)
    async def counted(stream: StreamInput, question: str) -> str:
        for number, word in enumerate(words_of(question, stream.checkpoint or 0), stream.checkpoint or 0):
            await stream.write(word, checkpoint=number + 1)
            await anyio.sleep(WORD_SECONDS)
        return "".join(words_of(question))

    @streams_http.recoverable("again", attempts=ATTEMPTS, backoff=AT_ONCE)
    async def again(question: str) -> AsyncGenerator[str]:
        for word in words_of(question):
            yield word
            await anyio.sleep(WORD_SECONDS)

    calls: dict[Way, Recoverable] = {"attached": attached, "counted": counted, "again": again}

    @app.post("/ask/{way}/{question}")
    async def ask(request: Request, way: Way, question: str) -> Response:
        call = calls[way](question=question)
        return await streams_http.respond(request, call, id=f"{way}-{question}", framing=SSEFraming(retry_seconds=0.1))

    @app.get("/answers/{stream}")
    async def follow(request: Request, stream: str) -> Response:
        return await streams_http.follow(request, stream, framing=SSEFraming(retry_seconds=0.1))

    @app.get("/process")
    async def process() -> int:
        return os.getpid()

    return app
