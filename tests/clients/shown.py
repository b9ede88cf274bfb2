"""The apps that pages of the docs show, around a producer of ours: no line of theirs is changed but where they store."""

import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from tests.test_docs import ROOT, blocks

from streamkeep.http import StreamsHTTP
from streamkeep.http.response import ASGIApp

WORDS: Final = ("Nothing ", "is ", "lost, ", "not even é\u2028.")
HELD: Final = 2
STORED: Final = 'StreamsHTTP("sqlite:///streams.db")'


def shown_app(page: str, streams_http: StreamsHTTP, answer: Callable[..., object], *, block: int = 0) -> ASGIApp:
    """Give the app of a page, over a `StreamsHTTP`, with `answer` in place of its own."""
    program = blocks(path := ROOT / page)[block]
    assert program.count(STORED) == 1, page
    shown: dict[str, Any] = {"given": streams_http}
    exec(compile(program.replace(STORED, "given"), str(path), "exec", dont_inherit=True), shown)
    shown["answer"] = answer
    app: ASGIApp = shown["app"]
    return app


@dataclass(eq=False, slots=True)
class Paced:
    """Says `WORDS`, and counts how often it has answered each question. An answer that is held stops before word `HELD`."""

    runs: Counter[int] = field(default_factory=Counter[int])
    may_go_on: anyio.Event = field(default_factory=anyio.Event)

    async def words(self, number: int, *, holds: bool) -> AsyncGenerator[str]:
        self.runs[number] += 1
        for place, word in enumerate(WORDS):
            if holds and place == HELD:
                await self.may_go_on.wait()
            yield word


def langgraph_app(streams_http: StreamsHTTP, paced: Paced) -> ASGIApp:
    """Give the app of the page about LangGraph's clients."""

    async def answer(question: dict[str, Any]) -> AsyncGenerator[object]:
        async for word in paced.words(question["number"], holds=question.get("holds", False)):
            yield "values", {"word": word}

    return shown_app("docs/how-to/langgraph.md", streams_http, answer)


def ag_ui_app(streams_http: StreamsHTTP, paced: Paced) -> ASGIApp:
    """Give the app of the page about AG-UI's clients. A question is text that is JSON."""

    async def answer(messages: list[dict[str, Any]]) -> AsyncGenerator[str]:
        content = messages[-1]["content"]
        question = json.loads(content if isinstance(content, str) else content[0]["text"])
        async for word in paced.words(question["number"], holds=question["holds"]):
            yield word

    return shown_app("docs/how-to/ag-ui.md", streams_http, answer)
