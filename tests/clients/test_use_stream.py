"""`useStream` of LangGraph's React package as it comes, on the page and before the server that `docs/how-to/langgraph.md` shows."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import pytest
from playwright.async_api import Browser, BrowserContext, Page, expect
from tests.clients.shown import ON_PAGE, PART_ON_PAGE, SHOWN, Paced, use_stream_app
from tests.http.servers import server_process, serving
from tests.network.proxy import End, Fate, bad_network

from streamkeep import InMemoryStreamManager
from streamkeep.http import StreamsHTTP

pytestmark = pytest.mark.usefixtures("packages")


@asynccontextmanager
async def served() -> AsyncGenerator[tuple[str, Paced]]:
    paced = Paced()
    async with serving(use_stream_app(StreamsHTTP(InMemoryStreamManager()), paced)) as url:
        yield url, paced


@asynccontextmanager
async def context_of(browser: Browser) -> AsyncGenerator[BrowserContext]:
    async with await browser.new_context() as context:
        context.set_default_timeout(SHOWN)
        yield context


async def opened(context: BrowserContext, url: str) -> Page:
    """Open a tab that shows thread `t`."""
    page = await context.new_page()
    await page.goto(f"{url}/page?thread=t")
    return page


async def ask(page: Page, *, number: int = 1, holds: bool = True) -> None:
    await page.locator("input").fill(json.dumps({"number": number, "holds": holds}))


async def shows(page: Page, *answers: str, runs: bool, questions: int | None = None) -> None:
    """Return when a page shows these answers, so many questions, and whether the last answer is still coming."""
    await expect(page.locator("p.ai")).to_have_text(answers, timeout=SHOWN)
    await expect(page.locator("p.human")).to_have_count(len(answers) if questions is None else questions, timeout=SHOWN)
    await expect(page.locator("button")).to_have_count(int(runs), timeout=SHOWN)


async def is_told(page: Page, why: str) -> None:
    await expect(page.locator("p.error")).to_contain_text(why, timeout=SHOWN)


async def test_a_thread_is_whole_and_each_question_is_answered_once(browser: Browser) -> None:
    async with served() as (url, paced), context_of(browser) as context:
        page = await opened(context, url)
        await ask(page, holds=False)
        await shows(page, ON_PAGE, runs=False)
        await ask(page, number=2, holds=False)
        await shows(page, ON_PAGE, ON_PAGE, runs=False)
        await page.reload()
        await shows(page, ON_PAGE, ON_PAGE, runs=False)
        await expect(page.locator("p.error")).to_have_count(0)
    assert paced.runs == {1: 1, 2: 1}


async def test_a_page_without_a_thread_makes_one_whose_history_is_its_state(browser: Browser) -> None:
    async with served() as (url, paced), context_of(browser) as context, httpx.AsyncClient(base_url=url) as http:
        page = await context.new_page()
        await page.goto(f"{url}/page")
        async with page.expect_response("**/threads") as response:
            await ask(page, holds=False)
        await shows(page, ON_PAGE, runs=False)
        thread = (await (await response.value).json())["thread_id"]
        (state,) = (await http.post(f"/threads/{thread}/history", json={"limit": 10})).json()
        assert [message["type"] for message in state["values"]["messages"]] == ["human", "ai"]
        assert (await http.post("/threads/other/history", json={})).json() == []
    assert paced.runs == {1: 1}


@pytest.mark.cell("reload", "LangGraph's useStream")
@pytest.mark.cell("second tab", "LangGraph's useStream")
async def test_a_page_that_is_reloaded_and_a_second_tab_have_all_of_a_run(browser: Browser) -> None:
    async with served() as (url, paced), context_of(browser) as context:
        page = await opened(context, url)
        await ask(page)
        await shows(page, PART_ON_PAGE, runs=True)
        await page.reload()
        tab = await opened(context, url)
        for each in (page, tab):
            await shows(each, PART_ON_PAGE, runs=True)
        paced.may_go_on.set()
        for each in (page, tab):
            await shows(each, ON_PAGE, runs=False)
            await each.reload()
            await shows(each, ON_PAGE, runs=False)
    assert paced.runs == {1: 1}


@pytest.mark.cell("cut", "LangGraph's useStream")
@pytest.mark.parametrize("is_joined", [False, True], ids=["it began", "it has joined"])
@pytest.mark.parametrize("place", [0, 1, b"data: {", b"data: [", b"event: end", b"\r\n0\r\n\r"])
async def test_wherever_a_run_is_cut_its_page_comes_back_and_has_all_of_it(
    browser: Browser, place: int | bytes, *, is_joined: bool
) -> None:
    async with served() as (url, paced), bad_network(url) as network, context_of(browser) as context:
        page = await opened(context, network.path())
        await ask(page)
        await shows(page, PART_ON_PAGE, runs=True)
        if is_joined:
            await page.reload()
            await shows(page, PART_ON_PAGE, runs=True)
        network.meet(Fate(End.FIN, place))
        paced.may_go_on.set()
        await shows(page, ON_PAGE, runs=False)
        await expect(page.locator("p.error")).to_have_count(0)
        assert network.struck.total() >= 1
    assert paced.runs == {1: 1}


@pytest.mark.cell("Stop", "LangGraph's useStream")
async def test_stop_ends_the_run_in_every_tab_and_keeps_what_there_was_until_a_reload(browser: Browser) -> None:
    async with served() as (url, paced), context_of(browser) as context:
        page = await opened(context, url)
        await ask(page)
        await shows(page, PART_ON_PAGE, runs=True)
        tab = await opened(context, url)
        await shows(tab, PART_ON_PAGE, runs=True)
        async with httpx.AsyncClient(base_url=url) as http, page.expect_response("**/cancel*"):
            await page.get_by_role("button", name="Stop").click()
            await shows(page, PART_ON_PAGE, runs=False)
            await shows(tab, PART_ON_PAGE, runs=False)
            await is_told(tab, "cancelled")
            assert (await http.get("/threads/t/state")).json()["values"]["messages"][0]["type"] == "human"
        for each in (page, tab):
            await each.reload()
            await shows(each, runs=False, questions=1)
    assert paced.runs == {1: 1}


async def test_a_run_that_is_kept_no_more_is_an_error_until_the_next_question(browser: Browser) -> None:
    async with served() as (url, paced), context_of(browser) as context:
        page = await opened(context, url)
        await page.evaluate("localStorage.setItem('lg:stream:t', 'gone')")
        await page.reload()
        await is_told(page, "404")
        await ask(page, holds=False)
        await shows(page, ON_PAGE, runs=False)
        await page.reload()
        await shows(page, ON_PAGE, runs=False)
        await expect(page.locator("p.error")).to_have_count(0)
    assert paced.runs == {1: 1}


@pytest.mark.cell("restart", "LangGraph's useStream")
@pytest.mark.cell("kill -9", "LangGraph's useStream")
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_comes_back_has_what_was_stored_and_says_why_there_is_no_more(
    browser: Browser, how: str, sqlite_url: str
) -> None:
    async with bad_network() as network, server_process("use-stream", sqlite_url) as server, context_of(browser) as context:
        network.url = server.url
        page = await opened(context, network.path())
        await ask(page)
        await shows(page, PART_ON_PAGE, runs=True)
        await server.end(how)
        async with server_process("use-stream", sqlite_url) as again:
            network.url = again.url
            await is_told(page, "before the stream was completed")
            await shows(page, PART_ON_PAGE, runs=False)
            await page.reload()
            await is_told(page, "before the stream was completed")
            await shows(page, PART_ON_PAGE, runs=False)
