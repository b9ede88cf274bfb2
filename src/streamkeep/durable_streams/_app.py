"""DurableStreams: the Durable Streams protocol over a manager's storage, as plain ASGI."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final, Literal

import anyio

from .._background import Background
from .._durations import check_durations
from .._guard import GuardedStorage
from .._manager import StreamManager
from ..errors import InvalidArgumentError, PublicError, StorageError, StreamManagerClosedError
from ..events import encode_json
from ..http.access import lets_in
from ..http.mounted import MountedManager
from ..http.response import Receive, Scope, Send
from ..storage import PAGE_BYTES
from . import _control, _paths, _rules
from ._answering import METHODS, Answering, DurableStreamsLimits, Manner
from ._readers import SSE, Readers, long_poll
from ._requests import RefusedError, append_of, config_of, fork_of, is_true, reading_of
from ._retention import MARK_PART, Retention
from ._rules import Answer, Bounds, Headers, Stream
from ._streams import Streams, forgotten
from ._subscriptions import Subscriptions
from ._webhooks import check_installed

logger: Final = logging.getLogger("streamkeep")

Action = Literal["create", "append", "close", "read", "head", "delete", "fork", "subscribe", "claim"]


@dataclass(frozen=True, slots=True)
class Access:
    """What `authorize` is asked about.

    Attributes:
        action: `create`, `append`, `close`, `read`, `head`, `delete`; `fork` is asked of the source, and then `create` of the fork.
            `subscribe` and `claim` are asked of the subscription (`__ds/subscriptions/ID`), and `subscribe` of each pattern and stream
            that it is to have as well; `append` of its wake stream.
        path: the stream's path, below the root of all streams.
        headers: the request's headers, names in lower case.
        scope: the ASGI connection scope.
    """

    action: Action
    path: str
    headers: Mapping[str, str]
    scope: Mapping[str, Any]


Authorize = Callable[[Access], "bool | Awaitable[bool]"]
"""Says whether a request is allowed, by True or False; others are answered 403. It may raise `PublicError`, or Starlette's or FastAPI's
`HTTPException`, to say more."""


class DurableStreams(MountedManager):
    """Serves streams by the Durable Streams protocol; an async context manager, and an ASGI app to be mounted. See `durable_streams`."""

    def __init__(
        self,
        streams: StreamManager | str,
        *,
        authorize: Authorize | None = None,
        limits: DurableStreamsLimits | None = None,
        retention: Retention | None = None,
        cors: str | None = "*",
        cache: Literal["public", "private"] = "private",
        public_url: str | None = None,
        subscriptions: Literal["off", "public", "local"] = "off",
    ) -> None:
        super().__init__(streams)
        self._authorize = authorize
        self._limits = limits or DurableStreamsLimits()
        self._retention = _checked(retention, self._limits)
        public_url = public_url.rstrip("/") if isinstance(public_url, str) else public_url
        self._manner = Manner(self._limits, cors, cache, public_url, forgets=retention is not None)
        if subscriptions not in ("off", "public", "local"):  # False must not mean that they are on
            raise InvalidArgumentError(f"`subscriptions` is 'off', 'public' or 'local', and not {subscriptions!r}")
        self._webhooks = None if subscriptions == "off" else subscriptions
        if self._webhooks is not None:
            check_installed()
        self._readers = Readers(self._limits, self._shutdown)
        self._background = Background()
        self._there: Streams | None = None
        self._subscriptions: Subscriptions | None = None

    @property
    def is_running(self) -> bool:
        """Whether it has been entered."""
        return self._there is not None

    async def drain(self) -> None:
        """End live reads; their readers come back, and find another process. For servers that say when they stop."""
        self._readers.are_ending = True
        if self._there is not None:
            self._there.wake()

    async def _begin(self, stack: AsyncExitStack) -> None:
        self._readers.are_ending = False
        self._background = Background()
        self._background.begin()
        limits = self._limits
        bounds = Bounds(limits.max_stream_bytes, limits.max_stream_records, limits.max_producers, self._retention)
        storage = GuardedStorage(self.streams.storage)
        self._there = Streams(storage, self._background, bounds, self._changed)
        if self._webhooks is not None:
            self._subscriptions = Subscriptions(
                storage,
                self._background,
                self._there,
                allow_local=self._webhooks == "local",
                max_subscriptions=limits.max_subscriptions,
            )
            self._background.start(self._subscriptions.run, "knowing all subscriptions")
            self._background.start(self._subscriptions.look_again, "looking at all streams again")
        self._background.start(self._there.sweep_for_ever, "sweeping what has expired")
        self._background.start(self._there.follow_links_for_ever, "removing what is kept for forks that are gone")
        self._background.start(self._end_in_time, "waiting for the end")
        stack.push_async_callback(self._end)

    async def _end_in_time(self) -> None:
        await self._shutdown.begun.wait()
        await self.drain()

    async def _end(self) -> None:
        await self.drain()
        self._background.stop()
        with anyio.CancelScope(shield=True):
            await self._background.wait()
        self._there = None

    def _changed(self, stream: Stream) -> None:
        if self._subscriptions is not None:
            self._subscriptions.changed(stream)

    # Answering

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = Answering(self._manner, scope, receive, send)
        try:
            await self._route(answering)
        except StorageError as error:
            if not answering.has_begun:
                await answering.refuse(error)
            else:
                logger.warning("a response was cut: %s", error)  # its client knows that it is not whole, and comes back
        except Exception as error:
            if answering.has_begun:
                logger.exception("a response was cut")
            else:
                await answering.refuse(error)
        finally:
            answering.let_go()

    async def _route(self, answering: Answering) -> None:
        if answering.scope["method"] == "OPTIONS":
            await answering.preflight()
            return
        there = self._there
        if there is None:
            raise StreamManagerClosedError("the server is not running: enter it, or give its `lifespan` to the outermost app")
        _ = self.streams.storage  # raises where it cannot be used
        path = answering.path()
        method = answering.scope["method"]
        if path.split("/")[0] == _paths.CONTROL:
            await self._see_to_subscriptions(answering, path)
            return
        answering.check_path()
        match method:
            case "GET":
                await self._get(answering, there, path)
            case "HEAD":
                await self._head(answering, there, path)
            case "POST":
                await self._post(answering, there, path)
            case "PUT":
                await self._put(answering, there, path)
            case "DELETE":
                await self._allow(answering, "delete", path)
                await answering.send(await there.delete(path))
            case _:
                await answering.send(Answer(405, (("allow", METHODS),), "the protocol has no such method"))

    async def _allow(self, answering: Answering, action: Action, path: str) -> None:
        if self._authorize is None:
            return
        if not await lets_in(self._authorize(Access(action, path, answering.headers, answering.scope)), "durable_streams"):
            raise PublicError("PERMISSION_DENIED", "this is not allowed")

    async def _see_to_subscriptions(self, answering: Answering, path: str) -> None:
        """Answer a request about subscriptions (6)."""
        subscriptions, method = self._subscriptions, answering.scope["method"]
        _, _, what = path.partition("/")
        if subscriptions is None or not (what == "jwks.json" or what.startswith("subscriptions/")):
            await answering.send(Answer(404, reason="there is no such thing"))
            return
        if what == "jwks.json":
            if method != "GET":
                raise RefusedError(405, "the keys are there to be read", headers=(("allow", "GET"),))
            signer = await subscriptions.signer()
            headers = (("content-type", "application/jwk-set+json"),)
            await answering.send(Answer(200, headers), encode_json(signer.jwks), "public, max-age=300")
            return
        below = what.removeprefix("subscriptions/")
        request = _control.request_of(method, below, answering.headers, answering.base_url())
        await self._allow_control(answering, request)
        body = await answering.body()
        if body is None:
            return
        request = replace(request, body=body)
        if self._authorize is not None:
            for action, stream in _control.streams_in(request, allow_local=self._webhooks == "local"):
                await self._allow(answering, action, stream)
        reply = await _control.answer(subscriptions, request, allow_local=self._webhooks == "local")
        if reply.value is None:
            await answering.send(Answer(reply.code))
        else:
            await answering.send(Answer(reply.code, (("content-type", "application/json"),)), encode_json(reply.value))

    async def _allow_control(self, answering: Answering, request: _control.Request) -> None:
        """Ask whether a request about subscriptions is allowed; those with a token of ours bring their permission."""
        if self._authorize is None or (request.method == "POST" and request.what in {"callback", "ack", "release"}):
            return
        where = f"{_paths.CONTROL}/subscriptions/{request.name}"
        await self._allow(answering, "claim" if request.what == "claim" else "subscribe", where)

    async def _put(self, answering: Answering, there: Streams, path: str) -> None:
        config = config_of(answering.headers)
        asked = fork_of(answering.headers, answering.roots())
        if asked is not None:
            if (why := _paths.why_refused(asked.source)) is not None:
                raise RefusedError(400, why)
            await self._allow(answering, "fork", asked.source)
        await self._allow(answering, "create", path)
        body = await answering.body()
        if body is None:
            return
        answer, stream = await there.create(path, config, body, asked)
        if stream is not None:
            state = stream.state
            location = (("location", answering.url(path)),) if answer.code == 201 else ()
            told = (*location, ("content-type", state.content_type), *_told(stream))
            answer = Answer(answer.code, (*answer.headers, *told))
        await answering.send(answer)

    async def _post(self, answering: Answering, there: Streams, path: str) -> None:
        await self._allow(answering, "append", path)
        if is_true(answering.headers, "stream-closed"):
            await self._allow(answering, "close", path)
        body = await answering.body()
        if body is not None:
            await answering.send(await there.append(path, append_of(answering.headers, body)))

    async def _head(self, answering: Answering, there: Streams, path: str) -> None:
        await self._allow(answering, "head", path)
        stream = await there.find(path)
        gone = _rules.absence(stream, there.storage.time())
        if gone is not None or stream is None:
            await answering.send(gone or Answer(404))
            return
        state = stream.state
        ttl = () if state.ttl is None else (("stream-ttl", str(state.ttl)),)
        expires = (("stream-expires-at", state.expires),) if state.expires else ()
        await answering.send(Answer(200, (("content-type", state.content_type), *_told(stream), *ttl, *expires)))

    async def _get(self, answering: Answering, there: Streams, path: str) -> None:
        reading = reading_of(answering.scope["query_string"])
        await self._allow(answering, "read", path)
        is_now = reading.offset == "now"
        place = await _now(there, path) if is_now else await _behind(there, path, reading.offset)
        if isinstance(place, Answer):
            await answering.send(place)
            return
        stream, position, records = place
        await there.renew(stream)
        if reading.live == "sse":
            with self._readers.one_more():
                await SSE(answering, there, self._readers, stream, position, reading).run(records)
        elif not reading.live or position < stream.tail:
            await answering.page(stream, position, records, reading, is_now=is_now)
        elif stream.state.is_closed:
            await answering.nothing(stream, None)
        else:
            await long_poll(answering, there, self._readers, stream, position, reading)


def durable_streams(
    streams: StreamManager | str,
    *,
    authorize: Authorize | None = None,
    limits: DurableStreamsLimits | None = None,
    retention: Retention | None = None,
    cors: str | None = "*",
    cache: Literal["public", "private"] = "private",
    public_url: str | None = None,
    subscriptions: Literal["off", "public", "local"] = "off",
) -> DurableStreams:
    """Give an ASGI app that serves streams by the Durable Streams protocol, over a manager's storage; mount it anywhere.

        app.mount("/v1/stream", durable_streams("sqlite:///streams.db", authorize=allow))

    Enter it, or have `lifespan` do so; entering it enters the manager, unless that is running already. Its streams are its own: the
    manager's are neither seen nor touched by it.

    Args:
        streams: the manager, or the URL that `StreamManager.connect` makes one of.
        authorize: says whether a request is allowed; see `Access`. None: all are. A stream's path is not a permission.
        limits: see `DurableStreamsLimits`.
        retention: what streams keep of themselves while they go on; see `Retention`. None: all.
        cors: whom browsers let read the answers (`Access-Control-Allow-Origin`), without cookies; None: only pages of this origin.
        cache: who may keep what was read: `public` only where everybody may read all streams.
        public_url: the URL of the root of all streams as clients know it; None: what the request says.
        subscriptions: `public`: workers may be woken by webhooks, which go to https and public addresses only, or by events in a stream.
            `local`: also by webhooks to http://localhost and http://127.0.0.x, for development. Extra: `streamkeep[durable-streams]`.
    """
    return DurableStreams(
        streams,
        authorize=authorize,
        limits=limits,
        retention=retention,
        cors=cors,
        cache=cache,
        public_url=public_url,
        subscriptions=subscriptions,
    )


def _checked(retention: Retention | None, limits: DurableStreamsLimits) -> Retention | None:
    """Give a retention that can be kept. InvalidArgumentError: it cannot, or not within the limits."""
    if retention is None:
        return None
    check_durations(age=retention.age)
    for name, kept, limit, more in (
        ("max_bytes", retention.max_bytes, limits.max_stream_bytes, limits.max_append_bytes),
        ("max_records", retention.max_records, limits.max_stream_records, limits.max_append_bytes // PAGE_BYTES + 1),
    ):
        if kept is None:
            continue
        if kept < 1:
            raise InvalidArgumentError(f"a retention's {name} is at least 1")
        if kept + kept // MARK_PART + more > limit:
            raise InvalidArgumentError(
                f"a retention's {name}, an eighth more and an append must fit into a stream: raise its limit"
            )
    return retention


def _told(stream: Stream) -> Headers:
    closed = (("stream-closed", "true"),) if stream.state.is_closed else ()
    return (("stream-next-offset", _rules.offset_of(stream.state, stream.tail)), *closed)


async def _now(there: Streams, path: str) -> tuple[Stream, int, Sequence[bytes]] | Answer:
    """Give a stream, and its end; or why not."""
    stream = await there.find(path)
    gone = _rules.absence(stream, there.storage.time())
    return gone or Answer(404) if gone is not None or stream is None else (stream, stream.tail, ())


async def _behind(there: Streams, path: str, offset: str) -> tuple[Stream, int, Sequence[bytes]] | Answer:
    """Give a stream, the position of an offset, and what is behind it; or why not."""
    position, life = int(offset[:16]) if offset[:16].isdigit() and len(offset) > 16 else 0, ""
    for attempt in count():
        stream, records = await there.find_with(path, position)
        gone = _rules.absence(stream, there.storage.time())
        if gone is not None or stream is None:
            return gone or Answer(404)
        begin = _position(stream, offset)
        if position == begin or (begin < position <= stream.tail and stream.state.life == life):
            return stream, position, records
        # Its beginning is forgotten. Where that goes on faster than it can be read, only what is further on will still be there.
        position, life = begin + (stream.tail - begin) * min(max(attempt - 1, 0), 8) // 8, stream.state.life
    raise AssertionError("a count has no end")


def _position(stream: Stream, offset: str) -> int:
    match offset:
        case "-1":
            return stream.earliest
        case "now":
            return stream.tail
        case _:
            position = _rules.position_of(stream.state, offset)
            if position is None and len(offset) == 33 and offset[:16].isdigit() and offset[16] == "_":
                raise RefusedError(410, "the offset is of another stream, such as one that was here before")
            if position is None or position > stream.tail:
                raise RefusedError(400, "the stream has no such offset")
            if position < stream.earliest:
                raise forgotten()
            return position
