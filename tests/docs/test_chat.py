"""A chat with users and history: the page's program keeps each question and its answer, in their order, for their owner only."""

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from tests.http.servers import STREAM_ID, http_to, until
from tests.test_docs import ROOT, blocks

from streamkeep import StreamManager

PAGE: Final = ROOT / "docs/how-to/chat.md"
(SHOWN,) = blocks(PAGE)
PROGRAM: Final = SHOWN.replace('{"t0k3n": "ann"}', '{"a": "ann", "b": "bob"}').replace(
    "ttl=timedelta(hours=12)", "lease=timedelta(seconds=1), grace=timedelta(seconds=0.5), ttl=timedelta(hours=12)"
)
ANN: Final = {"Cookie": "session=a"}
BOB: Final = {"Cookie": "session=b"}
KILLED: Final = """
import anyio, httpx
import shown

async def answer(messages):
    yield "Nothing "
    await anyio.sleep_forever()

async def main():
    shown.answer = answer
    async with shown.streams_http, httpx.AsyncClient(transport=httpx.ASGITransport(shown.app), base_url="http://test") as client:
        message = {"id": "q-1", "role": "user", "parts": [{"type": "text", "text": "Nothing is lost"}]}
        await client.post("/api/chat", json={"id": "c", "messages": [message]}, headers={"Cookie": "session=a"})

anyio.run(main)
"""


def message_of(name: str, text: str) -> dict[str, Any]:
    return {"id": name, "role": "user", "parts": [{"type": "text", "text": text}]}


def body_of(*messages: dict[str, Any], trigger: str = "submit-message", **more: str) -> dict[str, Any]:
    return {"id": "c", "messages": messages, "trigger": trigger, **more}


class Chat:
    """The program that is served, with an answer that can be held, and Ann's requests."""

    def __init__(self, shown: dict[str, Any], http: httpx.AsyncClient) -> None:
        self.http = http
        self.runs = 0
        self.may_go_on = anyio.Event()
        self.may_go_on.set()
        self._answer = shown["answer"]
        shown["answer"] = self.answer

    async def answer(self, messages: list[dict[str, Any]]) -> AsyncGenerator[str]:
        self.runs += 1
        number = 0
        async for word in self._answer(messages):
            if number == 1:
                await self.may_go_on.wait()
            yield word
            number += 1

    async def ask(self, *messages: dict[str, Any], **more: str) -> httpx.Response:
        return (await self.http.post("/api/chat", json=body_of(*messages, **more), headers=ANN)).raise_for_status()

    async def history(self) -> list[tuple[str, str]]:
        found = (await self.http.get("/api/chat/c/messages", headers=ANN)).raise_for_status().json()
        return [(message["role"][0], message["parts"][0]["text"]) for message in found]

    async def history_of(self, messages: int) -> list[tuple[str, str]]:
        """Give the history when it has so many messages."""
        with anyio.fail_after(60):
            while len(history := await self.history()) < messages:  # noqa: ASYNC110 - it asks a server
                await anyio.sleep(0.05)
        return history


@asynccontextmanager
async def served(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Chat]:
    monkeypatch.chdir(directory)
    shown: dict[str, Any] = {}
    exec(compile(PROGRAM, str(PAGE), "exec", dont_inherit=True), shown)
    try:
        async with http_to(shown["app"]) as http:
            yield Chat(shown, http)
    finally:
        shown["db"].close()


@pytest.fixture
async def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Chat]:
    """Serve the page's program."""
    async with served(tmp_path, monkeypatch) as chat:
        yield chat


FIRST: Final = message_of("q-1", "Nothing is lost")
SECOND: Final = message_of("q-2", "Why is that")


async def test_a_question_and_its_answer_are_in_the_history_under_their_ids(chat: Chat) -> None:
    answer = await chat.ask(FIRST)
    history = (await chat.http.get("/api/chat/c/messages", headers=ANN)).json()
    assert history == [
        FIRST,
        {
            "id": answer.headers[STREAM_ID],
            "role": "assistant",
            "metadata": {"isWhole": True},
            "parts": [{"type": "text", "text": "Nothing is lost "}],
        },
    ]


async def test_a_question_that_is_sent_twice_is_answered_once(chat: Chat) -> None:
    first, again = await chat.ask(FIRST), await chat.ask(FIRST)
    assert again.text == first.text
    assert (chat.runs, await chat.history()) == (1, [("u", "Nothing is lost"), ("a", "Nothing is lost ")])


async def test_a_message_of_another_chat_with_the_same_id_is_another_question(chat: Chat) -> None:
    first, *others = [
        await chat.http.post("/api/chat", json={**body_of(question), "id": id_}, headers=ANN)
        for id_, question in (("c", FIRST), ("other", message_of("q-1", "Is it")))
    ]
    assert chat.runs == 2
    assert others[0].headers[STREAM_ID] != first.headers[STREAM_ID]


async def test_a_new_question_stops_the_answer_that_runs_and_the_history_is_in_order(chat: Chat) -> None:
    chat.may_go_on = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(chat.ask, FIRST)
        await until(lambda: chat.runs == 1)
        running = await chat.history()
        tasks.start_soon(chat.ask, FIRST, SECOND)
        await until(lambda: chat.runs == 2)
        chat.may_go_on.set()
    history = await chat.history_of(4)
    shown = (await chat.http.get("/api/chat/c/messages", headers=ANN)).json()
    assert [message["metadata"]["isWhole"] for message in shown[1::2]] == [False, True]
    assert running == [("u", "Nothing is lost")]
    assert [role for role, _ in history] == ["u", "a", "u", "a"]
    assert history[1][1] != "Nothing is lost "
    assert history[3] == ("a", "Why is that ")


async def test_regenerate_and_an_edit_take_the_place_of_the_first_answer_and_of_what_came_after(chat: Chat) -> None:
    await chat.ask(FIRST)
    await chat.ask(FIRST, SECOND)
    before = await chat.history()
    await chat.ask(FIRST, SECOND, trigger="regenerate-message")
    regenerated = await chat.history()
    await chat.ask(message_of("q-1", "Is it"), messageId="q-1")
    assert chat.runs == 4
    assert (
        before
        == regenerated
        == [("u", "Nothing is lost"), ("a", "Nothing is lost "), ("u", "Why is that"), ("a", "Why is that ")]
    )
    assert await chat.history() == [("u", "Is it"), ("a", "Is it ")]


async def test_an_answer_that_the_page_has_is_not_replayed_and_any_other_is(chat: Chat) -> None:
    answer = await chat.ask(FIRST)
    answers = [
        await chat.http.get("/api/chat/c/stream", params={"seen": seen}, headers=ANN)
        for seen in (answer.headers[STREAM_ID], "q-1", "")
    ]
    assert [answer.status_code for answer in answers] == [204, 200, 200]
    assert answers[1].text == answers[2].text == answer.text


async def test_to_somebody_else_a_chat_does_not_exist(chat: Chat) -> None:
    await chat.ask(FIRST)
    history = await chat.http.get("/api/chat/c/messages", headers=BOB)
    stream = await chat.http.get("/api/chat/c/stream", headers=BOB)
    stopped = await chat.http.post("/api/chat/c/stop", headers=BOB)
    nobody = await chat.http.post("/api/chat", json=body_of(FIRST))
    assert (history.json(), stream.status_code, stopped.status_code, nobody.status_code) == ([], 204, 404, 401)
    await chat.http.post("/api/chat", json=body_of(FIRST), headers=BOB)  # it is another one, also under the same ids
    assert chat.runs == 2


@pytest.mark.timeout(120)
async def test_after_a_kill_the_part_that_there_is_comes_into_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shown.py").write_text(PROGRAM)
    with anyio.fail_after(60):
        async with (
            await anyio.open_process([sys.executable, "-c", KILLED], cwd=tmp_path) as process,
            StreamManager.connect(f"sqlite:///{tmp_path}/streams.db") as streams,
        ):
            while not any(info.tail for info in await streams.list()):  # noqa: ASYNC110 - another process does it
                await anyio.sleep(0.05)
            process.kill()
        async with served(tmp_path, monkeypatch) as chat:
            before = await chat.history()
            history = await chat.history_of(2)
    assert before == [("u", "Nothing is lost")]
    assert history == [("u", "Nothing is lost"), ("a", "Nothing ")]
