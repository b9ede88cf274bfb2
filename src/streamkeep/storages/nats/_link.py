"""The connection to NATS: requests with a bound, errors in our words, and a new connection when one is lost.

nats-py's own reconnecting is switched off: it would keep what could not be sent, and send it whenever a server is back, however long after
the caller was told that it failed; and it would tell nobody that what was asked will never be answered. Here a connection lives once. When
it is lost, or a server does not answer a ping (a stopped process keeps its connections), all that was asked fails at once, and a task
connects anew, to whichever server it can reach.
"""

import asyncio
import random
import re
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec

from streamkeep.errors import StorageError, StorageFullError, StorageUnavailableError

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

OLDEST_SERVER: Final = (2, 12)

_ANSWER_SECONDS: Final = 5.0
_CONNECT_SECONDS: Final = 2
_PING_SECONDS: Final = 2.0
_CLOSE_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 1.0
_NEVER: Final = 1 << 30
_NO_LIMIT: Final = 1 << 30
_HEADERS_BYTES: Final = 1024  # room for our headers in a message, whose size counts them too
_OTHER_HOST: Final = frozenset({62, 64})  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH

_FULL: Final = frozenset({10002, 10023, 10028, 10047, 10122})
_STORE_FAILED: Final = 10077
_TOO_LARGE: Final = 10054
_NOT_ENABLED: Final = frozenset({10035, 10039, 10076})
_FOR_NOW: Final = frozenset({10005, 10007, 10008, 10009, 10163, 10176, 10210, 10211})

_TOO_MANY_RESULTS: Final = "413"

NO_MESSAGE: Final = 10037
NO_STREAM: Final = 10059
WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})


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


class Connection:
    """One connection, until it is lost. Everything that it is asked is answered, or fails, within seconds."""

    def __init__(self, client: "Client", denied: list[str]) -> None:
        self._client = client
        self._denied = denied
        self._inbox = client.new_inbox()
        self._asked: dict[str, _Asked] = {}
        self._count = 0
        self._pings: set[asyncio.Task[None]] = set()
        self.lost: Final = asyncio.Event()

    @property
    def room(self) -> int:
        """How many bytes a message may have."""
        return self._client.max_payload - _HEADERS_BYTES

    @property
    def peers(self) -> Sequence[str]:
        """Other servers of the cluster, as this one tells."""
        return [f"{uri.scheme}://{uri.netloc}" for uri in self._client.discovered_servers]

    async def start(self) -> None:
        """Begin to hear answers."""
        await self.subscribe(f"{self._inbox}.*", self._answered)

    async def subscribe(self, subject: str, heard: Callable[["Msg"], Awaitable[None]]) -> None:
        """Have `heard` called with every message; StorageError if that is not allowed."""
        with _translating():
            await self._client.subscribe(subject, cb=heard, pending_msgs_limit=0, pending_bytes_limit=0)
        # nats-py's flush sends its PING before what waits to be sent, but then that is sent; so the second one comes after it.
        await self.ping()
        await self.ping()
        for sentence in self._denied:
            if sentence.startswith("subscription") and f'"{subject.lower()}"' in sentence:
                raise _denial(sentence)

    async def request(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> "Msg":
        """Ask, and give the answer."""
        return (await self._ask(subject, payload, headers, is_batch=False))[0]

    async def request_batch(self, subject: str, payload: bytes) -> "Batch":
        """Ask, and give all answers."""
        *messages, end = await self._ask(subject, payload, None, is_batch=True)
        headers = end.headers or {}
        return Batch(messages, headers.get("Status") == _TOO_MANY_RESULTS, int(headers.get("Nats-Num-Pending", 0)))

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

    async def tell(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> None:
        """Send, without an answer."""
        with _translating():
            await self._client.publish(subject, payload, headers=dict(headers))

    async def ping(self) -> None:
        """Return if the server is there."""
        # In a task that nobody's cancellation reaches: to nats-py the answer to a ping that was given up is an error, and it stops reading.
        flush = self._client.flush(timeout=_ANSWER_SECONDS)  # type: ignore[arg-type] # an int, it says, and takes any number
        ping = asyncio.get_running_loop().create_task(flush)
        self._pings.add(ping)
        ping.add_done_callback(self._pinged)
        await asyncio.wait([ping])
        if ping.cancelled():
            raise StorageUnavailableError("the connection to NATS was lost before it answered")
        with _translating():
            ping.result()

    def _pinged(self, ping: "asyncio.Task[None]") -> None:
        self._pings.discard(ping)
        if not ping.cancelled():
            ping.exception()  # who asked may have been cancelled

    def lose(self) -> None:
        """Let everything that waits for an answer fail."""
        self.lost.set()
        for asked in self._asked.values():
            asked.fail(StorageUnavailableError("the connection to NATS was lost before it answered"))

    def deny(self, sentence: str) -> None:
        """Let what is not allowed fail: NATS says so without saying to which request, but it names the subject."""
        for asked in self._asked.values():
            if f'"{asked.subject.lower()}"' in sentence:
                asked.fail(_denial(sentence))

    async def close(self, *, abort: bool = False) -> None:
        """Hang up; with `abort` without sending what has not been sent, which a stopped server would never take."""
        self.lose()
        with anyio.CancelScope(shield=True):
            await _hang_up(self._client, abort=abort)
            if pings := tuple(self._pings):
                for ping in pings:
                    ping.cancel()
                await asyncio.wait(pings, timeout=_CLOSE_SECONDS)

    async def _ask(self, subject: str, payload: bytes, headers: Mapping[str, str] | None, *, is_batch: bool) -> Sequence["Msg"]:
        if self.lost.is_set():
            raise StorageUnavailableError("the connection to NATS is lost")
        self._count += 1
        name = f"{self._count:x}"
        asked = self._asked[name] = _Asked(subject, asyncio.get_running_loop().create_future(), is_batch)
        try:
            with _translating():
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self._client.publish(subject, payload, f"{self._inbox}.{name}", dict(headers) if headers else None)
                    return await asked.future
        finally:
            del self._asked[name]

    async def _answered(self, message: "Msg") -> None:
        asked = self._asked.get(message.subject[len(self._inbox) + 1 :])
        if asked is not None:
            asked.take(message)


@dataclass(frozen=True, slots=True)
class Batch:
    """The answers to one question, and how it ended: it was refused because there would be too many, or so many are still to come."""

    messages: "Sequence[Msg]"
    is_refused: bool
    pending: int


@dataclass(slots=True)
class _Asked:
    subject: str
    future: "asyncio.Future[Sequence[Msg]]"
    is_batch: bool
    answers: "list[Msg]" = field(default_factory=list)

    def take(self, message: "Msg") -> None:
        status = message.headers.get("Status") if message.headers and not message.data else None
        if status == "503":
            self.fail(
                StorageUnavailableError(
                    f"nobody answers {self.subject}: JetStream is not enabled (start nats-server with -js), or not yet up"
                )
            )
            return
        self.answers.append(message)
        if (not self.is_batch or status is not None) and not self.future.done():
            self.future.set_result(self.answers)

    def fail(self, error: StorageError) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # who asked may have been cancelled


class Link:
    """Keeps one connection at a time.

    `connected` is called with each new one before anybody else may use it, and `tended` every two seconds while it lives. If either raises
    StorageUnavailableError, the connection is given up.
    """

    def __init__(self, servers: Servers, connected: Callable[[Connection], Awaitable[None]]) -> None:
        self._servers = servers
        self._connected = connected
        self._peers: Sequence[str] = ()
        self._connection: Connection | None = None
        self._is_up = asyncio.Event()
        self._trouble: StorageError | None = None

    @asynccontextmanager
    async def kept(self, tended: Callable[[Connection], Awaitable[None]]) -> AsyncGenerator[None]:
        """Connect, and stay connected. Raises what is wrong with the first connection."""
        connection = await self._connect()
        task = asyncio.get_running_loop().create_task(self._keep(connection, tended))
        try:
            yield
        finally:
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
                if self._connection is not None:
                    await self._connection.close()

    async def connection(self) -> Connection:
        """Give the connection, or wait for the next one, for a while."""
        if self._connection is None:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self._is_up.wait()
            except TimeoutError:
                raise self._trouble or StorageUnavailableError(f"NATS cannot be reached at {self._servers.names}") from None
        assert self._connection is not None
        return self._connection

    async def _keep(self, connection: Connection, tended: Callable[[Connection], Awaitable[None]]) -> None:
        while True:
            try:
                while not connection.lost.is_set():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_PING_SECONDS):
                            await connection.lost.wait()
                            break
                    await connection.ping()
                    await tended(connection)
            except StorageError as error:
                self._trouble = error
            self._connection = None
            self._is_up.clear()
            await connection.close(abort=True)
            connection = await self._connect_again()

    async def _connect_again(self) -> Connection:
        pause = 0.05
        while True:
            try:
                return await self._connect()
            except StorageError as error:
                self._trouble = error
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - so that not all come back at once
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _connect(self) -> Connection:
        urls = list(dict.fromkeys((*random.sample(self._servers.urls, len(self._servers.urls)), *self._peers)))
        trouble: StorageError | None = None
        for url in urls:
            try:
                return await self._connect_to(url)
            except StorageUnavailableError as error:
                trouble = trouble or error
            except StorageError:
                if url in self._servers.urls:
                    raise
                # One that was learned of by an address that its certificate does not bear is no better than one that is away.
        assert trouble is not None
        raise trouble

    async def _connect_to(self, url: str) -> Connection:
        connection = await _connect(url, self._servers)
        try:
            await connection.start()
            await self._connected(connection)
        except BaseException:
            await connection.close(abort=True)
            raise
        self._peers = connection.peers or self._peers
        self._connection, self._trouble = connection, None
        self._is_up.set()
        return connection


def answer_of(message: "Msg") -> dict[str, Any]:
    """Give what a JetStream answer says; ApiError if it is a refusal."""
    try:
        answer: dict[str, Any] = msgspec.json.decode(message.data)
    except msgspec.DecodeError as error:
        raise StorageError("JetStream's answer cannot be understood") from error
    if refusal := answer.get("error"):
        raise ApiError(refusal.get("err_code", 0), refusal.get("description", "unknown error"))
    return answer


class translating_refusals:  # noqa: N801 - reads as a function
    """Turns JetStream's refusals into our errors."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ApiError):
            raise error.translated() from error


async def _connect(url: str, servers: Servers) -> Connection:
    try:
        from streamkeep.storages.nats._client import InsistingClient, credentials_in
    except ImportError as error:
        raise StorageError('NATSStorage needs nats-py: pip install "streamkeep[nats]"') from error
    client = InsistingClient()
    denied: list[str] = []
    connections: list[Connection] = []

    async def failed(error: Exception) -> None:
        sentence = str(error).lower().removeprefix("nats: ").strip("'")
        if "permissions violation for" in sentence:
            sentence = sentence.removeprefix("permissions violation for").strip()
            denied.append(sentence)
            for connection in connections:
                connection.deny(sentence)

    async def closed() -> None:
        for connection in connections:
            connection.lose()

    try:
        with _translating(url):
            await client.connect(
                servers=[url],
                error_cb=failed,
                closed_cb=closed,
                name="streamkeep",
                allow_reconnect=False,
                connect_timeout=_CONNECT_SECONDS,
                reconnect_time_wait=0,
                max_reconnect_attempts=1,
                ping_interval=_NEVER,  # `Link` pings: what nats-py does about a server that is silent may wait for it
                pending_size=_NO_LIMIT,  # else nats-py waits for a stopped server, and swallows the cancellation of that
                skip_subject_validation=True,
                user=servers.user,
                password=servers.password,
                token=servers.token,
                user_credentials=None if servers.creds is None else credentials_in(servers.creds),
                tls=ssl.create_default_context() if url.startswith("tls:") else None,
            )
    except BaseException:
        await _hang_up(client, abort=True)
        raise
    version = client.connected_server_version
    if (version.major, version.minor) < OLDEST_SERVER:
        await _hang_up(client, abort=True)
        raise StorageError(
            f"the NATS server at {url} is version {version}, and streamkeep needs 2.12 or newer: upgrade nats-server"
        )
    connection = Connection(client, denied)
    connections.append(connection)
    return connection


async def _hang_up(client: "Client", *, abort: bool) -> None:
    # `close` waits until all is sent, which it never is to a server that is stopped.
    writer = getattr(client._transport, "_io_writer", None)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    if abort and writer is not None:
        writer.transport.abort()
    # What nats-py leaves behind of a connection that was reset: tasks that wait for messages, and an error that nobody asks for.
    subscriptions = tuple(client._subs.values())  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    reading = client._reading_task  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    with suppress(Exception):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await client.close()
    for subscription in subscriptions:
        subscription._stop_processing()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    if reading is not None and reading.done() and not reading.cancelled():
        reading.exception()
    if writer is not None:
        writer.transport.abort()
        await asyncio.sleep(0)  # the transport lets go of its socket in the next turn of the loop


class _translating:  # noqa: N801 - reads as a function
    """Turns nats-py's errors into ours."""

    def __init__(self, url: str = "the server") -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        from nats import errors

        match error:
            case StorageError():
                return
            case TimeoutError() | errors.TimeoutError():
                raise StorageUnavailableError(f"NATS has not answered at {self._url} for too long") from error
            case errors.MaxPayloadError():
                raise StorageError("the message is larger than the NATS server takes: raise its max_payload") from error
            case errors.SecureConnRequiredError():
                raise StorageError(
                    f"NATS at {self._url} does not ask for TLS: give it a tls {{}} without allow_non_tls, or write nats:// for none"
                ) from error
            case ssl.SSLCertVerificationError() if error.verify_code in _OTHER_HOST:
                raise StorageError(
                    f"TLS with NATS at {self._url} fails: {error.verify_message}; name the host as its certificate does"
                ) from error
            case ssl.SSLError():
                raise StorageError(
                    f"TLS with NATS at {self._url} fails: {error}; SSL_CERT_FILE names the CA to trust"
                ) from error
            case ImportError():
                raise StorageError(f'a package for credentials is missing ({error}): pip install "streamkeep[nats]"') from error
            case OSError() | errors.Error() if _is_authorization(str(error)):
                raise StorageError(
                    f"NATS at {self._url} refuses who we are: check user, password, token or creds in the URL"
                ) from error
            case OSError() | errors.Error():
                raise StorageUnavailableError(f"NATS at {self._url}: {str(error) or type(error).__name__}") from error
            case _:
                return


def _is_authorization(message: str) -> bool:
    return (
        re.search(r"authorization violation|authentication|user authentication|account authentication", message, re.IGNORECASE)
        is not None
    )


def _denial(sentence: str) -> StorageError:
    return StorageError(f"NATS does not permit the {sentence}: allow it in the permissions of this user")
