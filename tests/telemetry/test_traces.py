"""Spans, by OpenTelemetry's real SDK, before FastAPI with its instrumentation and real requests."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext
from tests.http.servers import http_to, until
from tests.telemetry.app import SECRET, Telemetry, app_of, linked

from streamkeep import InMemoryStreamManager, StreamManager

pytestmark = pytest.mark.anyio

RUN, READ = "run stream", "read stream"


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def id_of(span: ReadableSpan) -> int:
    return context_of(span).span_id


def trace_of(span: ReadableSpan) -> int:
    return context_of(span).trace_id


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def stream_of(span: ReadableSpan) -> object:
    return (span.attributes or {})["messaging.destination.name"]


@asynccontextmanager
async def other_process(url: str) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve the same app in another process."""
    async with await anyio.open_process([sys.executable, "-m", "tests.telemetry.app", url], stderr=None) as process:
        assert process.stdout is not None
        try:
            with anyio.fail_after(30):
                base = (await process.stdout.receive()).decode().strip()
            async with httpx.AsyncClient(base_url=base, timeout=20) as http:
                yield http
        finally:
            process.kill()


async def test_a_run_has_a_span_of_its_own_that_outlives_its_request(tmp_path: Path) -> None:
    telemetry, may_end = Telemetry(), asyncio.Event()
    app = app_of(telemetry, InMemoryStreamManager(hooks=[telemetry.hooks]), may_end)
    async with http_to(app) as http:
        async with http.stream("POST", "/ask/a", headers={"baggage": "tenant=acme"}) as response:
            assert await anext(response.aiter_lines())  # and it leaves with the first chunk
        await until(lambda: telemetry.spans("POST /ask/{id}") and telemetry.spans(READ))
        assert not telemetry.spans(RUN)
        may_end.set()
        await until(lambda: telemetry.spans(RUN))
    (request,), (run,), (read,) = (telemetry.spans(name) for name in ("POST /ask/{id}", RUN, READ))
    (model,) = telemetry.spans("asking a model: a")
    assert parent_of(run) is None
    assert trace_of(run) != trace_of(request)
    assert linked(run) == [id_of(request)]
    assert parent_of(read) == id_of(request)
    assert linked(read) == [id_of(run)]
    assert parent_of(model) == id_of(run)
    attributes = dict(run.attributes or {})
    assert isinstance(attributes.pop("gen_ai.response.time_to_first_chunk"), float)
    assert attributes == {
        "messaging.system": "streamkeep",
        "messaging.operation.name": "run",
        "messaging.operation.type": "send",
        "messaging.destination.name": "a",
        "messaging.destination.temporary": True,
        "messaging.batch.message_count": 3,
        "gen_ai.conversation.id": "chat of a",
        "streamkeep.outcome": "done",
    }
    assert SECRET not in "".join(span.to_json() for span in telemetry.spans())


async def test_nothing_of_one_request_gets_into_another(tmp_path: Path) -> None:
    telemetry, may_end = Telemetry(), asyncio.Event()
    app = app_of(telemetry, StreamManager.connect(f"sqlite:///{tmp_path}/s.db", hooks=[telemetry.hooks]), may_end)
    ids = [f"s{number}" for number in range(8)]
    all_there = asyncio.Barrier(len(ids) + 1)

    async def ask_and_follow(http: httpx.AsyncClient, id: str) -> None:
        async with http.stream("POST", f"/ask/{id}", headers={"baggage": f"tenant={id}"}) as asked:
            lines = asked.aiter_lines()
            assert f'"baggage":"{id}"' in await anext(lines)
            async with http.stream("GET", f"/ask/{id}") as followed:
                await all_there.wait()
                assert f'"baggage":"{id}"' in "".join([line async for line in followed.aiter_lines()])
            assert "result" in "".join([line async for line in lines])

    async with http_to(app) as http, asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for id in ids:
            tasks.create_task(ask_and_follow(http, id))
        await all_there.wait()
        may_end.set()
    assert len(telemetry.spans(RUN)) == len(ids)
    assert len(telemetry.spans(READ)) == 2 * len(ids)
    by_id = {id_of(span): span for span in telemetry.spans()}
    for run in telemetry.spans(RUN):
        (request,) = [by_id[span] for span in linked(run)]
        assert str((request.attributes or {})["http.target"]).endswith(f"/ask/{stream_of(run)}")
        (model,) = [span for span in telemetry.spans() if parent_of(span) == id_of(run)]
        assert model.name == f"asking a model: {stream_of(run)}"
    for read in telemetry.spans(READ):
        request = by_id[parent_of(read) or 0]
        assert str((request.attributes or {})["http.target"]).endswith(f"/ask/{stream_of(read)}")
        assert [stream_of(by_id[span]) for span in linked(read)] == [stream_of(read)]
        assert not any(parent_of(span) == id_of(read) for span in telemetry.spans())


async def test_who_resumes_in_another_process_is_below_its_own_request_and_linked_to_the_run(tmp_path: Path) -> None:
    telemetry, may_end = Telemetry(), asyncio.Event()
    url = f"sqlite:///{tmp_path}/s.db"
    app = app_of(telemetry, StreamManager.connect(url, hooks=[telemetry.hooks]), may_end)
    async with http_to(app) as http, other_process(url) as other:
        async with http.stream("POST", "/ask/a") as response:
            assert await anext(response.aiter_lines())
        async with other.stream("GET", "/ask/a") as response:
            lines = response.aiter_lines()
            assert await anext(lines)
            may_end.set()
            assert "carrier" not in "".join([line async for line in lines])
        spans: list[Any] = (await other.get("/spans")).json()
        await until(lambda: telemetry.spans(RUN))
    (run,) = telemetry.spans(RUN)
    (read,) = [span for span in spans if span["name"] == READ]
    (request,) = [span for span in spans if span["name"] == "GET /ask/{id}"]
    assert read["parent_id"] == request["context"]["span_id"]
    assert [int(link["context"]["span_id"], 16) for link in read["links"]] == [id_of(run)]
    assert not [span for span in spans if span["name"] == RUN]


async def test_a_run_that_is_stopped_elsewhere_or_fails_says_so_and_nothing_of_what_was_raised() -> None:
    telemetry, may_end = Telemetry(), asyncio.Event()
    app = app_of(telemetry, InMemoryStreamManager(hooks=[telemetry.hooks]), may_end)
    async with http_to(app) as http:
        for id in ("stopped", "fail"):
            async with http.stream("POST", f"/ask/{id}") as response:
                assert await anext(response.aiter_lines())
        assert (await http.delete("/ask/stopped")).json() == {"stopped": True}
        await until(lambda: telemetry.spans(RUN))
        may_end.set()
        await until(lambda: len(telemetry.spans(RUN)) == 2)
    ends = {
        stream_of(run): ((run.attributes or {})["streamkeep.outcome"], run.status.status_code.name, run.status.description)
        for run in telemetry.spans(RUN)
    }
    assert ends == {"stopped": ("stopped", "UNSET", None), "fail": ("INTERNAL", "ERROR", "INTERNAL")}
    told = json.dumps([json.loads(span.to_json()) for span in telemetry.spans(RUN)])
    assert SECRET not in told
