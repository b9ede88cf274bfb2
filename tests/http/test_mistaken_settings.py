"""A setting that is of another type is refused by name, where it is given."""

import secrets
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from tests.http.servers import http_to

from streamkeep import InMemoryStreamManager, Recovery, StreamManager
from streamkeep.client import Retry, subscribe
from streamkeep.client import sync as client_sync
from streamkeep.client.durable_streams import DurableStream, sync
from streamkeep.durable_streams import DurableStreamsLimits
from streamkeep.http import Bounds, SSEFraming, StreamsHTTP, Timeouts
from streamkeep.integrations.django import DjangoStreams
from streamkeep.integrations.flask import FlaskStreams
from streamkeep.integrations.mcp import StreamEventStore

SECONDS: Any = 60
STREAMS = InMemoryStreamManager()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("ttl", lambda: StreamManager.connect("memory://", ttl=SECONDS)),
        ("lease", lambda: StreamManager.connect("memory://", lease=SECONDS)),
        ("grace", lambda: StreamManager.connect("memory://", grace=SECONDS)),
        pytest.param("ttl", lambda: STREAMS.open("s", ttl=SECONDS), id="open"),
        ("idle_timeout", lambda: STREAMS.subscribe("s", idle_timeout=SECONDS)),
        ("drain", lambda: StreamsHTTP("memory://", drain=SECONDS)),
        ("heartbeat", lambda: Timeouts(heartbeat=SECONDS)),
        ("longest", lambda: Timeouts(longest=SECONDS)),
        ("idle", lambda: Timeouts(idle=SECONDS)),
        ("body", lambda: Timeouts(body=SECONDS)),
        ("max_silence", lambda: Bounds(max_silence=SECONDS)),
        ("max_duration", lambda: Bounds(max_duration=SECONDS)),
        ("max_unread", lambda: Bounds(max_unread=SECONDS)),
        ("backoff", lambda: Recovery("r", backoff=SECONDS)),
        pytest.param("within", lambda: Recovery("r", within=SECONDS), id="recovery-within"),
        pytest.param("within", lambda: Retry(within=SECONDS), id="retry-within"),
        ("first", lambda: Retry(first=SECONDS)),
        pytest.param("longest", lambda: Retry(longest=SECONDS), id="retry-longest"),
        ("longest_asked", lambda: Retry(longest_asked=SECONDS)),
        pytest.param("body", lambda: DurableStreamsLimits(body=SECONDS), id="limits-body"),
        ("long_poll", lambda: DurableStreamsLimits(long_poll=SECONDS)),
        ("sse", lambda: DurableStreamsLimits(sse=SECONDS)),
        ("read_timeout", lambda: DurableStream("http://127.0.0.1/s", read_timeout=SECONDS)),
        pytest.param("read_timeout", lambda: sync.DurableStream("http://127.0.0.1/s", read_timeout=SECONDS), id="blocking"),
        pytest.param("drain", lambda: FlaskStreams("memory://", drain=SECONDS), id="flask"),
        pytest.param("drain", lambda: FlaskStreams(drain=SECONDS), id="flask-without-url"),
        pytest.param("drain", lambda: DjangoStreams(drain=SECONDS), id="django"),
        pytest.param("idle", lambda: StreamEventStore("memory://", idle=SECONDS), id="mcp-idle"),
        pytest.param("drain", lambda: StreamEventStore("memory://", drain=SECONDS), id="mcp-drain"),
    ],
)
def test_a_number_is_no_duration(name: str, make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=rf"`{name}` is a timedelta, such as timedelta\(seconds=30\), and not int"):
        make()


async def test_a_client_that_is_given_a_number_asks_nothing() -> None:
    with pytest.raises(TypeError, match="`read_timeout` is a timedelta"):
        async with subscribe("http://127.0.0.1/s", read_timeout=SECONDS):
            pass
    with (
        pytest.raises(TypeError, match="`read_timeout` is a timedelta"),
        client_sync.subscribe("http://127.0.0.1/s", read_timeout=SECONDS),
    ):
        pass
    async with DurableStream("http://127.0.0.1/s") as stream:
        with pytest.raises(TypeError, match="`ttl` is a timedelta"):
            await stream.create(ttl=SECONDS)


async def test_a_token_expires_in_a_duration() -> None:
    async with StreamsHTTP("memory://", token_keys=[secrets.token_bytes(32)]) as streams_http, streams_http.streams.open("s"):
        with pytest.raises(TypeError, match="`expires_in` is a timedelta"):
            await streams_http.token("s", can="read", expires_in=SECONDS)
        assert await streams_http.token("s", can="read", expires_in=timedelta(seconds=60))


@pytest.mark.parametrize("framing", [SSEFraming, "sse"])
@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_class_or_a_name_is_no_framing(framing: Any, method: str, caplog: pytest.LogCaptureFixture) -> None:
    streams_http = StreamsHTTP("memory://")
    app = FastAPI(lifespan=streams_http.lifespan)
    ran = []

    async def answer() -> AsyncGenerator[str]:
        ran.append(1)
        yield "a"

    @app.api_route("/", methods=["POST", "GET"])
    async def endpoint(request: Request) -> Response:
        if request.method == "GET":
            return await streams_http.follow(request, "s", framing=framing)
        return await streams_http.respond(request, answer(), framing=framing)

    async with http_to(app) as http:
        assert (await http.request(method, "/")).status_code == 500
    assert "TypeError: `framing` is an object, such as SSEFraming()" in caplog.text
    assert not ran
