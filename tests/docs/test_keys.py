"""Starting once: the page's program for HTTP answers as the page says."""

from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.http.servers import STREAM_ID, http_to
from tests.test_docs import ROOT, blocks

PAGE: Final = ROOT / "docs/how-to/keys.md"
QUESTION: Final = {"threadId": "c", "runId": "r-1", "text": "Nothing is lost"}


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[dict[str, Any]]:
    """Run the page's program, on memory, and give what it defines."""
    monkeypatch.chdir(tmp_path)
    (program,) = [block for block in blocks(PAGE) if "run=body.runId" in block]
    shown: dict[str, Any] = {}
    exec(compile(program.replace("sqlite:///streams.db", "memory://"), str(PAGE), "exec", dont_inherit=True), shown)
    yield shown
    shown["db"].close()


async def test_a_run_starts_once_and_its_question_is_kept_once(shown: dict[str, Any]) -> None:
    async with http_to(shown["app"]) as http:
        first = await http.post("/chat", json=QUESTION)
        again = await http.post("/chat", json=QUESTION)
        seen_all = await http.post(
            "/chat", json=QUESTION, headers={STREAM_ID: first.headers[STREAM_ID], "X-Genkit-Stream-Offset": "3"}
        )
        other = await http.post("/chat", json={**QUESTION, "runId": "r-2", "text": "Why?"})
    assert again.text == first.text
    assert first.headers[STREAM_ID] == again.headers[STREAM_ID] != other.headers[STREAM_ID]
    assert seen_all.status_code == 204
    kept = {(first.headers[STREAM_ID], "c", "Nothing is lost"), (other.headers[STREAM_ID], "c", "Why?")}
    assert set(shown["db"].execute("SELECT * FROM questions")) == kept


async def test_a_question_that_cannot_be_stored_ends_its_stream_and_a_repeat_shows_that(shown: dict[str, Any]) -> None:
    async with http_to(shown["app"]) as http:
        shown["db"].execute("DROP TABLE questions")
        first = await http.post("/chat", json=QUESTION)
        again = await http.post("/chat", json=QUESTION)
    assert first.text == again.text
    assert ("event: error" in first.text, "event: chunk" in first.text) == (True, False)


async def test_another_question_while_an_answer_runs_is_refused_and_a_repeat_is_not(shown: dict[str, Any]) -> None:
    async with http_to(shown["app"]) as http:
        async with shown["streams_http"].streams.open(
            "s", key="c", run="r-1", owner="ann", metadata={"route": "/chat"}
        ) as stream:
            other = await http.post("/chat", json={**QUESTION, "runId": "r-2"})
            await stream.done()
        again = await http.post("/chat", json=QUESTION)
    assert (other.status_code, other.json()["error"]["status"]) == (409, "ALREADY_EXISTS")
    assert other.json()["error"]["details"] == {"stream": "s"}
    assert (again.status_code, again.headers[STREAM_ID]) == (200, "s")
    assert not list(shown["db"].execute("SELECT * FROM questions"))


async def test_the_last_answer_is_shown_also_when_it_has_ended(shown: dict[str, Any]) -> None:
    async with http_to(shown["app"]) as http:
        nothing = await http.get("/chat/c/last")
        answer = await http.post("/chat", json=QUESTION)
        what_runs = await http.get("/chat/c/stream")
        last = await http.get("/chat/c/last")
        end = answer.text.rpartition("id: ")[2].strip()
        seen = await http.get("/chat/c/last", headers={"Last-Event-ID": end})
    assert (nothing.status_code, what_runs.status_code, seen.status_code) == (404, 204, 204)
    assert last.text == answer.text
