"""Flask: durable streams in views that do not await, whatever WSGI server runs them; and Genkit flows as blueprints.

streams = FlaskStreams("sqlite:///answers.db")

@app.post("/chat/<chat>")
def ask(chat: str) -> Response:
    return streams.respond(words(request.form["question"]), key=chat)
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, Unpack
from weakref import WeakKeyDictionary, ref

from .._extras import needed_by

with needed_by(__name__, "flask"):
    from flask import Blueprint, Flask, Request, Response, current_app, request

from .._info import StreamInfo
from ..http.access import REQUEST, owner_text
from ..http.app import MAX_BODY_BYTES, Call, FollowOptions, Provide, StartOptions, StopOptions, StreamsHTTP, TokenOptions
from ..http.check import checks
from ..http.recovery import Recoverable, Register, Terms, registering
from ..http.response import ASGIApp, Scope
from ..http.sources import AS_IT_IS, Setting, Source
from ..http.threads import (
    CALLER,
    Body,
    ServingOptions,
    Streams,
    StreamsThread,
    Taken,
    View,
    check_options,
    context_without,
    scope_of,
)
from ..http.trust import Trust

if TYPE_CHECKING:
    from genkit.plugin_api import Action

    from .genkit import ContextProviders

__all__ = ["FlaskStreams", "StreamResponse", "durable_flow"]

EXTENSION: Final = "streamkeep"
URL: Final = "STREAMKEEP_URL"
READING: Final = ("GET", "HEAD", "POST", "DELETE")


class StreamResponse(Response):
    """A response of Flask's that shows a stream, or says why it does not.

    Attributes:
        stream_id: the id of the stream that it shows; None if it shows none.
        started: whether this very request has started that stream: not if it was there, and was joined, resumed or followed.
    """

    stream_id: str | None = None
    started: bool = False


class FlaskStreams:
    """The streams of Flask apps: `respond`, `follow` and `cancel` in a view, whose request they take themselves.

    They run in an event loop and a thread of their own, one for each process, from the first request on, or from `start`. They end with
    `close`, at the end of `with`, or with the program; and they drain when the process gets SIGTERM or SIGINT, if somebody handles it.

    Attributes:
        app: what was given to `init_app` last.

    Args:
        streams: the URL of a storage, or a function that makes a `StreamManager` that nobody else uses. None: each app says by its
            `STREAMKEEP_URL`, and has streams of its own; give it to `init_app`.
        app: the same as `init_app(app)`.
        options: those of `StreamsHTTP`. A heartbeat is sent every five seconds, unless `timeouts` are given. `authorize` has the request as
            `access.request`. A plain function is called in the request's own thread, with all that the request has there; one that
            awaits in the event loop. What it raises is raised by the view, `PublicError` excepted, which is answered as JSON.
    """

    def __init__(self, streams: Streams | None = None, app: Flask | None = None, **options: Unpack[ServingOptions]) -> None:
        check_options(**options)
        self._options = options
        self._ours = None if streams is None else StreamsThread(streams, **options)
        self._of_apps = WeakKeyDictionary[Flask, StreamsThread]()
        self._recoverables: list[Recoverable] = []
        self.app: Flask | None = None
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Serve an app: by the URL that this was made with, or by the `STREAMKEEP_URL` of its configuration. KeyError: it has none."""
        if self._ours is None:
            threads = self._of_apps[app] = StreamsThread(app.config[URL], **self._options)
            for recoverable in self._recoverables:
                threads.register(recoverable, _InItsApp(ref(app)))
        self.app = app
        app.extensions[EXTENSION] = self

    def start(self) -> None:
        """Start in this process, before the first request does. In the main thread, SIGTERM and SIGINT are heard from here on."""
        for threads in self._all():
            threads.start()

    def close(self) -> None:
        """Drain, and return when nothing is left running. What is used after that starts anew."""
        for threads in self._all():
            threads.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def respond(self, source: Source, **options: Unpack[StartOptions]) -> StreamResponse:
        """Make an iterable a durable stream, and give the response that shows it; arguments and answers are `StreamsHTTP.respond`'s.

        The source runs apart from the request, in a thread if it does not await, and in an app context of its own: `current_app` and `g`
        are there, what was torn down is not, and neither are `request`, `session` and `current_user`: give it what it needs of them. All
        other context variables are as they are here. So it is with `on_end`; a plain function is called in a thread.

        Raises as `StreamsHTTP.respond` does.
        """
        return _response(self._here().respond(_scope(), source, _view(), **options))

    def recoverable(self, name: str, **terms: Unpack[Terms]) -> Register:
        """Register a function that makes a stream's chunks, and the rest of them when the process has died that was at it.

        All is as with `StreamsHTTP.recoverable`; it runs in an app context. A process goes on with the streams of others from its `start`
        on, or from its first request.
        """
        return registering(self._register, name, **terms)

    def _register(self, recoverable: Recoverable) -> None:
        if self._ours is not None:
            self._ours.register(recoverable, _InItsApp(lambda: self.app))
        for app, threads in self._of_apps.items():
            threads.register(recoverable, _InItsApp(ref(app)))  # which would keep the app otherwise
        self._recoverables.append(recoverable)

    def follow(self, stream: object = None, **options: Unpack[FollowOptions]) -> StreamResponse:
        """Give the response that shows a stream, by its id or its `key`: a 204 where nothing runs. See `StreamsHTTP.follow`."""
        return _response(self._here().follow(_scope(), stream, _view(), **options))

    def cancel(self, stream: object = None, **options: Unpack[StopOptions]) -> StreamResponse:
        """Stop a stream, and give the response that says whether it ran. See `StreamsHTTP.cancel`."""
        return _response(self._here().cancel(_scope(), stream, _view(), **options))

    def current(self, key: object, owner: object = "") -> StreamInfo:
        """Give what is known of the newest stream that an owner has started under a key, whether it runs or has ended.

        Raises StreamNotFoundError: there is none, or it is kept no more. StorageError: the storage fails.
        """
        return self._here().current(str(key), owner_text(owner))

    def token(self, stream: object, **options: Unpack[TokenOptions]) -> str:
        """Give a token that lets whoever has it read a stream, or stop it. See `StreamsHTTP.token`, which raises the same.

        StorageError: the storage fails.
        """
        return self._here().token(stream, **options)

    def blueprint(self, name: str = "streams") -> Blueprint:
        """Give `StreamsHTTP` itself, for any stream: `app.register_blueprint(streams.blueprint(), url_prefix="/streams")`.

        Whose a stream is, only `authorize` says, which has the request's context; who may come at all, the blueprint's `before_request`.
        """
        blueprint = Blueprint(name, __name__)

        @blueprint.route("/", defaults={"rest": ""}, methods=READING)
        @blueprint.route("/<path:rest>", methods=READING)
        def read(rest: str) -> StreamResponse:
            scope = _scope()
            scope["root_path"] = scope["path"].removesuffix(rest).rstrip("/")
            return self.answer(scope, lambda http: http, body=b"")

        return blueprint

    def check_blueprint(self, *, trust: str | Trust, name: str = "streamkeep_check") -> Blueprint:
        """Give what `streamkeep check` asks: `app.register_blueprint(streams.check_blueprint(trust=token), url_prefix="/check")`.

        Args:
            trust: as `CheckHTTP` takes it: a token of at least 16 characters, or a function of a request's headers.
            name: the blueprint's.

        Raises InvalidArgumentError: the token is shorter.
        """
        blueprint, checked = Blueprint(name, __name__), checks(trust)

        @blueprint.route("/<path:rest>", methods=READING)
        def check(rest: str) -> StreamResponse:
            scope = _scope()
            scope["root_path"] = scope["path"].removesuffix(rest).rstrip("/")
            return self.answer(scope, checked)

        return blueprint

    def answer(self, scope: Scope, app: Callable[[StreamsHTTP], ASGIApp], *, body: bytes | None = None) -> StreamResponse:
        """Give the response that an ASGI app gives, which is made of the `StreamsHTTP`. Unless `body` is given, it is read first.

        RequestEntityTooLarge (413): it has more than `max_body_bytes`, or than the app allows.
        """
        here = self._here()
        if body is None:
            most = self._options.get("max_body_bytes", MAX_BODY_BYTES)
            request.max_content_length = min(most, request.max_content_length or most)
            body = request.get_data()
        return _response(here.answer(scope, body, app, _view()))

    def _here(self) -> StreamsThread:
        threads = self._ours or self._of_apps.get(_app())
        if threads is None:
            raise RuntimeError("this app has no streams: give it to `init_app`, or give FlaskStreams the URL of a storage")
        return threads

    def _all(self) -> list[StreamsThread]:
        return [*self._of_apps.values()] if self._ours is None else [self._ours]


def durable_flow(
    flow: "Action[Any, Any, Any, Any]",
    streams: FlaskStreams | Streams,
    *,
    path: str | None = None,
    context: Callable[[], Mapping[str, Any]] | None = None,
    context_provider: "ContextProviders | None" = None,
) -> Blueprint:
    """Give a blueprint that serves a Genkit flow, or an agent, durably: `app.register_blueprint(durable_flow(my_flow, streams))`.

        POST   {path}   Genkit's exchange; with `X-Genkit-Stream-Id` it resumes that stream, from the start or after the
                        offset in `X-Genkit-Stream-Offset`, and never runs the flow
        DELETE {path}   with `X-Genkit-Stream-Id`: stop that stream's flow

    An agent that has a store also has `POST {path}/getSnapshot` and `POST {path}/abort`.

    A run outlives its request; stopping it sets the flow's abort signal, and cancels it a second later. It runs in an app context.

    Args:
        flow: the flow, the agent, or any other Genkit action.
        streams: what the app's views have, or the URL of a storage.
        path: `/<flow's name>` unless given.
        context: gives the action's context in a request, for a resume and a stop as well; it rejects as views do, by `abort` say. Other
            means are the blueprint's `before_request`.
        context_provider: one of Genkit's, or several, which are asked in order, and whose contexts are added. They reject by raising
            Genkit's `PublicError`. A plain one is called in the view.
    """
    from .genkit import WorkIn, calls_of, provider_of, work_of

    ours = streams if isinstance(streams, FlaskStreams) else FlaskStreams(streams)
    blueprint = Blueprint(flow.name.replace(".", "-"), __name__)
    route = f"/{flow.name}" if path is None else path
    work = work_of(flow)

    def provide(scope: Scope) -> Provide | None:
        return provider_of(context_provider, scope[REQUEST], scope, scope[CALLER].ask)

    @blueprint.post(route)
    def run() -> StreamResponse:
        known = context() if context else {}
        within = WorkIn(work, _InApp(_app()))
        return ours.answer(
            _scope(), lambda http: lambda scope, receive, send: http.post(scope, receive, send, within, known, provide(scope))
        )

    @blueprint.delete(route)
    def stop() -> StreamResponse:
        known = context() if context else {}
        return ours.answer(
            _scope(), lambda http: lambda scope, _, send: http.stop(scope, send, known, provide(scope)), body=b""
        )

    def answer_call(call: Call) -> StreamResponse:
        known = context() if context else {}
        return ours.answer(
            _scope(), lambda http: lambda scope, receive, send: http.call(scope, receive, send, call, known, provide(scope))
        )

    for name, call in calls_of(flow).items():
        blueprint.add_url_rule(f"{route}/{name}", name, partial(answer_call, call), methods=["POST"])
    return blueprint


class _InApp:
    """An app context for each piece of a source, in the thread, or the task, that it runs in."""

    def __init__(self, app: Flask) -> None:
        self._app = app

    def in_thread(self) -> AbstractContextManager[object]:
        return self._app.app_context()

    @asynccontextmanager
    async def in_task(self) -> AsyncGenerator[None]:
        with self._app.app_context():
            yield


class _InItsApp:
    """The same, of an app that is found when it is needed; of none, if there is none."""

    def __init__(self, find: Callable[[], Flask | None]) -> None:
        self._find = find

    def in_thread(self) -> AbstractContextManager[object]:
        return self._here.in_thread()

    def in_task(self) -> AbstractAsyncContextManager[object]:
        return self._here.in_task()

    @property
    def _here(self) -> Setting:
        app = self._find()
        return AS_IT_IS if app is None else _InApp(app)


def _app() -> Flask:
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001 - as Flask's docs have it
    return app


def _view() -> View:
    return View(_InApp(_app()), context_without(lambda name: name.startswith("flask.")))


def _scope() -> Scope:
    asked: Request = request._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001 - as above
    return {**scope_of(request.environ), REQUEST: asked}


def _response(taken: Taken) -> StreamResponse:
    body = taken.body if isinstance(taken.body, bytes) else Body(taken.body)
    response = StreamResponse(body, taken.status, taken.headers)
    if "content-type" not in dict(taken.headers):
        del response.headers["Content-Type"]
    response.stream_id, response.started = taken.stream, taken.started
    return response
