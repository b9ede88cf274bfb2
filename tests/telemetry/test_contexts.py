"""Where a run's own spans go: in threads, in blocks, in other frameworks; and what is left as it was."""

import asyncio
from collections.abc import AsyncGenerator, Iterator

import anyio
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from flask import Flask
from flask import Response as FlaskResponse
from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware  # pyright: ignore[reportMissingTypeStubs]
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from tests.http.servers import http_to, until
from tests.telemetry.app import Telemetry, linked
from tests.telemetry.test_traces import READ, RUN, id_of, parent_of

from streamkeep import InMemoryStreamManager, Recovery, StreamInput, sync
from streamkeep.http import DurableStreaming, Ended, StreamsHTTP
from streamkeep.http.runner import Runner
from streamkeep.integrations.flask import FlaskStreams
from streamkeep.integrations.otel import OpenTelemetryHooks

pytestmark = pytest.mark.anyio


def only(telemetry: Telemetry, name: str) -> trace.SpanContext:
    (span,) = telemetry.spans(name)
    context = span.get_span_context()
    assert context is not None
    return context


async def test_what_a_producer_does_in_a_thread_and_what_is_done_at_its_end_is_below_the_run() -> None:
    telemetry = Telemetry()

    def on_end(_: Ended) -> None:
        with telemetry.tracer.start_as_current_span("keeping the answer"):
            pass

    streams_http = StreamsHTTP(InMemoryStreamManager(hooks=[telemetry.hooks]), on_end=on_end)
    app = FastAPI(lifespan=streams_http.lifespan)

    def answer() -> Iterator[str]:
        with telemetry.tracer.start_as_current_span("in a thread"):
            yield "a"

    @app.post("/")
    async def ask(request: Request) -> Response:
        before = trace.get_current_span()
        response = await streams_http.respond(request, answer)
        assert trace.get_current_span() is before
        return response

    async with http_to(app) as http:
        await http.post("/")
        await until(lambda: telemetry.spans("keeping the answer"))
    run = only(telemetry, RUN)
    for name in ("in a thread", "keeping the answer"):
        (span,) = telemetry.spans(name)
        assert parent_of(span) == run.span_id


async def test_a_run_that_goes_on_in_place_of_a_dead_one_is_linked_to_that_and_has_no_request() -> None:
    telemetry = Telemetry()
    async with InMemoryStreamManager(hooks=[telemetry.hooks]) as streams:
        with telemetry.tracer.start_as_current_span("request"):
            stream = await streams.open("s", recovery=Recovery("go"))
        await stream.close()

        async def produce(stream: StreamInput, _stop: anyio.Event) -> None:
            with telemetry.tracer.start_as_current_span("going on"):
                await stream.write(1)

        with telemetry.tracer.start_as_current_span("unrelated"):
            async with Runner(streams) as runner:
                runner.recover(["go"], lambda _: produce)
                await until(lambda: len(telemetry.spans(RUN)) == 2)
    first, second = telemetry.spans(RUN)
    assert linked(first) == [id_of(telemetry.spans("request")[0])]
    assert linked(second) == [id_of(first)]
    assert parent_of(second) is None
    assert parent_of(telemetry.spans("going on")[0]) == id_of(second)


async def test_a_block_that_writes_is_below_the_run_and_what_comes_behind_it_is_not() -> None:
    telemetry = Telemetry()
    async with InMemoryStreamManager(hooks=[telemetry.hooks]) as streams:
        with telemetry.tracer.start_as_current_span("job") as job:
            async with streams.open("s") as stream:
                with telemetry.tracer.start_as_current_span("asking"):
                    await stream.write(1)
                await stream.done()
            assert trace.get_current_span() is job
    assert parent_of(telemetry.spans("asking")[0]) == only(telemetry, RUN).span_id
    assert linked(telemetry.spans(RUN)[0]) == [id_of(telemetry.spans("job")[0])]


async def test_where_nobody_traces_what_came_with_the_request_goes_on_to_whom_the_producer_asks() -> None:
    remote = trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=True))
    async with InMemoryStreamManager(hooks=[OpenTelemetryHooks(tracer_provider=trace.NoOpTracerProvider())]) as streams:
        with trace.use_span(remote):
            async with streams.open("s") as stream:
                assert trace.get_current_span() is remote
                await stream.done()


async def test_blocks_that_are_left_in_any_order_leave_no_span_behind() -> None:
    telemetry = Telemetry()
    async with InMemoryStreamManager(hooks=[telemetry.hooks]) as streams:
        with telemetry.tracer.start_as_current_span("job") as job:
            first, second, third = (streams.open(name) for name in "abc")
            for block in (first, second, third):
                await block.__aenter__()
            run = trace.get_current_span()
            for block in (first, second):
                await block.__aexit__(None, None, None)
                assert trace.get_current_span() is run
            await third.__aexit__(None, None, None)
            assert trace.get_current_span() is job


async def test_a_block_that_is_left_in_another_task_leaves_no_span_there_and_logs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    telemetry = Telemetry()
    async with InMemoryStreamManager(hooks=[telemetry.hooks]) as streams:
        with telemetry.tracer.start_as_current_span("job") as job:
            block = streams.open("s")
            await block.__aenter__()

            async def leave() -> trace.Span:
                await block.__aexit__(None, None, None)
                return trace.get_current_span()

            assert await asyncio.create_task(leave()) is job
    assert not caplog.records


def test_code_that_does_not_await_has_its_spans_linked_and_its_readers_below_it() -> None:
    telemetry = Telemetry()
    with sync.StreamManager.connect("memory://", hooks=[telemetry.hooks]) as streams:
        with telemetry.tracer.start_as_current_span("job"), streams.open("s") as stream:
            stream.write("a")
            stream.done()
        with telemetry.tracer.start_as_current_span("view"):
            assert len(list(streams.subscribe("s"))) == 2
    (run,), (read,) = telemetry.spans(RUN), telemetry.spans(READ)
    assert linked(run) == [id_of(telemetry.spans("job")[0])]
    assert linked(read) == [id_of(run)]
    assert parent_of(read) == id_of(telemetry.spans("view")[0])


async def test_an_app_that_is_made_durable_keeps_its_own_spans_and_they_live_as_long_as_its_answer() -> None:
    telemetry, may_end = Telemetry(), asyncio.Event()
    app = FastAPI()

    @app.post("/")
    async def ask() -> StreamingResponse:
        async def answer() -> AsyncGenerator[str]:
            yield "data: a\n\n"
            await may_end.wait()
            with telemetry.tracer.start_as_current_span("asking"):
                yield "data: b\n\n"

        return StreamingResponse(answer(), media_type="text/event-stream")

    FastAPIInstrumentor.instrument_app(app, tracer_provider=telemetry.traces, exclude_spans=["send", "receive"])
    durable = DurableStreaming(app, InMemoryStreamManager(hooks=[telemetry.hooks]))
    outer = OpenTelemetryMiddleware(
        durable,
        tracer_provider=telemetry.traces,
        exclude_spans=["send", "receive"],
        default_span_details=lambda _: ("outer", {}),
    )
    async with http_to(outer) as http:
        async with http.stream("POST", "/") as response:
            assert await anext(response.aiter_lines())
        await until(lambda: telemetry.spans(READ))
        await until(lambda: telemetry.spans("outer"))
        assert not telemetry.spans("POST /")
        may_end.set()
        await until(lambda: telemetry.spans(RUN) and telemetry.spans("POST /"))
    outer_span, inner, asking = (only(telemetry, name) for name in ("outer", "POST /", "asking"))
    parents = {span.name: parent_of(span) for span in telemetry.spans()}
    assert parents == {
        "outer": None,
        READ: outer_span.span_id,
        "POST /": outer_span.span_id,
        "asking": inner.span_id,
        RUN: None,
    }
    assert asking.trace_id == inner.trace_id
    assert linked(telemetry.spans(RUN)[0]) == [outer_span.span_id]


def test_flask_views_have_their_readers_below_them_and_what_they_stream_below_its_run() -> None:
    telemetry = Telemetry()
    app = Flask(__name__)
    streams = FlaskStreams(lambda: InMemoryStreamManager(hooks=[telemetry.hooks]), app)

    def answer() -> Iterator[str]:
        with telemetry.tracer.start_as_current_span("asking"):
            yield "a"

    @app.post("/")
    def ask() -> FlaskResponse:
        with telemetry.tracer.start_as_current_span("view"):
            return streams.respond(answer)

    with streams:
        assert b"a" in app.test_client().post("/").data
    (run,), (read,), view = telemetry.spans(RUN), telemetry.spans(READ), only(telemetry, "view")
    assert parent_of(run) is None
    assert linked(run) == [view.span_id]
    assert parent_of(read) == view.span_id
    assert parent_of(telemetry.spans("asking")[0]) == id_of(run)
