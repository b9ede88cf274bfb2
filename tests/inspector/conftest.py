"""A real browser, on a real `streamkeep inspect`, over a storage to which this process writes."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from tests.demo.conftest import browser, context, page
from tests.inspector.command import InspectCommand

from streamkeep.sync import StreamManager

__all__ = ["browser", "context", "page"]


@pytest.fixture(scope="module")
def shared_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give the URL of a storage that the tests of a module share; each has streams of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('inspector') / 'streams.db'}"


@pytest.fixture(scope="module")
def streams(shared_url: str) -> Iterator[StreamManager]:
    """Give the manager of the process that writes: this one."""
    with StreamManager.connect(shared_url, ttl=timedelta(hours=1)) as streams:
        yield streams


@pytest.fixture(scope="module")
def command(
    streams: StreamManager, shared_url: str, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InspectCommand]:
    log = tmp_path_factory.mktemp("log") / "inspect.log"
    with log.open("w") as stderr, InspectCommand(shared_url, stderr) as command:
        yield command
    assert "Traceback" not in Path(log).read_text()
