"""`useChat` before the app of `docs/how-to/chat.md`: what is in the history is not replayed, and what is not, is."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

from tests.clients.chats import HELD_ON, PART, WHOLE, Chats, add_page, job_of, shows
from tests.clients.conftest import Open
from tests.clients.programs import Chromium
from tests.http.servers import serving
from tests.test_docs import ROOT, blocks

PAGE: Final = ROOT / "docs/how-to/chat.md"
CLIENT: Final = "useChat"


@asynccontextmanager
async def served() -> AsyncGenerator[Chats]:
    """Serve the page's app, on memory, around an answer of ours."""
    chats = Chats()
    (program,) = blocks(PAGE)
    program = program.replace("sqlite:///streams.db", "memory://").replace('"chats.db"', '":memory:"')
    shown: dict[str, Any] = {}
    exec(compile(program, str(PAGE), "exec", dont_inherit=True), shown)
    shown["answer"] = chats.answer
    add_page(shown["app"])
    try:
        async with serving(shown["app"]) as chats.url:
            yield chats
    finally:
        shown["db"].close()


async def shown_on(page: Chromium, url: str, ask: str = "") -> Any:
    """Show the chat as a page of Ann's does that keeps nothing."""
    await page.page.context.add_cookies([{"name": "session", "value": "t0k3n", "url": url}])
    (reading,) = await page.read(CLIENT, [job_of(url, ask=ask, keptByTheServer=True)])
    return reading


async def test_a_reload_in_mid_answer_shows_all_and_one_behind_the_end_shows_the_history_and_replays_nothing(
    page_of: Open,
) -> None:
    async with served() as server:
        async with page_of(server.url) as page:
            await (await shown_on(page, server.url, HELD_ON)).when(shows("streaming", PART))
        async with page_of(server.url) as page:
            reading = await shown_on(page, server.url)
            await reading.when(shows("streaming", PART))
            server.may_go_on.set()
            await reading.when(shows("ready", WHOLE))
            assert await page.page.evaluate("finished(0)") == 1
        async with page_of(server.url) as page, page.page.expect_response("**/stream?seen=*") as response:
            reading = await shown_on(page, server.url)
            await reading.when(shows("ready", WHOLE))
            assert (await response.value).status == 204
            assert await page.page.evaluate("finished(0)") == 0
    assert server.runs == {HELD_ON: 1}


async def test_an_answer_that_has_failed_is_an_error_once(page_of: Open) -> None:
    async with served() as server:
        async with page_of(server.url) as page:
            await (await shown_on(page, server.url, "fail")).when(shows("error", PART))
        async with page_of(server.url) as page:
            await (await shown_on(page, server.url)).when(shows("ready", PART))
    assert server.runs == {"fail": 1}
