"""What an ASGI app answers in an event loop of ours, taken in another thread, or in another event loop."""

import asyncio
import errno
import gc
import json
import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import nullcontext
from typing import Any, Final, Self

import anyio.to_thread
import pytest
from tests.core.test_loop_thread import at_a_signal, raised_by
from tests.inside import threads_of_ours
from tests.web.test_flask import BOUND_SECONDS, until

from streamkeep import StorageError, StreamManager, StreamManagerClosedError, StreamNotFoundError
from streamkeep.http import Access, Ended, StreamsHTTP
from streamkeep.http.response import ASGIApp, Message, Receive, Scope, Send, can_be_cut, send_response
from streamkeep.http.threads import BUFFER_BYTES, AsyncBody, Body, Pipe, StreamsThread, scope_of
from streamkeep.storages.memory import MemoryStorage

ENVIRON: Final = {"REQUEST_METHOD": "POST", "PATH_INFO": "/", "SERVER_PROTOCOL": "HTTP/1.1"}
HEAD: Final[Message] = {"type": "http.response.start", "status": 200, "headers": [(b"X-A", b"a"), (b"Connection", b"close")]}
PIECE: Final = b"x" * 10_000


@pytest.fixture
def threads() -> Iterator[StreamsThread]:
    with StreamsThread("memory://") as threads:
        yield threads


class Answering:
    """An ASGI app: sends its head and so many pieces, then waits until its client has gone, unless it is to `end` or to be `cut`."""

    def __init__(self, pieces: int = 1, then: str = "wait") -> None:
        self.sent = 0
        self.came: list[Message] = []
        self.refused = threading.Event()
        self.gone = threading.Event()
        self._pieces = pieces
        self._then = then

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        self.came.append(await receive())
        await send(HEAD)
        for _ in range(self._pieces):
            try:
                await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            except OSError:
                self.refused.set()
                break
            self.sent += 1
        if self._then == "wait":
            assert (await receive())["type"] == "http.disconnect"
            self.gone.set()
        elif self._then == "end":
            await send({"type": "http.response.body", "body": b"."})


def pipe_of(threads: StreamsThread, app: ASGIApp, body: bytes = b"") -> Pipe:
    taken = threads.answer(scope_of(ENVIRON), body, lambda _: app)
    assert (taken.status, taken.headers) == (200, [("x-a", "a")])
    assert isinstance(taken.body, Pipe)
    return taken.body


def test_a_body_is_given_as_it_comes_and_ends(threads: StreamsThread) -> None:
    app = Answering(3, "end")
    assert b"".join(Body(pipe_of(threads, app, b"asked"))) == 3 * PIECE + b"."
    assert app.came == [{"type": "http.request", "body": b"asked", "more_body": False}]


async def test_a_body_is_given_to_another_event_loop(threads: StreamsThread) -> None:
    pipe = await asyncio.to_thread(pipe_of, threads, Answering(3, "end"))
    assert b"".join([part async for part in AsyncBody(pipe)]) == 3 * PIECE + b"."


async def test_a_wait_that_is_cancelled_loses_nothing(threads: StreamsThread) -> None:
    app = Answering(1)
    pipe = await asyncio.to_thread(pipe_of, threads, app)
    body = AsyncBody(pipe)
    assert await anext(body) == PIECE
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(body), 0.01)
    threads.start().call(pipe.send, {"type": "http.response.body", "body": b"later", "more_body": True})
    assert await anext(body) == b"later"
    body.close()


def test_who_takes_nothing_is_not_sent_more_than_a_bit(threads: StreamsThread) -> None:
    app = Answering(100, "end")
    body = Body(pipe_of(threads, app))
    until(lambda: app.sent * len(PIECE) >= BUFFER_BYTES - len(PIECE))
    assert app.sent * len(PIECE) <= BUFFER_BYTES + len(PIECE)
    assert len(b"".join(body)) == 100 * len(PIECE) + 1


@pytest.mark.parametrize("leave", [Body.close, lambda _: None], ids=["closed", "dropped"])
@pytest.mark.parametrize("pieces", [1, 100], ids=["waiting", "sending"])
def test_an_app_is_told_that_its_client_has_gone(threads: StreamsThread, pieces: int, leave: Callable[[Body], None]) -> None:
    app = Answering(pieces)
    body = Body(pipe_of(threads, app))
    assert next(body)
    leave(body)
    del body
    gc.collect()
    assert app.gone.wait(BOUND_SECONDS)
    assert app.refused.is_set() is (pieces > 1)


def test_an_answer_without_its_last_message_is_cut(threads: StreamsThread) -> None:
    body = Body(pipe_of(threads, Answering(1, "cut")))
    assert next(body) == PIECE
    with pytest.raises(ConnectionResetError):
        next(body)


def test_who_waits_is_told_of_the_end(threads: StreamsThread) -> None:
    gate, answers = threading.Event(), list[object]()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(HEAD)
        await anyio.to_thread.run_sync(gate.wait, BOUND_SECONDS)

    pipe = pipe_of(threads, app)

    def take() -> None:
        try:
            answers.append(next(Body(pipe)))
        except ConnectionResetError as error:
            answers.append(error)

    waiting = threading.Thread(target=take)
    waiting.start()
    until(lambda: pipe._waiting is not None)
    gate.set()
    waiting.join(BOUND_SECONDS)
    assert len(answers) == 1
    assert isinstance(answers[0], ConnectionResetError)


def test_an_answer_whose_length_is_known_is_whole(threads: StreamsThread) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send_response(send, 200, PIECE * 100)

    assert threads.answer(scope_of(ENVIRON), b"", lambda _: app).body == PIECE * 100


def test_an_app_that_fails_without_an_answer_is_an_error(threads: StreamsThread, caplog: pytest.LogCaptureFixture) -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ValueError("broken")

    with pytest.raises(RuntimeError, match="no answer"):
        threads.answer(scope_of(ENVIRON), b"", lambda _: app)
    assert "broken" in caplog.text


def test_closing_ends_what_answers(threads: StreamsThread) -> None:
    taken = threads.respond(scope_of(ENVIRON), iter(["a"]), id="s")
    assert isinstance(taken.body, Pipe)
    assert b'"result"' in b"".join(Body(taken.body))
    body = Body(pipe_of(threads, Answering()))
    assert next(body) == PIECE
    threads.close()
    with pytest.raises(ConnectionResetError):
        next(body)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_has_one_of_its_own(threads: StreamsThread) -> None:
    child = os.fork()
    if not child:
        try:
            whole = b"".join(Body(pipe_of(threads, Answering(3, "end"))))
            threads.close()
            os._exit(0 if whole == 3 * PIECE + b"." else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert b"".join(Body(pipe_of(threads, Answering(1, "end"))))


def test_a_manager_is_made_for_each_start() -> None:
    made: list[StreamManager] = []

    def make() -> StreamManager:
        made.append(StreamManager.connect("memory://"))
        return made[-1]

    threads = StreamsThread(make)
    for _ in range(2):
        threads.start()
        threads.close()
    assert len(made) == 2
    assert not any(manager.is_running for manager in made)


def test_ctrl_c_of_a_program_that_has_streams_cancels_the_main_task_of_asyncio() -> None:
    cancelled = list[bool]()

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGINT)  # which is no KeyboardInterrupt here
        try:
            await asyncio.sleep(BOUND_SECONDS)
        finally:
            cancelled.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StreamsThread("memory://") as threads:
            with pytest.raises(KeyboardInterrupt):
                asyncio.run(main())
            assert threads.respond(scope_of(ENVIRON), ["a"]).status == 200
    finally:
        signal.signal(signal.SIGINT, before)
    assert cancelled == [True]


SERVERS: Final[dict[str, tuple[dict[str, Any], bool]]] = {
    "gunicorn": ({"SERVER_SOFTWARE": "gunicorn/27.0.1"}, True),
    "HTTP/1.0": ({"SERVER_PROTOCOL": "HTTP/1.0"}, False),
    "wsgiref": ({"SERVER_SOFTWARE": "WSGIServer/0.2"}, False),
}


@pytest.mark.parametrize("server", SERVERS)
def test_where_a_body_ends_with_its_connection_nothing_is_cut(server: str) -> None:
    environ, cuts = SERVERS[server]
    assert can_be_cut(scope_of({**ENVIRON, **environ})) is cuts


def test_a_request_is_read_as_wsgi_has_it() -> None:
    scope = scope_of(
        {
            "REQUEST_METHOD": "POST",
            "SCRIPT_NAME": "/api",
            "PATH_INFO": "/caf\u00c3\u00a9",
            "QUERY_STRING": "a=1",
            "CONTENT_TYPE": "text/plain",
            "CONTENT_LENGTH": "",
            "HTTP_LAST_EVENT_ID": "s/1/2",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.url_scheme": "https",
        }
    )
    assert (scope["path"], scope["root_path"], scope["query_string"]) == ("/api/café", "/api", b"a=1")
    assert sorted(scope["headers"]) == [(b"content-type", b"text/plain"), (b"last-event-id", b"s/1/2")]
    assert (scope["http_version"], scope["scheme"]) == ("1.1", "https")


def test_the_streams_are_those_of_a_streamshttp(threads: StreamsThread) -> None:
    assert isinstance(threads.start().entered.http, StreamsHTTP)


class Closable:
    """A source that does not await, and notes where it is closed."""

    def __init__(self) -> None:
        self.closed_in: list[int] = []

    def __iter__(self) -> Iterator[str]:
        return iter("a")

    def close(self) -> None:
        self.closed_in.append(threading.get_ident())


def test_a_source_that_is_not_begun_is_closed_in_a_thread(threads: StreamsThread) -> None:
    gate, joined = threading.Event(), Closable()

    def waits() -> Iterator[str]:
        yield "a"
        assert gate.wait(BOUND_SECONDS)

    threads.respond(scope_of(ENVIRON), waits(), key="k")
    assert not threads.respond(scope_of(ENVIRON), joined, key="k").started
    gate.set()
    assert len(joined.closed_in) == 1
    assert joined.closed_in[0] not in {threading.get_ident(), threads.start()._thread.ident}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_view_that_is_ended_while_it_is_asked_starts_nothing(stop: type[BaseException]) -> None:
    asked = list[Access]()

    def authorize(access: Access) -> str:
        asked.append(access)
        if len(asked) == 1:
            raise stop
        return "ann"

    with StreamsThread("memory://", authorize=authorize) as threads:
        source = Closable()
        with pytest.raises(stop):
            threads.respond(scope_of(ENVIRON), source, id="s")
        until(lambda: source.closed_in)
        assert threads.cancel(scope_of(ENVIRON), "s").status == 404
        assert threads.respond(scope_of(ENVIRON), ["a"], id="s").started
    assert [access.action for access in asked] == ["start", "stop", "start"]


async def test_a_view_that_awaits_and_is_cancelled_while_it_is_asked_starts_nothing() -> None:
    asked, gate = threading.Event(), threading.Event()

    def authorize(_access: Access) -> str:
        asked.set()
        assert gate.wait(BOUND_SECONDS)
        return "ann"

    with StreamsThread("memory://", authorize=authorize) as threads:
        source = Closable()
        view = asyncio.create_task(threads.arespond(scope_of(ENVIRON), source))
        await asyncio.to_thread(asked.wait, BOUND_SECONDS)
        view.cancel()
        with pytest.raises(asyncio.CancelledError):
            await view
        await asyncio.to_thread(until, lambda: source.closed_in)
        gate.set()


@pytest.mark.parametrize("has_come", [True, False])
async def test_the_client_of_an_answer_whose_view_is_cancelled_is_gone(threads: StreamsThread, has_come: bool) -> None:
    gate, stop, running = threading.Event(), threading.Event(), threads.start()

    def chunks() -> Iterator[str]:
        gate.set()
        yield "a" * BUFFER_BYTES
        stop.wait(BOUND_SECONDS)

    try:
        view = asyncio.create_task(threads.arespond(scope_of(ENVIRON), chunks()))
        await asyncio.sleep(0)  # until it waits
        assert gate.wait(BOUND_SECONDS)  # in its event loop, which so does nothing about the answer
        if has_come:
            until(lambda: running.entered.bodies)
        view.cancel()
        with pytest.raises(asyncio.CancelledError):
            await view
        await asyncio.to_thread(until, lambda: not running.entered.tasks._tasks)
    finally:
        stop.set()


def test_an_authorize_of_any_kind_is_asked_and_what_it_raises_is_raised_in_the_view() -> None:
    class Asking:
        async def __call__(self, access: Access) -> str:
            if access.action == "stop":
                raise KeyError("a bug")
            return "ann"

    with StreamsThread("memory://", authorize=Asking()) as threads:
        assert threads.respond(scope_of(ENVIRON), ["a"], id="s").status == 200
        with pytest.raises(KeyError):
            threads.cancel(scope_of(ENVIRON), "s")


def test_as_many_run_as_may_and_their_threads_end_with_them() -> None:
    gate = threading.Event()

    def waits() -> Iterator[str]:
        yield "a"
        assert gate.wait(BOUND_SECONDS)

    before = threads_of_ours()
    with StreamsThread("memory://", max_producers=20) as threads:
        answers = [threads.respond(scope_of(ENVIRON), waits(), key=number) for number in range(20)]
        refused, joined = (threads.respond(scope_of(ENVIRON), waits(), key=key) for key in (20, 0))
        assert (refused.status, joined.status, joined.started) == (429, 200, False)
        # One for each, and the event loop's.
        until(lambda: len(threads_of_ours() - before) == 21)
        gate.set()
        for answer in answers:
            assert isinstance(answer.body, Pipe)
            assert b'"result"' in b"".join(Body(answer.body))
        until(lambda: len(threads_of_ours() - before) == 1)
        assert threads.respond(scope_of(ENVIRON), ["a"], key=20).started
    assert threads_of_ours() <= before


def test_who_comes_while_it_closes_is_answered_503(threads: StreamsThread, monkeypatch: pytest.MonkeyPatch) -> None:
    running, source = threads.start(), Closable()
    running.close()
    monkeypatch.setattr(threads._threads, "starting", lambda: running)  # as who has looked a moment before
    assert threads.respond(scope_of(ENVIRON), source).status == 503
    assert len(source.closed_in) == 1


def test_what_was_produced_is_read_here_but_not_in_the_event_loop() -> None:
    told = list[object]()

    async def awaiting(ended: Ended) -> None:
        with pytest.raises(RuntimeError, match=r"await ended\.chunks"):
            ended.chunks_here()
        told.append(ended)

    with StreamsThread("memory://", on_end=awaiting) as threads:
        threads.respond(scope_of(ENVIRON), ["a", "b"], id="s")
        until(lambda: told)
        (ended,) = told
        assert isinstance(ended, Ended)
        assert ended.chunks_here() == ["a", "b"]
        threads.start().call(threads.start().entered.http.streams.delete, "s")
        with pytest.raises(StreamNotFoundError):
            ended.chunks_here()
    with pytest.raises(StreamManagerClosedError):
        ended.chunks_here()


class Starting(MemoryStorage):
    """A storage whose opening waits for a gate, and fails if it is to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = 0
        self.entering, self.gate = threading.Event(), threading.Event()
        self.fails = False

    def make(self) -> StreamManager:
        manager = StreamManager(self)
        manager._make_storage = lambda: self  # as `connect` has it
        return manager

    async def __aenter__(self) -> Self:
        self.begun += 1
        self.entering.set()
        await anyio.to_thread.run_sync(self.gate.wait, BOUND_SECONDS, abandon_on_cancel=True)
        if self.fails:
            raise OSError("no more files")
        return await super().__aenter__()


@pytest.fixture
def storage() -> Starting:
    return Starting()


@pytest.fixture
def starting(storage: Starting) -> Iterator[StreamsThread]:
    threads = StreamsThread(storage.make)
    yield threads
    storage.gate.set()
    threads.close()


@pytest.mark.parametrize("fails", [True, False])
async def test_views_that_await_share_a_start_and_wait_for_it_without_threads(
    storage: Starting, starting: StreamsThread, fails: bool
) -> None:
    storage.fails = fails
    sources = [Closable() for _ in range(60)]
    views = [asyncio.create_task(starting.arespond(scope_of(ENVIRON), source)) for source in sources]
    current = asyncio.create_task(starting.acurrent("k"))
    await asyncio.to_thread(storage.entering.wait, BOUND_SECONDS)
    pool = asyncio.get_running_loop()._default_executor  # type: ignore[attr-defined]
    assert len(pool._threads) == 1
    storage.gate.set()
    statuses = {taken.status for taken in await asyncio.wait_for(asyncio.gather(*views), BOUND_SECONDS)}
    assert (storage.begun, statuses) == (1, {503 if fails else 200})
    with pytest.raises(StorageError if fails else StreamNotFoundError):
        await current
    assert not fails or all(len(source.closed_in) == 1 for source in sources)


def test_a_start_that_fails_by_the_system_is_answered_503_and_closes_the_source(
    storage: Starting, starting: StreamsThread
) -> None:
    storage.fails = True
    storage.gate.set()
    source = Closable()
    taken = starting.respond(scope_of(ENVIRON), source)
    assert (taken.status, len(source.closed_in)) == (503, 1)
    assert isinstance(taken.body, bytes)
    assert json.loads(taken.body)["error"]["status"] == "UNAVAILABLE"
    storage.fails = False
    assert starting.respond(scope_of(ENVIRON), ["a"]).status == 200


def test_an_event_loop_that_cannot_be_made_is_answered_503_and_closes_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> StreamManager:
        raise OSError(errno.EMFILE, "Too many open files")

    threads, source = StreamsThread(make), Closable()
    assert threads.respond(scope_of(ENVIRON), source).status == 503
    assert len(source.closed_in) == 1


def test_a_view_that_is_interrupted_while_it_starts_closes_its_source(storage: Starting, starting: StreamsThread) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    source = Closable()
    with at_a_signal(interrupt) as send:
        sending, _ = raised_by(lambda: storage.entering.wait(BOUND_SECONDS) and send())
        with pytest.raises(KeyboardInterrupt):
            starting.respond(scope_of(ENVIRON), source)
    sending.join(BOUND_SECONDS)
    assert len(source.closed_in) == 1


async def test_a_view_that_is_cancelled_while_it_starts_closes_its_source(storage: Starting, starting: StreamsThread) -> None:
    async def chunks() -> AsyncGenerator[str]:
        yield "a"

    source = chunks()
    view = asyncio.create_task(starting.arespond(scope_of(ENVIRON), source))
    await asyncio.to_thread(storage.entering.wait, BOUND_SECONDS)
    view.cancel()
    with pytest.raises(asyncio.CancelledError):
        await view
    with pytest.raises(StopAsyncIteration):
        await anext(source)


@pytest.mark.parametrize("begun", [True, False])
def test_a_source_is_closed_once_whether_the_event_loop_has_begun_with_it_or_not(
    threads: StreamsThread, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    running, source = threads.start(), Closable()
    if not begun:
        monkeypatch.setattr(
            running, "_call", lambda _: running._end(next(iter(running._calls)))
        )  # it has ended before it came to it
    with pytest.raises(RuntimeError, match="starts a stream") if begun else nullcontext():
        taken = threads.respond(scope_of({**ENVIRON, "REQUEST_METHOD": "GET"}), source)
        assert taken.status == 503
    assert len(source.closed_in) == 1
    monkeypatch.undo()
