"""The clients, and the programs that they live in."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import pytest
from playwright.async_api import Browser, async_playwright
from tests.clients.programs import NODE, PACKAGES, Chromium, Program, chromium, node
from tests.demo.conftest import ARGUMENTS
from tests.http.conftest import install_packages

pytest.register_assert_rewrite("tests.clients.served", "tests.clients.chats")


Open = Callable[[str], AbstractAsyncContextManager[Chromium]]
"""Opens the page of the server at a URL, in a tab of a profile of its own."""


class Start(Protocol):
    """Starts the program of a client, on the page of the server at a URL."""

    def __call__(self, client: str, url: str) -> AbstractAsyncContextManager[Program]: ...


@pytest.fixture(scope="module")
async def browser(requires: Callable[[str], str]) -> AsyncGenerator[Browser]:
    """Give a running Chromium."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=requires("chromium"), args=ARGUMENTS, headless=True)
        try:
            yield browser
        finally:
            await browser.close()


@pytest.fixture
def packages(requires: Callable[[str], str]) -> None:
    """Install the clients' packages where they are missing."""
    install_packages(requires("npm"), PACKAGES)


@pytest.fixture
def page_of(packages: None, browser: Browser) -> Open:
    """Give what opens the page of the server at a URL."""
    return lambda url: chromium(browser, f"{url}/page")


@pytest.fixture
def start_node(packages: None) -> Start:
    """Give what starts a client in Node."""
    return lambda client, url: node(NODE, "program.js", client)


@pytest.fixture
def start(start_node: Start, browser: Browser) -> Start:
    """Give what starts the program of a client of server-sent events."""

    def start_program(client: str, url: str) -> AbstractAsyncContextManager[Program]:
        return start_node(client, url) if client == "eventsource" else chromium(browser, f"{url}/page")

    return start_program


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of the clients the time that installing them may take."""
    for item in items:
        if "packages" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(300))
