"""Inspector: the ASGI app, which answers its page. Whoever is let in sees everybody's streams, so nobody is let in unasked."""

import logging
import re
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, Final, get_args
from urllib.parse import quote, urlsplit

import anyio

from .._info import StreamInfo, StreamStatus
from .._manager import StreamManager
from ..errors import (
    InvalidArgumentError,
    PublicError,
    StorageCorruptError,
    StreamkeepError,
    StreamNotFoundError,
)
from ..events import MAX_OFFSET, StreamEvent, encode_json
from ..http.access import Access, Action, lets_in
from ..http.app import path_below
from ..http.mounted import Mounted
from ..http.place import query_of
from ..http.response import Receive, Scope, Send, disconnected, errors_answered, headers_of, send_response
from ..http.shutdown import shutdown_of
from .files import files, secured
from .listing import Filter, list_filtered
from .live import MAX_PAUSE_SECONDS, PAUSE_SECONDS, Following, Message
from .messages import Row, known, line_of, listed, row, shown_data
from .sightings import Sightings

logger: Final = logging.getLogger("streamkeep")

Authorize = Callable[[Access], "bool | Awaitable[bool]"]
"""Says whether who sent a request may do what it asks for: see `Inspector`."""

HEADER: Final = "x-streamkeep-inspector"
"""What the page's own requests have: no other site can have a browser send it."""
MAX_PAGES: Final = 200
"""How many pages may follow streams at a time."""
MAX_SEEN: Final = 64
"""Of how many streams it is kept when their events arrived, those that were looked at last."""
MAX_ROWS: Final = 500
MAX_LISTED: Final = 200
MAX_COPIED_BYTES: Final = 1 << 20
LONGEST_SECONDS: Final = 3_600.0
LOOK_SECONDS: Final = 0.25
LAST_SECONDS: Final = 1.0
_USUAL_PORTS: Final = {"http": ":80", "https": ":443"}
_API: Final = re.compile(
    r"/api/streams(?:/(?P<id>[^/]+)(?P<what>/live|/events|/timing|/copy|/stop)?(?:/(?P<offset>\d{1,16}))?)?"
)


class Inspector(Mounted):
    """A page that shows a manager's streams as they come, as an ASGI app to be mounted: `app.mount("/inspector", inspector)`.

        inspector = Inspector(streams, authorize=lambda access: access.headers.get("x-forwarded-user") in OPERATORS)

    Whoever is let in sees the streams of all owners, with all that was written to them. It uses the manager where that runs, and needs no
    lifespan of its own.

    Args:
        streams: the manager; enter it in your app's lifespan.
        authorize: asked before every answer, with an `Access` that says what is to be done: `page` (the page's files, which say nothing of
            streams), `list`, `read`, `stop` or `delete`, and of which stream. True lets in; False is answered 403. It may also raise
            `PublicError`, or Starlette's or FastAPI's `HTTPException`. Anything else that it gives, such as a user's name, is refused.
        read_only: nobody stops or deletes streams here, whatever `authorize` says.
        show_internal: show of errors also what no reader is shown, the producer's exception with its traceback.
    """

    _path_routing: Final = True
    """For Channels' `URLRouter`: a `path()` to this is where it is mounted, and not all of a URL."""
    _lifespan_hint = "give your manager's lifespan to the outermost app"

    def __init__(
        self, streams: StreamManager, *, authorize: Authorize, read_only: bool = False, show_internal: bool = False
    ) -> None:
        if not callable(authorize):
            raise TypeError("an Inspector needs `authorize`: a function that says whether a request is let in")
        self._streams = streams
        self._authorize = authorize
        self._read_only = read_only
        self._shown = partial(shown_data, internal=show_internal)
        self._shutdown = shutdown_of(streams)
        self._pages: Counter[str] = Counter()
        self._seen: OrderedDict[str, Sightings] = OrderedDict()

    async def drain(self) -> None:
        """Have pages that follow streams come back elsewhere, soon: for servers that wait for responses before they stop."""
        self._shutdown.begun.set()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        send, path = secured(send), path_below(scope)
        async with errors_answered(send):
            if path.startswith("/api/"):
                await self._answer_api(path, scope, receive, send)
            else:
                await self._send_file(path, scope, send)

    async def _send_file(self, path: str, scope: Scope, send: Send) -> None:
        await self._check(scope, "page")
        if scope["method"] not in {"GET", "HEAD"}:
            await send_response(send, 405, headers=[("allow", "GET, HEAD")])
        elif not path:  # a page's files are beside it
            here = quote(scope["path"].rpartition("/")[2])
            await send_response(send, 307, headers=[("location", f"{here}/")])
        elif (file := files().get(path.removeprefix("/") or "index.html")) is None:
            raise PublicError("NOT_FOUND", "not found")
        else:
            kind, body = file
            start = {"type": "http.response.start", "status": 200}
            await send({**start, "headers": _raw([("content-type", kind), ("content-length", str(len(body)))])})
            await send({"type": "http.response.body", "body": body if scope["method"] == "GET" else b""})

    async def _answer_api(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        check_same_site(headers_of(scope))
        found = _API.fullmatch(path)
        if found is None or (found["offset"] is not None and found["what"] != "/events"):
            await self._check(scope, "list")
            raise PublicError("NOT_FOUND", "not found")
        match scope["method"], found["id"], found["what"]:
            case "GET", None, None:
                await self._check(scope, "list")
                await self._send_list(scope, send)
            case "GET", str(id), what:
                stream = await self._stream(scope, id, "read")
                if found["offset"] is not None:
                    await self._send_event(stream, int(found["offset"]), send)
                else:
                    await self._send_about(stream, what, scope, receive, send)
            case "POST", str(id), "/stop":
                stream = await self._stream(scope, id, "stop")
                await send_response(
                    send, 200, encode_json({"stopped": await self._streams.cancel(stream.id, life=stream.life)})
                )
            case "DELETE", str(id), None:
                await self._delete(scope, id, send)
            case _:
                await self._check(scope, "list")
                await send_response(send, 405, headers=[("allow", "POST" if found["what"] == "/stop" else "GET, DELETE")])

    async def _send_about(self, stream: StreamInfo, what: str | None, scope: Scope, receive: Receive, send: Send) -> None:
        match what:
            case "/live":
                await self._send_live(stream, _pause_of(query_of(scope)), receive, send)
            case "/events":
                await self._send_rows(stream, query_of(scope), send)
            case "/timing":
                runs = self._sightings(stream).since(0)
                await send_response(send, 200, encode_json({"runs": runs}))
            case "/copy":
                await self._send_lines(stream, query_of(scope), send)
            case "/stop":
                await send_response(send, 405, headers=[("allow", "POST")])
            case _:
                await send_response(send, 200, encode_json(self._known(stream)))

    # Who may

    async def _check(self, scope: Scope, action: Action, stream: StreamInfo | None = None) -> None:
        """Raise PublicError, or what `authorize` raises, unless that lets the request in."""
        if self._read_only and action in {"stop", "delete"}:
            raise PublicError("PERMISSION_DENIED", "this inspector only shows streams")
        if not await lets_in(self._authorize(Access(action, scope, headers_of(scope), stream)), "an Inspector"):
            raise PublicError("PERMISSION_DENIED", "you may not do this")

    async def _stream(self, scope: Scope, id: str, action: Action) -> StreamInfo:
        """Give a stream about which something is asked that is allowed, of the life that the request names."""
        return _of_life(await self._found(scope, id, action), scope)

    async def _found(self, scope: Scope, id: str, action: Action) -> StreamInfo | StreamkeepError:
        """Give a stream about which something is asked that is allowed, or why there is none; who is not let in is told neither."""
        try:
            found: StreamInfo | StreamkeepError = await self._streams.info(id)
        except StreamkeepError as error:
            found = error
        await self._check(scope, action, found if isinstance(found, StreamInfo) else None)
        return found

    async def _delete(self, scope: Scope, id: str, send: Send) -> None:
        found = await self._found(scope, id, "delete")
        life = (
            None if isinstance(found, StorageCorruptError) else _of_life(found, scope).life
        )  # what is damaged is deleted all the same
        await self._streams.delete(id, life=life)
        await send_response(send, 200, encode_json({"deleted": True}))

    # What is shown

    def _now(self) -> float:
        return self._streams.storage.time()

    def _known(self, stream: StreamInfo) -> Mapping[str, object]:
        about = known(stream, self._streams.presence(stream), self._pages[stream.id], self._now())
        return {**about, "read_only": self._read_only}

    def _sightings(self, stream: StreamInfo) -> Sightings:
        seen = self._seen.get(stream.id)
        if seen is None or seen.life != stream.life:
            seen = self._seen[stream.id] = Sightings(stream.life)
        self._seen.move_to_end(stream.id)
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return seen

    async def _send_list(self, scope: Scope, send: Send) -> None:
        wanted, after, limit = _filter_of(query_of(scope))
        page = await list_filtered(self._streams, wanted, after, limit)
        answer = {"streams": [listed(stream) for stream in page.streams], "next": page.next, "now": self._now()}
        await send_response(send, 200, encode_json({**answer, "read_only": self._read_only}))

    async def _send_rows(self, stream: StreamInfo, query: Mapping[str, str], send: Send) -> None:
        first, limit = _number(query, "from", 0), min(_number(query, "limit", MAX_ROWS), MAX_ROWS)
        times = self._sightings(stream).times(first, limit)
        rows: list[Row] = []
        async with aclosing(self._events(stream, first)) as events:
            async for event in events:
                if len(rows) == limit:
                    break
                rows.append(row(event, self._shown(event), times[len(rows)]))
        await send_response(send, 200, encode_json({"rows": rows, "tail": stream.tail}))

    async def _send_event(self, stream: StreamInfo, offset: int, send: Send) -> None:
        async with aclosing(self._events(stream, offset)) as events:
            async for event in events:
                await send_response(send, 200, line_of(event, self._shown(event)))
                return
        raise PublicError("NOT_FOUND", "there is no event at this offset")

    async def _send_lines(self, stream: StreamInfo, query: Mapping[str, str], send: Send) -> None:
        """Send events as lines, as many as fit, and one at least; as text, for a browser's numbers hold fewer digits than JSON's."""
        first = _number(query, "from", 0)
        lines: list[str] = []
        size = 0
        async with aclosing(self._events(stream, first)) as events:
            async for event in events:
                line = line_of(event, self._shown(event))
                size += len(line)
                if lines and size > MAX_COPIED_BYTES:
                    break
                lines.append(line.decode())
        await send_response(send, 200, encode_json({"lines": lines, "next": first + len(lines), "tail": stream.tail}))

    async def _events(self, stream: StreamInfo, first: int) -> AsyncGenerator[StreamEvent[Any]]:
        """Give the events that are stored, from an offset on; of long ones a page at a time is in memory."""
        if first >= stream.tail:
            return
        async with self._streams.subscribe(stream.id, first - 1 if first else None, follow=False) as events:
            _check_life(events.life, stream)
            async for event in events:
                yield event

    # Live

    async def _send_live(self, stream: StreamInfo, pause: float, receive: Receive, send: Send) -> None:
        if self._pages.total() >= MAX_PAGES:
            raise PublicError("RESOURCE_EXHAUSTED", f"{MAX_PAGES} pages follow streams already")
        with self._counted(stream.id):  # from here on: many may be about to follow
            async with self._streams.subscribe(stream.id, last=0) as events:
                _check_life(events.life, stream)
                following = Following(events, self._sightings(stream), self._now, self._shown, pause)
                await self._follow(stream, events.first_offset, following, receive, send)

    async def _follow(self, stream: StreamInfo, first: int, following: Following, receive: Receive, send: Send) -> None:
        with self._shutdown.listening(), self._shutdown.responding():
            async with anyio.create_task_group() as tasks:

                async def end_when_left() -> None:
                    await disconnected(receive)
                    tasks.cancel_scope.cancel()

                async def end_in_time() -> None:
                    await self._time_to_end()
                    following.close()
                    await anyio.sleep(LAST_SECONDS)  # whoever does not read is not waited for
                    tasks.cancel_scope.cancel()

                tasks.start_soon(end_when_left)
                tasks.start_soon(end_in_time)
                tasks.start_soon(following.run)
                await self._send_messages(stream, first, following, send)
                tasks.cancel_scope.cancel()

    async def _send_messages(self, stream: StreamInfo, first: int, following: Following, send: Send) -> None:
        async def say(message: Message) -> None:
            await send({"type": "http.response.body", "body": b"data: " + encode_json(message) + b"\n\n", "more_body": True})

        try:
            # Middlewares that compress leave event streams alone, and nothing else that grows.
            await send({"type": "http.response.start", "status": 200, "headers": _raw(_LIVE_HEADERS)})
            await say({"kind": "begin", "first": first, **self._known(stream)})
            async with aclosing(following.messages(partial(self._state, stream))) as messages:
                async for message in messages:
                    await say(message)
            await send({"type": "http.response.body"})
        except OSError:
            pass  # the client is gone (ASGI 2.4)
        except Exception:  # too late to answer; the page comes back
            logger.exception("a page that follows stream %s is cut", stream.id)

    async def _state(self, stream: StreamInfo) -> Message:
        try:
            return {"kind": "state", **self._known(await self._streams.info(stream.id))}
        except StreamkeepError:  # who follows is told what that is, when it concerns the events
            return {"kind": "state", **self._known(stream)}

    @contextmanager
    def _counted(self, stream: str) -> Generator[None]:
        self._pages[stream] += 1
        try:
            yield
        finally:
            self._pages[stream] -= 1
            if not self._pages[stream]:
                del self._pages[stream]

    async def _time_to_end(self) -> None:
        with anyio.move_on_after(LONGEST_SECONDS):
            while not self._shutdown.is_time_to_end():  # noqa: ASYNC110 - an event would be of one event loop
                await anyio.sleep(LOOK_SECONDS)


_LIVE_HEADERS: Final = [("content-type", "text/event-stream"), ("x-accel-buffering", "no")]


def check_same_site(headers: Mapping[str, str]) -> None:
    """Raise PublicError unless a request is the page's own: one that another site has a browser send is not."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    is_ours = site == "same-origin" if site is not None else origin is None or _is_at(origin, headers.get("host", ""))
    if headers.get(HEADER) != "1" or not is_ours:
        raise PublicError("PERMISSION_DENIED", f"only the inspector's own page may ask this (header {HEADER}, same origin)")


def _is_at(origin: str, host: str) -> bool:
    """Say whether an origin is a host's. Browsers leave the usual port out; a proxy may write it in Host."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    usual = _USUAL_PORTS.get(parts.scheme, "")
    return bool(parts.hostname) and parts.netloc.removesuffix(usual) == host.lower().removesuffix(usual)


def _filter_of(query: Mapping[str, str]) -> tuple[Filter, str, int]:
    status = query.get("status") or None
    if status not in {None, *get_args(StreamStatus)}:
        raise InvalidArgumentError(f"a status is one of {', '.join(get_args(StreamStatus))}")
    statuses: Mapping[str | None, StreamStatus] = {status: status for status in get_args(StreamStatus)}
    wanted = Filter(statuses.get(status), query.get("owner") or None, query.get("key", ""), query.get("id", ""))
    return wanted, query.get("after", ""), max(1, min(_number(query, "limit", 50), MAX_LISTED))


def _pause_of(query: Mapping[str, str]) -> float:
    """Give how many seconds are to be between two messages on events: more, for a page whose connection is slow."""
    return min(max(PAUSE_SECONDS, _number(query, "pause", 0) / 1000), MAX_PAUSE_SECONDS)


def _number(query: Mapping[str, str], name: str, otherwise: int) -> int:
    text = query.get(name, "")
    if not text:
        return otherwise
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_OFFSET)) and int(text) <= MAX_OFFSET):
        raise InvalidArgumentError(f"`{name}` is a whole number, in ASCII digits")
    return int(text)


def _of_life(found: StreamInfo | StreamkeepError, scope: Scope) -> StreamInfo:
    if not isinstance(found, StreamInfo):
        raise found
    _check_life(query_of(scope).get("life", found.life), found)
    return found


def _check_life(life: str, stream: StreamInfo) -> None:
    if life != stream.life:
        raise StreamNotFoundError("the stream was deleted, or has expired, and another one has its id now")


def _raw(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers]
