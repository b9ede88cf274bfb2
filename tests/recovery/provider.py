"""A provider: OpenAI's Responses API in background mode, over a model that counts how often it is asked."""

from collections import Counter
from collections.abc import AsyncGenerator
from typing import Final

import anyio
from fastapi import FastAPI

from streamkeep.http import StreamsHTTP
from streamkeep.integrations.openai import OpenAIResponses, ResponseRequest

WORDS: Final = 40
WORD_SECONDS: Final = 0.05
generations: Final = Counter[str]()
said: Final = Counter[str]()
"""Of the last answer: how many words, and whether it was stopped."""


def words_of(question: str, begin: int = 0) -> list[str]:
    """Give the answer to a question, from some word on."""
    return [f"{question}-{number} " for number in range(begin, WORDS)]


async def model(question: str) -> AsyncGenerator[str]:
    """Answer, word by word."""
    generations[question] += 1
    said.clear()
    try:
        for word in words_of(question):
            said["words"] += 1
            yield word
            await anyio.sleep(WORD_SECONDS)
    finally:
        said["stopped"] += said["words"] < WORDS


async def _answer(request: ResponseRequest) -> AsyncGenerator[str]:
    return model(str(request.body["input"]))


def provider() -> FastAPI:
    """Give the app."""
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)

    @app.get("/generations")
    async def counted() -> dict[str, int]:
        return dict(generations)

    @app.get("/said")
    async def what_was_said() -> dict[str, int]:
        return {"words": said["words"], "stopped": said["stopped"]}

    @app.get("/process")
    async def process() -> int:
        return 0

    app.mount("/v1", OpenAIResponses(streams_http, _answer))
    return app
