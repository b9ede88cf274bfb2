"""DurableStreaming: makes the POSTs of an unmodified ASGI app durable, in the format that each of them answers in.

Whatever is not an answer that streams passes through byte for byte. What one becomes in the log, and how it is passed on until that is
known, is in `exchange`.
"""

from collections.abc import Callable, Collection
from typing import Final

from .._manager import StreamManager
from ..errors import StreamkeepError
from .app import StreamsHTTP
from .claim import Claim, is_endpoints_own
from .exchange import EVENT_STREAM, Exchange
from .lifespan import Lifespan
from .place import run_of, stream_named_in
from .response import STREAM_ID_HEADER, ASGIApp, Receive, Scope, Send, errors_answered, headers_of
from .tokens import discreet
from .ui_messages import MARK

KEPT_HEADERS: Final = (MARK,)


class DurableStreaming:
    """An ASGI app around another: `app = DurableStreaming(app, streams)`.

    Whatever a POST answers with 200 and `text/event-stream` is stored, and shown as it was: the events with their names and data, under ids
    of ours. (Comments, ids and `retry` are not kept: those are a connection's.) Its producer goes on when the client has gone. The answer
    has an `X-Genkit-Stream-Id`; a POST with that header, or with the cursor that an event's id is as `Last-Event-ID`, gets the rest of
    that stream and does not reach the app; a DELETE with the header stops it, which the app is told as a disconnect, and which is enforced
    a second later. To a client of Genkit's (`{"data": …}` or `{}`, that accepts an event stream) frames of Genkit's are Genkit's
    exchange: errors in them are stored in full, and readers get their status only.

    All else passes byte for byte: other methods and answers, WebSockets, JSON-RPC and so MCP, whose answers belong to their request,
    answers in an encoding that is not known here (put compression around this, not inside), and what is durable already (`respond`).

    Its lifespan starts what it needs after the inner app's start-up and stops it before the inner app's shutdown.

    Args:
        app: the inner app.
        streams: a manager (entered here, unless it is running), or its URL; or a `StreamsHTTP` over it, to say who is authorized.
        when: says by a request's ASGI scope whether its answer may be made durable; of all by default.
        media_types: of which answers. Others than event streams, such as `text/plain` or `application/x-ndjson`, are kept as text.
        kept_headers: names of the app's own headers that are kept with the stream and sent with every later answer; those of the first
            answer are the app's anyway.
    """

    def __init__(
        self,
        app: ASGIApp,
        streams: StreamManager | StreamsHTTP | str,
        *,
        when: Callable[[Scope], bool] | None = None,
        media_types: Collection[str] = (EVENT_STREAM,),
        kept_headers: Collection[str] = KEPT_HEADERS,
    ) -> None:
        self._app = app
        self._http = streams if isinstance(streams, StreamsHTTP) else StreamsHTTP(streams)
        self._when = when or (lambda _: True)
        self._media_types = frozenset(name.lower() for name in media_types)
        self._kept_headers = frozenset(name.lower() for name in kept_headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, or the server's lifespan (ASGI)."""
        match scope["type"], scope.get("method"):
            case "lifespan", _:
                await Lifespan(self._app, self._http).run(scope, receive, send)
            case "http", "POST" if self._when(scope):
                await self._post(scope, receive, send)
            case "http", "DELETE" if STREAM_ID_HEADER in headers_of(scope) and self._when(scope):
                if await self._is_endpoints(headers_of(scope)[STREAM_ID_HEADER]):
                    await self._app(scope, receive, send)
                else:
                    await self._http.stop(scope, send, {})
            case _:
                await self._app(scope, receive, send)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (named := stream_named_in(scope)[0]) is not None and not await self._is_endpoints(named):
            send = discreet(scope, send)
            async with errors_answered(send):
                if await self._http.skip_body(scope, receive):
                    await self._http.resume(scope, receive, send, {})
        else:
            claim = Claim(self._http.streams, scope, await self._claiming(scope))
            exchange = Exchange(self._http, self._app, scope, self._media_types, self._kept_headers, claim)
            await exchange.answer(receive, send)

    async def _is_endpoints(self, stream: str) -> bool:
        """Say whether the app has made a stream durable itself, by `respond` or `durable_flow`, and so sees to it itself."""
        try:
            return is_endpoints_own(await self._http.streams.info(stream))
        except StreamkeepError:
            return False

    async def _claiming(self, scope: Scope) -> str | None:
        """Say who sends a request that may be in the app only once at a time; None: it may be there as often as it is sent."""
        if run_of(scope) is None or not self._http.is_running:
            return None
        try:
            return await self._http.who_starts(scope)
        except Exception:
            return None  # whether it may start a stream is asked again when it does
