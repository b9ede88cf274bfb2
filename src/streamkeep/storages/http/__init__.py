"""HTTPStorage: the streams of a server, for workers, scripts and notebooks that cannot reach its storage themselves; asyncio only."""

import asyncio
import math
import os
import re
import ssl
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from streamkeep._extras import needed_by

with needed_by(__name__, "client"):
    import httpx2
    import msgspec

from streamkeep._credentials import warn_of_clear_text
from streamkeep.errors import InvalidArgumentError, StorageError, StorageUnavailableError, StreamkeepError
from streamkeep.storage import Doorbell, Head, Page
from streamkeep.storages._asyncio_storage import AsyncioStorage
from streamkeep.storages._batch_task import BatchTask
from streamkeep.storages._engine_clock import EngineClock
from streamkeep.storages._http_messages import (
    BEAT,
    CONTENT_TYPE,
    SILENCE_SECONDS,
    SLOWLY_DONE,
    TIME_HEADER,
    Change,
    Expired,
    Failure,
    Read,
    Scan,
)
from streamkeep.storages._ids import id_bytes
from streamkeep.storages.http._watching import Watching

__all__ = ["HTTPStorage"]

T = TypeVar("T")

TOKEN_VARIABLE: Final = "STREAMKEEP_STORAGE_TOKEN"  # noqa: S105 - its name
CONNECT_SECONDS: Final = 5.0
MAX_ANSWER_BYTES: Final = 64 << 20
READS_AT_ONCE: Final = 8
BATCH_BYTES: Final = 8 << 20
"""About how much is sent in a request."""
_PASSING: Final = frozenset((408, 425, 429, 502, 503, 504))
"""Statuses by which a server, or what is before it, says: not now."""


class HTTPStorage(AsyncioStorage["_Entered"]):
    """Keeps streams where a server keeps them that has a `streamkeep.http.StorageHTTP` under `url`.

    What a commit that has returned True survives is up to the server's storage, and so is the clock. A process has a few connections: one
    for changes, which are sent together, at most 8 for reads, and one for all doorbells, whatever its streams and subscribers. A clone has
    as many again. Proxies may stand between, and several servers behind one URL, if they have their streams in common.

    Entering raises StorageError if the server refuses who asks, or does not speak this, and StorageUnavailableError if it cannot be
    reached. Leaving waits for the changes that were asked for.

    Args:
        url: where it is, `https://host/path`. A user in it, `https://TOKEN@host/path`, is sent as `Authorization: Bearer TOKEN`.
        headers: more headers of each request. Unless they, or the URL, say who asks, the environment's `STREAMKEEP_STORAGE_TOKEN` does.
        ssl_context: whom to believe, and the client's certificate; unless given, the system's authorities, or those in `SSL_CERT_FILE`.
    """

    def __init__(
        self, url: str, *, headers: Mapping[str, str] | None = None, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        self._address, token = _parts_of(url)
        self._url = url
        self._given = headers
        self._ssl_context = ssl_context
        self._headers = httpx2.Headers(dict(headers or {}))
        if token := token or os.environ.get(TOKEN_VARIABLE, ""):
            if not re.fullmatch(r"[!-~]+", token):
                raise InvalidArgumentError("a token is of characters of ASCII that can be seen")
            self._headers.setdefault("authorization", f"Bearer {token}")
        if "authorization" in self._headers:
            address = urlsplit(self._address)
            warn_of_clear_text(address.scheme, address.hostname or "")
        super().__init__(self._address)

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        """See `Storage.read`."""
        id_bytes(stream)
        entered = self._open
        async with entered.reading:
            return await entered.ask("read", Read(stream, start, limit), Page | None)

    async def commit(self, stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        """See `Storage.commit`."""
        id_bytes(stream)
        return await self._open.changes.ask(Change(stream, seen, head, records))

    async def delete(self, stream: str, seen: int) -> bool:
        """See `Storage.delete`."""
        id_bytes(stream)
        return await self._open.changes.ask(Change(stream, seen, None))

    async def scan(self, after: str = "", limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.scan`."""
        id_bytes(after)
        return await self._open.ask("scan", Scan(after, limit), list[tuple[str, Head]])

    async def expired(self, before: float, limit: int = 100) -> Sequence[tuple[str, Head]]:
        """See `Storage.expired`."""
        return await self._open.ask("expired", Expired(before, limit), list[tuple[str, Head]])

    def time(self) -> float:
        """See `Storage.time`. It is the clock of the server's storage."""
        return self._open.clock.time()

    def clone(self) -> "HTTPStorage":
        """See `Storage.clone`."""
        return HTTPStorage(self._url, headers=self._given, ssl_context=self._ssl_context)

    def watch(self, stream: str) -> AbstractAsyncContextManager[Doorbell]:
        """See `Storage.watch`."""
        id_bytes(stream)
        return self._open.watching.watch(stream)

    async def _enter(self, stack: AsyncExitStack) -> "_Entered":
        client = await stack.enter_async_context(
            httpx2.AsyncClient(
                verify=self._ssl_context or True,
                headers=[*self._headers.multi_items(), ("accept-encoding", "identity")],
                timeout=httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS, pool=None),
                # Servers close what is idle after 5 seconds, and a request that meets that is lost.
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=3),
            )
        )
        entered = _Entered(self._address, client, EngineClock())
        await entered.ask("scan", Scan("", 1), list[tuple[str, Head]])  # it is there, lets us, and says what time it is
        await stack.enter_async_context(entered.changes)
        await stack.enter_async_context(entered.watching)
        return entered


@dataclass(eq=False)
class _Entered:
    address: str
    client: httpx2.AsyncClient
    clock: EngineClock

    def __post_init__(self) -> None:
        self.reading = asyncio.Semaphore(READS_AT_ONCE)
        self.changes: BatchTask[Change, bool] = BatchTask(self._change)
        self.watching = Watching(self.client, f"{self.address}/watch")

    async def ask(self, what: str, question: object, answer: type[T] | Any) -> T:  # noqa: ANN401 - unions are no types
        """Ask the server. Raises StorageUnavailableError if it has not answered, and whatever it says."""
        asked_at = self.clock.start()
        try:
            response, content = await self._post(f"{self.address}/{what}", msgspec.msgpack.encode(question))
        except httpx2.LocalProtocolError as error:
            raise StorageError(f"{self.address} cannot be asked: {error}") from error
        except httpx2.TransportError as error:
            raise StorageUnavailableError(f"{self.address} cannot be reached: {type(error).__name__}: {error}") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise StorageError(f"{self.address} cannot be asked: {type(error).__name__}: {error}") from error
        if response.headers.get("content-type") != CONTENT_TYPE:
            raise _stranger(self.address, response)
        try:
            self.clock.set(_time_in(response), asked_at)
            is_done, content = _opened(response, content)
            if is_done:
                given: T = msgspec.msgpack.decode(content, type=answer)
                return given
            failure = msgspec.msgpack.decode(content, type=Failure)
        except (KeyError, ValueError) as error:
            raise StorageError(f"{self.address} has answered what cannot be: {error}") from error
        raise failure.error()

    async def _post(self, url: str, content: bytes) -> tuple[httpx2.Response, bytes]:
        """Give an answer, and its body as it came: nothing here is compressed. StorageError: it has no end. A stranger's is not read."""
        async with self.client.stream("POST", url, content=content, headers={"content-type": CONTENT_TYPE}) as response:
            if response.headers.get("content-type") != CONTENT_TYPE:
                return response, b""
            body = bytearray()
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise StorageError(f"{self.address} has answered more than {MAX_ANSWER_BYTES} bytes")
            return response, bytes(body)

    async def _change(self, changes: Sequence[Change]) -> list[bool | StorageError]:
        answers: list[bool | StorageError] = []
        for batch in _batches(changes):
            answers += await self._change_together(batch)
        return answers

    async def _change_together(self, changes: Sequence[Change]) -> list[bool | StorageError]:
        try:
            given: list[bool | Failure] = await self.ask("change", changes, list[bool | Failure])
        except StorageUnavailableError as error:
            return [error] * len(changes)
        except StreamkeepError as error:
            if len(changes) > 1:  # one that is refused, or all that is too long for a proxy, is not the others' fault
                half = len(changes) // 2
                return [*await self._change_together(changes[:half]), *await self._change_together(changes[half:])]
            return [error if isinstance(error, StorageError) else StorageError(str(error))]
        return [_storage_error(each) if isinstance(each, Failure) else each for each in given]


def _time_in(response: httpx2.Response) -> float:
    time = float(response.headers[TIME_HEADER])
    if not math.isfinite(time):
        raise ValueError("no time")
    return time


def _opened(response: httpx2.Response, content: bytes) -> tuple[bool, bytes]:
    """Say whether this is what was asked for, or a Failure; and give that."""
    if not content.startswith(BEAT):
        return response.status_code == 200, content
    content = content.lstrip(BEAT)
    return content.startswith(SLOWLY_DONE), content[1:]


def _batches(changes: Sequence[Change]) -> list[list[Change]]:
    """Cut what is to be sent, but no change, into parts of a bearable size."""
    batches: list[list[Change]] = []
    room = 0
    for change in changes:
        size = sum(map(len, change.records))
        if not batches or size > room:
            batches.append([])
            room = BATCH_BYTES
        batches[-1].append(change)
        room -= size
    return batches


def _storage_error(failure: Failure) -> StorageError:
    error = failure.error()
    return error if isinstance(error, StorageError) else StorageError(str(error))


def _stranger(address: str, response: httpx2.Response) -> StorageError:
    """Give what it means that something else has answered: a proxy, a login page, another app."""
    status = response.status_code
    if status in {401, 403}:
        return StorageError(
            f"{address} does not trust who asks: {status}; a token is in the URL, {TOKEN_VARIABLE} or the headers"
        )
    if status == 413:
        return StorageError(f"{address}, or a proxy before it, takes no request of this length: 413")
    if status in _PASSING:
        return StorageUnavailableError(f"{address} is not available now: {status}")
    return StorageError(f"there is no StorageHTTP at {address}: the answer was {status} {response.reason_phrase}")


def _parts_of(url: str) -> tuple[str, str]:
    """Give a URL without what is secret in it, and the token. InvalidArgumentError: it is no URL for this."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    is_url = host is not None and parts.scheme in {"http", "https"} and not (parts.query or parts.fragment)
    # An @ in the path is one behind a token with a slash in it.
    if not is_url or parts.password is not None or "@" in parts.path:
        # It may have a token in it, and a message goes to terminals and logs.
        raise InvalidArgumentError(
            "an HTTP storage is https://host/path or https://TOKEN@host/path, without a query, its token percent-encoded"
        )
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", "")), unquote(
        parts.username or ""
    )
