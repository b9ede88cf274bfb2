"""Genkit's context providers, in its own form, and the ids of traces: as Genkit's servers have them, in all three frameworks."""

# pyright: reportMissingTypeStubs=false

import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import pytest
from django.core.wsgi import get_wsgi_application
from django.test.utils import override_settings
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from fastapi import FastAPI, HTTPException
from flask import Flask
from flask import request as flask_request
from genkit import ActionRunContext
from genkit import PublicError as GenkitPublicError
from genkit.plugin_api import RequestData
from opentelemetry import trace
from tests.http.agents import Words, stored, words_agent
from tests.http.servers import STREAM_ID, STREAMING, Flow, flow_of, frames_of, http_to
from tests.web import site
from werkzeug.serving import make_server

from streamkeep import PublicError
from streamkeep.http.response import ASGIApp, Receive, Scope, Send
from streamkeep.integrations import django as our_django
from streamkeep.integrations import fastapi as our_fastapi
from streamkeep.integrations import flask as our_flask

site.configure()

ADA: Final = {"Authorization": "Ada"}


class Whoami:
    """A flow that gives the context it is run with, and the trace that it is part of."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str]] = []

    @property
    def flow(self) -> Flow:
        async def whoami(_: Any, ctx: ActionRunContext) -> object:
            span = trace.get_current_span().get_span_context()
            self.spans.append((format(span.trace_id, "032x"), format(span.span_id, "016x")))
            return dict(ctx.context)

        return flow_of(whoami)


@asynccontextmanager
async def by_fastapi(flow: Flow, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(our_fastapi.durable_flow(flow, "memory://", **options))
    async with http_to(app) as http:
        yield http


@asynccontextmanager
async def by_flask(flow: Flow, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    with our_flask.FlaskStreams("memory://") as streams:
        app = Flask(__name__)
        app.register_blueprint(our_flask.durable_flow(flow, streams, **options))
        async with _served(app) as http:
            yield http


class URLs:
    """A URLconf."""

    def __init__(self, name: str, view: Any) -> None:
        self.urlpatterns = [path(name, csrf_exempt(view)), path(f"{name}/<str:call>", csrf_exempt(view))]


@asynccontextmanager
async def by_django(flow: Flow, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    with our_django.DjangoStreams("memory://") as streams:
        urls = URLs(flow.name, our_django.durable_flow(flow, streams, **options))
        with override_settings(ROOT_URLCONF=urls):
            async with _served(get_wsgi_application()) as http:
                yield http


@asynccontextmanager
async def _served(app: Any) -> AsyncGenerator[httpx.AsyncClient]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.server_port}", timeout=20, verify=False) as http:
            yield http
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


By = Callable[..., Any]
each: Final = pytest.mark.parametrize("by", [by_fastapi, by_flask, by_django], ids=["FastAPI", "Flask", "Django"])


@each
async def test_a_provider_is_given_method_headers_and_input_before_a_start_a_resume_and_a_stop(by: By) -> None:
    asked: list[tuple[str, object]] = []

    def provider(request: RequestData[Any]) -> Mapping[str, object]:
        given: Any = request
        asked.append((given.method, given.input))
        assert given.request is not None
        return {"name": given.headers["authorization"], "repeated": given.headers["x-twice"]}

    headers = [("Authorization", "Ada"), ("X-Twice", "a"), ("x-twice", "b")]
    async with by(Whoami().flow, context_provider=provider) as http:
        once = await http.post("/whoami", json={"data": {"asks": 1}}, headers=headers)
        streamed = await http.post("/whoami", json={"data": {"asks": 2}}, headers=[*headers, *STREAMING.items()])
        stream = (STREAM_ID, streamed.headers[STREAM_ID])
        resumed = [await http.post("/whoami", content=body, headers=[*headers, stream]) for body in (b"", b"{", b'{"data":3}')]
        await http.delete("/whoami", headers=[*headers, stream])
    context = once.json()["result"]
    assert context["name"] == "Ada"
    assert context["repeated"].replace(" ", "") == "a,b"
    assert frames_of(streamed.content)[0]["result"] == context
    assert [answer.content for answer in resumed] == [streamed.content] * 3
    assert asked == [
        ("POST", {"asks": 1}),
        ("POST", {"asks": 2}),
        ("POST", None),
        ("POST", None),
        ("POST", 3),
        ("DELETE", None),
    ]


@each
@pytest.mark.parametrize("is_async", [True, False])
async def test_genkits_public_error_rejects_by_its_status_and_in_its_words(by: By, *, is_async: bool) -> None:
    whoami = Whoami()

    def provider(request: Any) -> Mapping[str, object]:
        if "authorization" not in request.headers:
            raise GenkitPublicError("PERMISSION_DENIED", "sign in first", {"at": "/login"})
        return {}

    async def awaiting(request: Any) -> Mapping[str, object]:
        return provider(request)

    async with by(whoami.flow, context_provider=awaiting if is_async else provider) as http:
        stream = {STREAM_ID: (await http.post("/whoami", json={}, headers=STREAMING | ADA)).headers[STREAM_ID]}
        for method, headers in (("POST", {}), ("POST", STREAMING), ("POST", stream), ("DELETE", stream)):
            answer = await http.request(method, "/whoami", json={}, headers=headers)
            assert answer.status_code == 403
            told = {"status": "PERMISSION_DENIED", "message": "sign in first", "details": {"at": "/login"}}
            assert answer.json() == {"error": told}
    assert len(whoami.spans) == 1


@each
async def test_several_are_asked_in_order_behind_the_frameworks_own_and_the_last_word_counts(by: By) -> None:
    asked: list[str] = []

    def provider_of(name: str, *, rejects: bool = False) -> Callable[[object], Mapping[str, object]]:
        def provide(_: object) -> Mapping[str, object]:
            asked.append(name)
            if rejects:
                raise PublicError("UNAUTHENTICATED", name)
            return {name: True, "last": name}

        return provide

    def context(*_: object) -> Mapping[str, object]:
        asked.append("context")
        return {"context": True, "last": "context"}

    def own() -> Mapping[str, object]:  # FastAPI looks at the signature
        return context()

    own_of = own if by is not by_django else context
    async with by(Whoami().flow, context=own_of, context_provider=[provider_of("1"), provider_of("2")]) as http:
        answer = await http.post("/whoami", json={})
    assert answer.json()["result"] == {"context": True, "1": True, "2": True, "last": "2"}
    assert asked == ["context", "1", "2"]
    asked.clear()
    async with by(Whoami().flow, context_provider=[provider_of("1", rejects=True), provider_of("2")]) as http:
        assert (await http.post("/whoami", json={})).status_code == 401
    assert asked == ["1"]


@each
async def test_what_a_provider_raises_otherwise_is_nobodys_to_read(by: By) -> None:
    def provider(_: object) -> Mapping[str, object]:
        raise ValueError("secret://db-password")

    async with by(Whoami().flow, context_provider=provider) as http:
        answer = await http.post("/whoami", json={})
    assert answer.status_code == 500
    assert "secret" not in answer.text


@each
async def test_what_is_no_mapping_adds_nothing_and_another_rejection_of_the_frameworks_is_its_own(by: By) -> None:
    async with by(Whoami().flow, context_provider=lambda _: None) as http:
        assert (await http.post("/whoami", json={})).json() == {"result": {}}

    def rejects(_: object) -> Mapping[str, object]:
        raise HTTPException(402, "pay first")

    async with by(Whoami().flow, context_provider=rejects) as http:
        assert (await http.post("/whoami", json={})).status_code == 402


async def test_a_plain_provider_has_flasks_request() -> None:
    async with by_flask(Whoami().flow, context_provider=lambda _: {"path": flask_request.path}) as http:
        assert (await http.post("/whoami", json={})).json() == {"result": {"path": "/whoami"}}


# Traces


def traced(app: ASGIApp) -> ASGIApp:
    """Give the app within a span, as instrumentation does; without an SDK of OpenTelemetry's all spans within have its ids."""

    async def within(scope: Scope, receive: Receive, send: Send) -> None:
        span = trace.NonRecordingSpan(trace.SpanContext(trace_id=5 << 64, span_id=7, is_remote=False))
        with trace.use_span(span):
            await app(scope, receive, send)

    return within


async def test_an_answer_that_does_not_stream_names_its_trace() -> None:
    whoami = Whoami()
    async with http_to(traced(durable_app_of(whoami.flow))) as http:
        once = await http.post("/whoami", json={})
        streamed = await http.post("/whoami", json={}, headers=STREAMING)
        refused = await http.post("/whoami", json={"init": 1})
    assert (once.headers["x-genkit-trace-id"], once.headers["x-genkit-span-id"]) == whoami.spans[0]
    assert whoami.spans[0] == (f"{5 << 64:032x}", f"{7:016x}")
    assert not {"x-genkit-trace-id", "x-genkit-span-id"} & {*streamed.headers, *refused.headers}


def durable_app_of(flow: Flow) -> ASGIApp:
    app = FastAPI()
    app.include_router(our_fastapi.durable_flow(flow, "memory://"))
    return app


async def test_where_nothing_is_traced_no_trace_is_named() -> None:
    whoami = Whoami()
    async with http_to(durable_app_of(whoami.flow)) as http:
        answer = await http.post("/whoami", json={})
    if int(whoami.spans[0][0], 16) == 0:  # unless another test has set a tracer
        assert "x-genkit-trace-id" not in answer.headers


# Agents


@each
async def test_an_agent_is_served_with_its_snapshots_and_their_end(by: By) -> None:
    words = Words()
    held = {"data": {"message": {"role": "user", "content": [{"text": "hold"}]}, "detach": True}, "init": {}}

    def provider(request: Any) -> Mapping[str, object]:
        return {"name": request.headers["authorization"]}

    async with by(words_agent(words, stored()), context_provider=provider) as http:
        detached = (await http.post("/words", json=held, headers=ADA)).json()["result"]
        named = {"data": {"snapshotId": detached["snapshotId"]}}
        found = (await http.post("/words/getSnapshot", json=named, headers=ADA)).json()["result"]
        ended = (await http.post("/words/abort", json=named, headers=ADA)).json()["result"]
        read = await http.post("/words", headers=ADA | {STREAM_ID: detached["snapshotId"]})
        nothing = await http.post("/words/other", json=named, headers=ADA)
    assert (found["status"], ended["status"]) == ("pending", "pending")
    assert frames_of(read.content)[-1]["error"]["status"] == "CANCELLED"  # type: ignore[index]
    assert nothing.status_code in (404, 405)
    assert words.contexts == [{"name": "Ada"}]
