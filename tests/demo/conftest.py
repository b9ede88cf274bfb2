"""A real browser, on a real `streamkeep demo`."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from tests.demo.server import Demo

WAIT_MS = 20_000
expect.set_options(timeout=WAIT_MS)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser(requires: Callable[[str], str]) -> Iterator[Browser]:
    # Not for the session: its event loop counts as running for as long as it is open, and async tests could not run theirs.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=requires("chromium"), args=ARGUMENTS, headless=True)
        yield browser
        browser.close()


@contextmanager
def running_demo(directory: Path, tokens_per_second: float) -> Generator[Demo]:
    storage = f"sqlite:///{directory / 'streams.db'}"
    with (directory / "demo.log").open("w+") as log:
        with Demo(storage, log, tokens_per_second=tokens_per_second) as demo:
            yield demo
        log.seek(0)
        assert "Traceback" not in log.read()


@pytest.fixture(scope="module")
def demo(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """Give a demo that all may use; its whole answer takes nine seconds."""
    with running_demo(tmp_path_factory.mktemp("demo"), tokens_per_second=150) as demo:
        yield demo


@pytest.fixture
def mortal_demo(browser: Browser, tmp_path: Path) -> Iterator[Demo]:
    """Give a demo of this test's own, at a person's pace."""
    with running_demo(tmp_path, tokens_per_second=30) as demo:
        yield demo


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Give a browser's profile, in which no page may fail or break its content security policy."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT_MS)
    complaints: list[str] = []
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("console", lambda message: complaints.append(message.text) if "Security Policy" in message.text else None)
    yield context
    context.close()
    assert complaints == []


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()
