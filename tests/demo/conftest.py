"""A real browser, on a real `streamkeep demo`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the demo needs streamkeep[demo]")
pytest.importorskip("genkit", reason="the demo needs streamkeep[demo]")

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.demo.server import Demo

WAIT_MS = 15_000
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

StartDemo = Callable[..., Demo]


@pytest.fixture(scope="session")
def browser(requires: Callable[[str], str]) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=requires("chromium"), args=ARGUMENTS, headless=True)
        yield browser
        browser.close()


@pytest.fixture
def start_demo(browser: Browser, sqlite_url: str, tmp_path: Path) -> Iterator[StartDemo]:
    """Give what starts the demo over a database of this test."""
    demos: list[Demo] = []
    with (tmp_path / "demo.log").open("w+") as log:

        def start(tokens_per_second: float = 300.0) -> Demo:
            demos.append(Demo(sqlite_url, log, tokens_per_second=tokens_per_second))
            demos[-1].start()
            return demos[-1]

        yield start
        for demo in demos:
            demo.kill()
        log.seek(0)
        assert "Traceback" not in log.read()


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
