"""assistant-ui over `AssistantChatTransport({ resumable })`, as its package comes: what it comes back to, and what it resumes no more."""

from collections.abc import Callable
from typing import Final

import pytest
from tests.clients.chats import HELD_ON, PART, WHOLE, answers, job_of, post, served
from tests.clients.conftest import Open
from tests.clients.programs import Event
from tests.http.servers import server_process
from tests.network.proxy import End, Fate, bad_network

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


@pytest.mark.cell("reload", "assistant-ui")
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


@pytest.mark.cell("cut", "assistant-ui")
async def test_a_cut_is_an_error_and_a_page_that_is_reloaded_has_all_of_it(page_of: Open) -> None:
    async with served() as server, bad_network(server.url) as network, page_of(server.url) as page:
        url = network.path()
        (reading,) = await page.read(CLIENT, [job_of(url, ask=HELD_ON)])
        await reading.when(shows("streaming", PART, pending=True))
        network.meet(Fate(End.FIN, b'"text-delta"'))
        server.may_go_on.set()
        await reading.when(shows("error", PART, pending=True))
        await page.reload()
        (reading,) = await page.read(CLIENT, [job_of(url)])
        await reading.when(shows("ready", WHOLE, pending=False))
        assert network.struck.total() == 1
    assert server.runs == {HELD_ON: 1}


async def test_it_does_not_come_back_by_itself_when_its_page_is_visible_again(page_of: Open) -> None:
    # It gives `useChat` no `resume`. When this fails, they have changed it.
    async with served() as server, bad_network(server.url) as network, page_of(server.url) as page:
        (reading,) = await page.read(CLIENT, [job_of(network.path(), ask=HELD_ON)])
        await reading.when(shows("streaming", PART, pending=True))
        network.meet(Fate(End.FIN, b'"text-delta"'))
        server.may_go_on.set()
        await reading.when(shows("error", PART, pending=True))
        before = server.requests["GET"]
        await page.comes_back()
        (other,) = await page.read("useChat", [job_of(server.url)])  # which asks in any case, and later
        await other.when(lambda event: event["event"] == "ready" and answers(event) == [])
        await reading.when(shows("error", PART, pending=True))
        assert server.requests["GET"] - before <= 2  # in StrictMode it asks twice


@pytest.mark.cell("second tab", "assistant-ui")
async def test_a_second_tab_of_the_same_session_follows_as_well_and_a_new_one_knows_of_nothing(page_of: Open) -> None:
    # Where a stream's id is kept is the tab's: a tab that is duplicated has it, one that is opened anew has not.
    async with served() as server, page_of(server.url) as page, page_of(server.url) as new:
        (first,) = await page.read(CLIENT, [job_of(server.url, ask=HELD_ON)])
        await first.when(shows("streaming", PART, pending=True))
        (nothing,) = await new.read(CLIENT, [job_of(server.url)])
        await nothing.when(shows("ready", pending=False))
        async with page.duplicate() as tab:
            (second,) = await tab.read(CLIENT, [job_of(server.url)])
            await second.when(shows("streaming", PART, pending=True))
            server.may_go_on.set()
            for reading in (first, second):
                await reading.when(shows("ready", WHOLE, pending=False))
        await nothing.when(shows("ready", pending=False))
    assert server.runs == {HELD_ON: 1}


@pytest.mark.cell("Stop", "assistant-ui")
async def test_stop_keeps_what_there_is_and_is_resumed_no_more(page_of: Open) -> None:
    async with served() as server, page_of(server.url) as page:
        (reading,) = await page.read(CLIENT, [job_of(server.url, ask=HELD_ON)])
        stream = (await reading.when(shows("streaming", PART, pending=True)))["id"]
        assert await post(server.url, f"/api/chat/{stream}/stop") == {"stopped": True}
        await reading.when(shows("ready", PART, pending=False))
        await page.reload()
        (reading,) = await page.read(CLIENT, [job_of(server.url)])
        await reading.when(shows("ready", pending=False))
    assert server.runs == {HELD_ON: 1}


@pytest.mark.cell("restart", "assistant-ui")
@pytest.mark.cell("kill -9", "assistant-ui")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_comes_back_says_that_there_is_no_more(page_of: Open, how: str, sqlite_url: str) -> None:
    async with bad_network() as network, server_process("chats", sqlite_url) as server:
        network.url = server.url
        url = network.path()
        async with page_of(url) as page:
            (reading,) = await page.read(CLIENT, [job_of(url, ask=HELD_ON)])
            await reading.when(shows("streaming", PART, pending=True))
            if how == "restart":
                server.stop()
                await reading.when(shows("error", PART, pending=False))  # told of the end before the server is gone
                await server.wait()
            else:
                await server.kill()
                await reading.when(shows("error", PART, pending=True))
            async with server_process("chats", sqlite_url) as again:
                network.url = again.url
                await page.reload()
                (reading,) = await page.read(CLIENT, [job_of(url)])
                if how == "restart":
                    await reading.when(shows("ready", pending=False))
                else:
                    await reading.when(shows("error", PART, pending=False))
