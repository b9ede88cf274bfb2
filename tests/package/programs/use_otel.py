"""Metrics and traces with OpenTelemetry's API and no SDK: hooks tell it of a run and its reader, and cost nobody his stream."""

import asyncio

from opentelemetry.trace import NoOpTracer, NoOpTracerProvider

from streamkeep import StreamManager
from streamkeep.integrations.otel import OpenTelemetryHooks

begun = []


class Tracer(NoOpTracer):
    def start_span(self, name, *args, **options):
        begun.append(name)
        return super().start_span(name, *args, **options)


class Tracers(NoOpTracerProvider):
    def get_tracer(self, *args, **options):
        return Tracer()


async def main():
    for hooks in (OpenTelemetryHooks(tracer_provider=Tracers()), OpenTelemetryHooks()):
        async with StreamManager.connect("memory://", hooks=[hooks]) as streams:
            async with streams.open("answer") as stream:
                await stream.write("Nothing is lost")
                await stream.done()
            async with streams.subscribe("answer") as events:
                assert [event.type.value async for event in events] == ["chunk", "done"]


asyncio.run(main())
assert begun == ["run stream", "read stream"], begun
