"""PostgreSQL's errors, and asyncpg's, as ours: what a caller would do differently, and a sentence with the remedy."""

from collections.abc import Mapping
from typing import Final

from streamkeep._extras import needed_by
from streamkeep.errors import StorageCorruptError, StorageError, StorageFullError, StorageUnavailableError

with needed_by("streamkeep.storages.postgres", "postgres"):
    import asyncpg  # type: ignore[import-untyped]  # it has no types; what is used of it is in Database

__all__ = ["asyncpg", "is_conflict", "may_be_of_one", "translated"]


def translated(error: Exception, place: object) -> StorageError:
    """Give the StorageError for whatever a driver's call has raised."""
    if isinstance(error, StorageError):
        return error
    kind, reason = _explained(error)
    # Values do not belong in a log.
    detail = "" if isinstance(error, asyncpg.DataError) else str(error)
    return kind(f"{place}: {reason} ({detail or type(error).__name__})")


def is_conflict(error: StorageError) -> bool:
    """Say whether a transaction was rolled back only because it was in another one's way: made again at once, it succeeds."""
    return getattr(error.__cause__, "sqlstate", None) in _CONFLICTS


def may_be_of_one(error: StorageError) -> bool:
    """Say whether one change of many may be why all were rolled back. Nothing was stored then."""
    cause = error.__cause__
    return isinstance(cause, asyncpg.DataError) or str(getattr(cause, "sqlstate", ""))[:2] in _OF_ONE


Explained = tuple[type[StorageError], str]


def _explained(error: Exception) -> Explained:
    if isinstance(error, asyncpg.PostgresError):
        code = str(getattr(error, "sqlstate", ""))
        return _BY_CODE.get(code) or _BY_CLASS.get(code[:2]) or (StorageError, "the server has refused")
    for type, explained in _BY_TYPE.items():
        if isinstance(error, type):
            return explained
    return StorageError, "the driver has failed"


_CONFLICTS: Final = {"40001", "40P01"}
_OF_ONE: Final = {"22", "23", "53", "54", "58", "P0", "XX"}
_LOST: Final[Explained] = (StorageUnavailableError, "the server cannot be reached, or the connection was lost")
_READ_ONLY: Final[Explained] = (
    StorageUnavailableError,
    "it is a standby, or read-only; name the primary, or all hosts (postgresql://one,two/database): the one with read-write is used",
)
_FULL: Final[Explained] = (StorageFullError, "no space left, so nothing was stored; make space on the server's disk")
_PASSWORD: Final[Explained] = (
    StorageError,
    "the server does not let this user in; check user and password in the URL, and the server's pg_hba.conf",
)
_POOLER: Final[Explained] = (
    StorageError,
    "the session has lost what was prepared in it; before the server is a pooler in transaction mode: add notify=off to the URL",
)
_GONE: Final[Explained] = (
    StorageCorruptError,
    "streamkeep's tables are missing or not as they were made; nobody else may change them",
)
_GRANTS: Final = (
    "the role lacks a permission: GRANT CREATE ON DATABASE to create the schema, GRANT USAGE, CREATE ON SCHEMA to create its tables,"
    " GRANT USAGE ON SCHEMA and GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA to use them"
)
_BUSY: Final[Explained] = (StorageUnavailableError, "others have kept the server busy for too long, so nothing was done")

_BY_CODE: Final[Mapping[str, Explained]] = {
    "28P01": _PASSWORD,
    "28000": _PASSWORD,
    "3D000": (StorageError, "there is no such database; create it with CREATE DATABASE, or name another one in the URL"),
    "42501": (StorageError, _GRANTS),
    "53100": _FULL,
    "53400": _FULL,
    "53200": (StorageUnavailableError, "the server is out of memory"),
    "53300": (
        StorageUnavailableError,
        "the server has no connection left; raise its max_connections, or put a pooler before it (notify=off)",
    ),
    "25006": _READ_ONLY,
    "26000": _POOLER,
    "42P05": _POOLER,
    "08P01": (
        StorageError,
        "the server, or a pooler before it, does not understand; behind a pooler add notify=off to the URL",
    ),
    "55P03": _BUSY,
    "57014": _BUSY,
    "40001": _BUSY,
    "40P01": _BUSY,
    "57P01": (StorageUnavailableError, "the server is shutting down"),
    "57P02": (StorageUnavailableError, "the server has crashed, and is starting again"),
    "57P03": (StorageUnavailableError, "the server is starting up, shutting down or recovering"),
    "57P04": (StorageError, "the database was dropped"),
    "57P05": _LOST,
    "25P03": _LOST,
    "23505": _GONE,
    "3F000": _GONE,
    "42P01": _GONE,
    "42703": _GONE,
    "42804": _GONE,
}
_BY_TYPE: Final[Mapping[type[Exception], Explained]] = {  # the first that fits
    asyncpg.exceptions.DataError: (StorageError, "a value cannot be stored"),
    asyncpg.TargetServerAttributeNotMatched: _READ_ONLY,
    asyncpg.ClientConfigurationError: (StorageError, "the URL cannot be used; see its options"),
    asyncpg.UnsupportedClientFeatureError: (StorageError, "the server wants what the driver does not know"),
    TimeoutError: (StorageUnavailableError, "the server did not answer in time"),
    OSError: _LOST,
    asyncpg.InterfaceError: _LOST,
    asyncpg.InternalClientError: _LOST,
}
_BY_CLASS: Final[Mapping[str, Explained]] = {
    "08": _LOST,
    "22": (StorageError, "a value cannot be stored"),
    "53": (StorageUnavailableError, "the server has too little of something"),
    "XX": (StorageCorruptError, "the server reports damage, or a bug of its own"),
}
