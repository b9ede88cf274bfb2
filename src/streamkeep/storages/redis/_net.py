"""Connections to Redis servers: commands in, replies out, in order; and what its errors mean here.

redis-py connects, logs in and parses (with hiredis). Its pools, pipelines and retries are not used: a pool refuses beyond its hundredth
connection, and whether a command may be sent again is decided above, by heads.
"""

import asyncio
import math
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Self

import hiredis
from redis.asyncio.connection import Connection, SSLConnection
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from streamkeep.errors import StorageCorruptError, StorageError, StorageFullError, StorageUnavailableError, fresh
from streamkeep.storages._forks import keep_from_children
from streamkeep.storages.redis._url import Address, Credentials, Options, shown

Command = tuple[str | bytes | int, ...]
Reply = object
"""None, an int, bytes, a list of those, or the ResponseError that one command was answered with."""

TIMEOUT_SECONDS: Final = 5.0
"""A server that makes no progress for so long is regarded as gone."""

_PIECE_BYTES: Final = 1 << 18
_PUSHED: Final = (b"message", b"smessage", b"unsubscribe", b"sunsubscribe")

OnMessage = Callable[[bytes, bytes], None]
BROKEN: Final = b"broken"


class Line:
    """One connection, in use: what is asked is sent together, and answered in order.

    Once it is broken it stays so, and whoever was waiting is told why. `on_message` is called with the kind and the channel of every
    message, of every subscription's end, and, as BROKEN, of the line's own; with it the line is for doorbells, and asks by itself, every
    few seconds, whether the server is still there.
    """

    def __init__(self, address: Address, connection: Connection, on_message: "OnMessage | None") -> None:
        self.address: Final = address
        self._connection = connection
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._outbox: list[bytes] = []
        self._wanted = asyncio.Event()
        self._expected: deque[_Expected] = deque()
        self._error: StorageError | None = None
        self._times_out_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timed_out = asyncio.Event()
        self._task = self._loop.create_task(self._serve())

    @classmethod
    async def open(
        cls,
        address: Address,
        options: Options,
        on_message: "OnMessage | None" = None,
        *,
        credentials: Credentials | None = None,
    ) -> Self:
        """Connect, log in, and choose the database; a sentinel has other credentials, and no database."""
        if credentials is None:
            connection = _connection(address, options, options.credentials, options.database)
        else:
            connection = _connection(address, options, credentials, 0)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's types are partial
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if options.tls is not None and isinstance(error, (TimeoutError, RedisTimeoutError)):
                raise StorageUnavailableError(f"Redis at {shown(address)}: no answer; {_NO_TLS}") from error
            if isinstance(error, (RedisError, OSError)):
                raise translated(address, error) from error
            raise
        # From here on the line itself says how long is too long.
        connection.socket_timeout = None
        writer: asyncio.StreamWriter | None = getattr(connection, "_writer", None)  # redis-py gives it to nobody
        if writer is not None:
            keep_from_children(connection, writer.get_extra_info("socket"))
        return cls(address, connection, on_message)

    @property
    def is_broken(self) -> bool:
        """Say whether it is of no use any more."""
        return self._error is not None

    def ask(self, commands: Sequence[Command]) -> asyncio.Future[list[Reply]]:
        """Send commands; give the future of their replies."""
        future: asyncio.Future[list[Reply]] = self._loop.create_future()
        if self._error is not None:
            _fail(future, self._error)
            return future
        self._outbox.extend(map(_packed, commands))
        self._expected.append(_Expected(len(commands), future))
        self._wanted.set()
        if self._timer is None:
            self._extend_timeout()
            self._check_timeout()
        return future

    def send(self, command: Command) -> None:
        """Send a command whose reply, if there is any, is for `on_message`."""
        self._outbox.append(_packed(command))
        self._wanted.set()

    async def close(self) -> None:
        """Close the connection."""
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._end(_closed(self.address))  # asyncio does not begin a task that is cancelled before

    async def _serve(self) -> None:
        error = _closed(self.address)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read())
                tasks.create_task(self._write())
                tasks.create_task(self._raise_timeout())
                if self._on_message is not None:
                    tasks.create_task(self._ping())
        except BaseExceptionGroup as group:
            error = translated(self.address, group.exceptions[0])
        finally:
            await self._end(error)

    async def _end(self, error: StorageError) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
        for expected in self._expected:
            _fail(expected.future, error)
        if self._on_message is not None:
            self._on_message(BROKEN, b"")
        with suppress(RedisError, OSError):
            await self._connection.disconnect(nowait=True)

    async def _write(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            data, self._outbox = b"".join(self._outbox), []
            for start in range(0, len(data), _PIECE_BYTES):
                await self._connection.send_packed_command(data[start : start + _PIECE_BYTES], check_health=False)
                self._extend_timeout()

    async def _read(self) -> None:
        while True:
            self._take(await self._reply())

    async def _reply(self) -> Reply:
        try:
            # redis-py would connect again at the next command if it were to disconnect here.
            return await self._connection.read_response(disable_decoding=True, timeout=math.inf, disconnect_on_error=False)
        except ResponseError as error:
            return error

    def _take(self, reply: Reply) -> None:
        if isinstance(reply, list) and self._on_message is not None and reply[0] in _PUSHED:
            self._on_message(reply[0], reply[1])
            return
        if not self._expected:
            raise RedisConnectionError("it said what nobody had asked")
        expected = self._expected[0]
        expected.replies.append(reply)
        if len(expected.replies) == expected.count:
            self._expected.popleft()
            if not expected.future.done():
                expected.future.set_result(expected.replies)
        self._extend_timeout()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(TIMEOUT_SECONDS)
            await self.ask([("PING",)])

    def _extend_timeout(self) -> None:
        """Give the server its time anew, for there was progress."""
        self._times_out_at = self._loop.time() + TIMEOUT_SECONDS

    def _check_timeout(self) -> None:
        self._timer = None
        if self._expected and self._loop.time() >= self._times_out_at:
            self._timed_out.set()
        elif self._expected:
            self._timer = self._loop.call_at(self._times_out_at, self._check_timeout)

    async def _raise_timeout(self) -> None:
        await self._timed_out.wait()
        raise TimeoutError


def _connection(address: Address, options: Options, who: Credentials, database: int) -> Connection:
    host, port = address
    username, password = who.username or None, who.password or None
    if options.tls is None:
        return Connection(
            host=host, port=port, db=database, username=username, password=password, socket_timeout=TIMEOUT_SECONDS, protocol=2
        )
    return SSLConnection(
        host=host,
        port=port,
        db=database,
        username=username,
        password=password,
        socket_timeout=TIMEOUT_SECONDS,
        protocol=2,
        ssl_ca_certs=options.tls.get("ssl_ca_certs"),
        ssl_certfile=options.tls.get("ssl_certfile"),
        ssl_keyfile=options.tls.get("ssl_keyfile"),
    )


def _packed(command: Command) -> bytes:
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # it declares a tuple of one
    return packed


def _closed(address: Address) -> StorageError:
    return StorageUnavailableError(f"Redis at {shown(address)}: the connection was closed")


def _fail(future: asyncio.Future[list[Reply]], error: StorageError) -> None:
    if not future.done():
        future.set_exception(fresh(error))  # many may wait, and every raise makes a traceback longer
        future.exception()  # nobody may be left to retrieve it


class _Expected:
    """The replies that one `ask` waits for."""

    __slots__ = ("count", "future", "replies")

    def __init__(self, count: int, future: asyncio.Future[list[Reply]]) -> None:
        self.count = count
        self.future = future
        self.replies: list[Reply] = []


def translated(address: Address, error: BaseException) -> StorageError:
    """Give the StorageError for an error of redis-py, of the operating system, or for one that a server answered with."""
    if isinstance(error, StorageError):
        return error
    kind, reason = _explained(error)
    failure = kind(f"Redis at {shown(address)}: {reason} ({error})" if str(error) else f"Redis at {shown(address)}: {reason}")
    failure.__cause__ = error
    return failure


def _explained(error: BaseException) -> tuple[type[StorageError], str]:
    match error:
        case NoPermissionError():
            return StorageError, _NO_PERMISSION
        case AuthenticationError() | AuthenticationWrongNumberOfArgsError():
            return StorageError, _LOGIN
        case ResponseError():
            return _explained_answer(str(error), error.status_code or "")
        case BusyLoadingError():
            return _ANSWERS["LOADING"]
        case TimeoutError() | RedisTimeoutError():
            return StorageUnavailableError, f"no answer for {TIMEOUT_SECONDS:g} seconds"
        case _:
            return _explained_failure(error)


def _explained_failure(error: BaseException) -> tuple[type[StorageError], str]:
    if not isinstance(error, (RedisError, OSError)):
        return StorageError, f"the driver has failed: {type(error).__name__}"
    return _tls_failure(error) or (StorageUnavailableError, _NOT_THERE if "connecting to" in str(error) else _CLOSED)


def _explained_answer(text: str, code: str) -> tuple[type[StorageError], str]:
    word = code or text.partition(" ")[0]
    if word in _ANSWERS:
        return _ANSWERS[word]
    for part, explanation in _TEXTS.items():
        if part in text:
            return explanation
    return StorageError, "it answered with an error"


def _tls_failure(error: BaseException) -> tuple[type[StorageError], str] | None:
    # redis-py leaves the cause of a failed connection in the context.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return StorageError, _UNTRUSTED
        if isinstance(cause, ssl.SSLError):
            return StorageError, f"TLS failed; {_NO_TLS}"
        cause = cause.__cause__ or cause.__context__
    return None


_NOT_THERE: Final = "it cannot be reached"
_CLOSED: Final = "it closed the connection; if this goes on, does it expect rediss://, or have too many clients (maxclients)?"
_UNTRUSTED: Final = (
    "its certificate is not trusted; name the authority's file with ?ssl_ca_certs=PATH, and the host as the certificate does"
)
_NO_TLS: Final = "does it expect redis:// instead of rediss://, or a certificate of ours (ssl_certfile, ssl_keyfile)?"
_LOGIN: Final = (
    "it refused the login; put the right user and password into the URL, redis://USER:PASSWORD@HOST, or none if it has none"
)
_NO_PERMISSION: Final = (
    "this user may not do what streamkeep does; on the server, for the prefix of the URL: "
    "ACL SETUSER NAME ~{PREFIX:* &{PREFIX:* +@read +@write +@connection +@scripting +@pubsub +@transaction +info +time"
)
_OTHER_NODE: Final = "it is a node of a cluster; use redis+cluster://HOST:PORT"
_DISK: Final = "it cannot write to its disk, and takes no writes, so nothing was stored; see its log"

_ANSWERS: Final[dict[str, tuple[type[StorageError], str]]] = {
    "OOM": (
        StorageFullError,
        "its memory (maxmemory) is full, so nothing was stored; give it more, or let streams expire sooner (ttl)",
    ),
    "MISCONF": (StorageError, _DISK),
    "READONLY": (
        StorageUnavailableError,
        "it is a replica, or has just become one; the URL must lead to the primary, as redis+sentinel:// does",
    ),
    "MASTERDOWN": (StorageUnavailableError, "it is a replica whose primary is down"),
    "CLUSTERDOWN": (StorageUnavailableError, "the cluster is down, or no node serves this slot"),
    "TRYAGAIN": (StorageUnavailableError, "the slot is being moved to another node"),
    "NOREPLICAS": (StorageUnavailableError, "too few replicas follow it (min-replicas-to-write), so nothing was stored"),
    "BUSY": (StorageUnavailableError, "it is busy with somebody's script"),
    "LOADING": (StorageUnavailableError, "it is loading its data"),
    "WRONGTYPE": (StorageCorruptError, "a key under this prefix is not streamkeep's; choose another prefix"),
    "MOVED": (StorageError, _OTHER_NODE),
    "ASK": (StorageError, _OTHER_NODE),
    "CROSSSLOT": (StorageError, _OTHER_NODE),
}

_TEXTS: Final[dict[str, tuple[type[StorageError], str]]] = {
    "No space left": (StorageFullError, _DISK),
    "ACL failure in script": (StorageError, _NO_PERMISSION),
    "The user executing the script can't": (StorageError, _NO_PERMISSION),
    "max number of clients": (StorageUnavailableError, "it has as many connections as it allows (maxclients)"),
    "DB index is out of range": (
        StorageError,
        "it has no database with this number (its `databases`); change the number at the URL's end",
    ),
    "SELECT is not allowed": (StorageError, "a cluster has no numbered databases; use redis+cluster://HOST:PORT"),
    "unknown command": (StorageError, "it does not know a command that streamkeep needs; use Redis 7.0 or newer, or Valkey"),
}
