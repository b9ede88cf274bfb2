"""assistant-ui over `AssistantChatTransport({ resumable })`, as its package comes: reloads, and no resume of what has ended."""

from collections.abc import Callable
from typing import Final

from tests.clients.chats import HELD_ON, PART, WHOLE, answers, job_of, served
from tests.clients.conftest import Open
from tests.clients.programs import Event

CLIENT: Final = "assistant-ui"


def shows(status: str, *texts: str, pending: bool) -> Callable[[Event], bool]:
    """Give what says whether a thread has this status, shows these answers, and would resume a stream when its page is reloaded."""
    return lambda event: (event["event"], answers(event), bool(event["id"])) == (status, list(texts), pending)


async def test_an_answer_is_whole_and_resumed_no_more(page_of: Open) -> None:
    async with served() as server, page_of(server.url) as page:
        (reading,) = await page.read(CLIENT, [job_of(server.url, ask="why?")])
        await reading.when(shows("ready", WHOLE, pending=False))
        await page.reload()
        before = server.requests["GET"]
        (reading,) = await page.read(CLIENT, [job_of(server.url)])
        await reading.when(shows("ready", pending=False))
        assert server.requests["GET"] - before <= 2  # the page and its program
    assert server.runs == {"why?": 1}


async def test_a_page_that_is_reloaded_in_mid_answer_has_all_of_it(page_of: Open) -> None:
    async with served() as server, page_of(server.url) as page:
        (reading,) = await page.read(CLIENT, [job_of(server.url, ask=HELD_ON)])
        await reading.when(shows("streaming", PART, pending=True))
        await page.reload()
        (reading,) = await page.read(CLIENT, [job_of(server.url)])
        await reading.when(shows("streaming", PART, pending=True))
        server.may_go_on.set()
        await reading.when(shows("ready", WHOLE, pending=False))
    assert server.runs == {HELD_ON: 1}
