"""The same of the frameworks' parts, where all extras are there."""

from collections.abc import AsyncIterator
from typing import assert_type

from fastapi import APIRouter, FastAPI, Request, Response
from flask import Flask
from flask import Response as FlaskResponse
from genkit import Genkit

from streamkeep import StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.integrations.fastapi import durable_flow
from streamkeep.integrations.flask import FlaskStreams
from streamkeep.integrations.mcp import StreamEventStore
from streamkeep.storage import Storage
from streamkeep.storages.http import HTTPStorage
from streamkeep.storages.nats import NATSStorage
from streamkeep.storages.postgres import PostgresStorage
from streamkeep.storages.redis import RedisStorage
from streamkeep.testing import StorageSuite

streams_http = StreamsHTTP("sqlite:///streams.db")
app = FastAPI(lifespan=streams_http.lifespan)
flask_app = Flask(__name__)
flask_streams = FlaskStreams("memory://", flask_app)


async def words(question: str) -> AsyncIterator[str]:
    """Answer."""
    for word in question.split():
        yield word


@app.post("/ask")
async def ask(request: Request, question: str) -> Response:
    """Answer durably."""
    answer = await streams_http.respond(request, words(question), key="chat", owner="ann")
    assert_type(answer.stream, str | None)
    assert_type(answer.started, bool)
    return answer


@flask_app.get("/ask")
def ask_flask() -> FlaskResponse:
    """Answer durably."""
    return flask_streams.respond(iter(["word"]), key="chat")


@Genkit().flow()
async def shout(text: str) -> str:
    """Shout."""
    return text.upper()


assert_type(durable_flow(shout, streams_http), APIRouter)
events = StreamEventStore(StreamManager.connect("memory://"))
storages: list[Storage] = [
    RedisStorage("redis://h"),
    PostgresStorage("postgresql://h/d"),
    NATSStorage(["nats://h"]),
    HTTPStorage("https://h"),
]


class TestOwn(StorageSuite):
    """The suite is a class to subclass."""
