"""`useChat` of the AI SDK as its package comes, in StrictMode: never ready with half an answer, as `docs/how-to/ai-sdk.md` has it."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
import httpx
import pytest
from tests.clients.chats import HELD_ON, PART, QUESTION, WHOLE, FileEvent, answers, asked, job_of, post, served, shows
from tests.clients.conftest import Open
from tests.http.servers import server_process, until
from tests.network.cuts import exchange
from tests.network.proxy import FINE, End, Fate, bad_network

CLIENT: Final = "useChat"
AT_ONCE: Final = 40
"""So many chats of a page are cut at a time: a browser keeps six connections to a server."""


async def test_an_answer_is_whole_and_once(page_of: Open) -> None:
    async with served() as server, page_of(server.url) as page:
        (reading,) = await page.read(CLIENT, [job_of(server.url, ask="why?")])
        await reading.when(shows("ready", WHOLE))
    assert server.runs == {"why?": 1}


@pytest.mark.cell("reload", "useChat")
async def test_a_page_that_is_reloaded_in_mid_answer_has_all_of_it(page_of: Open) -> None:
    async with served() as server:
        async with page_of(server.url) as page:
            (reading,) = await page.read(CLIENT, [job_of(server.url, ask=HELD_ON)])
            await reading.when(shows("streaming", PART))
        async with page_of(server.url) as page:
            (reading,) = await page.read(CLIENT, [job_of(server.url, history=[QUESTION])])
            await reading.when(shows("streaming", PART))
            server.may_go_on.set()
            await reading.when(shows("ready", WHOLE))
    assert server.runs == {HELD_ON: 1}


@pytest.mark.cell("second tab", "useChat")
async def test_a_second_tab_follows_as_well(page_of: Open) -> None:
    async with served() as server, page_of(server.url) as first, page_of(server.url) as second:
        readings = await first.read(CLIENT, [job_of(server.url, ask=HELD_ON)])
        await readings[0].when(shows("streaming", PART))
        readings += await second.read(CLIENT, [job_of(server.url, history=[QUESTION])])
        await readings[1].when(shows("streaming", PART))
        server.may_go_on.set()
        for reading in readings:
            await reading.when(shows("ready", WHOLE))
    assert server.runs == {HELD_ON: 1}


@pytest.mark.cell("cut", "useChat")
@pytest.mark.parametrize("is_over", [False, True], ids=["it runs", "it has ended meanwhile"])
async def test_a_cut_is_an_error_and_who_comes_back_has_all_of_it(page_of: Open, *, is_over: bool) -> None:
    async with served() as server, page_of(server.url) as page, bad_network(server.url) as network:
        (reading,) = await page.read(CLIENT, [job_of(network.path(), ask=HELD_ON)])
        await reading.when(shows("streaming", PART))
        network.meet(Fate(End.FIN, b'"text-delta"'))
        server.may_go_on.set()
        await reading.when(shows("error", PART))
        if is_over:
            async with httpx.AsyncClient(base_url=server.url) as http:
                assert "[DONE]" in (await http.get("/api/chat/c/stream")).text
        await page.comes_back()
        await reading.when(shows("ready", WHOLE))
    assert server.runs == {HELD_ON: 1}


async def test_a_history_that_has_the_answer_under_its_id_shows_it_once(page_of: Open) -> None:
    async with served() as server:
        server.may_go_on.set()
        stream = await asked(server.url)
        history = [QUESTION, {"id": stream, "role": "assistant", "parts": [{"type": "text", "text": PART}]}]
        async with page_of(server.url) as page:
            (reading,) = await page.read(CLIENT, [job_of(server.url, history=history)])
            await reading.when(shows("ready", WHOLE))


async def test_a_chat_without_an_answer_is_ready(page_of: Open) -> None:
    async with served() as server, page_of(server.url) as page:
        (reading,) = await page.read(CLIENT, [job_of(server.url, history=[])])
        await reading.when(shows("ready"))
        assert {event["event"] for event in reading.events} == {"ready"}
    assert server.requests["GET"] >= 3


@pytest.mark.cell("Stop", "useChat")
async def test_stop_keeps_what_there_is_in_every_tab_and_after_a_reload(page_of: Open) -> None:
    async with served() as server:
        async with page_of(server.url) as page, page_of(server.url) as other:
            readings = await page.read(CLIENT, [job_of(server.url, ask=HELD_ON)])
            await readings[0].when(shows("streaming", PART))
            readings += await other.read(CLIENT, [job_of(server.url, history=[QUESTION])])
            await readings[1].when(shows("streaming", PART))
            assert await post(server.url, "/api/chat/c/stop") == {"stopped": True}
            for reading in readings:
                await reading.when(shows("ready", PART))
        async with page_of(server.url) as page:
            (reading,) = await page.read(CLIENT, [job_of(server.url, history=[QUESTION])])
            await reading.when(shows("ready", PART))


async def test_a_new_question_stops_the_answer_that_runs(page_of: Open) -> None:
    async with served() as server, page_of(server.url) as page:
        (first,) = await page.read(CLIENT, [job_of(server.url, ask=HELD_ON)])
        await first.when(shows("streaming", PART))
        (second,) = await page.read(CLIENT, [job_of(server.url, ask="why?")])
        await second.when(lambda event: event["event"] == "ready" and answers(event)[-1:] == [WHOLE])
        await first.when(shows("ready", PART))


async def test_a_message_that_is_sent_twice_is_one_answer(page_of: Open) -> None:
    async with served() as server, page_of(server.url) as page:
        (reading,) = await page.read(CLIENT, [job_of(server.url, ask="why?", sendsTwice=True)])
        await reading.when(shows("ready", WHOLE))
    assert server.requests["POST"] == 2
    assert server.runs == {"why?": 1}


async def test_a_question_that_is_refused_while_an_answer_runs_is_an_error_whose_message_is_the_409(page_of: Open) -> None:
    async with served(when_running="refuse") as server, page_of(server.url) as page:
        (first,) = await page.read(CLIENT, [job_of(server.url, ask=HELD_ON)])
        await first.when(shows("streaming", PART))
        (second,) = await page.read(CLIENT, [job_of(server.url, chat="c", ask="why?")])
        refused = await second.when(lambda event: event["event"] == "error")
        server.may_go_on.set()
        await first.when(shows("ready", WHOLE))
    assert json.loads(refused["id"])["error"]["status"] == "ALREADY_EXISTS"
    assert server.runs == {HELD_ON: 1}


async def test_regenerate_and_an_edit_are_new_answers(page_of: Open) -> None:
    async with served() as server, page_of(server.url) as page:
        (reading,) = await page.read(CLIENT, [job_of(server.url, ask="why?")])
        await reading.when(shows("ready", WHOLE))
        await page.page.evaluate("regenerate(0)")
        await until(lambda: server.runs == {"why?": 2})
        await reading.when(shows("ready", WHOLE))
        await page.page.evaluate("edit(0, 'how?')")
        await until(lambda: server.runs == {"why?": 2, "how?": 1})
        await reading.when(shows("ready", WHOLE))
    assert server.requests["POST"] == 3


async def test_an_answer_that_has_ended_is_finished_again_at_a_reload(page_of: Open) -> None:
    async with served() as server:
        for ask, history in (("why?", []), ("", [{"id": "q", "role": "user", "parts": [{"type": "text", "text": "why?"}]}])):
            async with page_of(server.url) as page:
                (reading,) = await page.read(CLIENT, [job_of(server.url, ask=ask, history=history)])
                await reading.when(shows("ready", WHOLE))
                assert await page.page.evaluate("finished(0)") == 1
    assert server.runs == {"why?": 1}


async def test_an_answer_that_fails_is_an_error_also_after_a_reload(page_of: Open) -> None:
    async with served() as server:
        async with page_of(server.url) as page:
            (reading,) = await page.read(CLIENT, [job_of(server.url, ask="fail")])
            await reading.when(shows("error", PART))
        async with page_of(server.url) as page:
            (reading,) = await page.read(CLIENT, [job_of(server.url, history=[QUESTION])])
            await reading.when(shows("error", PART))


@pytest.mark.cell("restart", "useChat")
@pytest.mark.cell("kill -9", "useChat")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_a_server_that_comes_back_says_that_there_is_no_more(page_of: Open, how: str, sqlite_url: str) -> None:
    async with bad_network() as network, server_process("chats", sqlite_url) as server:
        network.url = server.url
        url = network.path()
        async with page_of(url) as page:
            (reading,) = await page.read(CLIENT, [job_of(url, ask=HELD_ON)])
            await reading.when(shows("streaming", PART))
            await server.end(how)
            await reading.when(shows("error", PART))
            async with server_process("chats", sqlite_url) as again:
                network.url = again.url
                known = len(reading.events)
                await page.comes_back()
                await reading.when(shows("error", PART))
                assert "ready" not in {event["event"] for event in reading.events[known:]}
                async with page_of(url) as reloaded:
                    (reading,) = await reloaded.read(CLIENT, [job_of(url, history=[QUESTION])])
                    await reading.when(shows("error", PART))


async def refuses(url: str) -> None:
    """Return when the server takes no connections any more: it has noticed that it is to go."""
    with anyio.fail_after(20), pytest.raises(httpx.ConnectError):
        while True:
            with suppress(httpx.ReadError, httpx.RemoteProtocolError):  # a connection that it had not yet accepted
                async with httpx.AsyncClient(base_url=url) as http:
                    await http.get("/openapi.json")


@pytest.mark.cell("restart", "useChat")
@pytest.mark.slow
async def test_a_rolling_restart_is_not_noticed_by_who_stays_nor_by_who_reloads(page_of: Open, sqlite_url: str) -> None:
    async with bad_network() as network, server_process("chats that drain", sqlite_url) as old:
        network.url = old.url
        url = network.path()
        async with page_of(url) as page, page_of(url) as stays, page_of(url) as comes:
            (reading,) = await page.read(CLIENT, [job_of(url, ask=HELD_ON)])
            await reading.when(shows("streaming", PART))
            (staying,) = await stays.read(CLIENT, [job_of(url, history=[QUESTION])])
            await staying.when(shows("streaming", PART))
            async with server_process("chats that drain", sqlite_url) as new:
                network.url = new.url
                old.stop()
                await refuses(old.url)
                for _ in range(25):  # for longer than a producer has that is told to stop
                    await page.reload()
                    (reading,) = await page.read(CLIENT, [job_of(url, history=[QUESTION])])
                    await reading.when(shows("streaming", PART))
                (coming,) = await comes.read(CLIENT, [job_of(url, history=[QUESTION])])
                await coming.when(shows("streaming", PART))
                assert old.process.is_alive()
                FileEvent(Path(sqlite_url.removeprefix("sqlite:///") + ".go-on")).set()
                for shown in (reading, staying, coming):
                    await shown.when(shows("ready", WHOLE))
                await old.wait()
                await page.reload()
                (reading,) = await page.read(CLIENT, [job_of(url, history=[QUESTION])])
                await reading.when(shows("ready", WHOLE))


@pytest.mark.cell("restart", "useChat")
@pytest.mark.cell("kill -9", "useChat")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["restart", "kill -9"])
async def test_an_answer_that_is_gone_on_with_is_whole_and_once_for_who_was_there_and_who_comes(
    page_of: Open, how: str, sqlite_url: str
) -> None:
    async with (
        bad_network() as network,
        server_process("chats gone on with", sqlite_url) as old,
        server_process("chats gone on with", sqlite_url) as new,
    ):
        network.url = old.url
        url = network.path()
        async with page_of(url) as page, page_of(new.url) as tab, page_of(new.url) as late:
            (reading,) = await page.read(CLIENT, [job_of(url, ask=HELD_ON)])
            await reading.when(shows("streaming", PART))
            (watching,) = await tab.read(CLIENT, [job_of(new.url, history=[QUESTION])])
            await watching.when(shows("streaming", PART))
            network.url = new.url
            await old.end(how)
            await reading.when(lambda event: event["event"] == "error")
            await page.comes_back()
            await tab.page.wait_for_function("restarts(0) === 1")
            await watching.when(shows("streaming", PART))
            (coming,) = await late.read(CLIENT, [job_of(new.url, history=[QUESTION])])
            await coming.when(shows("streaming", PART))
            await post(new.url, "/go-on")
            for shown in (reading, watching, coming):
                await shown.when(shows("ready", WHOLE))
            assert await late.page.evaluate("restarts(0)") == 0


@pytest.mark.slow
async def test_a_server_that_only_shows_may_restart(page_of: Open, sqlite_url: str) -> None:
    async with bad_network() as network, server_process("chats", sqlite_url) as writes:
        await asked(writes.url)
        async with server_process("chats", sqlite_url) as server:
            network.url = server.url
            url = network.path()
            async with page_of(url) as page:
                (reading,) = await page.read(CLIENT, [job_of(url, history=[QUESTION])])
                await reading.when(shows("streaming", PART))
                server.stop()
                await server.wait()
                await reading.when(shows("error", PART))
                async with server_process("chats", sqlite_url) as again:
                    network.url = again.url
                    await page.comes_back()
                    await reading.when(shows("streaming", PART))
                    await post(writes.url, "/go-on")
                    await reading.when(shows("ready", WHOLE))


def few(answer: bytes) -> Sequence[int]:
    return behind_the_head(answer, 97)


def many(answer: bytes) -> Sequence[int]:
    return behind_the_head(answer, 7)


def behind_the_head(answer: bytes, apart: int) -> Sequence[int]:
    # Over plain HTTP Chromium takes a head that breaks off for a whole one, of an empty answer; over HTTPS it is an error.
    return [0, *range(answer.index(b"\r\n\r\n") + 4, len(answer), apart)]


@pytest.mark.cell("cut", "useChat")
@pytest.mark.parametrize("places", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"])
async def test_wherever_an_answer_is_cut_who_comes_back_has_it_whole_and_once(
    page_of: Open, places: Callable[[bytes], Sequence[int]]
) -> None:
    async with served() as server, page_of(server.url) as page, bad_network(server.url) as network:
        request = b"GET /api/chat/c/stream HTTP/1.1\r\nHost: test\r\nOrigin: null\r\nConnection: close\r\n\r\n"
        server.may_go_on.set()
        await asked(server.url)
        cuts = [
            Fate(End.FIN, place) for place in places((await exchange(server.url, request))[: -len(b"connection: close\r\n")])
        ]
        # The first connection asks whether something runs, the second one is the preflight's.
        jobs = [
            {"url": network.path([FINE, FINE, cut]), "chat": f"chat-{number}", "ask": f"{number}", "returns": True}
            for number, cut in enumerate(cuts)
        ]
        for first in range(0, len(jobs), AT_ONCE):
            for reading in await page.read(CLIENT, jobs[first : first + AT_ONCE]):
                await reading.when(shows("ready", WHOLE))
        assert network.struck.total() == len(cuts)
        assert [run for run in server.runs.values() if run != 1] == []
