"""Servers under attack, each started once for all tests of a file: what one attack has done to it, the next one would see."""

from collections.abc import Generator
from pathlib import Path

import anyio
import pytest
from tests.hostile.servers import APPS, HASTY, Apart, House, Target, command, house, process, store_known_at


@pytest.fixture(scope="module", params=APPS)
def served(request: pytest.FixtureRequest) -> Generator[House]:
    """Give a server of each app, in a thread."""
    with house(request.param, timeouts=HASTY) as target:
        yield target


@pytest.fixture(scope="module")
def known_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give the URL of a SQLite file with the known stream."""
    url = f"sqlite:///{Path(tmp_path_factory.mktemp('streams')) / 'streams.db'}"
    anyio.run(store_known_at, url)
    return url


@pytest.fixture(scope="module", params=[*APPS, "streamkeep serve"])
def apart(request: pytest.FixtureRequest, known_url: str) -> Generator[Apart]:
    """Give a server of each app, and the command's, as processes of their own."""
    with command(known_url) if request.param not in APPS else process(request.param, known_url) as target:
        yield target


@pytest.fixture(scope="module", params=[*APPS, "h11", "streamkeep serve"])
def anywhere(request: pytest.FixtureRequest, known_url: str) -> Generator[Target]:
    """Give all servers one after the other: those in threads, on either HTTP implementation of uvicorn, and the command."""
    match request.param:
        case "streamkeep serve":
            with command(known_url) as target:
                yield target
        case "h11":
            with house("durable_flow", server="h11") as target:
                yield target
        case app:
            with house(app, server="httptools") as target:
                yield target
