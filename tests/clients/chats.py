"""What the clients that chat read: the app of `docs/how-to/ai-sdk.md` as it is shown, with an answer that a test can hold."""

import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, HTMLResponse
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from starlette.middleware.cors import CORSMiddleware
from tests.clients.programs import PACKAGES, Event, bundle_of
from tests.clients.served import closing_preflights
from tests.http.servers import serving, until
from tests.inside import feeds_of
from tests.test_docs import ROOT, blocks

from streamkeep import InMemoryStreamManager
from streamkeep.http import StreamsHTTP
from streamkeep.http.response import ASGIApp, Receive, Scope, Send

PAGE: Final = ROOT / "docs/how-to/ai-sdk.md"
WORDS: Final = ("Nothing ", "is lost, ", "and nothing ", "is said ", "twice: ", "\u2028é.")
WHOLE: Final = "".join(WORDS)
HELD: Final = 3
PART: Final = "".join(WORDS[:HELD])
HELD_ON: Final = "hold on"
TOOL: Final = "tool"
CALL: Final = {"type": "tool-input-available", "toolCallId": "call-1", "toolName": "weather", "input": {"city": "Bern"}}
SOURCE: Final = "source = answer(messages=chat.messages)"
REGISTERED: Final = f"""```python
@streams_http.recoverable("answer")
async def answer(messages: list[dict[str, Any]]):  # as above
    ...


@app.post("/api/chat")
async def ask(request: Request, chat: Chat):
    {SOURCE}
    ...  # as above
```"""
"""What the page has in place of two lines where another process is to go on."""
QUESTION: Final = {"id": "q", "role": "user", "parts": [{"type": "text", "text": HELD_ON}]}


@dataclass(eq=False, slots=True)
class FileEvent:
    """An event that another process can set, and one that takes no connections any more can see: a file is there."""

    path: Path

    def set(self) -> None:
        self.path.touch()

    async def wait(self) -> None:
        while not self.path.exists():  # noqa: ASYNC110 - no event tells
            await anyio.sleep(0.02)


@dataclass(eq=False, slots=True)
class Chats:
    """A server, and how often it has answered each question. After `HELD` words one that begins with `hold` is
    held, `fail` fails, and `tool` is answered with the call of a tool."""

    url: str = ""
    runs: Counter[str] = field(default_factory=Counter[str])
    requests: Counter[str] = field(default_factory=Counter[str])
    may_go_on: anyio.Event | FileEvent = field(default_factory=anyio.Event)

    async def go_on(self) -> None:
        self.may_go_on.set()

    async def answer(self, messages: list[dict[str, Any]]) -> AsyncGenerator[object]:
        question = "".join(part.get("text", "") for part in messages[-1]["parts"])
        self.runs[question] += 1
        if question == TOOL:
            yield CALL
            return
        for number, word in enumerate(WORDS):
            if question.startswith("hold") and number == HELD:
                await self.may_go_on.wait()
            if question == "fail" and number == HELD:
                raise ValueError(question)
            yield word


MADE: Final = 'StreamsHTTP("sqlite:///streams.db")'


class Shown(StrEnum):
    """The apps of the page."""

    PLAIN = "plain"
    AGENT = "an agent of Pydantic AI's"
    DURABLE = "Pydantic AI's endpoint in DurableStreaming"


def app_of(
    chats: Chats,
    streams_http: StreamsHTTP,
    which: Shown = Shown.PLAIN,
    *,
    when_running: str = "replace",
    is_recoverable: bool = False,
) -> ASGIApp:
    """Give an app of the page over other streams, for pages of any origin, with a page that has the clients."""
    shown: dict[str, Any] = {"given": streams_http}
    apps = [block for block in blocks(PAGE) if MADE in block]
    program = apps[list(Shown).index(which)].replace(MADE, "given")
    program = program.replace('when_running="replace"', f'when_running="{when_running}"')
    if is_recoverable:
        program = program.replace("source = answer(chat.messages)", SOURCE)
        assert program.count(SOURCE) == (PAGE.read_text().count(REGISTERED)) == 1
    exec(compile(program, str(PAGE), "exec", dont_inherit=True), shown)
    answer = streams_http.recoverable("answer")(chats.answer) if is_recoverable else chats.answer
    shown |= {"answer": answer} if which is Shown.PLAIN else {"agent": agent_of(chats)}
    add_page(shown["app"])
    shown["app"].post("/go-on")(chats.go_on)
    exposed = ["X-Genkit-Stream-Id", "X-Workflow-Run-Id", "X-Resumable-Stream-Id"]
    with_cors = CORSMiddleware(shown["app"], ["*"], ["*"], ["*"], expose_headers=exposed)
    return closing_preflights(counting(with_cors, chats.requests))


def agent_of(chats: Chats) -> Agent:
    """Give an agent of Pydantic AI's that answers as this does."""

    async def words(messages: list[ModelMessage], _: AgentInfo) -> AsyncGenerator[str]:
        (prompt,) = [part.content for part in messages[-1].parts if isinstance(part, UserPromptPart)]
        async for word in chats.answer([{"parts": [{"text": prompt if isinstance(prompt, str) else str(prompt[0])}]}]):
            yield str(word)

    return Agent(FunctionModel(stream_function=words))


def counting(app: ASGIApp, requests: Counter[str]) -> ASGIApp:
    """Count what is asked for."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            requests[scope["method"]] += 1
        await app(scope, receive, send)

    return wrapped


def add_page(app: FastAPI) -> None:
    """Add the page, and its program."""

    @app.get("/page")
    async def page() -> Response:
        return HTMLResponse('<!doctype html><body><script type="module" src="/chats.js"></script>')

    @app.get("/chats.js")
    async def program() -> Response:
        return FileResponse(bundle())


def bundle() -> Path:
    """Give the page's program with all its packages in one file."""
    return bundle_of(PACKAGES / "chats.js")


def job_of(url: str, *, ask: str = "", chat: str = "c", **more: object) -> dict[str, object]:
    """Give what a client is to do: show a chat, and ask something there."""
    return {"url": url, "chat": chat, "ask": ask, **more}


def answers(event: Event) -> list[str]:
    """Give the texts of the answers that a chat shows."""
    shown: list[str] = json.loads(event["data"])
    return shown


def shows(status: str, *texts: str) -> Callable[[Event], bool]:
    """Give what says whether a chat has this status, and shows these answers."""
    return lambda event: event["event"] == status and answers(event) == list(texts)


async def asked(url: str) -> str:
    """Ask what is held, as a page did that is gone; give the stream."""
    body = {"id": "c", "messages": [QUESTION], "trigger": "submit-message"}
    async with httpx.AsyncClient(base_url=url) as http, http.stream("POST", "/api/chat", json=body) as answer:
        return answer.headers["X-Workflow-Run-Id"]


async def post(url: str, path: str) -> object:
    """Give what a POST is answered with."""
    async with httpx.AsyncClient(base_url=url) as http:
        return (await http.post(path)).raise_for_status().json()


@asynccontextmanager
async def served(which: Shown = Shown.PLAIN, *, when_running: str = "replace") -> AsyncGenerator[Chats]:
    """Serve one; at the end no reader has left anything behind in the server."""
    streams, chats = InMemoryStreamManager(), Chats()
    async with serving(app_of(chats, StreamsHTTP(streams), which, when_running=when_running)) as chats.url:
        yield chats
        await until(lambda: not feeds_of(streams))
