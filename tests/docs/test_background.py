"""Background work and resources: what the page says dies with the request, and what goes on."""

from collections.abc import AsyncGenerator
from contextvars import ContextVar

import anyio
from fastapi import BackgroundTasks, Depends, FastAPI, Request, Response, UploadFile
from tests.http.servers import STREAM_ID, Reading, events_of, http_to
from tests.test_docs import ROOT, blocks

from streamkeep import InMemoryStreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.sources import producer_of


async def test_what_belongs_to_the_request_is_closed_when_its_client_has_gone_and_the_producer_goes_on() -> None:
    told: list[str] = []
    user = ContextVar[str]("user")
    request_over, go_on = anyio.Event(), anyio.Event()
    streams_http = StreamsHTTP(InMemoryStreamManager())
    app = FastAPI(lifespan=streams_http.lifespan)

    async def session() -> AsyncGenerator[str]:
        yield "rows"
        told.append("session closed")

    @app.post("/ask")
    async def ask(request: Request, file: UploadFile, tasks: BackgroundTasks, rows: str = Depends(session)) -> Response:
        user.set("ann")
        tasks.add_task(request_over.set)

        async def produce() -> AsyncGenerator[str]:
            yield rows
            await go_on.wait()
            told.append(f"upload closed: {file.file.closed}")
            yield user.get()
            yield str(await request.is_disconnected())

        return await streams_http.respond(request, produce)

    async with http_to(app) as http:
        async with http.stream("POST", "/ask", files={"file": b"text"}) as answer:
            await Reading(answer).until()
        with anyio.fail_after(10):
            await request_over.wait()
            while "session closed" not in told:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        go_on.set()
        events = await events_of(streams_http.streams, answer.headers[STREAM_ID])
    assert told == ["session closed", "upload closed: True"]
    assert [content for _, content in events] == ["rows", "ann", "False", None]


async def test_a_stopped_generator_sees_it_at_its_await_or_at_its_yield_and_may_still_save() -> None:
    streams_http, told = StreamsHTTP(InMemoryStreamManager()), list[str]()

    async def produce(*, goes_on: bool) -> AsyncGenerator[int]:
        number = 0
        try:
            while True:
                yield (number := number + 1)
                await anyio.sleep(0.01 if goes_on else 60)
        except BaseException as seen:
            told.append(type(seen).__name__)
            raise
        finally:
            await anyio.sleep(0.01)
            told.append("saved")

    async with streams_http:
        for goes_on in (True, False):
            await streams_http.runner.start(str(goes_on), producer_of(produce(goes_on=goes_on)))
            async with streams_http.streams.subscribe(str(goes_on)) as events:
                await anext(events)
            await streams_http.streams.cancel(str(goes_on))
    assert sorted(told) == ["CancelledError", "GeneratorExit", "saved", "saved"]


async def test_the_pages_first_program_answers() -> None:
    shown: dict[str, FastAPI] = {}
    program = blocks(ROOT / "docs/how-to/background.md")[0].replace("sqlite:///streams.db", "memory://")
    exec(compile(program, "background.md", "exec", dont_inherit=True), shown)
    async with http_to(shown["app"]) as http:
        answer = await http.post("/summary", files={"document": b"Nothing is lost"})
    assert b'{"message":{"text":"lost"},"offset":2}' in answer.content
    assert b'{"result":{"words":3},"offset":3}' in answer.content
