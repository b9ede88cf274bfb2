"""The connection to NATS: requests with a bound, errors in our words, and a new connection when one is lost.

A connection lives once. When it is lost, or a server does not answer a ping (a stopped process keeps its connections), all that was asked
fails at once, and a task connects anew, to whichever server it can reach. Nothing is sent a second time here: whoever was told that it
failed may have done something else since.
"""

import asyncio
import random
import re
import secrets
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
import msgspec

from streamkeep.errors import StorageError, StorageFullError, StorageUnavailableError, StreamkeepError, fresh
from streamkeep.storages.nats._client import Client, Info, Message, NoTLSError, RefusedError
from streamkeep.storages.nats._credentials import credentials_in

OLDEST_SERVER: Final = (2, 12)

_ANSWER_SECONDS: Final = 5.0
_PING_SECONDS: Final = 2.0
_LONGEST_PAUSE_SECONDS: Final = 1.0
_HEADERS_BYTES: Final = 1024  # room for our headers in a message, whose size counts them too
_OTHER_HOST: Final = frozenset({62, 64})  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH

_FULL: Final = frozenset({10002, 10023, 10028, 10047, 10122})
_STORE_FAILED: Final = 10077
_TOO_LARGE: Final = 10054
_NOT_ENABLED: Final = frozenset({10035, 10039, 10076})
_FOR_NOW: Final = frozenset({10005, 10007, 10008, 10009, 10163, 10176, 10210, 10211})

_TOO_MANY_RESULTS: Final = "413"

_AUTHORIZATION: Final = re.compile(r"authorization violation|authentication", re.IGNORECASE)

NO_MESSAGE: Final = 10037
NO_STREAM: Final = 10059
WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})


class ChangedError(Exception):
    """What was being read is no longer there: the stream was deleted meanwhile, and perhaps created again."""


class ApiError(Exception):
    """JetStream refused a request."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{description} ({code})")
        self.code = code

    def translated(self) -> StorageError:
        """Give it in our words."""
        if self.code in _FULL or (self.code == _STORE_FAILED and "exceed" in str(self)):
            return StorageFullError(
                f"JetStream is full: {self}; delete streams, or raise max_bytes of the JetStream stream, the account's limits or the "
                "server's max_file_store"
            )
        if self.code == _TOO_LARGE:
            return StorageError(f"JetStream refuses large messages: {self}; remove max_msg_size from the JetStream stream")
        if self.code in _NOT_ENABLED:
            return StorageError(
                f"{self}: start nats-server with -js (jetstream {{}} in its configuration), and enable JetStream for the account"
            )
        if self.code == NO_STREAM:
            return StorageError(f"the JetStream stream has been deleted ({self}): open the storage again to create it")
        if self.code in _FOR_NOW or self.code == _STORE_FAILED:
            return StorageUnavailableError(f"JetStream cannot do it for now: {self}")
        return StorageError(f"JetStream refused: {self}")


@dataclass(frozen=True, slots=True)
class Servers:
    """Where NATS is, and who we are there."""

    urls: Sequence[str]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    creds: Path | None = None

    @property
    def names(self) -> str:
        """Them in a message."""
        return ", ".join(self.urls)

    def log_in(self, info: Info) -> Mapping[str, str]:
        """Give what a server wants to know of us."""
        if self.creds is not None:
            return credentials_in(self.creds, info.nonce)
        named = {"user": self.user, "pass": self.password, "auth_token": self.token}
        return {name: value for name, value in named.items() if value is not None}


class Connection:
    """One connection, until it is lost. Everything that it is asked is answered, or fails, within seconds."""

    def __init__(self) -> None:
        self._client = Client(self._error_received, self.fail)
        self._denied: list[str] = []
        self._inbox = f"_INBOX.{secrets.token_hex(11)}"
        self._requests: dict[str, _Request] = {}
        self._count = 0
        self.lost: Final = asyncio.Event()

    @property
    def room(self) -> int:
        """How many bytes a message may have."""
        return self._client.info.max_payload - _HEADERS_BYTES

    @property
    def peers(self) -> Sequence[str]:
        """Where else the cluster has servers, as this one tells."""
        return self._client.info.connect_urls

    async def start(self, url: str, servers: Servers) -> None:
        """Connect, and subscribe to answers."""
        with _translating(url):
            await self._client.connect(url, servers.log_in)
        info = self._client.info
        if info.major_minor < OLDEST_SERVER:
            raise StorageError(
                f"the NATS server at {url} is version {info.version}, and streamkeep needs 2.12 or newer: upgrade nats-server"
            )
        await self.subscribe(f"{self._inbox}.*", self._answered)

    async def subscribe(self, subject: str, received: Callable[[Message], None]) -> None:
        """Have `received` called with every message; StorageError if that is not allowed."""
        self._client.subscribe(subject, received)
        await self.ping()
        for sentence in self._denied:
            if sentence.startswith("subscription") and f'"{subject.lower()}"' in sentence:
                raise _denial(sentence)

    async def request(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> Message:
        """Ask, and give the answer."""
        return (await self._ask(subject, payload, headers, is_batch=False))[0]

    async def request_batch(self, subject: str, payload: bytes) -> "Batch":
        """Ask, and give all answers."""
        *messages, end = await self._ask(subject, payload, None, is_batch=True)
        return Batch(messages, end.status == _TOO_MANY_RESULTS, int(end.headers.get("Nats-Num-Pending", 0)))

    async def subjects(self, name: str, matching: str) -> AsyncGenerator[str]:
        """Give the subjects of a JetStream stream that match, in any order."""
        count = 0
        while True:
            info = await self.api(f"STREAM.INFO.{name}", {"subjects_filter": matching, "offset": count})
            page: dict[str, int] = info["state"].get("subjects") or {}
            for subject in page:
                yield subject
            count += len(page)
            if not page or count >= info.get("total", 0):
                return

    async def api(self, subject: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """Ask JetStream's API; ApiError if it refuses."""
        return answer_of(await self.request(f"$JS.API.{subject}", b"" if body is None else msgspec.json.encode(body)))

    def publish(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Send, without an answer. What is lost is lost."""
        if not self.lost.is_set():
            self._client.publish(subject, payload, headers=headers)

    async def ping(self) -> None:
        """Return if the server is there."""
        with _translating():
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._client.ping()

    def fail(self) -> None:
        """Let everything that waits for an answer fail, and nothing be asked any more."""
        self.lost.set()
        for request in self._requests.values():
            request.fail(StorageUnavailableError("the connection to NATS was lost before it answered"))

    async def close(self, *, abort: bool = False) -> None:
        """Hang up; with `abort` without sending what has not been sent, which a stopped server would never take."""
        self.fail()
        await self._client.close(abort=abort)

    async def _ask(
        self, subject: str, payload: bytes, headers: Mapping[str, str] | None, *, is_batch: bool
    ) -> Sequence[Message]:
        if self.lost.is_set():
            raise StorageUnavailableError("the connection to NATS is lost")
        if len(payload) > self._client.info.max_payload:
            raise StorageError("the message is larger than the NATS server takes: raise its max_payload")
        self._count += 1
        name = f"{self._count:x}"
        request = self._requests[name] = _Request(subject, asyncio.get_running_loop().create_future(), is_batch)
        try:
            with _translating():
                async with asyncio.timeout(_ANSWER_SECONDS):
                    self._client.publish(subject, payload, f"{self._inbox}.{name}", headers)
                    return await request.future
        finally:
            del self._requests[name]

    def _answered(self, message: Message) -> None:
        request = self._requests.get(message.subject[len(self._inbox) + 1 :])
        if request is not None:
            request.take(message)

    def _error_received(self, sentence: str) -> None:
        # What is not allowed NATS says without saying to which request, but it names the subject.
        _, found, denied = sentence.lower().partition("permissions violation for ")
        if found:
            self._denied.append(denied)
            for request in self._requests.values():
                if f'"{request.subject.lower()}"' in denied:
                    request.fail(_denial(denied))


@dataclass(frozen=True, slots=True)
class Batch:
    """The answers to one question, and how it ended: it was refused because there would be too many, or so many are still to come."""

    messages: Sequence[Message]
    is_refused: bool
    pending: int


@dataclass(slots=True)
class _Request:
    subject: str
    future: asyncio.Future[Sequence[Message]]
    is_batch: bool
    answers: list[Message] = field(default_factory=list)

    def take(self, message: Message) -> None:
        status = message.status
        if status == "503":
            self.fail(
                StorageUnavailableError(
                    f"nobody answers {self.subject}: JetStream is not enabled (start nats-server with -js), or not yet up"
                )
            )
            return
        self.answers.append(message)
        if (not self.is_batch or status) and not self.future.done():
            self.future.set_result(self.answers)

    def fail(self, error: StorageError) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # who asked may have been cancelled


class Link:
    """Keeps one connection at a time.

    `on_connected` is called with each new one before anybody else may use it, and `check` every two seconds while it lives. If either
    raises StorageError, the connection is given up.
    """

    def __init__(self, servers: Servers, on_connected: Callable[[Connection], Awaitable[None]]) -> None:
        self._servers = servers
        self._on_connected = on_connected
        self._peers: Sequence[str] = ()
        self._connection: Connection | None = None  # that may be used
        self._latest: Connection | None = None  # that was made, and may be lost
        self._is_up = asyncio.Event()
        self._last_error: StorageError | None = None

    @asynccontextmanager
    async def open(self, check: Callable[[Connection], Awaitable[None]]) -> AsyncGenerator[None]:
        """Connect, and stay connected. Raises what is wrong with the first connection."""
        connection = await self._connect()
        task = asyncio.get_running_loop().create_task(self._stay_connected(connection, check))
        try:
            yield
        finally:
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
                if self._latest is not None:
                    await self._latest.close()

    async def connection(self) -> Connection:
        """Give the connection, or wait for the next one, for a while."""
        if self._connection is not None and self._connection.lost.is_set():
            self._forget()
        if self._connection is None:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self._is_up.wait()
            except TimeoutError:
                error = self._last_error or StorageUnavailableError(f"NATS cannot be reached at {self._servers.names}")
                raise fresh(error) from None
        assert self._connection is not None
        return self._connection

    def _forget(self) -> None:
        self._connection = None
        self._is_up.clear()

    async def _stay_connected(self, connection: Connection, check: Callable[[Connection], Awaitable[None]]) -> None:
        while True:
            try:
                await self._check_until_lost(connection, check)
            except Exception as error:  # whatever it was, another connection may do better
                self._last_error = storage_error(error)
            self._forget()
            await connection.close(abort=True)
            connection = await self._connect_again()

    async def _check_until_lost(self, connection: Connection, check: Callable[[Connection], Awaitable[None]]) -> None:
        """Look after a connection until it is lost."""
        while not connection.lost.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_PING_SECONDS):
                    await connection.lost.wait()
                    return
            await connection.ping()
            await check(connection)

    async def _connect_again(self) -> Connection:
        pause = 0.05
        while True:
            try:
                return await self._connect()
            except Exception as error:  # whatever it was, it may be over
                self._last_error = storage_error(error)
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - so that not all come back at once
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _connect(self) -> Connection:
        urls = list(dict.fromkeys((*random.sample(self._servers.urls, len(self._servers.urls)), *self._peers)))
        first_error: StorageError | None = None
        for url in urls:
            try:
                return await self._connect_to(url)
            except StorageUnavailableError as error:
                first_error = first_error or error
            except StorageError:
                if url in self._servers.urls:
                    raise
                # One that was learned of by an address that its certificate does not bear is no better than one that is away.
        assert first_error is not None
        raise first_error

    async def _connect_to(self, url: str) -> Connection:
        connection = Connection()
        try:
            await connection.start(url, self._servers)
            await self._on_connected(connection)
        except BaseException:
            await connection.close(abort=True)
            raise
        scheme = url.partition("://")[0]
        self._peers = [f"{scheme}://{peer}" for peer in connection.peers] or self._peers
        self._connection, self._latest, self._last_error = connection, connection, None
        self._is_up.set()
        return connection


def answer_of(message: Message) -> dict[str, Any]:
    """Give what a JetStream answer says; ApiError if it is a refusal."""
    try:
        answer: dict[str, Any] = msgspec.json.decode(message.data)
    except msgspec.DecodeError as error:
        raise StorageError("JetStream's answer cannot be understood") from error
    if refusal := answer.get("error"):
        raise ApiError(refusal.get("err_code", 0), refusal.get("description", "unknown error"))
    return answer


class translating_refusals:  # noqa: N801 - reads as a function
    """Turns JetStream's refusals, and whatever else goes wrong, into our errors."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, StreamkeepError):
            raise storage_error(error) from error


def storage_error(error: Exception) -> StorageError:
    """Give an error as ours, whatever it is."""
    match error:
        case StorageError():
            return error
        case ApiError():
            return error.translated()
        case ChangedError():
            return StorageUnavailableError("the stream changed all the time while it was looked at")
        case _:
            return StorageError(f"what NATS answered could not be used: {type(error).__name__}: {error}")


class _translating:  # noqa: N801 - reads as a function
    """Turns the errors of a connection into ours."""

    def __init__(self, url: str = "the server") -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        match error:
            case TimeoutError():
                raise StorageUnavailableError(f"NATS has not answered at {self._url} for too long") from error
            case NoTLSError():
                raise StorageError(
                    f"NATS at {self._url} does not ask for TLS: give it a tls {{}} without allow_non_tls, or write nats:// for none"
                ) from error
            case RefusedError() if _AUTHORIZATION.search(str(error)):
                raise StorageError(
                    f"NATS at {self._url} refuses who we are: check user, password, token or creds in the URL"
                ) from error
            case OSError() if tls := _tls_error(error):
                if isinstance(tls, ssl.SSLCertVerificationError) and tls.verify_code in _OTHER_HOST:
                    raise StorageError(
                        f"TLS with NATS at {self._url} fails: {tls.verify_message}; name the host as its certificate does"
                    ) from error
                raise StorageError(f"TLS with NATS at {self._url} fails: {tls}; SSL_CERT_FILE names the CA to trust") from error
            case OSError():
                raise StorageUnavailableError(f"NATS at {self._url}: {str(error) or type(error).__name__}") from error
            case _:
                return


def _tls_error(error: OSError) -> ssl.SSLError | None:
    return next((at for at in (error, error.__cause__) if isinstance(at, ssl.SSLError)), None)


def _denial(sentence: str) -> StorageError:
    return StorageError(f"NATS does not permit the {sentence}: allow it in the permissions of this user")
