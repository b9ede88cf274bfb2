"""What is measured, by OpenTelemetry's real SDK; and what Prometheus finds at its exporter's endpoint."""

import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Barrier
from types import ModuleType
from typing import Any

import prometheus_client
import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, messaging_attributes  # pyright: ignore[reportMissingTypeStubs]
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics, messaging_metrics  # pyright: ignore[reportMissingTypeStubs]
from opentelemetry.semconv.attributes import error_attributes
from tests.http.servers import http_to, until
from tests.telemetry.app import SECRET, Telemetry

from streamkeep import InMemoryStreamManager, StorageError, StorageUnavailableError, StreamManager, sync
from streamkeep.integrations import _otel_names
from streamkeep.integrations._otel_names import Metric
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.retrying import RetryingStorage
from streamkeep.testing.faults import FaultyStorage

pytestmark = pytest.mark.anyio


def value(telemetry: Telemetry, name: str, which: str) -> Any:
    """Give a number that was measured; of a histogram how many were measured."""
    point = telemetry.measured().get(name, {}).get(which)
    return None if point is None else getattr(point, "value", getattr(point, "count", None))


async def test_what_streams_and_readers_do_is_counted() -> None:
    telemetry = Telemetry()
    async with InMemoryStreamManager(hooks=[telemetry.hooks]) as streams:
        async with streams.open("done", owner="ada", key="chat") as stream:
            await stream.write(SECRET)
            async with streams.subscribe("done") as events:
                await anext(events)
                await stream.done()
                assert len([event async for event in events]) == 1
        with suppress(ValueError):
            async with streams.open("failed"):
                raise ValueError(SECRET)
        kept = await streams.open("kept")
        await kept.close()
        async with streams.open("kept", resume=True):
            await streams.cancel("kept")
    measured = telemetry.measured()
    found = {(name, which): value(telemetry, name, which) for name, points in measured.items() for which in points}
    expected = {
        ("streamkeep.streams.started", ""): 3,
        ("streamkeep.streams.taken_over", ""): 1,
        ("streamkeep.streams.ended", "done"): 1,
        ("streamkeep.streams.ended", "INTERNAL"): 1,
        ("streamkeep.streams.ended", "CANCELLED"): 1,
        ("streamkeep.writers.left", "done"): 1,
        ("streamkeep.writers.left", "INTERNAL"): 1,
        ("streamkeep.writers.left", "released"): 1,
        ("streamkeep.writers.left", "stopped"): 1,
        ("messaging.client.sent.messages", "commit"): 3,
        ("messaging.client.operation.duration", "commit"): 4,
        ("messaging.client.consumed.messages", "read"): 2,
        ("streamkeep.delivery.duration", "read"): 1,
        ("gen_ai.server.time_to_first_token", ""): 1,
        ("gen_ai.server.request.duration", ""): 3,
        ("gen_ai.server.request.duration", "INTERNAL"): 1,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert value(telemetry, "streamkeep.stored", "") > len(SECRET)
    texts = {str(text) for points in measured.values() for point in points.values() for text in point.attributes.values()}
    few = {"streamkeep", "commit", "read", "send", "receive", "stream"}
    outcomes = {"done", "INTERNAL", "CANCELLED", "released", "stopped"}
    assert texts <= few | outcomes  # and no id, no owner, no key, and nothing of a chunk


async def test_gauges_say_how_all_managers_of_the_process_are_doing_and_forget_those_that_are_closed() -> None:
    telemetry = Telemetry()
    async with InMemoryStreamManager(hooks=[telemetry.hooks]) as one:
        async with InMemoryStreamManager(hooks=[telemetry.hooks]) as other:  # hooks of their own, of one provider
            first, second = await one.open("a"), await other.open("b")
            for number in range(5):
                await first.write(number)
            async with one.subscribe("a"), other.subscribe("b"), other.subscribe("b"):
                await until(lambda: value(telemetry, "streamkeep.readers", "") == 3)
                assert value(telemetry, "streamkeep.streams.open", "") == 2
                assert value(telemetry, "messaging.client.sent.messages", "commit") == 5
                assert value(telemetry, "streamkeep.reader.lag", "") == 5
                assert value(telemetry, "streamkeep.queued", "") == 0
                age, renewed = (value(telemetry, f"streamkeep.session.{name}age", "") for name in ("", "renewal."))
                assert 0 <= renewed <= age
            await first.done()
            await second.done()
            assert value(telemetry, "messaging.client.sent.messages", "commit") == 7
        await until(lambda: value(telemetry, "streamkeep.readers", "") == 0)
    assert value(telemetry, "streamkeep.streams.open", "") == 0
    assert value(telemetry, "streamkeep.session.age", "") is None


def test_nothing_is_lost_of_what_threads_count_that_begin_at_once() -> None:
    telemetry, threads = Telemetry(), 4
    begun = Barrier(threads)

    class Slow(MeterProvider):
        def get_meter(self, *args: Any, **options: Any) -> Meter:
            time.sleep(0.05)  # for others to begin
            return super().get_meter(*args, **options)

    telemetry.reader = InMemoryMetricReader()
    telemetry.metrics = Slow([telemetry.reader])

    def write() -> None:
        begun.wait()
        with sync.StreamManager.connect("memory://", hooks=[telemetry.hooks]) as streams, streams.open("s") as stream:
            stream.done()

    with ThreadPoolExecutor(threads) as pool:
        for written in [pool.submit(write) for _ in range(threads)]:
            written.result()
    assert value(telemetry, "messaging.client.sent.messages", "commit") == threads


async def test_errors_of_the_storage_and_retries_are_counted_by_kind() -> None:
    telemetry = Telemetry()
    storage = FaultyStorage(MemoryStorage())
    retrying = RetryingStorage(storage, timeout=timedelta(seconds=5))
    async with StreamManager(retrying, hooks=[telemetry.hooks]) as streams:
        await (await streams.open("s")).close()
        storage.refuse("read", error=StorageUnavailableError(SECRET))
        await streams.info("s")
        storage.refuse("read", error=StorageError(SECRET))
        with pytest.raises(StorageError):
            await streams.info("s")
    assert value(telemetry, "streamkeep.storage.retries", "read StorageUnavailableError") == 1
    assert value(telemetry, "streamkeep.storage.errors", "read StorageError") == 1


def named() -> Iterator[tuple[str, str]]:
    """Give the names of metrics and of attributes."""
    for name, text in vars(_otel_names).items():
        if isinstance(text, Metric):
            yield "metric", text.name
        elif isinstance(text, str) and re.match(r"(messaging|gen_ai|error|streamkeep)\.", text) and name != "__name__":
            yield "attribute", text


def texts_in(*modules: ModuleType) -> set[object]:
    return {text for module in modules for text in vars(module).values() if isinstance(text, str)}


def test_names_are_those_of_the_conventions_or_our_own() -> None:
    known: Mapping[str, set[object]] = {
        "metric": texts_in(messaging_metrics, gen_ai_metrics),
        "attribute": texts_in(messaging_attributes, gen_ai_attributes, error_attributes),
    }
    all_names = [*named()]
    assert len(all_names) > 30
    for kind, name in all_names:
        assert name.startswith("streamkeep.") or name in known[kind], name
    source = Path(_otel_names.__file__).with_name("otel.py").read_text()
    assert re.findall(r'"(?:messaging|gen_ai|streamkeep)\.[^" ]+"', source) == []


async def test_prometheus_finds_all_of_it_at_its_endpoint() -> None:
    registry = prometheus_client.CollectorRegistry()
    telemetry = Telemetry(PrometheusMetricReader(registry=registry))
    async with (
        InMemoryStreamManager(hooks=[telemetry.hooks]) as streams,
        http_to(prometheus_client.make_asgi_app(registry)) as http,
        streams.open("s") as stream,
        streams.subscribe("s"),
    ):
        await stream.write(1)
        page = (await http.get("/")).text
        await stream.done()
    telemetry.metrics.shutdown()
    assert "streamkeep_streams_started_total{" in page
    assert "messaging_client_sent_messages_total{" in page
    assert "messaging_client_operation_duration_seconds_bucket{" in page
    assert 'le="0.0005"' in page
