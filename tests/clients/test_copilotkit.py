"""A page of CopilotKit's as its package comes, with a server of ours as its runtime: both are what `docs/how-to/ag-ui.md` shows."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, Page, expect
from tests.clients.shown import ON_PAGE, PART_ON_PAGE, SHOWN, Paced, copilotkit_app
from tests.http.servers import server_process, serving
from tests.network.proxy import End, Fate, bad_network

from streamkeep import InMemoryStreamManager
from streamkeep.http import StreamsHTTP

pytestmark = pytest.mark.usefixtures("copilotkit")


@asynccontextmanager
async def served() -> AsyncGenerator[tuple[str, Paced]]:
    paced = Paced()
    async with serving(copilotkit_app(StreamsHTTP(InMemoryStreamManager()), paced)) as url:
        yield url, paced


@asynccontextmanager
async def page_of(browser: Browser, url: str) -> AsyncGenerator[Page]:
    """Give a page of a profile of its own that shows thread `t`. It asks nobody but this machine."""
    async with await browser.new_context() as context:
        page = await context.new_page()
        page.set_default_timeout(SHOWN)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(urlsplit(request.url).hostname or request.url))
        await page.goto(f"{url}/page?thread=t")
        yield page
        assert set(asked) == {"127.0.0.1"}


async def ask(page: Page, *, number: int = 1, holds: bool = True) -> None:
    box = page.get_by_test_id("copilot-chat-textarea")
    await box.fill(json.dumps({"number": number, "holds": holds}))
    await box.press("Enter")


async def shows(page: Page, *answers: str, runs: bool) -> None:
    """Return when a page shows these answers, with a question before each, and whether the last one is still coming."""
    await expect(page.get_by_test_id("copilot-assistant-message").locator("p")).to_have_text(answers, timeout=SHOWN)
    await expect(page.get_by_test_id("copilot-user-message")).to_have_count(len(answers), timeout=SHOWN)
    await expect(page.get_by_test_id("copilot-loading-cursor")).to_have_count(int(runs), timeout=SHOWN)


async def is_told(page: Page, why: str) -> None:
    await expect(page.get_by_test_id("copilot-error-banner")).to_contain_text(why, timeout=SHOWN)


async def test_a_thread_is_whole_and_each_question_is_answered_once(browser: Browser) -> None:
    async with served() as (url, paced), page_of(browser, url) as page:
        await ask(page, holds=False)
        await shows(page, ON_PAGE, runs=False)
        await ask(page, number=2, holds=False)
        await shows(page, ON_PAGE, ON_PAGE, runs=False)
        await page.reload()
        await shows(page, ON_PAGE, ON_PAGE, runs=False)
    assert paced.runs == {1: 1, 2: 1}


@pytest.mark.cell("reload", "CopilotKit")
@pytest.mark.cell("second tab", "CopilotKit")
async def test_a_page_that_is_reloaded_and_a_second_tab_have_all_of_a_run(browser: Browser) -> None:
    async with served() as (url, paced), page_of(browser, url) as page, page_of(browser, url) as tab:
        await ask(page)
        await shows(page, PART_ON_PAGE, runs=True)
        await page.reload()
        await tab.reload()
        for each in (page, tab):
            await shows(each, PART_ON_PAGE, runs=True)
        paced.may_go_on.set()
        for each in (page, tab):
            await shows(each, ON_PAGE, runs=False)
    assert paced.runs == {1: 1}


@pytest.mark.cell("cut", "CopilotKit")
@pytest.mark.parametrize("place", [0, 1, b"data: {", b"TEXT_MESSAGE_END", b"RUN_FINISHED", b"\r\n0\r\n\r"])
async def test_wherever_a_run_is_cut_its_page_comes_back_and_has_all_of_it(browser: Browser, place: int | bytes) -> None:
    async with served() as (url, paced), bad_network(url) as network, page_of(browser, network.path()) as page:
        await ask(page)
        await shows(page, PART_ON_PAGE, runs=True)
        network.meet(Fate(End.FIN, place))
        paced.may_go_on.set()
        await shows(page, ON_PAGE, runs=False)
        assert network.struck.total() >= 1
    assert paced.runs == {1: 1}


@pytest.mark.cell("Stop", "CopilotKit")
async def test_stop_ends_the_run_in_every_tab_and_keeps_what_there_was(browser: Browser) -> None:
    async with served() as (url, paced), page_of(browser, url) as page, page_of(browser, url) as tab:
        await ask(page)
        await shows(page, PART_ON_PAGE, runs=True)
        await tab.reload()
        await shows(tab, PART_ON_PAGE, runs=True)
        await page.get_by_test_id("copilot-send-button").click()  # which is Stop while a run lasts
        for each in (page, tab):
            await shows(each, PART_ON_PAGE, runs=False)
        await page.reload()
        await shows(page, PART_ON_PAGE, runs=False)
        await ask(page, number=2, holds=False)
        await shows(page, PART_ON_PAGE, ON_PAGE, runs=False)
    assert paced.runs == {1: 1, 2: 1}


async def test_a_question_that_does_not_reach_the_server_is_shown_no_more_when_the_page_has_come_back(browser: Browser) -> None:
    # It connects to its thread anew, where there is no such question. When this fails, they have changed it.
    async with served() as (url, paced), bad_network(url) as network, page_of(browser, network.path()) as page:
        await ask(page, holds=False)
        await shows(page, ON_PAGE, runs=False)
        network.url = None
        network.meet(Fate(End.FIN, 0, of_request=True))
        await ask(page, number=2, holds=False)
        await is_told(page, "Failed to fetch")
        network.url = url
        await shows(page, ON_PAGE, runs=False)
    assert paced.runs == {1: 1}


@pytest.mark.cell("restart", "CopilotKit")
@pytest.mark.cell("kill -9", "CopilotKit")
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_comes_back_has_what_was_stored_and_says_why_there_is_no_more(
    browser: Browser, how: str, sqlite_url: str
) -> None:
    async with bad_network() as network, server_process("copilotkit", sqlite_url) as server:
        network.url = server.url
        async with page_of(browser, network.path()) as page:
            await ask(page)
            await shows(page, PART_ON_PAGE, runs=True)
            await server.end(how)
            async with server_process("copilotkit", sqlite_url) as again:
                network.url = again.url
                await is_told(page, "before the stream was completed")
                await shows(page, PART_ON_PAGE, runs=False)
                await page.reload()
                await is_told(page, "before the stream was completed")
                await shows(page, PART_ON_PAGE, runs=False)
