"""Django: durable streams in its views, those that await and those that do not, under WSGI and ASGI; and Genkit flows as views.

streams = DjangoStreams("sqlite:///answers.db")

@login_required
@require_POST
def ask(request, chat):
    return streams.respond(request, words(request.POST["question"]), key=chat, owner=request.user.pk)
"""

# pyright: reportMissingTypeStubs=false

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

import anyio

from .._extras import needed_by

with needed_by(__name__, "django"):
    from asgiref.sync import ThreadSensitiveContext, sync_to_async
    from django.conf import settings

from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, HttpResponseNotAllowed, StreamingHttpResponse
from django.urls import URLPattern, URLResolver, path
from django.views.decorators.csrf import csrf_exempt, csrf_protect

from .._background import is_asyncio_here
from .._info import StreamInfo
from ..http.access import REQUEST, owner_text
from ..http.app import Call, FollowOptions, Provide, StartOptions, StopOptions, StreamsHTTP, TokenOptions
from ..http.check import checks
from ..http.recovery import Register, Terms, registering
from ..http.response import ASGIApp, Receive, Scope, Send
from ..http.sources import Source
from ..http.threads import (
    CALLER,
    AsyncBody,
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
from ..http.tokens import token_of, tokens_in
from ..http.trust import Trust

if TYPE_CHECKING:
    from genkit.plugin_api import Action

    from .genkit import ContextProviders, WorkIn

__all__ = ["DjangoStreams", "durable_flow"]

URL: Final = "STREAMKEEP_URL"
CLOSE_SECONDS: Final = 5.0
"""How long closing a producer's connections may take."""
OF_REQUESTS: Final = frozenset({"thread_sensitive_context", "deadlock_context", "async_single_thread_context", "asgiref.local"})
"""Names of context variables by which asgiref knows the threads of a request. A producer has threads of its own."""

AnyView = Callable[..., HttpResponseBase]


class DjangoStreams:
    """The streams of a Django site: `respond`, `follow` and `cancel` for its views; `arespond`, `afollow`, `acancel` for those that await.

    They run in an event loop and a thread of their own, one for each process, from the first request on, or from `start`. They end with
    `close`, at the end of `with`, or with the program; and they drain when the process gets SIGTERM or SIGINT, if somebody handles it.

    A response has what it shows as `stream_id` (None: nothing), and whether this very request has started that as `started`.

    Args:
        streams: the URL of a storage, or a function that makes a `StreamManager` that nobody else uses. None: the setting
            `STREAMKEEP_URL`, which is read at the first use.
        options: those of `StreamsHTTP`. A heartbeat is sent every five seconds, unless `timeouts` are given. `authorize` has the request as
            `access.request`. A plain function is called in the request's own thread, with all that the request has there; one that
            awaits in the event loop. What it raises is raised by the view, `PublicError` excepted, which is answered as JSON.
    """

    def __init__(self, streams: Streams | None = None, **options: Unpack[ServingOptions]) -> None:
        check_options(**options)
        self._options = options
        self._threads = None if streams is None else StreamsThread(streams, call_blocking=_in_views_thread, **options)

    def start(self) -> None:
        """Start in this process, before the first request does. In the main thread, SIGTERM and SIGINT are heard from here on."""
        self._here().start()

    def close(self) -> None:
        """Drain, and return when nothing is left running. What is used after that starts anew."""
        if self._threads is not None:
            self._threads.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def respond(self, request: HttpRequest, source: Source, **options: Unpack[StartOptions]) -> HttpResponseBase:
        """Make an iterable a durable stream, and give the response that shows it; arguments and answers are `StreamsHTTP.respond`'s.

        The source runs apart from the request, in a thread if it does not await. Its database connections are its own, and are closed
        behind it. Context variables are as they are here. So it is with `on_end`; a plain function is called in a thread.

        Raises as `StreamsHTTP.respond` does. RuntimeError: a view that awaits calls this; there it is `await streams.arespond(…)`.
        """
        here = self._here_blocking()
        return _response(request, here.respond(_scope(request), source, _view(), **options))

    def recoverable(self, name: str, **terms: Unpack[Terms]) -> Register:
        """Register a function that makes a stream's chunks, and the rest of them when the process has died that was at it.

        All is as with `StreamsHTTP.recoverable`; its database connections are its own. A process goes on with the streams of others from
        its `start` on, or from its first request.
        """
        return registering(lambda recoverable: self._here().register(recoverable, _OwnConnections()), name, **terms)

    def follow(self, request: HttpRequest, stream: object = None, **options: Unpack[FollowOptions]) -> HttpResponseBase:
        """Give the response that shows a stream, by its id or its `key`: a 204 where nothing runs. See `StreamsHTTP.follow`."""
        return _response(request, self._here_blocking().follow(_scope(request), stream, _view(), **options))

    def cancel(self, request: HttpRequest, stream: object = None, **options: Unpack[StopOptions]) -> HttpResponseBase:
        """Stop a stream, and give the response that says whether it ran. See `StreamsHTTP.cancel`."""
        return _response(request, self._here_blocking().cancel(_scope(request), stream, _view(), **options))

    async def arespond(self, request: HttpRequest, source: Source, **options: Unpack[StartOptions]) -> HttpResponseBase:
        """Do what `respond` does, in a view that awaits."""
        taken = await self._here().arespond(_scope(request), source, _view(), **options)
        return _response(request, taken)

    async def afollow(self, request: HttpRequest, stream: object = None, **options: Unpack[FollowOptions]) -> HttpResponseBase:
        """Do what `follow` does, in a view that awaits."""
        return _response(request, await self._here().afollow(_scope(request), stream, _view(), **options))

    async def acancel(self, request: HttpRequest, stream: object = None, **options: Unpack[StopOptions]) -> HttpResponseBase:
        """Do what `cancel` does, in a view that awaits."""
        return _response(request, await self._here().acancel(_scope(request), stream, _view(), **options))

    def current(self, key: object, owner: object = "") -> StreamInfo:
        """Give what is known of the newest stream that an owner has started under a key, whether it runs or has ended.

        Raises StreamNotFoundError: there is none, or it is kept no more. StorageError: the storage fails.
        """
        return self._here_blocking().current(str(key), owner_text(owner))

    async def acurrent(self, key: object, owner: object = "") -> StreamInfo:
        """Do what `current` does, in a view that awaits."""
        return await self._here().acurrent(str(key), owner_text(owner))

    def token(self, stream: object, **options: Unpack[TokenOptions]) -> str:
        """Give a token that lets whoever has it read a stream, or stop it. See `StreamsHTTP.token`, which raises the same.

        StorageError: the storage fails.
        """
        return self._here_blocking().token(stream, **options)

    async def atoken(self, stream: object, **options: Unpack[TokenOptions]) -> str:
        """Do what `token` does, in a view that awaits."""
        return await self._here().atoken(stream, **options)

    @property
    def urls(self) -> list[URLPattern | URLResolver]:
        """The URLs of `StreamsHTTP` itself, for any stream: `path("streams/", include((streams.urls, "streams")))`.

        Whose a stream is, `authorize` says. What stops one (DELETE, or POST to `/cancel`) is checked for CSRF as Django does it, whether
        the site has its middleware or not: a page sends its token as `X-CSRFToken`. A request that bears a token of ours is judged by that
        alone, which no other site has, and is not checked; unless the token is for its holder alone, for then a cookie may say who asks.
        """

        def read(request: HttpRequest, rest: str = "") -> HttpResponseBase:
            scope = _scope(request)
            scope["root_path"] = scope["path"].removesuffix(rest).rstrip("/")
            return self.answer(request, scope, lambda http: http, body=b"")

        checked = csrf_protect(read)

        def read_by_token(request: HttpRequest, rest: str = "") -> Any:
            borne = tokens_in(_scope(request))
            token = token_of(borne)
            is_enough = bool(borne) and not (token is not None and token.is_held)
            return read(request, rest) if is_enough else checked(request, rest)

        methods = ("GET", "HEAD", "POST", "DELETE")
        takes_tokens = bool(self._options.get("token_keys"))
        # Exempt of the site's middleware only, which cannot know of tokens.
        view = csrf_exempt(_taking(methods, read_by_token)) if takes_tokens else csrf_protect(_taking(methods, read))
        return [path("", view), path("<path:rest>", view)]

    def check_urls(self, *, trust: str | Trust) -> list[URLPattern | URLResolver]:
        """Give what `streamkeep check` asks: `path("check/", include((streams.check_urls(trust=token), "check")))`.

        It is not checked for CSRF, because no cookie lets anybody in.

        Args:
            trust: as `CheckHTTP` takes it: a token of at least 16 characters, or a function of a request's headers.

        Raises InvalidArgumentError: the token is shorter.
        """
        checked = checks(trust)

        def check(request: HttpRequest, rest: str) -> HttpResponseBase:
            scope = _scope(request)
            scope["root_path"] = scope["path"].removesuffix(rest).rstrip("/")
            return self.answer(request, scope, checked)

        return [path("<path:rest>", csrf_exempt(_taking(("GET", "HEAD", "POST", "DELETE"), check)))]

    def answer(
        self, request: HttpRequest, scope: Scope, app: Callable[[StreamsHTTP], ASGIApp], *, body: bytes | None = None
    ) -> HttpResponseBase:
        """Give the response that an ASGI app gives, which is made of the `StreamsHTTP`. Unless `body` is given, it is read first."""
        here = self._here_blocking()
        return _response(request, here.answer(scope, request.body if body is None else body, app, _view()))

    def _here(self) -> StreamsThread:
        if self._threads is None:
            url = getattr(settings, URL, None)
            if not url:
                raise ImproperlyConfigured(f"give DjangoStreams the URL of a storage, or set {URL}")
            made = StreamsThread(url, call_blocking=_in_views_thread, **self._options)
            # Of threads that come here at once the first one counts; what the others have made was never started. (A lock might be
            # held when a process forks.)
            self._threads = vars(self).setdefault("_made", made)
        return self._threads

    def _here_blocking(self) -> StreamsThread:
        if is_asyncio_here():
            raise RuntimeError(
                "this would block the event loop of a view that awaits: there it is `await streams.arespond(…)`, `afollow`, `acancel`"
            )
        return self._here()


def durable_flow(
    flow: "Action[Any, Any, Any, Any]",
    streams: DjangoStreams | Streams,
    *,
    context: Callable[[HttpRequest], Mapping[str, Any]] | None = None,
    context_provider: "ContextProviders | None" = None,
) -> AnyView:
    """Give a view that serves a Genkit flow, or an agent, durably; for `path("answer", …)`, say.

        POST     Genkit's exchange; with `X-Genkit-Stream-Id` it resumes that stream, from the start or after the offset in
                 `X-Genkit-Stream-Offset`, and never runs the flow
        DELETE   with `X-Genkit-Stream-Id`: stop that stream's flow

    An agent that has a store is asked for `getSnapshot` and `abort` as well, by POST. Its view is given which: by a second path to it,
    `path("agent/<str:call>", …)`.

    A run outlives its request; stopping it sets the flow's abort signal, and cancels it a second later.

    Decorators of views say who may, and whether Django checks for CSRF: `csrf_exempt(durable_flow(…))`.

    Args:
        flow: the flow, the agent, or any other Genkit action.
        streams: what other views have, or the URL of a storage.
        context: gives the action's context in a request, for a resume and a stop as well; it rejects as views do, by PermissionDenied say.
        context_provider: one of Genkit's, or several, which are asked in order, and whose contexts are added. They reject by raising
            Genkit's `PublicError`. A plain one is called in the view.
    """
    from .genkit import WorkIn, calls_of, provider_of, work_of

    ours = streams if isinstance(streams, DjangoStreams) else DjangoStreams(streams)
    work, calls = WorkIn(work_of(flow), _OWN_CONNECTIONS), calls_of(flow)

    def provide(scope: Scope) -> Provide | None:
        return provider_of(context_provider, scope[REQUEST], scope, scope[CALLER].ask)

    def serve(request: HttpRequest, call: str = "") -> HttpResponseBase:
        known = context(request) if context else {}
        if call:
            if call not in calls or request.META["REQUEST_METHOD"] != "POST":
                raise Http404
            return ours.answer(request, _scope(request), lambda http: partial(_call, http, calls[call], known, provide))
        if request.META["REQUEST_METHOD"] == "DELETE":
            return ours.answer(
                request,
                _scope(request),
                lambda http: lambda scope, _, send: http.stop(scope, send, known, provide(scope)),
                body=b"",
            )
        return ours.answer(request, _scope(request), lambda http: partial(_post, http, work, known, provide))

    return _taking(("POST", "DELETE"), serve)


ProvideOf = Callable[[Scope], Provide | None]


async def _post(
    http: StreamsHTTP,
    work: "WorkIn",
    context: Mapping[str, Any],
    provide: ProvideOf,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    await http.post(scope, receive, send, work, context, provide(scope))


async def _call(
    http: StreamsHTTP, call: Call, context: Mapping[str, Any], provide: ProvideOf, scope: Scope, receive: Receive, send: Send
) -> None:
    await http.call(scope, receive, send, call, context, provide(scope))


def _taking(methods: Sequence[str], view: AnyView) -> AnyView:
    def taking(request: HttpRequest, *args: object, **options: object) -> HttpResponseBase:
        is_taken = request.META["REQUEST_METHOD"] in methods
        return view(request, *args, **options) if is_taken else HttpResponseNotAllowed(methods)

    return taking


class _OwnConnections:
    """Closes the database connections that a producer has opened: no request ends behind it that would."""

    @contextmanager
    def in_thread(self) -> Generator[None]:
        try:
            yield
        finally:
            connections.close_all()

    @asynccontextmanager
    async def in_task(self) -> AsyncGenerator[None]:
        async with ThreadSensitiveContext():  # a thread of its own for what does not await
            try:
                yield
            finally:
                with anyio.move_on_after(CLOSE_SECONDS, shield=True), suppress(RuntimeError):  # at the end of the program
                    await sync_to_async(connections.close_all)()


_OWN_CONNECTIONS: Final = _OwnConnections()


def _view() -> View:
    context = partial(context_without, OF_REQUESTS.__contains__)
    return View(_OWN_CONNECTIONS, context(), _OWN_CONNECTIONS, context())


async def _in_views_thread(function: Callable[[], None]) -> None:
    await sync_to_async(function)()


def _scope(request: HttpRequest) -> Scope:
    asgi: Scope | None = getattr(request, "scope", None)
    if asgi is None:
        return {**scope_of(request.META), REQUEST: request}
    query: bytes | str = asgi["query_string"]  # of Django's own test client it is text
    return {**asgi, "query_string": query.encode("latin-1") if isinstance(query, str) else query, REQUEST: request}


def _headers(taken: Taken) -> dict[str, str]:
    """Give headers as Django has them: one of each name."""
    headers: dict[str, str] = {}
    for name, value in taken.headers:
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _response(request: HttpRequest, taken: Taken) -> HttpResponseBase:
    headers = _headers(taken)
    if isinstance(taken.body, bytes):
        response = HttpResponse(taken.body, status=taken.status, headers=headers)
    else:
        # Django gathers all of a body of the other kind before it sends any of it, and warns.
        body = AsyncBody(taken.body) if hasattr(request, "scope") else Body(taken.body)
        # Whatever compresses would hold back what is small, and leaves alone what has an encoding.
        response = StreamingHttpResponse(body, status=taken.status, headers={**headers, "content-encoding": "identity"})
    if "content-type" not in headers:
        del response.headers["Content-Type"]
    vars(response).update(stream_id=taken.stream, started=taken.started)
    return response
