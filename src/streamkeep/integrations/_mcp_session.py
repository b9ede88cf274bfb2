"""Sessions of MCP's, and the streams of their requests as they are written. `mcp` has what is around the SDK's app.

It knows nothing of HTTP: who asks, and whether they may, is decided before.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

import anyio
from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
from mcp.server.streamable_http import GET_STREAM_KEY
from mcp.types import JSONRPCError, JSONRPCMessage, JSONRPCResponse

from .._input import StreamInput
from .._manager import StreamManager
from ..errors import (
    InvalidArgumentError,
    LimitExceededError,
    StorageError,
    StreamAlreadyExistsError,
    StreamkeepError,
    StreamManagerClosedError,
)
from ..events import ErrorInfo

logger: Final = logging.getLogger("streamkeep")

EVENT_ID: Final = re.compile(r"([A-Za-z0-9_.~%-]+)(?::([1-9][0-9]{0,8}))?/(0|[1-9][0-9]{0,14})")
MAX_REQUEST: Final = 256
"""How long a request's id may be for its answer to be kept."""
SLOW_SECONDS: Final = 0.001
MOST_AHEAD: Final = 32
"""How many messages of a request may be under way to a slow storage when the next one is given its id."""

NOT_STORED: Final = ErrorInfo("INTERNAL", "what came next could not be stored")

Owner = AuthorizationContext
"""Whose token a request has, as the SDK compares them."""


@dataclass(frozen=True, slots=True)
class Place:
    """What an event's id names in a session: a request's stream, and how far into it.

    Attributes:
        request: the request's id, as the SDK has it.
        life: which of its streams; only what the server says by itself has more than one.
        after: the event's offset; -1 for the beginning.
    """

    request: str
    life: int
    after: int

    @property
    def is_get(self) -> bool:
        """Whether it is in what the server says by itself, which never has a response."""
        return self.request == GET_STREAM_KEY

    @property
    def next(self) -> "Place":
        """The beginning of the stream behind it."""
        return Place(self.request, self.life + 1, -1)

    def id_of(self, offset: int) -> str:
        """Give the id of an event in the same stream."""
        life = f":{self.life}" if self.life else ""
        return f"{quote(self.request, safe='', errors='surrogatepass')}{life}/{offset}"


def place_of(event_id: str) -> Place:
    """Give the place that an event's id names. InvalidArgumentError: it names none."""
    if not (found := EVENT_ID.fullmatch(event_id)):
        raise InvalidArgumentError("not an event's id")
    return Place(unquote(found[1]), int(found[2] or 0), int(found[3]))


def stream_of(owner: Owner | None, session: str, place: Place) -> str:
    """Give the id of a request's stream. Who knows the session's name and its user can compute it; so it is no permission."""
    named = json.dumps([owner, session, place.request, place.life], sort_keys=True)
    return "mcp~" + hashlib.sha256(named.encode()).hexdigest()


class Session:
    """A session that is served here: the streams of its requests that have no response yet.

    Attributes:
        name: empty until `begin`.
        owner: whose it is; None where requests have no tokens.
        path: where it was begun.
        requests: how many of its requests are being answered.
        used_at: when its owner last asked something of it, by the event loop's clock.
    """

    def __init__(self, streams: StreamManager) -> None:
        self.name = ""
        self.owner: Owner | None = None
        self.path = ""
        self.requests = 0
        self.used_at = anyio.current_time()
        self._streams = streams
        self._lock = anyio.Lock()
        self._early: list[tuple[str, JSONRPCMessage | None]] = []
        self._has_begun = False
        self._is_over = False
        self._writers: dict[str, _Writer] = {}
        self._has_answered = anyio.Event()

    async def store(self, request: str, message: JSONRPCMessage | None) -> str:
        """Store a message and give its id; see `StreamEventStore.store_event`."""
        if not 0 < len(request) <= MAX_REQUEST:
            return ""
        if not self._has_begun:
            async with self._lock:
                if not self.name and not self._is_over:
                    self._early.append((request, message))
                    return Place(request, 0, 0).id_of(sum(early == request for early, _ in self._early) - 1)
        return await self._store(request, message)

    async def begin(self, name: str, owner: Owner | None, path: str) -> None:
        """Give it its name, and store what came before that."""
        async with self._lock:
            self.name, self.owner, self.path = name, owner, path
            early, self._early = self._early, []
            for request, message in early:
                await self._store(request, message, has_id=True)
            self._has_begun = True

    async def end(self, error: ErrorInfo) -> None:
        """End its streams, which have no response."""
        self._is_over = True
        writers, self._writers = self._writers, {}
        self._tell()
        for writer in writers.values():
            await writer.end(error)

    async def answered(self) -> None:
        """Return when all its requests have their responses."""
        while any(request != GET_STREAM_KEY for request in self._writers):
            await self._has_answered.wait()

    async def _store(self, request: str, message: JSONRPCMessage | None, *, has_id: bool = False) -> str:
        if self._is_over:
            return ""
        writer = self._writers.get(request)
        if writer is None:
            writer = self._writers[request] = _Writer(self._streams, self.owner, self.name, request)
        is_last = request != GET_STREAM_KEY and isinstance(message, JSONRPCResponse | JSONRPCError)
        try:
            return await writer.store(message, is_last=is_last, has_id=has_id)
        finally:
            if is_last and self._writers.get(request) is writer:
                del self._writers[request]
                self._tell()

    def _tell(self) -> None:
        has_answered, self._has_answered = self._has_answered, anyio.Event()
        has_answered.set()


class _Writer:
    """What is stored of one request, until it has its response; and what the server says by itself.

    A message is given its id when it is stored; where the storage is slow, when it is queued behind `MOST_AHEAD` at most. What is queued
    is stored in order, or nothing from there on is: so an id names the same message whenever it is asked for, or none. A response is
    always stored first.

    Where a message cannot be stored, a request's stream ends. What the server says by itself goes on in another one.
    """

    def __init__(self, streams: StreamManager, owner: Owner | None, session: str, request: str) -> None:
        self._streams = streams
        self._owner = owner
        self._session = session
        self._lock = anyio.Lock()
        self._place = Place(request, 0, -1)
        self._has_ids = False
        self._input: StreamInput | None = None
        self._left: StreamInput | None = None  # an earlier stream, which ends when there is another one to go on with
        self._next = 0
        self._is_slow = False
        self._ahead = 0
        self._is_over = False
        self._is_told = False

    async def store(self, message: JSONRPCMessage | None, *, is_last: bool, has_id: bool) -> str:
        """Store a message, or have it stored, and give its id; empty if it cannot be.

        Args:
            message: None for a priming event.
            is_last: it is the response.
            has_id: it was given one already.
        """
        async with self._lock:
            self._has_ids = self._has_ids or has_id
            if self._is_over:
                return ""
            try:
                id_ = await self._store(message, is_last=is_last)
            except StreamManagerClosedError:
                return ""
            except StreamkeepError:
                if not self._is_told:
                    logger.exception("a message of MCP's could not be stored; it is sent without an id")
                self._is_told = True
                await self._lose(is_last=is_last)
                return ""
            self._has_ids, self._is_told = True, False
            return id_

    async def end(self, error: ErrorInfo) -> None:
        """End the stream, if that can be stored."""
        async with self._lock:
            self._is_over = True
            for stream in (self._left, self._input):
                await _end(stream, error)

    async def _store(self, message: JSONRPCMessage | None, *, is_last: bool) -> str:
        stream = self._input or await self._open()
        if not is_last:
            return self._place.id_of(await self._queue(stream, message))
        try:
            await stream.done(message)
        except StorageError as error:  # it is stored in the background
            logger.warning("a response of MCP's is not stored yet: %s", error)
        self._is_over = True
        return self._place.id_of(self._next)

    async def _queue(self, stream: StreamInput, message: JSONRPCMessage | None) -> int:
        try:
            offset = stream.write_soon(message)
        except LimitExceededError:  # if the queue is full, there is room for it then
            await stream.flush()
            offset = stream.write_soon(message)
        self._next = offset + 1
        self._ahead += 1
        if self._is_slow and self._ahead < MOST_AHEAD:
            return offset
        began_at = anyio.current_time()
        try:
            await stream.flush()
        except StorageError:  # it goes on in the background, which says so
            self._is_slow = True
        else:
            self._is_slow = anyio.current_time() - began_at > SLOW_SECONDS
        self._ahead = 0
        return offset

    async def _open(self) -> StreamInput:
        stream = stream_of(self._owner, self._session, self._place)
        try:
            self._input = await self._create(stream)
        except StreamAlreadyExistsError:
            # An id that is used twice in a session: its first answer is not asked for any more. Or the answer to `open` was lost.
            await self._streams.delete(stream)
            self._input = await self._create(stream)
        left, self._left = self._left, None
        await _end(left, NOT_STORED)
        return self._input

    async def _create(self, stream: str) -> StreamInput:
        # Its owner is nobody whom an app could mean: the id can be computed, and the app may show its streams by their ids.
        return await self._streams.open(stream, owner=stream, metadata={"protocol": "mcp"}, encode=_json_of)

    async def _lose(self, *, is_last: bool) -> None:
        """Go on with another stream, as far as nobody can have an id that would name something else there."""
        if self._place.is_get and self._input is not None and (self._next or self._input.is_closed):
            self._left, self._input = self._input, None
            self._place, self._next = self._place.next, 0
        elif not self._place.is_get and (self._has_ids or is_last):
            self._is_over = True
            await _end(self._input, NOT_STORED)


async def _end(stream: StreamInput | None, error: ErrorInfo) -> None:
    if stream is not None and not stream.is_closed:
        try:
            await stream.error(error)
        except StreamkeepError as why:
            logger.debug("stream %s could not be ended: %s", stream.id, why)


def _json_of(message: object) -> bytes:
    """Give a message as the SDK sends it."""
    if message is None:
        return b"null"
    assert isinstance(message, JSONRPCMessage)
    return message.model_dump_json(by_alias=True, exclude_unset=True).encode()
