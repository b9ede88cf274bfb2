"""The storages that come with streamkeep, and the one place that knows their URLs."""

import re
from collections.abc import Mapping
from pathlib import Path
from ssl import SSLContext
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from streamkeep.errors import InvalidArgumentError, StorageError
from streamkeep.storage import Storage
from streamkeep.storages.retrying import RetryingStorage

__all__ = ["http_storage", "storage_for"]

_KNOWN = (
    "memory://, sqlite:///relative.db, sqlite:////absolute.db, sqlite:///streams.db?synchronous=NORMAL, redis://HOST:6379/0, "
    "postgresql://USER:PASSWORD@HOST/DATABASE, https://HOST/PATH, nats://HOST:4222 or "
    "nats://USER:PASSWORD@HOST1:4222,HOST2:4222?stream=streamkeep&replicas=3&creds=FILE"
)

_SCHEMES = frozenset(re.findall(r"[a-z]+://", _KNOWN))
"""Those of which a known storage has a URL: one that is refused has a mistake behind it."""


def storage_for(url: str) -> Storage:
    """Give the storage that a URL names, not yet entered.

    `memory://`; `sqlite:///relative.db` and `sqlite:////absolute.db`, both with `?synchronous=NORMAL` if a power failure
    may take the last moments; `redis://`, `rediss://`, `redis+sentinel://` and `redis+cluster://` as in
    `streamkeep.storages.redis.RedisStorage`; `postgresql://user:password@host/database`, with the options of `PostgresStorage`;
    `https://host/path` (or `http://`) for the streams of another server, see `HTTPStorage`;
    `nats://host1:4222,host2:4222` (or `tls://`), with `?stream=`, `&replicas=`, `&creds=`, see `NATSStorage`. What is behind a network is
    wrapped in `RetryingStorage`. Percent-encoding is undone. Anything else raises `InvalidArgumentError`; StorageError: it needs a package
    that is not installed.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise _unknown(url) from None
    match parts.scheme:
        case "memory":
            return _memory_storage(parts, url)
        case "sqlite":
            return _sqlite_storage(parts, url)
        case scheme if scheme.split("+")[0] in {"redis", "rediss"}:
            return _redis_storage(url)
        case "postgresql" | "postgres":
            return _postgres_storage(url)
        case "nats" | "tls":
            return _nats_storage(parts, url)
        case "http" | "https":
            return http_storage(url)
        case _:
            raise _unknown(url)


def http_storage(url: str, headers: Mapping[str, str] | None = None, ssl_context: SSLContext | None = None) -> Storage:
    """Give what keeps streams where another server does. Raises InvalidArgumentError, and StorageError as `storage_for` does."""
    try:
        from streamkeep.storages.http import HTTPStorage
    except ImportError as error:
        raise _missing(error) from error
    return RetryingStorage(HTTPStorage(url, headers=headers, ssl_context=ssl_context))


def _memory_storage(parts: SplitResult, url: str) -> Storage:
    from streamkeep.storages.memory import MemoryStorage

    if parts.netloc or parts.path or parts.query or parts.fragment:
        raise _unknown(url)
    return MemoryStorage()


def _sqlite_storage(parts: SplitResult, url: str) -> Storage:
    from streamkeep.storages.sqlite import SQLiteStorage

    path = unquote(parts.path.removeprefix("/"), errors="surrogateescape")  # as Python has names that are not UTF-8
    if parts.netloc or parts.fragment or path in {"", ":memory:"}:
        raise _unknown(url)
    return SQLiteStorage(path, synchronous=_synchronous(parts.query, url))


def _redis_storage(url: str) -> Storage:
    try:
        from streamkeep.storages.redis import RedisStorage
    except ImportError as error:
        raise _missing(error) from error
    return RetryingStorage(RedisStorage(url))


def _postgres_storage(url: str) -> Storage:
    try:
        from streamkeep.storages.postgres import PostgresStorage
    except ImportError as error:
        raise _missing(error) from error
    return RetryingStorage(PostgresStorage(url))


def _synchronous(query: str, url: str) -> Literal["FULL", "NORMAL"]:
    match parse_qsl(query, keep_blank_values=True):
        case []:
            return "FULL"
        case [("synchronous", "FULL")]:
            return "FULL"
        case [("synchronous", "NORMAL")]:
            return "NORMAL"
        case _:
            raise _unknown(url)


def _nats_storage(parts: SplitResult, url: str) -> Storage:
    from streamkeep.storages.nats import NATSStorage

    who, _, where = parts.netloc.rpartition("@")
    user, colon, password = who.partition(":")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    stream, creds, replicas = (options.pop(name, None) for name in ("stream", "creds", "replicas"))
    hosts = where.split(",")
    try:
        ports = [urlsplit(f"//{host}").port for host in hosts]
        names = [urlsplit(f"//{host}").hostname for host in hosts]
        number = None if replicas is None else int(replicas)
    except ValueError:
        raise _unknown(url) from None
    if options or not all(names) or parts.path.strip("/") or parts.fragment or stream == "" or creds == "" or 0 in ports:
        raise _unknown(url)
    return RetryingStorage(
        NATSStorage(
            [f"{parts.scheme}://{host}" for host in hosts],
            user=unquote(user) if colon else None,
            password=unquote(password) if colon else None,
            token=unquote(user) if user and not colon else None,
            creds=None if creds is None else Path(creds),
            stream="streamkeep" if stream is None else stream,
            replicas=number,
        )
    )


def _missing(error: ImportError) -> StorageError:
    return StorageError(str(error))  # it says which extra brings what is missing


def _unknown(url: str) -> InvalidArgumentError:
    # Whatever follows the scheme may be a password, and a message goes to terminals and logs.
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url)
    what = "this" if scheme is None else f"what follows '{scheme[0]}'" if scheme[0].lower() in _SCHEMES else f"'{scheme[0]}...'"
    return InvalidArgumentError(f"{what} names no storage; known are {_KNOWN}")
