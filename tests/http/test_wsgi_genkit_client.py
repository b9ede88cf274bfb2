"""Genkit's official JavaScript client against a flow that Flask serves, and one that Django serves under WSGI."""

# pyright: reportMissingTypeStubs=false

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio.to_thread
import pytest
from django.core.wsgi import get_wsgi_application
from django.test.utils import override_settings
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from flask import Flask
from genkit import ActionRunContext
from tests.http.servers import Flow, flow_of
from tests.web import site
from werkzeug.serving import make_server

from streamkeep.integrations import django as our_django
from streamkeep.integrations import flask as our_flask

if TYPE_CHECKING:
    from tests.http.conftest import GenkitClient

site.configure()

BOUND_SECONDS: Final = 20


class Talk:
    """A flow that says hello, and to Ada goes on behind a gate only."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.runs: list[str] = []

    @property
    def flow(self) -> Flow:
        async def talk(name: str, ctx: ActionRunContext) -> str:
            self.runs.append(name)
            ctx.send_chunk(f"hello {name}")
            if name == "Ada":
                await anyio.to_thread.run_sync(self.gate.wait, BOUND_SECONDS)
            ctx.send_chunk("bye")
            return name

        return flow_of(talk)


@contextmanager
def by_flask(flow: Flow) -> Generator[Any]:
    with our_flask.FlaskStreams("memory://") as streams:
        app = Flask(__name__)
        app.register_blueprint(our_flask.durable_flow(flow, streams))
        yield app


class URLs:
    """A URLconf."""

    def __init__(self, flow: Flow, streams: our_django.DjangoStreams) -> None:
        self.urlpatterns = [path("talk", csrf_exempt(our_django.durable_flow(flow, streams)))]


@contextmanager
def by_django(flow: Flow) -> Generator[Any]:
    with our_django.DjangoStreams("memory://") as streams, override_settings(ROOT_URLCONF=URLs(flow, streams)):
        yield get_wsgi_application()


@contextmanager
def served(app: Any) -> Generator[str]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


@pytest.mark.parametrize("by", [by_flask, by_django], ids=["Flask", "Django"])
async def test_two_stream_at_a_time_and_who_leaves_freezes_nothing_and_comes_back(
    by: Callable[[Flow], Any], genkit_client: "GenkitClient"
) -> None:
    talk = Talk()
    with by(talk.flow) as app, served(app) as root:
        url = f"{root}/talk"
        async with genkit_client.live(url=url, input="Ada") as ada:
            begin = await ada.next_line()
            assert await ada.next_line() == {"chunk": "hello Ada"}
            _, *beside = await genkit_client(url=url, input="Bob")
        _, *after = await genkit_client(url=url, input="Eve")
        async with genkit_client.live(url=url, streamId=begin["streamId"]) as resumed:
            assert await resumed.next_line() == begin
            assert await resumed.next_line() == {"chunk": "hello Ada"}
            talk.gate.set()
            assert [line async for line in resumed] == [{"chunk": "bye"}, {"output": "Ada"}]
        assert await genkit_client("run", url=url, input="Mia") == [{"output": "Mia"}]
    assert beside == [{"chunk": "hello Bob"}, {"chunk": "bye"}, {"output": "Bob"}]
    assert after == [{"chunk": "hello Eve"}, {"chunk": "bye"}, {"output": "Eve"}]
    assert talk.runs == ["Ada", "Bob", "Eve", "Mia"]
