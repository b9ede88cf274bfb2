"""StorageHTTP: a manager's storage on the web, for trusted processes that cannot reach it themselves, as plain ASGI.

The other side is `streamkeep.storages.http.HTTPStorage`, of which a `StreamManager` elsewhere makes streams. Nothing is kept here between
requests, so a writer's next commit may reach another process; who may write is decided by each commit, as in every storage.
"""

import math
import re
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import anyio
import msgspec

from .._manager import StreamManager
from ..errors import InvalidArgumentError, StorageUnavailableError, StreamkeepError
from ..events import encode_json
from ..storage import Storage
from ..storages._http_messages import (
    BEAT,
    BEAT_SECONDS,
    CONTENT_TYPE,
    HEARTBEAT_SECONDS,
    MAX_BODY_BYTES,
    SLOWLY_DONE,
    SLOWLY_FAILED,
    TIME_HEADER,
    Change,
    Expired,
    Failure,
    Read,
    Scan,
    failure_of,
)
from .mounted import MountedManager
from .response import Receive, Scope, Send, disconnected, errors_answered, headers_of, read_body, send_response
from .trust import Trust, check_trusted, trust_of

MAX_WATCHED: Final = 100_000
MAX_PAGE: Final = 1_000
"""How many streams a scan gives at most."""
BODY_WITHIN: Final = timedelta(seconds=60)
CODES: Final[Mapping[str, int]] = {"invalid": 400, "full": 507, "unavailable": 503}
_WHAT: Final = re.compile(r"/(read|change|scan|expired|watch)/?")


class StorageHTTP(MountedManager):
    """Gives a manager's storage to `RemoteStreamManager`s elsewhere; an async context manager, and an ASGI app to be mounted.

        storage_http = StorageHTTP("sqlite:///streams.db", trust=os.environ["STREAMKEEP_STORAGE_TOKEN"])
        app.mount("/storage", storage_http)

    Whoever is trusted may read and write all that is stored, whosesoever it is: workers, notebooks, other services of one application. It
    is nothing for browsers or users; those get `StreamsHTTP`. Serve it over HTTPS.

    Entering it enters the manager, unless that is running already. As a lifespan: `FastAPI(lifespan=storage_http.lifespan)`.

    Args:
        streams: the manager, or the URL that `StreamManager.connect` makes one of.
        trust: a token of at least 16 characters, which those who are trusted send as `Authorization: Bearer`; or a function that says of a
            request's headers whether who sent them is. Others are answered 401.
        max_body_bytes: the longest request body that is read; a longer one is answered 413.
    """

    def __init__(self, streams: StreamManager | str, *, trust: str | Trust, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        super().__init__(streams)
        self._trust = trust_of(trust)
        self._max_body_bytes = max_body_bytes

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with errors_answered(send):
            await self._answer_trusted(scope, receive, send)

    async def _answer_trusted(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        await check_trusted(self._trust, headers)
        what = _WHAT.fullmatch(scope["path"].removeprefix(scope.get("root_path", "")))
        if what is None:
            await send_response(send, 404)
        elif scope["method"] != "POST":
            await send_response(send, 405, headers=[("allow", "POST")])
        elif headers.get("content-type") != CONTENT_TYPE:
            await send_response(send, 415)
        elif (body := await read_body(scope, receive, max_bytes=self._max_body_bytes, within=BODY_WITHIN)) is not None:
            await self._do(what[1], body, receive, send)

    async def _do(self, what: str, body: bytes, receive: Receive, send: Send) -> None:
        answering = _Answering(send)
        try:
            storage = self.streams.storage
            if what == "watch":
                await self._watch(storage, _decoded(body, list[str]), receive, send)
                return
            async with answering.going_on(storage):
                answer, code = await _done(storage, what, body), 200
        except StreamkeepError as error:
            answer = failure_of(error)
            code = CODES.get(answer.kind, 500)
        await answering.end(self.streams.storage, code, msgspec.msgpack.encode(answer))

    async def _watch(self, storage: Storage, streams: Sequence[str], receive: Receive, send: Send) -> None:
        if len(streams) > MAX_WATCHED:
            raise InvalidArgumentError(f"more than {MAX_WATCHED} streams cannot be watched")
        bells, has_begun = _Bells(), False
        with self._shutdown.listening(), self._shutdown.responding():
            async with anyio.create_task_group() as tasks:

                async def end_when(ended: Awaitable[object]) -> None:
                    await ended
                    tasks.cancel_scope.cancel()

                tasks.start_soon(end_when, disconnected(receive))
                tasks.start_soon(end_when, self._shutdown.time_to_end())
                async with anyio.create_task_group() as beginning:
                    for stream in set(streams):
                        beginning.start_soon(tasks.start, bells.watch, storage, stream)
                if bells.failure is None:
                    has_begun = True
                    await self._ring(bells, send)
                tasks.cancel_scope.cancel()
        if has_begun:
            await send({"type": "http.response.body"})  # who watches comes back
        else:
            raise bells.failure or StorageUnavailableError("the server is shutting down")

    async def _ring(self, bells: "_Bells", send: Send) -> None:
        """Say what was rung, until that cannot be known any more."""
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"application/x-ndjson"),
                    (b"cache-control", b"no-store, no-transform"),
                    (b"x-accel-buffering", b"no"),
                ],
            }
        )
        while bells.failure is None:
            await send({"type": "http.response.body", "body": encode_json(bells.take()) + b"\n", "more_body": True})
            with anyio.move_on_after(HEARTBEAT_SECONDS):
                await bells.wait()


class _Answering:
    """An answer that begins before it is known, where that takes long: who asks is to know that somebody works on it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = False

    @asynccontextmanager
    async def going_on(self, storage: Storage) -> AsyncGenerator[None]:
        """Show signs of life while the block runs; what is raised in it comes bare."""
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._beat, storage)
            try:
                yield
            except Exception as error:
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def end(self, storage: Storage, code: int, payload: bytes) -> None:
        """Give the rest of it, be it all."""
        if self._has_begun:
            payload = (SLOWLY_DONE if code == 200 else SLOWLY_FAILED) + payload
        else:
            await self._begin(storage, code)
        await self._send({"type": "http.response.body", "body": payload})

    async def _beat(self, storage: Storage) -> None:
        while True:
            await anyio.sleep(BEAT_SECONDS)
            if not self._has_begun:
                await self._begin(storage, 200)
            await self._send({"type": "http.response.body", "body": BEAT, "more_body": True})

    async def _begin(self, storage: Storage, code: int) -> None:
        now = repr(storage.time())
        self._has_begun = True
        await self._send(
            {
                "type": "http.response.start",
                "status": code,
                "headers": [
                    (b"content-type", CONTENT_TYPE.encode()),
                    (b"cache-control", b"no-store"),
                    (b"x-accel-buffering", b"no"),
                    (TIME_HEADER.encode(), now.encode()),
                ],
            }
        )


class _Bells:
    """Which streams were rung, and why no more are."""

    def __init__(self) -> None:
        self.failure: StreamkeepError | None = None
        self._rung: set[str] = set()
        self._any = anyio.Event()

    async def watch(self, storage: Storage, stream: str, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        is_watched = False
        try:
            async with storage.watch(stream) as doorbell:
                is_watched = True
                task_status.started()
                while True:
                    await doorbell.wait()
                    self._rung.add(stream)
                    self._any.set()
        except StreamkeepError as error:
            self.failure = error
            self._any.set()
            if not is_watched:
                task_status.started()

    def take(self) -> list[str]:
        rung, self._rung, self._any = self._rung, set(), anyio.Event()
        return sorted(rung)

    async def wait(self) -> None:
        await self._any.wait()


async def _done(storage: Storage, what: str, body: bytes) -> object:
    match what:
        case "read":
            read = _decoded(body, Read)
            return await storage.read(read.stream, read.start, read.limit)
        case "scan":
            scan = _decoded(body, Scan)
            return await storage.scan(scan.after, min(scan.limit, MAX_PAGE))
        case "expired":
            expired = _decoded(body, Expired)
            if math.isnan(expired.before):
                raise InvalidArgumentError("nothing expires before what is no time")
            return await storage.expired(expired.before, min(expired.limit, MAX_PAGE))
        case _:
            return await _changed(storage, _decoded(body, list[Change]))


async def _changed(storage: Storage, changes: Sequence[Change]) -> list[bool | Failure]:
    """Make all changes, those of each stream one after the other, those of several at once: storages store them together."""
    for change in changes:
        change.check()
    answers: list[bool | Failure] = [False] * len(changes)
    by_stream: dict[str, list[int]] = {}
    for number, change in enumerate(changes):
        by_stream.setdefault(change.stream, []).append(number)

    async def make(numbers: Sequence[int]) -> None:
        for number in numbers:
            try:
                answers[number] = await _make(storage, changes[number])
            except StreamkeepError as error:
                answers[number] = failure_of(error)

    async with anyio.create_task_group() as tasks:
        for numbers in by_stream.values():
            tasks.start_soon(make, numbers)
    return answers


async def _make(storage: Storage, change: Change) -> bool:
    if change.head is not None:
        return await storage.commit(change.stream, change.seen, change.head, change.records)
    assert change.seen is not None  # it was checked
    return await storage.delete(change.stream, change.seen)


def _decoded(body: bytes, kind: Any) -> Any:  # noqa: ANN401 - unions and lists are no types
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"the body is not what this takes: {error}") from None
