"""The engines by name: each started by its own module, with settings that keep what was acknowledged through the death of the server."""

import tempfile
import uuid
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from tests.engines.engine import Engine

Empty = Callable[[], Engine]
"""Gives the engine with a storage in it that nobody has used."""


@contextmanager
def redis() -> Generator[Empty]:
    """Run Valkey, which here writes to its file before it answers."""
    from tests.engines.redis import Server

    with (
        tempfile.TemporaryDirectory(prefix="streamkeep-redis-", ignore_cleanup_errors=True) as directory,
        Server(Path(directory) / "server", "--appendfsync", "always") as server,
    ):

        def empty() -> Engine:
            server.prefix = f"test-{uuid.uuid4().hex[:8]}"
            return server

        yield empty


@contextmanager
def postgres() -> Generator[Empty]:
    """Run PostgreSQL."""
    from tests.engines.postgres import Postgres

    with Postgres() as server:
        yield server.empty


@contextmanager
def nats() -> Generator[Empty]:
    """Run NATS."""
    from tests.engines.nats import running_server

    with running_server() as server:

        def empty() -> Engine:
            server.stream = f"test-{uuid.uuid4().hex[:8]}"
            return server

        yield empty


@contextmanager
def http() -> Generator[Empty]:
    """Run a server of ours that has others' streams."""
    from tests.engines.http import Server

    with (
        tempfile.TemporaryDirectory(prefix="streamkeep-http-", ignore_cleanup_errors=True) as directory,
        Server(Path(directory) / "server") as server,
    ):

        def empty() -> Engine:
            server.name = f"test-{uuid.uuid4().hex[:8]}"
            return server

        yield empty


ENGINES: Final[dict[str, Callable[[], AbstractContextManager[Empty]]]] = {
    "redis": redis,
    "postgres": postgres,
    "nats": nats,
    "http": http,
}

NAMESPACES: Final = {
    "redis": "prefix",
    "rediss": "prefix",
    "postgresql": "schema",
    "postgres": "schema",
    "nats": "stream",
    "tls": "stream",
}
"""What sets storages of one server apart, by the scheme of the URL."""


def in_namespace(url: str, name: str) -> str:
    """Give the URL of another storage on the same server; `name` is of small letters, digits and `_`."""
    parts = urlsplit(url)
    if parts.scheme == "http":
        return parts._replace(path=f"/{name}").geturl()
    query = dict(parse_qsl(parts.query)) | {NAMESPACES[parts.scheme.split("+")[0]]: name}
    return parts._replace(query=urlencode(query)).geturl()
