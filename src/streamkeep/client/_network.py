"""HTTP as a reader of streams sees it, over httpx2: a request goes out, and an answer comes in pieces. No retries, no meaning.

`Network` and `Answer` are awaited. Those over a blocking client are, too, though they never wait there: `ran` runs what awaits nothing
else. So whoever reads streams is written once.
"""

import base64
import os
import re
import socket
import ssl
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from queue import Empty, SimpleQueue
from typing import Final, Protocol
from urllib.parse import urlsplit

import anyio

from .._credentials import warn_of_clear_text
from .._extras import needed_by
from ..errors import InvalidArgumentError, UnexpectedAnswerError
from ..wire import means_to_be_token

with needed_by("streamkeep.client", "client"):
    import httpx2

MAX_REDIRECTS: Final = 5
CLOSE_SECONDS: Final = 5.0
CONNECT_SECONDS: Final = 10.0
MAX_SHOWN: Final = 200
_NO_URL: Final = "its URL is none; what is special in a user's name or password has to be percent-encoded"
_AT: Final = (
    "with a token or a password, an @ behind the server's name has to be written %40; what is special in a user's name or password has to "
    "be percent-encoded, too"
)
# Each stream that is followed holds a connection; at httpx2's own limit, 100, the next request would wait for one of them to end.
_LIMITS: Final = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
_NOT_SENT: Final = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)


@dataclass(frozen=True, slots=True)
class Call:
    """A request."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    query: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes | None = None


class LostError(Exception):
    """There was no answer, or there is no more of it; `__cause__` is why.

    Args:
        is_sent: whether the server may have got the request.
        is_final: whether another try cannot do better.
        asked_seconds: how long the server wants to be left alone.
    """

    def __init__(self, *, is_sent: bool = True, is_final: bool = False, asked_seconds: float = 0.0) -> None:
        super().__init__("the connection was lost")
        self.is_sent = is_sent
        self.is_final = is_final
        self.asked_seconds = asked_seconds


class Answer(Protocol):
    """The head of an answer, and its body in pieces.

    Attributes:
        status: its HTTP code.
        headers: names in any case.
        has_end: whether the end of its body can be told from a lost connection.
    """

    status: int
    headers: Mapping[str, str]
    has_end: bool

    async def read(self) -> bytes:
        """Give what comes next of the body as it was sent, b"" at its end. LostError: it is not whole."""
        ...

    def hasten(self, seconds: float) -> None:
        """Wait no longer than this for each piece of the body, of which none has been read."""
        ...

    async def close(self) -> None:
        """Leave it; what is left of it is not read."""
        ...


class Network(Protocol):
    """What requests go through."""

    async def send(self, call: Call) -> Answer:
        """Send a request, and give its answer when the head is there. Redirects are followed as long as they stay with one server.

        LostError: there is none. InvalidArgumentError: it cannot be sent. UnexpectedAnswerError: it leads to another server.
        """
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    def interruptible(self) -> AbstractContextManager[None]:
        """Do inside of this what `interrupt` is to end. What happens then is not said: ask for yourself whether it was called."""
        ...

    async def interrupt(self) -> None:
        """End what is waited for in another task or thread, which calls `close` then. Called after whatever says that it was."""
        ...

    async def close(self) -> None:
        """Close what was opened for this, and not what was handed to it."""
        ...


# Awaited


class AsyncNetwork:
    """Over a client that awaits: the user's own, or one that is opened for this."""

    def __init__(self, client: httpx2.AsyncClient | None, read_seconds: float | None) -> None:
        self._is_ours = client is None
        self._client = client or httpx2.AsyncClient(verify=_tls(), timeout=CONNECT_SECONDS, limits=_LIMITS)
        self._timeout = _timeout(self._client.timeout, read_seconds)
        self._scope = anyio.CancelScope()
        self._closed = anyio.Event()

    def another(self) -> "AsyncNetwork":
        """Give one over the same client, that is closed and interrupted by itself, and does not close the client."""
        return AsyncNetwork(self._client, self._timeout.read)

    async def send(self, call: Call) -> Answer:
        """See `Network`."""
        request = _request(self._client, call, self._timeout)
        for _ in range(MAX_REDIRECTS):
            with _translated():
                response = await self._client.send(request, stream=True, follow_redirects=False)
            if not response.has_redirect_location:
                return _AsyncAnswer(response)
            with _translated():
                await response.aclose()
            request = _redirected(request, response)
        raise UnexpectedAnswerError(f"the server has led from one place to the next {MAX_REDIRECTS} times")

    async def sleep(self, seconds: float) -> None:
        """See `Network`."""
        await anyio.sleep(seconds)

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """See `Network`."""
        with anyio.CancelScope() as self._scope:
            yield

    async def interrupt(self) -> None:
        """See `Network`. It returns when all is closed."""
        self._scope.cancel()
        with anyio.move_on_after(CLOSE_SECONDS):
            await self._closed.wait()

    async def close(self) -> None:
        """See `Network`."""
        try:
            if self._is_ours:
                with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                    await self._client.aclose()
        finally:
            self._closed.set()


class _AsyncAnswer:
    def __init__(self, response: httpx2.Response) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.has_end = _has_end(response)
        self._response = response
        self._pieces = response.aiter_raw()

    async def read(self) -> bytes:
        """See `Answer`."""
        with _translated():
            return await anext(self._pieces, b"")

    def hasten(self, seconds: float) -> None:
        """See `Answer`."""
        _hasten(self._response, seconds)

    async def close(self) -> None:
        """See `Answer`."""
        with anyio.move_on_after(CLOSE_SECONDS, shield=True), suppress(httpx2.TransportError):
            await self._pieces.aclose()
            await self._response.aclose()


# Blocking


class BlockingNetwork:
    """Over a client that blocks, for `ran`."""

    def __init__(self, client: httpx2.Client | None, read_seconds: float | None) -> None:
        self._is_ours = client is None
        self._client = client or _blocking_client()
        self._process = os.getpid()
        self._timeout = _timeout(self._client.timeout, read_seconds)
        self._interrupted = SimpleQueue[None]()  # no Event: a signal's handler must not wait for its lock
        self._socket: socket.socket | None = None  # over which something is waited for, if nobody else uses it

    async def send(self, call: Call) -> Answer:
        """See `Network`."""
        if (
            self._is_ours and self._process != os.getpid()
        ):  # whose connections are the other process's, too: answers would be mixed up
            self._client, self._process, self._socket = _blocking_client(), os.getpid(), None
        request = _request(self._client, call, self._timeout)
        if self._is_ours:
            request.extensions = {**request.extensions, "trace": self._trace}
        for _ in range(MAX_REDIRECTS):
            with _translated():
                response = self._client.send(request, stream=True, follow_redirects=False)
            if not response.has_redirect_location:
                if response.http_version.startswith("HTTP/1"):  # else others may use it, too
                    self._socket = _socket_of(response.extensions.get("network_stream"))
                return _BlockingAnswer(response, self)
            response.close()
            request = _redirected(request, response)
        raise UnexpectedAnswerError(f"the server has led from one place to the next {MAX_REDIRECTS} times")

    async def sleep(self, seconds: float) -> None:
        """See `Network`."""
        with suppress(Empty):
            self._interrupted.put(self._interrupted.get(timeout=seconds))  # once for ever

    def interruptible(self) -> AbstractContextManager[None]:
        """See `Network`."""
        return nullcontext()

    async def interrupt(self) -> None:
        """See `Network`. It does not wait, for it may be called by a signal's handler, in the thread that reads."""
        self._interrupted.put(None)
        if (waited_for := self._socket) is not None:
            _shut_down(waited_for)

    async def close(self) -> None:
        """See `Network`."""
        if self._is_ours:
            self._client.close()

    def forget(self) -> None:
        """Nothing is waited for over a connection any more; others may use it, if it is not ours alone."""
        if not self._is_ours:
            self._socket = None

    def _trace(self, event: str, info: Mapping[str, object]) -> None:
        # An answer's head may never come, and until then nothing else says over which connection it is waited for.
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._socket = _socket_of(info["return_value"])
            if self._socket is not None and not self._interrupted.empty():
                _shut_down(self._socket)


class _BlockingAnswer:
    def __init__(self, response: httpx2.Response, network: BlockingNetwork) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.has_end = _has_end(response)
        self._response = response
        self._network = network
        self._process = os.getpid()
        self._pieces = response.iter_raw()

    async def read(self) -> bytes:
        """See `Answer`."""
        if self._process != os.getpid():
            raise LostError from RuntimeError("it is another process that reads this answer")
        with _translated():
            return next(self._pieces, b"")

    def hasten(self, seconds: float) -> None:
        """See `Answer`."""
        _hasten(self._response, seconds)

    async def close(self) -> None:
        """See `Answer`."""
        self._network.forget()
        self._response.close()


def _socket_of(stream: object) -> socket.socket | None:
    """Give the socket of what httpx2 calls a network stream; None: there is none, as in a transport of somebody's own."""
    get_extra_info = getattr(stream, "get_extra_info", None)
    found = None if get_extra_info is None else get_extra_info("socket")
    return found if isinstance(found, socket.socket) else None


def _shut_down(waited_for: socket.socket) -> None:
    """Wake whoever waits for a socket. It is not closed: who waits would then wait for whatever gets its number."""
    with suppress(OSError):
        socket.socket.shutdown(waited_for, socket.SHUT_RDWR)  # not that of TLS, which takes it apart under its reader


# Both


def is_header_value(text: str) -> bool:
    """Say whether a header can hold a text (RFC 9110, 5.5), as UTF-8."""
    return _HEADER_VALUE.fullmatch(text.encode()) is not None


_HEADER_VALUE: Final = re.compile(rb"|[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?")


def _blocking_client() -> httpx2.Client:
    return httpx2.Client(verify=_tls(), timeout=CONNECT_SECONDS, limits=_LIMITS)


@cache
def _tls() -> ssl.SSLContext:
    return httpx2.create_ssl_context()  # once, for it reads all the certificates of the system


def _timeout(timeout: httpx2.Timeout, read_seconds: float | None) -> httpx2.Timeout:
    return httpx2.Timeout(connect=timeout.connect, read=read_seconds, write=timeout.write, pool=timeout.pool)


def _request(client: httpx2.AsyncClient | httpx2.Client, call: Call, timeout: httpx2.Timeout) -> httpx2.Request:
    for name, value in call.headers.items():
        if not is_header_value(value):
            raise InvalidArgumentError(f"the header {name!r} has a value that none can have")
    try:
        headers = [(name.encode(), value.encode()) for name, value in call.headers.items()]
        request = client.build_request(call.method, call.url, headers=headers, content=call.body, timeout=timeout)
        request.url = request.url.copy_merge_params(dict(call.query))
        # Which is stricter, and shows who is asked: a password with a bracket has to be written in escapes.
        parts = urlsplit(call.url)
    except (httpx2.InvalidURL, TypeError, ValueError):
        # Not in its words: of a URL that is cut in the wrong place they may be half of a password.
        raise InvalidArgumentError(f"the request cannot be sent: {_NO_URL}") from None
    if request.url.scheme not in {"http", "https"} or not request.url.host:
        raise InvalidArgumentError("a URL of a server begins with http:// or https:// and a name")
    _take_credentials(request, call, has_auth=client.auth is not None)
    if "authorization" in request.headers or client.auth is not None:
        if parts.netloc and "@" in f"{parts.path}?{parts.query}#{parts.fragment}":
            # It may stand behind a password with a slash in it, and what stands before that is then no server of the user's.
            raise InvalidArgumentError(f"the request cannot be sent: {_AT}")
        warn_of_clear_text(request.url.scheme, request.url.host)
    return request


def _take_credentials(request: httpx2.Request, call: Call, *, has_auth: bool) -> None:
    """Send as a header what a URL has of credentials, a user or a token of ours: httpx2 logs URLs as they are."""
    url = request.url
    if url.userinfo:
        if "authorization" not in {name.lower() for name in call.headers}:
            user = f"{url.username}:{url.password}".encode()
            request.headers["Authorization"] = f"Basic {base64.b64encode(user).decode()}"
        request.url = url.copy_with(userinfo=b"")
    tokens = request.url.params.get_list("token")
    is_one = len(tokens) == 1 and means_to_be_token(tokens[0]) and tokens[0].isascii() and is_header_value(tokens[0])
    if is_one and not has_auth and "authorization" not in request.headers:
        request.headers["Authorization"] = f"Bearer {tokens[0]}"
        request.url = request.url.copy_remove_param("token")


@contextmanager
def _translated() -> Generator[None]:
    try:
        yield
    except httpx2.LocalProtocolError as error:
        raise InvalidArgumentError(f"the request cannot be sent: {error}") from error
    except httpx2.TransportError as error:
        raise LostError(is_sent=not isinstance(error, _NOT_SENT), is_final=_is_of_tls(error)) from error


def _is_of_tls(error: BaseException | None) -> bool:
    """Say whether it is because a certificate was not believed, which the next one will not be either."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _redirected(request: httpx2.Request, response: httpx2.Response) -> httpx2.Request:
    """Give the request to make instead. Nobody else is sent what the request holds, so it has to be to the same server.

    What is no GET stays what it is, or is not sent: a DELETE that becomes a GET, as with 302, would seem to have been done.
    """
    following = response.next_request
    if following is None:
        raise UnexpectedAnswerError("the server has led to a place that is no URL")
    following.url = following.url.copy_with(userinfo=b"")
    old, new = request.url, following.url
    place = str(new.copy_with(query=None, fragment=None))[:MAX_SHOWN]
    if request.method not in {"GET", "HEAD"} and response.status_code not in {307, 308}:
        raise UnexpectedAnswerError(
            f"the server has answered a {request.method} with {response.status_code}, which leads to a GET of {place}: not followed"
        )
    is_upgrade = (old.scheme, old.port, new.scheme, new.port) == ("http", None, "https", None) and old.host == new.host
    if old.origin != new.origin and not (is_upgrade and "authorization" not in request.headers):
        raise UnexpectedAnswerError(f"the server has led to another one, {place}, which nothing was sent to")
    following.extensions = dict(request.extensions)
    return following


def _hasten(response: httpx2.Response, seconds: float) -> None:
    timeouts = response.request.extensions.get("timeout", {})  # which httpx2 looks at when the body begins to be read
    timeouts["read"] = min(timeouts.get("read") or seconds, seconds)


def _has_end(response: httpx2.Response) -> bool:
    # Of HTTP/1 without either, the end of the connection is the end of the body, however it came about (RFC 9112, 6.3).
    is_http_1 = response.http_version.startswith("HTTP/1")
    return not is_http_1 or "content-length" in response.headers or "transfer-encoding" in response.headers
