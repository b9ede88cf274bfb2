"""The clients, and the programs that they live in."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Protocol

import pytest
from playwright.async_api import Browser, async_playwright
from tests.clients.programs import COPILOTKIT, NODE, PACKAGES, Chromium, Program, chromium, node
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
def copilotkit(packages: None, requires: Callable[[str], str]) -> None:
    """Install CopilotKit's packages where they are missing."""
    install_packages(requires("npm"), COPILOTKIT)


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


QUICK: Final = frozenset(
    (
        "test_a_call_that_is_cut_comes_back_and_has_each_message_once",
        "test_a_page_that_is_reloaded_in_mid_answer_has_all_of_it",
        "test_a_client_that_is_cut_comes_back_and_has_each_event_once",
        "test_a_response_that_is_cut_is_gone_on_with_and_has_each_event_once",
        "test_a_run_that_is_cut_comes_back_and_has_each_event_once",
        "test_a_run_that_is_cut_is_shown_once_and_has_run_once",
        "test_fetch_event_source_has_each_event_once",
        "test_sixty_answers_are_whole_and_once_under_random_cuts",
        "test_whatever_a_producer_writes_is_taken",
        "test_who_follows_by_get_has_each_event_once",
    )
)
"""One test of each client's; the others are slow: browsers leave no processor to anybody else."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of the clients the time that installing them may take, and leave most of them to `./dev test-more`."""
    for item in items:
        if item.path.parent == Path(__file__).parent and getattr(item, "originalname", "") not in QUICK:
            item.add_marker(pytest.mark.slow)
        if "packages" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(300))
