"""An app with OpenTelemetry's real SDK and FastAPI's instrumentation: in this process, or, run as a program, in one of its own."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI, Request, Response
from opentelemetry import baggage, trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from streamkeep import StreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.integrations.otel import OpenTelemetryHooks

SECRET = "what nobody is to read in telemetry"


@dataclass
class Telemetry:
    """OpenTelemetry's SDK, and what it was told."""

    reader: MetricReader = field(default_factory=InMemoryMetricReader)
    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)

    def __post_init__(self) -> None:
        self.traces = TracerProvider()
        self.traces.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.metrics = MeterProvider([self.reader])
        self.tracer = self.traces.get_tracer("test")

    @property
    def hooks(self) -> OpenTelemetryHooks:
        return OpenTelemetryHooks(self.metrics, self.traces)

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        """Give the spans that have ended."""
        return [span for span in self.exporter.get_finished_spans() if name in {None, span.name}]

    def measured(self) -> dict[str, dict[str, Any]]:
        """Give the metrics by name; for each what was measured, by the values of its attributes that are not always the same."""
        assert isinstance(self.reader, InMemoryMetricReader)
        data = self.reader.get_metrics_data()
        found: dict[str, dict[str, Any]] = {}
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        known = {"streamkeep.outcome", "error.type", "messaging.operation.name"}
                        which = " ".join(str(text) for name, text in (point.attributes or {}).items() if name in known)
                        found.setdefault(metric.name, {})[which] = point
        return found


def app_of(telemetry: Telemetry, streams: StreamManager, go_on: asyncio.Event | None = None) -> FastAPI:
    """Give an app whose answers have two chunks, with a pause between them until `go_on` is set."""
    may_end = go_on or asyncio.Event()
    streams_http = StreamsHTTP(streams)
    app = FastAPI(lifespan=streams_http.lifespan)
    tracer = telemetry.tracer

    async def answer(words: str) -> AsyncGenerator[object]:
        with tracer.start_as_current_span(f"asking a model: {words}"):
            yield {"text": words, "baggage": baggage.get_baggage("tenant")}
            await may_end.wait()
            if words == "fail":
                raise RuntimeError(SECRET)
        yield {"text": SECRET}

    @app.post("/ask/{id}")
    async def ask(request: Request, id: str) -> Response:
        return await streams_http.respond(request, answer(id), id=id, key=f"chat of {id}", owner="ada")

    @app.get("/ask/{id}")
    async def follow(request: Request, id: str) -> Response:
        return await streams_http.follow(request, id, owner="ada")

    @app.delete("/ask/{id}")
    async def stop(request: Request, id: str) -> Response:
        return await streams_http.cancel(request, id, owner="ada")

    @app.get("/spans")
    async def spans() -> list[Any]:
        return [json.loads(span.to_json()) for span in telemetry.spans()]

    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=telemetry.traces, meter_provider=telemetry.metrics, exclude_spans=["send", "receive"]
    )
    return app


def linked(span: ReadableSpan) -> Iterable[int]:
    """Give the ids of the spans that a span is linked to."""
    return [link.context.span_id for link in span.links]


def current_span() -> int:
    """Give the id of the span that is current."""
    return trace.get_current_span().get_span_context().span_id


async def main(url: str) -> None:
    telemetry = Telemetry()
    app = app_of(telemetry, StreamManager.connect(url, hooks=[telemetry.hooks]))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    with anyio.move_on_after(60):
        await server.serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
