"""What holds for whatever an SDK streams, given to `respond` as it comes."""

import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import anyio
import httpx
import msgspec
import pytest
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, TypeAdapter
from tests.http.servers import Reading, http_to
from tests.sdks.provider import FAILURE, SECRET, TEXT, Provider

from streamkeep import ErrorInfo, InMemoryStreamManager, JSONEncoding, StreamEventType, StreamManager
from streamkeep.http import NDJSONFraming, SSEFraming, StreamsHTTP
from streamkeep.http.sources import Source


@dataclass
class Stored:
    """What a stream has when it has ended."""

    chunks: list[Any]
    error: ErrorInfo | None

    @property
    def size(self) -> int:
        return sum(len(msgspec.json.encode(chunk)) for chunk in self.chunks)


async def stored_in(streams: StreamManager, stream: str, chunk_type: Any = Any) -> Stored:
    """Wait for a stream's end."""
    stored = Stored([], None)
    with anyio.fail_after(30):
        async with streams.subscribe(stream, chunk_type=chunk_type) as events:
            async for event in events:
                if event.type is StreamEventType.CHUNK:
                    stored.chunks.append(event.chunk)
                elif event.type is StreamEventType.ERROR:
                    stored.error = event.error
    return stored


def types_in(union: Any) -> set[str]:
    """Give the types of the models of a union."""
    schema = TypeAdapter(union).json_schema(mode="serialization")
    names = [member["$ref"].rpartition("/")[2] for member in schema.get("oneOf") or schema["anyOf"]]
    return {schema["$defs"][name]["properties"]["type"]["const"] for name in names}


class SDKSuite:
    """The contract.

    Attributes:
        encode: what the page says that its SDK needs.
        event: the type that its chunks are read as.
        failure: what an error in mid-answer says, of which readers are told nothing.
        cut: the status of an answer that is cut off without an error; None where the SDK takes it for a whole one.
    """

    encode: ClassVar[JSONEncoding | None] = None
    clients: AsyncExitStack
    event: ClassVar[Any] = Any
    failure: ClassVar[str] = FAILURE
    cut: ClassVar[str | None] = None

    @pytest.fixture(autouse=True)
    async def open_clients(self, provider: Provider) -> AsyncGenerator[None]:
        async with AsyncExitStack() as self.clients:
            yield

    def source(self, model: str) -> Source:
        """Give what a user would give to `respond`."""
        raise NotImplementedError

    def text_of(self, chunks: list[Any]) -> str:
        """Give the text that an answer's chunks are, each of the type that they are read as."""
        raise NotImplementedError

    def own_json(self, event: Any) -> Any:
        """Give an event as the SDK's own JSON has it."""
        return event.model_dump(mode="json", by_alias=True, exclude_unset=True) if isinstance(event, BaseModel) else event

    @asynccontextmanager
    async def asked(self, model: str, **options: Any) -> AsyncGenerator[tuple[StreamManager, httpx.Response]]:
        """Ask an app that responds with what the SDK gives."""
        streams_http = StreamsHTTP(InMemoryStreamManager())
        app = FastAPI(lifespan=streams_http.lifespan)

        @app.post("/ask")
        async def ask(request: Request) -> Response:
            return await streams_http.respond(request, self.source(model), id="a", encode=self.encode, **options)

        async with http_to(app) as http, http.stream("POST", "/ask") as answer:
            yield streams_http.streams, answer

    async def stored(self, model: str, chunk_type: Any = Any) -> Stored:
        async with self.asked(model) as (streams, _):
            return await stored_in(streams, "a", chunk_type)

    @pytest.mark.parametrize("model", ["words", "tool", "thinking"])
    async def test_what_is_stored_is_read_as_the_sdks_own_type_and_has_its_size(self, provider: Provider, model: str) -> None:
        async with self.asked(model) as (streams, _):
            stored = await stored_in(streams, "a")
            events = (await stored_in(streams, "a", self.event)).chunks
        assert stored.error is None
        assert [self.own_json(event) for event in events] == stored.chunks
        if model == "words":
            assert self.text_of(events) == TEXT

    @pytest.mark.parametrize("model", ["words", "tool"])
    async def test_no_instructions_are_stored(self, provider: Provider, model: str) -> None:
        stored = await self.stored(model)
        assert SECRET in msgspec.json.encode(provider.asked).decode()
        assert SECRET not in msgspec.json.encode(stored.chunks).decode()

    async def test_twice_as_many_chunks_have_twice_the_size(self, provider: Provider) -> None:
        few, many = [(await self.stored(f"words-{count}")).size for count in (100, 200)]
        assert 1.7 * few < many < 2.3 * few

    @pytest.mark.parametrize("framing", [None, SSEFraming(), NDJSONFraming()], ids=["genkit", "sse", "ndjson"])
    async def test_every_framing_shows_it(self, provider: Provider, framing: Any) -> None:
        async with self.asked("words", framing=framing) as (streams, answer):
            body = (await Reading(answer).whole()).decode()
            stored = await stored_in(streams, "a")
        assert all(
            msgspec.json.encode(chunk).decode() in body.replace('": ', '":').replace(', "', ',"') for chunk in stored.chunks
        )

    async def test_a_stop_closes_the_providers_connection(self, provider: Provider) -> None:
        async with self.asked("waits") as (streams, answer):
            reading = Reading(answer)
            await reading.until(b" is")
            await streams.cancel("a")
            await provider.until_left()
            with suppress(httpx.HTTPError):
                await reading.whole()
            stored = await stored_in(streams, "a")
        assert stored.error is not None
        assert stored.error.status == "CANCELLED"

    async def test_an_error_in_mid_answer_is_stored_in_full_and_reads_internal(
        self, provider: Provider, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL)
        stored = await self.stored("fails")
        assert stored.error is not None
        assert (stored.error.status, stored.error.message, stored.error.details) == ("INTERNAL", "internal", None)
        assert self.failure in stored.error.internal
        assert stored.chunks
        assert self.failure not in msgspec.json.encode(stored.chunks).decode()

    async def test_a_provider_that_is_asked_too_much_is_told_as_such(
        self, provider: Provider, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL)
        stored = await self.stored("limited")
        assert stored.error is not None
        assert (stored.error.status, stored.error.message) == ("RESOURCE_EXHAUSTED", "resource exhausted")

    async def test_an_answer_that_is_cut_off_ends_as_the_page_says(
        self, provider: Provider, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL)
        stored = await self.stored("cut")
        assert stored.chunks
        assert (stored.error and stored.error.status) == self.cut
