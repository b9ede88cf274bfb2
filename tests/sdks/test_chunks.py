"""What holds for the chunks of any SDK: where they end, and how they are closed. No SDK is needed for it."""

import gc
import threading
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Self

import anyio
import anyio.lowlevel
import pytest
from anyio import to_thread

from streamkeep import PublicError
from streamkeep.http.sources import close
from streamkeep.integrations import anthropic, openai_sdk

DELTA: Any = {"type": "response.output_text.delta", "delta": "x"}
LAST: Any = {"type": "response.completed", "response": {"id": "r", "status": "completed", "output": []}}


def choice(index: int, finish_reason: str | None = None) -> Any:
    return {"choices": [{"index": index, "delta": {}, "finish_reason": finish_reason}]}


# Where they end


@pytest.mark.parametrize(
    ("chunks", "events"),
    [
        (openai_sdk.chunks, []),
        (openai_sdk.chunks, [DELTA]),
        (openai_sdk.chunks, [{"type": "response.new"}]),
        (openai_sdk.chunks, [{"choices": []}]),
        (openai_sdk.chunks, [choice(0)]),
        (openai_sdk.chunks, [choice(0), choice(1), choice(1, "stop")]),
        (anthropic.chunks, []),
        (anthropic.chunks, [{"type": "message_start"}, {"type": "content_block_stop", "index": 0}]),
    ],
)
async def test_a_stream_that_is_cut_off_is_no_whole_answer(chunks: Callable[[Any], Any], events: list[Any]) -> None:
    async def come() -> AsyncGenerator[Any]:
        for event in events:
            yield event

    seen: list[Any] = []
    for given in (chunks(come()), chunks(events)):
        with pytest.raises(PublicError, match="ended without its last event") as raised:
            if isinstance(given, AsyncIterator):
                seen += [chunk async for chunk in given]
            else:
                seen += list(given)
        assert raised.value.status == "ABORTED"


@pytest.mark.parametrize(
    ("chunks", "events"),
    [
        (openai_sdk.chunks, [DELTA, LAST]),
        (openai_sdk.chunks, [{**LAST, "type": "response.incomplete"}]),
        (openai_sdk.chunks, [choice(0, "length"), choice(0), {"choices": [], "usage": {}}]),  # as Azure's filters come late
        (openai_sdk.chunks, [choice(1), choice(0, "stop"), choice(1, "tool_calls")]),
        (anthropic.chunks, [{"type": "message_start"}, {"type": "message_stop"}]),
    ],
)
def test_a_stream_with_its_last_event_is_whole(chunks: Callable[[Any], Any], events: list[Any]) -> None:
    assert len(list(chunks(events))) == len(events)


def test_one_that_is_closed_by_who_reads_it_has_not_failed() -> None:
    given = openai_sdk.chunks([DELTA, DELTA])
    assert next(given) == DELTA
    given.close()
    assert list(given) == []


# Closed by another thread, or another task


class Waiting:
    """A stream whose second event comes when it is closed, or when it may; with `close` it ends, or fails, or goes on."""

    def __init__(self, *, then: Callable[[], Any]) -> None:
        self.asked, self.may_come, self.closed = threading.Event(), threading.Event(), 0
        self._then = then
        self._count = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        self._count += 1
        if self._count == 2:
            self.asked.set()
            assert self.may_come.wait(10)
            return self._then()
        return DELTA

    def close(self) -> None:
        self.closed += 1
        self.may_come.set()


def goes_on() -> Any:
    return DELTA


def ends() -> Any:
    raise StopIteration


def fails() -> Any:
    raise OSError("its connection is closed")


@pytest.mark.parametrize("then", [goes_on, ends, fails])
async def test_closed_by_another_thread_it_closes_the_stream_and_has_not_failed(then: Callable[[], Any]) -> None:
    stream = Waiting(then=then)
    given = openai_sdk.chunks(stream)
    seen: list[Any] = []
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(to_thread.run_sync, lambda: seen.extend(given))
            await to_thread.run_sync(stream.asked.wait, 10)
            given.close()
    assert seen == [DELTA]
    assert stream.closed


class AsyncWaiting:
    """The same of one that awaits."""

    def __init__(self, *, then: Callable[[], Any]) -> None:
        self.asked, self.may_come = anyio.Event(), anyio.Event()
        self._then = then
        self._count = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        self._count += 1
        if self._count == 2:
            self.asked.set()
            await self.may_come.wait()
            try:
                return self._then()
            except StopIteration:
                raise StopAsyncIteration from None
        return DELTA

    async def aclose(self) -> None:
        self.may_come.set()


@pytest.mark.parametrize("then", [goes_on, ends, fails])
async def test_closed_by_another_task_it_closes_the_stream_and_has_not_failed(
    then: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    stream = AsyncWaiting(then=then)
    given = openai_sdk.chunks(stream)
    seen: list[Any] = []

    async def read() -> None:
        seen.extend([chunk async for chunk in given])

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await stream.asked.wait()
            await given.aclose()
    assert seen == [DELTA]
    assert not caplog.records


def test_what_is_given_is_closed_though_leaving_its_manager_fails(caplog: pytest.LogCaptureFixture) -> None:
    closed: list[str] = []

    class Manager:
        def __enter__(self) -> Iterator[Any]:
            return iter([DELTA, LAST])

        def __exit__(self, *_: object) -> None:
            raise ValueError("it cannot be left")

        def close(self) -> None:
            closed.append("manager")

    given = openai_sdk.chunks(Manager())
    next(given)
    given.close()
    assert closed == ["manager"]
    assert "could not be closed" in caplog.text


# Closed before they are begun


class Requesting:
    """A context manager that keeps its request as a coroutine, as OpenAI's and Anthropic's do."""

    def __init__(self) -> None:
        self._request = self.send()

    async def send(self) -> list[Any]:
        raise AssertionError("nobody has entered it")

    async def __aenter__(self) -> Any:
        return await self._request

    async def __aexit__(self, *_: object) -> None:
        pass


@asynccontextmanager
async def unawaited() -> AsyncGenerator[list[warnings.WarningMessage]]:
    """Give what Python warns of while entered."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
        gc.collect()


async def test_what_is_closed_before_it_is_begun_leaves_nothing_that_nobody_has_awaited() -> None:
    async with unawaited() as caught:
        for chunks in (openai_sdk.chunks, anthropic.chunks):
            given = chunks(Requesting())
            await given.aclose()
            del given
        for source in (Requesting(), anyio.lowlevel.checkpoint()):  # as `respond` closes what it is given and does not want
            await close(source)
        del source
    assert not caught


async def test_a_coroutine_is_refused_and_leaves_nothing_that_nobody_has_awaited() -> None:
    async with unawaited() as caught:
        coroutine: Any = anyio.lowlevel.checkpoint()
        with pytest.raises(TypeError, match="a coroutine has to be awaited first"):
            openai_sdk.chunks(coroutine)
        del coroutine
    assert not caught
