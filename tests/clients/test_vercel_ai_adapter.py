"""`useChat` before apps that stream Pydantic AI's own UI messages, as `docs/how-to/ai-sdk.md` has them: durable by one line."""

from typing import Final

import pytest
from tests.clients.chats import HELD_ON, PART, WHOLE, Shown, job_of, served, shows
from tests.clients.conftest import Open
from tests.http.servers import server_process
from tests.network.proxy import bad_network

CLIENT: Final = "useChat"

of_each_app = pytest.mark.parametrize("which", [Shown.AGENT, Shown.DURABLE])


def job(url: str, which: Shown, *, ask: str = "") -> dict[str, object]:
    return job_of(url, ask=ask, keepsStream=which is Shown.DURABLE)


@of_each_app
async def test_a_page_that_is_reloaded_in_mid_answer_has_the_agents_answer_whole_and_once(page_of: Open, which: Shown) -> None:
    async with served(which) as server, page_of(server.url) as page:
        (reading,) = await page.read(CLIENT, [job(server.url, which, ask=HELD_ON)])
        await reading.when(shows("streaming", PART))
        await page.reload()
        (reading,) = await page.read(CLIENT, [job(server.url, which)])
        await reading.when(shows("streaming", PART))
        server.may_go_on.set()
        await reading.when(shows("ready", WHOLE))
    assert server.runs == {HELD_ON: 1}


@pytest.mark.slow
@of_each_app
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_of_an_agent_whose_server_comes_back_there_is_what_was_stored_and_an_error(
    page_of: Open, which: Shown, how: str, sqlite_url: str
) -> None:
    async with bad_network() as network, server_process(which, sqlite_url) as server:
        network.url = server.url
        url = network.path()
        async with page_of(url) as page:
            (reading,) = await page.read(CLIENT, [job(url, which, ask=HELD_ON)])
            await reading.when(shows("streaming", PART))
            await server.end(how)
            await reading.when(shows("error", PART))
            async with server_process(which, sqlite_url) as again:
                network.url = again.url
                known = len(reading.events)
                await page.comes_back()
                await reading.when(shows("error", PART))
                assert "ready" not in {event["event"] for event in reading.events[known:]}
                await page.reload()
                (reading,) = await page.read(CLIENT, [job(url, which)])
                await reading.when(shows("error", PART))
