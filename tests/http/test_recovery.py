"""Recoverable functions: what a process leaves when it goes, another one makes the rest of; and what every framing says of that."""

import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field, SecretStr
from tests.http.servers import events_of, frames_of, http_to, until

from streamkeep import InvalidArgumentError, Recovery, StreamAlreadyExistsError, StreamInput, StreamManager
from streamkeep.events import encode_json
from streamkeep.http import (
    AGUIFraming,
    Bounds,
    Ended,
    Framing,
    GenkitFraming,
    LangGraphFraming,
    NDJSONFraming,
    PassThroughFraming,
    SSEFraming,
    StreamsHTTP,
    TextFraming,
    UIMessagesFraming,
)
from streamkeep.http.runner import Runner
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

RECOVERING: Final = ("recovering", None)
RESTARTED: Final = ("restarted", None)
AT_ONCE: Final = timedelta(0)


class Question(BaseModel):
    """What is asked."""

    text: str
    words: int = 2


class App:
    """An app that may be one process of several: what it shares with the others is the storage.

    Attributes:
        may_end: set when its answers may end.
        ends: what `on_end` was told.
    """

    def __init__(self, storage: MemoryStorage, **options: Any) -> None:
        self.may_end = anyio.Event()
        self.ends: list[Ended] = []
        self.seen: list[object] = []
        options = {"drain": AT_ONCE, "on_end": self.ends.append, **options}
        self.http = StreamsHTTP(StreamManager(storage), drain_on_signal=False, **options)

    @asynccontextmanager
    async def answering(self, call: Callable[[], object], framing: Framing | None = None) -> AsyncGenerator[httpx.AsyncClient]:
        app = FastAPI(lifespan=self.http.lifespan)

        @app.post("/ask")
        async def ask(request: Request) -> Response:
            return await self.http.respond(request, call(), id="s", framing=framing)  # type: ignore[arg-type]

        @app.get("/s")
        async def follow(request: Request) -> Response:
            return await self.http.follow(request, "s", framing=framing)

        async with http_to(app) as http:
            yield http


def words(app: App) -> Callable[..., Any]:
    """Give a generator function that begins again."""

    async def make(question: Question) -> AsyncGenerator[str]:
        app.seen.append(question)
        for number in range(question.words):
            yield f"{question.text}{number}"
        await app.may_end.wait()

    return make


def counted(app: App) -> Callable[..., Any]:
    """Give a function that goes on where it was."""

    async def make(stream: StreamInput, question: Question) -> str:
        begin = stream.checkpoint or 0
        app.seen.append((stream.attempt, begin))
        for number in range(begin, begin + question.words):
            await stream.write(f"{question.text}{number}", checkpoint=number + 1)
        await app.may_end.wait()
        return "whole"

    return make


def blocking(app: App) -> Callable[..., Any]:
    """Give one that does not await, and goes on where it was."""

    def make(stream: StreamInput, question: Question) -> Iterator[str]:
        begin = stream.checkpoint or 0
        for number in range(begin, begin + question.words):
            stream.write_soon(f"{question.text}{number}", checkpoint=number + 1)
        while not (app.may_end.is_set() or stream.cancelled.is_set()):
            time.sleep(0.01)
        yield "last"

    return make


async def asked(http: httpx.AsyncClient, storage: MemoryStorage, tail: int = 2) -> None:
    """Ask, and leave when there are so many events."""
    async with http.stream("POST", "/ask") as response:
        assert response.status_code == 200, await response.aread()
        with anyio.fail_after(20):
            while (page := await storage.read("s")) is None or page.head.tail < tail:  # noqa: ASYNC110
                await anyio.sleep(0.01)


async def left(
    storage: MemoryStorage, stream: str, input: Mapping[str, object] = MappingProxyType({"question": {"text": "w"}})
) -> None:
    """Have a process leave a stream."""
    async with (
        StreamManager(storage) as streams,
        streams.open(stream, recovery=Recovery("words", dict(input), backoff=AT_ONCE)) as writer,
    ):
        await writer.write("old")


@pytest.mark.promise("P24")
@pytest.mark.parametrize(
    ("make", "events"),
    [
        (words, [*"ab", RECOVERING, RESTARTED, *"ab", ("done", None)]),
        (counted, [*"ab", RECOVERING, *"cd", ("done", "whole")]),
        (blocking, [*"ab", RECOVERING, *"cd", "last", ("done", None)]),
    ],
)
async def test_what_a_process_leaves_when_it_is_shut_down_another_one_makes_the_rest_of(
    make: Callable[[App], Any], events: list[Any]
) -> None:
    storage, question = MemoryStorage(), Question(text="w")
    texts = dict(zip("abcd", ("w0", "w1", "w2", "w3"), strict=True))
    expected = [("chunk", texts.get(event, event)) if isinstance(event, str) else event for event in events]
    one, two = App(storage), App(storage)
    first, second = (app.http.recoverable("words")(make(app)) for app in (one, two))
    async with one.answering(lambda: first(question=question)) as http:
        await asked(http, storage)
    async with two.answering(lambda: second(question=question)):
        two.may_end.set()
        assert await events_of(two.http.streams, "s") == expected
        await until(lambda: two.ends)
    (left,), (ended,) = one.ends, two.ends
    assert (left.status, left.is_stored) == ("error", False)
    assert (ended.status, ended.is_stored) == ("done", True)


async def test_chunks_of_a_run_that_began_again_are_those_of_the_last_time() -> None:
    storage, question = MemoryStorage(), Question(text="w")
    found: list[Any] = []

    async def told(ended: Ended) -> None:
        found.append(await ended.chunks())

    one, two = App(storage), App(storage, on_end=told)
    first, second = (app.http.recoverable("words")(words(app)) for app in (one, two))
    async with one.answering(lambda: first(question=question)) as http:
        await asked(http, storage)
    async with two.answering(lambda: second(question=question)):
        two.may_end.set()
        await until(lambda: found)
    assert found == [["w0", "w1"]]
    assert one.seen == two.seen == [question]


async def test_a_producer_that_fails_is_not_gone_on_with_and_one_that_is_stopped_neither() -> None:
    storage = MemoryStorage()
    one, two = App(storage), App(storage)

    async def fail(stream: StreamInput) -> None:
        raise ValueError(stream.id)

    call = one.http.recoverable("fails")(fail)
    two.http.recoverable("fails")(fail)
    two.http.recoverable("words")(words(two))
    kept = one.http.recoverable("words")(words(one))
    async with two.answering(call):
        async with one.answering(call) as http:
            assert (await http.post("/ask")).text.count("INTERNAL") == 2
        async with one.answering(lambda: kept(question=Question(text="w"))) as http:
            await one.http.streams.delete("s")
            await asked(http, storage)
            assert await one.http.streams.cancel("s")
    assert two.seen == []


async def test_what_was_kept_for_an_older_version_of_a_function_fails_its_stream() -> None:
    storage = MemoryStorage()
    await left(storage, "s", {"prompt": "why"})
    app = App(storage)
    app.http.recoverable("words")(words(app))
    async with app.answering(lambda: ()):
        (_, recovering, end) = await events_of(app.http.streams, "s")
    assert recovering == RECOVERING
    assert end[0] == "error"
    assert app.seen == []


async def test_who_goes_on_waits_for_a_place() -> None:
    storage = MemoryStorage()
    for number in range(5):
        await left(storage, f"lost{number}")
    app = App(storage, max_producers=1)
    running: list[int] = []

    async def make(stream: StreamInput, question: Question) -> None:
        running.append(len(app.http.runner._runs))
        await anyio.sleep(0.01)
        await stream.done(question.text)

    app.http.recoverable("words")(make)
    async with app.answering(lambda: ()):
        for number in range(5):
            assert (await events_of(app.http.streams, f"lost{number}"))[-1] == ("done", "w")
    assert running == [1] * 5


async def test_the_bounds_of_a_run_hold_for_who_goes_on() -> None:
    storage = MemoryStorage()
    await left(storage, "s")
    app = App(storage, bounds=Bounds(max_duration=timedelta(seconds=0.2)))
    app.http.recoverable("words")(words(app))
    async with app.answering(lambda: ()):
        assert (await events_of(app.http.streams, "s"))[-1] == ("error", "DEADLINE_EXCEEDED")


def test_what_cannot_be_kept_is_refused_when_it_is_registered_or_called() -> None:
    http = StreamsHTTP("memory://")

    async def make(stream: StreamInput, question: Question, more: int = 0) -> None: ...

    def only_by_place(question: str, /) -> None: ...

    def any_number(*questions: str) -> None: ...

    register = http.recoverable("make")
    call = register(make)
    for wrong in (only_by_place, any_number):
        with pytest.raises(TypeError):
            register(wrong)
    with pytest.raises(InvalidArgumentError):
        http.recoverable("make")(make)
    with pytest.raises(InvalidArgumentError):
        http.recoverable("other", attempts=0)(make)
    kept = call(question=Question(text="w"), more=1).recovery.input
    assert json.loads(encode_json(kept)) == {"question": {"text": "w", "words": 2}, "more": 1}
    with pytest.raises(TypeError):
        call(prompt="w")
    for arguments in ({"question": object()}, {"question": {"words": 1}}, {"question": Question(text="w"), "more": "x"}):
        with pytest.raises(InvalidArgumentError):
            call(**arguments)


def test_a_call_gives_all_that_is_required_but_the_stream() -> None:
    http = StreamsHTTP("memory://")

    async def one(question: str, more: int = 0) -> None: ...

    async def two(stream: StreamInput, question: str) -> None: ...

    async def three(stream, self: str) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001 - nothing says what it is

    def not_the_first(question: str, stream: StreamInput) -> None: ...

    calls = [http.recoverable(function.__name__)(function) for function in (one, two, three)]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError):
        calls[1](question="w", stream="w")
    assert [call(question="w").recovery.name for call in calls[:2]] == ["one", "two"]
    assert calls[2](self="w").function.keywords == {"self": "w"}  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        http.recoverable("four")(not_the_first)


TYPED: Final = """
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamkeep import StreamInput
    from tests.http.test_recovery import Question


async def answer(stream: StreamInput, question: str) -> AsyncIterator[str]:
    yield question


async def unknown(stream: StreamInput, question: Question) -> None: ...
"""


def test_what_type_checkers_alone_know_is_needed_only_of_what_is_kept() -> None:
    http, written = StreamsHTTP("memory://"), dict[str, Any]()
    exec(TYPED, written)
    call = http.recoverable("answer")(written["answer"])
    assert call(question="w").function.keywords == {"question": "w"}  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="Question"):
        http.recoverable("unknown")(written["unknown"])


def test_arguments_may_hold_models() -> None:
    async def make(
        questions: list[Question], last: Question | None = None, other: dict[str, Question | int] | None = None
    ) -> None: ...

    call = StreamsHTTP("memory://").recoverable("make")(make)
    arguments = {"questions": [Question(text="a")], "last": Question(text="b"), "other": {"c": Question(text="c"), "d": 1}}
    assert call(**arguments).function.keywords == arguments  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgumentError):
        call(questions=[{"words": 1}])


class Credentials(BaseModel):
    key: SecretStr = SecretStr("")
    tenant: str = Field(default="none", exclude=True)


@pytest.mark.parametrize("given", [Credentials(key=SecretStr("k")), Credentials(tenant="acme")])
def test_arguments_that_json_does_not_hold_are_refused(given: Credentials) -> None:
    async def make(credentials: Credentials, others: list[Credentials] | None = None, plain: object = None) -> None: ...

    call = StreamsHTTP("memory://").recoverable("make")(make)
    for arguments in ({"credentials": given}, {"credentials": Credentials(), "others": [given]}):
        with pytest.raises(InvalidArgumentError, match=r"another (credentials|others)"):
            call(**arguments)
    whole = {"credentials": Credentials(), "others": [], "plain": Credentials(tenant="acme")}  # read as a dict
    assert call(**whole).function.keywords["plain"] == {"key": ""}  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="by keyword"):
        call(given)


@pytest.mark.promise("P24")
async def test_an_apps_own_metadata_says_nothing_of_how_its_chunks_are_read() -> None:
    storage = MemoryStorage()
    recovery = Recovery("words", {"question": {"text": "w"}}, backoff=AT_ONCE)
    async with StreamManager(storage) as streams, streams.open("s", metadata={"events": "many"}, recovery=recovery) as writer:
        await writer.write("old")
    app = App(storage)
    app.may_end.set()
    app.http.recoverable("words")(words(app))
    async with app.answering(lambda: ()):
        assert await events_of(app.http.streams, "s") == [
            ("chunk", "old"),
            RECOVERING,
            RESTARTED,
            ("chunk", "w0"),
            ("chunk", "w1"),
            ("done", None),
        ]


async def test_who_goes_on_has_the_place_of_a_start_that_failed() -> None:
    storage = MemoryStorage()
    faulty = FaultyStorage(storage)
    async with StreamManager(faulty) as streams, Runner(streams, max_producers=1, drain=AT_ONCE) as runner:
        await (await streams.open("there")).done()
        held = faulty.hold("commit")

        async def start() -> None:
            with pytest.raises(StreamAlreadyExistsError):
                await runner.start("there", nothing)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start)
            await held.reached.wait()
            await left(storage, "s")
            runner.recover({"words"}, lambda _: nothing)
            await anyio.sleep(0.05)
            held.release()
        assert (await events_of(streams, "s"))[-1] == ("done", None)


async def nothing(stream: StreamInput, stop: anyio.Event) -> None: ...


async def test_nothing_is_registered_while_it_runs() -> None:
    async def make() -> None: ...

    async with StreamsHTTP("memory://") as http:
        with pytest.raises(RuntimeError):
            http.recoverable("make")(make)


FRAMINGS: Final[dict[str, tuple[Callable[[], Framing], str]]] = {
    "sse": (SSEFraming, 'event: recovering\ndata: {"attempt":0}\n'),
    "sse again": (SSEFraming, "event: restarted\ndata: {}\n"),
    "pass through": (PassThroughFraming, "event: restarted\ndata: {}\n"),
    "ndjson": (NDJSONFraming, '{"restarted":true}\n'),
    "ui messages": (UIMessagesFraming, '{"type":"text-end","id":"text-1"}'),
    "ui messages, recovering": (UIMessagesFraming, '{"type":"data-recovering","data":{},"transient":true}'),
    "ui messages, restarted": (UIMessagesFraming, '{"type":"data-restarted","data":{}}'),
    "langgraph": (LangGraphFraming, "event: recovering\ndata: "),
    "langgraph again": (LangGraphFraming, "event: restarted\ndata: {}\n"),
}


@pytest.mark.parametrize("name", FRAMINGS)
async def test_every_framing_that_can_say_so_tells_its_readers(name: str) -> None:
    framing, told = FRAMINGS[name]
    storage = MemoryStorage()
    await left(storage, "s")
    app = App(storage)
    app.http.recoverable("words")(words(app))
    app.may_end.set()
    reader = FastAPI()
    reading = StreamsHTTP(app.http.streams)

    @reader.get("/s")
    async def follow(request: Request) -> Response:
        return await reading.follow(request, "s", framing=framing())

    async with app.http.streams, reading, http_to(reader) as http:
        bodies: list[str] = []
        began = anyio.Event()

        async def read() -> None:
            async with http.stream("GET", "/s") as response:
                async for text in response.aiter_text():
                    bodies.append(text)
                    began.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await began.wait()
            await tasks.start(_serve_until_done, app)
    assert told in "".join(bodies)


async def _serve_until_done(app: App, *, task_status: anyio.abc.TaskStatus[None]) -> None:
    async with app.http:
        task_status.started()
        await events_of(app.http.streams, "s")


@pytest.mark.parametrize(
    ("framing", "query", "is_shown"),
    [
        (GenkitFraming, "", False),
        (SSEFraming, "", False),
        (TextFraming, "", False),
        (NDJSONFraming, "", False),
        (UIMessagesFraming, "", False),
        (UIMessagesFraming, "?startIndex=0", True),
        (SSEFraming, "?after=0", True),
    ],
)
async def test_who_comes_later_is_not_shown_what_was_superseded_unless_he_counts(
    framing: Callable[[], Framing], query: str, *, is_shown: bool
) -> None:
    async with StreamsHTTP("memory://") as reading:
        async with reading.streams.open("s", recovery=Recovery("words")) as stream:
            for chunk in ("old0", "old1"):
                await stream.write(chunk)
            await stream.restart()
            await stream.write("new")
            await stream.done()
        app = FastAPI()

        @app.get("/s")
        async def follow(request: Request) -> Response:
            return await reading.follow(request, "s", framing=framing())

        async with http_to(app) as http:
            body = (await http.get(f"/s{query}")).text
    assert "new" in body
    assert ("old1" in body) is is_shown


async def test_a_text_of_ui_messages_that_is_gone_on_with_is_one_text() -> None:
    framing, storage = UIMessagesFraming(), MemoryStorage()
    await left(storage, "s")
    async with StreamManager(storage) as streams:
        async with streams.recoveries("words") as lost:
            stream = await anext(lost)
            await stream.write("new")
            await stream.restart()
            await stream.write("again")
            await stream.done()
        async with streams.subscribe("s") as events:
            body = b"".join([framing.event(event, "s/0") async for event in events]).decode()
    parts = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: {")]
    assert [(part["type"], part.get("id")) for part in parts] == [
        ("start", None),
        ("text-start", "text-1"),
        ("text-delta", "text-1"),
        ("data-recovering", None),
        ("text-delta", "text-1"),
        ("text-end", "text-1"),
        ("data-restarted", None),
        ("text-start", "text-2"),
        ("text-delta", "text-2"),
        ("text-end", "text-2"),
        ("finish", None),
    ]


async def test_genkits_clients_are_sent_nothing_that_they_do_not_know() -> None:
    framing = GenkitFraming()
    async with StreamManager.connect("memory://") as streams:
        async with streams.open("s", recovery=Recovery("words")) as stream:
            await stream.write("old")
            await stream.restart()
            await stream.done("end")
        async with streams.subscribe("s") as events:
            body = b"".join([framing.event(event, "") async for event in events])
    assert frames_of(body) == [{"message": "old", "offset": 0}, {"result": "end", "offset": 2}]


AGUI: Final[list[dict[str, Any]]] = [
    {"type": "RUN_STARTED", "threadId": "t", "runId": "r"},
    {"type": "STEP_STARTED", "stepName": "think"},
    {"type": "TEXT_MESSAGE_START", "messageId": "m", "role": "assistant"},
    {"type": "TOOL_CALL_START", "toolCallId": "c", "toolCallName": "n"},
    {"type": "TOOL_CALL_END", "toolCallId": "c"},
]


async def test_a_run_of_ag_ui_that_begins_again_ends_what_was_begun_and_is_started_once() -> None:
    framing = AGUIFraming()
    async with StreamManager.connect("memory://") as streams:
        async with streams.open("s", recovery=Recovery("run")) as stream:
            for event in AGUI:
                await stream.write(event)
            await stream.restart()
            await stream.write(AGUI[0])
            await stream.write({"type": "RUN_FINISHED", "threadId": "t", "runId": "r"})
            await stream.done()
        async with streams.subscribe("s") as events:
            body = b"".join([framing.event(event, "c") async for event in events]).decode()
    types = [line.split('"')[3] for line in body.splitlines() if line.startswith("data: ")]
    assert types == [*(event["type"] for event in AGUI), "TEXT_MESSAGE_END", "STEP_FINISHED", "CUSTOM", "RUN_FINISHED"]
