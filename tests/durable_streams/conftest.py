"""Servers of durable streams in this process, and clients of them."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
from tests.durable_streams.clients import PACKAGES
from tests.http.conftest import install_packages
from tests.http.servers import serving

from streamkeep import StreamManager
from streamkeep.durable_streams import DurableStreams, durable_streams
from streamkeep.storage import Storage
from streamkeep.storages.memory import MemoryStorage

Open = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]
"""Serves a storage (one in memory, unless it is given), with the options of `durable_streams`, and gives a client of it."""


@asynccontextmanager
async def client_of(app: DurableStreams) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve an app that is entered, and give a client whose paths are those of streams."""
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        yield client


@asynccontextmanager
async def _open(storage: Storage | None = None, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    async with (
        StreamManager(storage or MemoryStorage()) as streams,
        durable_streams(streams, **options) as app,
        client_of(app) as client,
    ):
        yield client


@pytest.fixture
def open_client() -> Open:
    """Give what serves a storage."""
    return _open


@pytest.fixture
async def client(open_client: Open) -> AsyncGenerator[httpx.AsyncClient]:
    """Give a client of a server over memory."""
    async with open_client() as client:
        yield client


@pytest.fixture
def packages(requires: Callable[[str], str]) -> None:
    """Install the protocol's own clients for Node where they are missing."""
    install_packages(requires("npm"), PACKAGES)
