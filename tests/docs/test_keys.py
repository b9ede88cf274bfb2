"""Starting once: the page's program for HTTP answers as the page says."""

from typing import Any, Final

from tests.http.servers import STREAM_ID, http_to
from tests.test_docs import ROOT, blocks

PAGE: Final = ROOT / "docs/how-to/keys.md"
QUESTION: Final = {"threadId": "c", "runId": "r-1", "text": "Nothing is lost"}


def shown_program() -> dict[str, Any]:
    """Run the page's program, on memory, and give what it defines."""
    (program,) = [block for block in blocks(PAGE) if "run=body.runId" in block]
    shown: dict[str, Any] = {}
    exec(compile(program.replace("sqlite:///streams.db", "memory://"), str(PAGE), "exec", dont_inherit=True), shown)
    return shown


async def test_a_run_starts_once_and_its_question_is_kept_once() -> None:
    shown = shown_program()
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
    assert shown["asked"] == ["Nothing is lost", "Why?"]


async def test_the_last_answer_is_shown_also_when_it_has_ended() -> None:
    async with http_to(shown_program()["app"]) as http:
        nothing = await http.get("/chat/c/last")
        answer = await http.post("/chat", json=QUESTION)
        what_runs = await http.get("/chat/c/stream")
        last = await http.get("/chat/c/last")
        end = answer.text.rpartition("id: ")[2].strip()
        seen = await http.get("/chat/c/last", headers={"Last-Event-ID": end})
    assert (nothing.status_code, what_runs.status_code, seen.status_code) == (404, 204, 204)
    assert last.text == answer.text
