"""What a manager tells hooks: each thing once, by who did it, whatever hooks do. On virtual time."""

import asyncio
import functools
import gc
import sys
from collections import UserDict
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest
import trio
from anyio import wait_all_tasks_blocked
from tests.core.helpers import Process, core_of, resumed

from streamkeep import (
    ErrorInfo,
    Hooks,
    InMemoryStreamManager,
    InvalidArgumentError,
    Recovery,
    StorageCorruptError,
    StorageError,
    StorageUnavailableError,
    StreamCompletedError,
    StreamInfo,
    StreamInput,
    StreamManager,
    StreamManagerClosedError,
    StreamTakenOverError,
    sync,
)
from streamkeep._background import Background
from streamkeep._lifecycle import FORGET_OPEN_SECONDS
from streamkeep._telling import Telling
from streamkeep.hooks import Commit, Delivery, Outcome, Reader, Sample, StorageFailure
from streamkeep.http.runner import Runner
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.retrying import RetryingStorage
from streamkeep.testing.faults import FaultyStorage


class Notes(Hooks):
    """Notes what it is told, as sentences."""

    def __init__(self, who: str = "", told: list[str] | None = None) -> None:
        self.who = f"{who}: " if who else ""
        self.told: list[str] = [] if told is None else told
        self.commits: list[Commit] = []
        self.deliveries: list[Delivery] = []
        self.failures: list[StorageFailure] = []
        self.samples: list[Sample] = []
        self.carriers: list[Mapping[str, str]] = []

    def note(self, sentence: str) -> None:
        self.told.append(self.who + sentence)

    def started(self, stream: StreamInfo) -> None:
        self.note(f"{stream.id} started")

    def taken_over(self, stream: StreamInfo, before: StreamInfo) -> None:
        assert stream.writer != before.writer
        self.note(f"{stream.id} taken over")

    def ended(self, stream: StreamInfo, outcome: Outcome) -> None:
        self.note(f"{stream.id} ended: {outcome}")

    def writer_left(self, stream: StreamInfo, outcome: Outcome) -> None:
        self.note(f"{stream.id}'s writer left: {outcome}")

    def not_opened(self, stream: str, writer: str) -> None:
        self.note(f"{stream} not opened")

    def committed(self, commit: Commit) -> None:
        self.commits.append(commit)

    def reader_entered(self, reader: Reader) -> None:
        self.carriers.append(reader.stream.carrier)
        self.note(f"{reader.stream.id} read after {reader.after}")

    def reader_left(self, reader: Reader) -> None:
        self.note(f"{reader.stream.id} left")

    def delivered(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)

    def storage_failed(self, failure: StorageFailure) -> None:
        self.failures.append(failure)

    def sampled(self, sample: Sample) -> None:
        self.samples.append(sample)


@pytest.fixture
def told() -> list[str]:
    """What was told in all processes, in order."""
    return []


@pytest.fixture
async def both(storage: FaultyStorage, told: list[str]) -> Any:
    """Two processes over one storage."""
    one, two = StreamManager(storage, hooks=[Notes("one", told)]), StreamManager(storage, hooks=[Notes("two", told)])
    async with one, two:
        yield one, two


# How a stream ends


@pytest.mark.promise("P26")
async def test_an_end_by_the_writer_is_told_once_and_its_leaving_behind_it(
    both: tuple[StreamManager, StreamManager], told: list[str]
) -> None:
    one, _ = both
    async with one.open("done") as stream:
        await stream.done()
    with suppress(ValueError):
        async with one.open("failed"):
            raise ValueError
    stream = await one.open("imposed")
    stream.end_soon(ErrorInfo("DEADLINE_EXCEEDED", "too long"))
    with suppress(StreamCompletedError):
        await stream.flush()
    assert told == [
        "one: done started",
        "one: done ended: done",
        "one: done's writer left: done",
        "one: failed started",
        "one: failed ended: INTERNAL",
        "one: failed's writer left: INTERNAL",
        "one: imposed started",
        "one: imposed ended: DEADLINE_EXCEEDED",
        "one: imposed's writer left: DEADLINE_EXCEEDED",
    ]


@pytest.mark.promise("P26")
@pytest.mark.parametrize("operation", ["cancel", "delete"])
@pytest.mark.parametrize("where", [0, 1], ids=["here", "elsewhere"])
async def test_an_end_by_others_is_told_by_them_and_the_writer_is_told_to_have_left(
    both: tuple[StreamManager, StreamManager], told: list[str], operation: str, where: int
) -> None:
    stream = await both[0].open("s")
    await getattr(both[where], operation)("s")
    with anyio.fail_after(60):
        await stream.cancelled.wait()
    by, end, left = (["one", "two"][where], *{"cancel": ("CANCELLED", "stopped"), "delete": ("deleted", "deleted")}[operation])
    assert told == ["one: s started", f"{by}: s ended: {end}", f"one: s's writer left: {left}"]
    if operation == "cancel":  # what has ended does so no more
        await both[where].cancel("s")
        await both[where].delete("s")
        assert len(told) == 3


async def test_a_writer_may_be_told_to_have_left_before_the_end_that_has_stopped_it(
    storage: FaultyStorage, told: list[str]
) -> None:
    async with StreamManager(storage, hooks=[Notes("one", told)]) as streams:
        stream = await streams.open("s")
        hold = storage.hold("commit", after=True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(streams.cancel, "s")
            await hold.reached.wait()
            with pytest.raises(StreamCompletedError):
                await stream.write(1)
            hold.release()
    assert told == ["one: s started", "one: s's writer left: stopped", "one: s ended: CANCELLED"]


@pytest.mark.promise("P26")
async def test_a_death_is_told_once_by_whoever_has_found_it(
    both: tuple[StreamManager, StreamManager], told: list[str], mortal: Process
) -> None:
    await mortal.streams.open("s")
    mortal.die()

    async def follow(streams: StreamManager) -> None:
        async with streams.subscribe("s") as events:
            async for _ in events:
                pass

    async with anyio.create_task_group() as readers:
        for streams in (*both, *both):
            readers.start_soon(follow, streams)
    assert len([sentence for sentence in told if sentence.endswith("s ended: ABORTED")]) == 1
    mortal.come_back()


@pytest.mark.promise("P26")
async def test_a_stream_that_nobody_looks_at_is_told_to_have_expired(memory: MemoryStorage, told: list[str]) -> None:
    dead = FaultyStorage(memory)
    async with StreamManager(dead) as streams:
        await streams.open("s")
        dead.is_down = True
    later = FaultyStorage(memory)
    later.ahead_seconds = FORGET_OPEN_SECONDS + 1
    async with StreamManager(later, hooks=[Notes("one", told)]):
        await anyio.sleep(300)
        assert told == ["one: s ended: expired"]


@pytest.mark.promise("P26")
async def test_taking_over_is_told_and_so_is_releasing(both: tuple[StreamManager, StreamManager], told: list[str]) -> None:
    one, two = both
    await (await one.open("s")).close()
    async with two.open("s", resume=True) as stream:
        await stream.done()
    assert told == [
        "one: s started",
        "one: s's writer left: released",
        "two: s taken over",
        "two: s ended: done",
        "two: s's writer left: done",
    ]


@pytest.mark.promise("P26")
async def test_a_writer_that_was_taken_over_from_is_told_to_have_left_and_not_that_its_stream_has_ended(
    storage: FaultyStorage, told: list[str], mortal: Process
) -> None:
    async with StreamManager(storage, hooks=[Notes("one", told)]) as streams:
        stopped = FaultyStorage(storage)
        async with StreamManager(stopped, hooks=[Notes("two", told)]) as other:
            lost = await other.open("s")
            stopped.is_down = True
            _kept = await resumed(streams, "s")
            stopped.is_down = False
            with pytest.raises(StreamTakenOverError):
                await lost.write(1)
    assert told == [
        "two: s started",
        *["one: s not opened"] * told.count("one: s not opened"),  # its writer might have been alive
        "one: s taken over",
        "two: s's writer left: taken over",
        "one: s's writer left: released",
    ]


@pytest.mark.promise("P26")
async def test_a_stream_that_is_gone_on_with_is_taken_over_and_ends_once(
    both: tuple[StreamManager, StreamManager], told: list[str], mortal: Process
) -> None:
    await mortal.streams.open("s", recovery=Recovery("go"))
    mortal.die()
    async with both[1].recoveries("go") as lost:
        stream = await anext(lost)
        await stream.done()
    mortal.come_back()
    assert told == ["two: s taken over", "two: s ended: done", "two: s's writer left: done"]


@pytest.mark.promise("P26")
async def test_a_manager_that_is_closed_while_its_storage_is_away_tells_that_it_does_not_know(
    storage: FaultyStorage, told: list[str]
) -> None:
    async with StreamManager(storage, hooks=[Notes("one", told)]) as streams:
        stream = await streams.open("s")
        storage.is_down = True
        with pytest.raises(StorageError):
            await stream.done()
    assert told == ["one: s started", "one: s's writer left: unknown"]
    storage.is_down = False


async def test_a_manager_whose_storage_cannot_be_closed_tells_its_end_all_the_same(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    async def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(MemoryStorage, "__aexit__", fail)
    notes = Notes("one", told)
    streams = StreamManager.connect("memory://", hooks=[notes])
    await streams.__aenter__()
    await streams.open("s")
    await streams.subscribe("s").__aenter__()
    monkeypatch.setattr(MemoryStorage, "commit", fail)
    with pytest.raises(OSError, match="disk"):
        await streams.aclose()
    assert told[-2:] == ["one: s's writer left: unknown", "one: s left"]
    assert notes.samples[-1] == Sample(notes.samples[-1].session, 0, 0, 0, 0, None, None)


@pytest.mark.promise("P26")
async def test_an_end_whose_answer_was_lost_is_told_once(storage: FaultyStorage, told: list[str]) -> None:
    async with StreamManager(storage, hooks=[Notes("one", told)]) as streams:
        for id, times in (("once", 1), ("twice", 2)):
            stream = await streams.open(id)
            storage.lose_answer("commit", times=times)
            storage.refuse("read", times=times - 1)
            with suppress(StorageError):
                await stream.done()
            with suppress(StorageError):
                await stream.flush()
            await stream.flush()
    assert [sentence for sentence in told if "ended" in sentence] == ["one: once ended: done", "one: twice ended: done"]


@pytest.mark.promise("P26")
async def test_what_was_not_opened_was_not_started(storage: FaultyStorage, told: list[str]) -> None:
    async with StreamManager(storage, hooks=[Notes("one", told)]) as streams:
        async with streams.open("there") as stream:
            await stream.done()
        told.clear()
        with suppress(Exception):
            await streams.open("there")
        storage.lose_answer("commit")
        storage.refuse("read")
        with pytest.raises(StorageError):
            await streams.open("lost")
        hold = storage.hold("commit")
        with anyio.move_on_after(1):
            await streams.open("cancelled")
        hold.release()
        with pytest.raises(InvalidArgumentError):
            await streams.open("not an id")
    assert told == ["one: there not opened", "one: lost not opened", "one: cancelled not opened"]


# Hooks that misbehave


class NativeError(BaseException):
    """What native libraries may raise."""


@pytest.mark.promise("P17", "P26")
@pytest.mark.parametrize("raised", [ValueError, NativeError, asyncio.CancelledError, trio.Cancelled, GeneratorExit])
async def test_whatever_a_hook_raises_is_logged_once_a_second_and_harms_no_stream(
    storage: FaultyStorage, quiet_logs: pytest.LogCaptureFixture, raised: type[BaseException]
) -> None:
    class Bad(Hooks):
        pass

    def bad(*_: object) -> Any:
        if raised is trio.Cancelled:
            raise trio.Cancelled._create(source="unknown")
        raise raised

    hook, good, odd = Bad(), Notes(), Bad()
    odd.ended = functools.partial(bad)  # type: ignore[method-assign]  # as people do
    names = [name for name, method in vars(Hooks).items() if callable(method)]
    assert len(names) == 13
    for name in names:
        setattr(hook, name, bad)
    async with StreamManager(storage, hooks=[hook, odd, good]) as streams:
        for id in "abc":
            async with streams.open(id) as stream, streams.subscribe(id) as events:
                await stream.write(1)
                assert (await anext(events)).chunk == 1
                await stream.done()
        await streams.cancel((await streams.open("d")).id)
        storage.refuse("read")
        with pytest.raises(StorageError):
            await streams.info("a")
    assert [commit.events for commit in good.commits[:2]] == [1, 1]
    assert "d ended: CANCELLED" in good.told
    logged = [record for record in quiet_logs.records if "the hook" in record.getMessage()]
    assert 1 <= len(logged) <= 4  # all within a second or two
    assert all(record.exc_info for record in logged)


@pytest.mark.parametrize("hooks", [[object()], Notes(), [Notes]])
def test_what_is_no_hook_is_refused(hooks: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="derived from"):
        InMemoryStreamManager(hooks=hooks)


def test_a_hook_that_awaits_is_refused() -> None:
    class Awaits(Hooks):
        async def ended(self, stream: StreamInfo, outcome: Outcome) -> None:  # type: ignore[override]  # that is what is tested
            pass

    with pytest.raises(InvalidArgumentError, match=r"`Awaits\.ended` is a coroutine function"):
        StreamManager(MemoryStorage(), hooks=[Awaits()])


class _AwaitsWhenCalled:
    async def __call__(self, *values: object) -> None:
        pass


async def _gives_later(*values: object) -> AsyncIterator[None]:
    yield


def _yields(*values: object) -> Generator[None]:
    yield


@pytest.mark.parametrize(
    ("hook", "kind"),
    [
        (_AwaitsWhenCalled(), "a coroutine function"),
        (functools.partial(_gives_later, 1), "a generator function"),
        (_yields, "a generator function"),
        (None, "nothing that can be called"),
    ],
)
def test_what_would_do_nothing_when_it_is_called_is_refused(hook: Any, kind: str) -> None:
    class Mistaken(Hooks):
        pass

    mistaken = Mistaken()
    mistaken.producing = hook  # type: ignore[method-assign]  # that is what is tested
    with pytest.raises(InvalidArgumentError, match=rf"`Mistaken\.producing` is {kind}"):
        StreamManager(MemoryStorage(), hooks=[mistaken])


@pytest.mark.parametrize(
    "hook", [contextmanager(_yields), functools.partial(print, "ended"), Notes, Notes().note, list[str]().append]
)
def test_any_other_callable_is_a_hook(hook: Any) -> None:
    good = Hooks()
    good.ended = hook  # type: ignore[method-assign]  # that is what is tested
    StreamManager(MemoryStorage(), hooks=[good])


# What is told of commits, readers and the storage


async def test_commits_say_what_was_stored(storage: FaultyStorage) -> None:
    notes = Notes()
    async with StreamManager(storage, hooks=[notes]) as streams, streams.open("s") as stream:
        await stream.write("a")
        hold = storage.hold("commit")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.flush)
            stream.write_soon("b")
            await hold.reached.wait()
            stream.write_soon("c")
            stream.write_soon("d")
            await anyio.sleep(2)
            hold.release()
        await stream.done()
    counts = [(commit.first, commit.events, commit.bytes, commit.queued, commit.is_end) for commit in notes.commits]
    assert counts == [(0, 1, 4, 0, False), (1, 1, 4, 2, False), (2, 2, 8, 0, False), (4, 1, 5, 0, True)]
    assert notes.commits[1].seconds == pytest.approx(2)
    assert len({commit.writer for commit in notes.commits}) == 1


@pytest.mark.promise("P26")
async def test_readers_are_told_of_once_whether_they_leave_or_are_dropped_or_the_manager_closes(storage: FaultyStorage) -> None:
    notes = Notes()
    async with StreamManager(storage, hooks=[notes]) as streams:
        stream = await streams.open("s")
        await stream.write("a")
        with pytest.raises(Exception, match="not found"):
            await streams.subscribe("t").__aenter__()
        async with streams.subscribe("s", 0):
            pass
        dropped = await streams.subscribe("s").__aenter__()
        notes.told.clear()
        await anyio.sleep(3)
        assert notes.samples[-1].readers == 1
        assert notes.samples[-1].lag == 1
        del dropped
        gc.collect()
        await anyio.sleep(3)
        assert notes.told == ["s left"]
        assert notes.samples[-1].readers == 0
        kept = await streams.subscribe("s").__aenter__()
    assert notes.told == ["s left", "s read after None", "s's writer left: released", "s left"]
    await kept.__aexit__(None, None, None)
    assert notes.told[-2:] == ["s's writer left: released", "s left"]


async def test_deliveries_say_how_late_they_are_to_who_follows_and_not_to_who_reads_what_was_there(
    storage: FaultyStorage, memory: MemoryStorage
) -> None:
    here, there = Notes(), Notes()
    async with StreamManager(storage, hooks=[here]) as streams, StreamManager(memory, hooks=[there]) as elsewhere:
        stream = await streams.open("s")
        await stream.write("a")
        await anyio.sleep(100)
        async with streams.subscribe("s") as events, elsewhere.subscribe("s") as others:
            await anext(events)
            await anext(others)
            hold = storage.hold("commit", after=True)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stream.write, "b")
                await anext(others)
                await anyio.sleep(5)
                hold.release()
                await anext(events)
    assert [(delivery.first, delivery.events) for delivery in here.deliveries] == [(0, 1), (1, 1)]
    assert [delivery.seconds for delivery in there.deliveries] == [None, pytest.approx(0, abs=0.01)]
    assert [delivery.seconds for delivery in here.deliveries] == [None, pytest.approx(5, abs=0.01)]


async def test_samples_say_how_the_manager_is_doing_and_end_with_it(storage: FaultyStorage) -> None:
    notes = Notes()
    async with StreamManager(storage, hooks=[notes]) as streams:
        await anyio.sleep(2)
        assert notes.samples[-1].session_seconds is None
        stream = await streams.open("s")
        async with streams.subscribe("s"):
            await stream.write("a")
            hold = storage.hold("commit")
            stream.write_soon("b")
            await hold.reached.wait()
            stream.write_soon("c")
            await anyio.sleep(2.5)
            hold.release()
            sample = notes.samples[-1]
    name = notes.samples[0].session
    assert (sample.session, sample.streams, sample.queued, sample.readers, sample.lag) == (name, 1, 2, 1, 1)
    assert sample.session_seconds is not None
    assert sample.renewed_seconds is not None
    assert sample.renewed_seconds <= sample.session_seconds
    assert notes.samples[-1] == Sample(name, 0, 0, 0, 0, None, None)


async def test_errors_of_the_storage_and_its_retries_are_told_by_their_names(memory: MemoryStorage) -> None:
    notes = Notes()
    storage = FaultyStorage(memory)
    retrying = RetryingStorage(storage, timeout=timedelta(seconds=5))
    async with StreamManager(retrying, hooks=[notes]) as streams:
        await (await streams.open("s")).close()
        storage.refuse("read", times=2, error=StorageUnavailableError("away"))
        await streams.info("s")
        storage.refuse("commit", error=StorageUnavailableError("away"))
        await streams.cancel("s")
        storage.refuse("read", error=StorageError("password=secret"))
        with pytest.raises(StorageError):
            await streams.info("s")
    assert notes.failures == [
        StorageFailure("read", "StorageUnavailableError", is_retried=True),
        StorageFailure("read", "StorageUnavailableError", is_retried=True),
        StorageFailure("commit", "StorageUnavailableError", is_retried=True),
        StorageFailure("read", "StorageError", is_retried=False),
    ]
    assert not retrying.retried


# What is kept with a stream, and where its producer runs

here: ContextVar[str] = ContextVar("here", default="outside")


class Carrying(Notes):
    """Has something kept with each stream, and producers run in a context of its own."""

    def opening(self, stream: str, writer: str) -> Mapping[str, str]:
        return {"traceparent": f"of {stream} by {self.who}"}

    def producing(self, stream: StreamInfo) -> AbstractContextManager[object]:
        @contextmanager
        def within() -> Any:
            token = here.set(stream.id)
            yield
            here.reset(token)

        return within()


async def test_what_hooks_keep_with_a_stream_is_there_for_hooks_of_other_processes_and_nobody_elses(
    memory: MemoryStorage,
) -> None:
    one, two, three = Carrying("one"), Carrying("two"), Notes("three")
    async with StreamManager(memory, hooks=[one]) as first, StreamManager(memory, hooks=[two]) as second:
        stream = await first.open("s", metadata={"a": "b"})
        await stream.write(1)
        async with StreamManager(memory, hooks=[three]) as third, third.subscribe("s"):
            info = await third.info("s")
            assert info.metadata == {"a": "b"}
            assert info.carrier == three.carriers[0] == {"traceparent": "of s by one: "}
        await stream.close()
        async with second.open("s", resume=True) as again:
            assert (await first.info("s")).carrier == {"traceparent": "of s by two: "}
            await again.done()
    async with StreamManager(memory) as without, without.open("t") as plain:
        assert (await without.info("t")).carrier == {}
        page = await memory.read("t")
        assert page is not None
        assert b"carrier" not in page.head.state
        await plain.done()


async def test_what_a_hook_is_told_of_a_stream_cannot_be_used_to_change_it(memory: MemoryStorage) -> None:
    class Changing(Hooks):
        def opening(self, stream: str, writer: str) -> Mapping[str, str]:
            return {"a": "of the hook"}

        def started(self, stream: StreamInfo) -> None:
            for values in (stream.metadata, stream.carrier):
                values["a"] = "changed"  # type: ignore[index]

        def reader_entered(self, reader: Reader) -> None:
            self.started(reader.stream)

    async with StreamManager(memory, hooks=[Changing()]) as streams:
        async with streams.open("s", metadata={"a": "of the app"}) as stream, streams.subscribe("s"):
            await stream.done()
        info = await streams.info("s")
    assert (info.metadata, info.carrier) == ({"a": "of the app"}, {"a": "of the hook"})


class Lazy(UserDict[str, str]):
    """A mapping that is made when it is read, and cannot be."""

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError


@pytest.mark.parametrize("given", [{"a": "b" * 2_000}, {"a": 1}, {"a": "\ud800"}, ["a"], None, Lazy(a="b")])
async def test_what_cannot_be_kept_is_not(given: Any, quiet_logs: pytest.LogCaptureFixture) -> None:
    class Wrong(Hooks):
        def opening(self, stream: str, writer: str) -> Mapping[str, str]:
            return given  # type: ignore[no-any-return]

    async with InMemoryStreamManager(hooks=[Wrong()]) as streams, streams.open("s") as stream:
        assert (await streams.info("s")).carrier == {}
        await stream.done()
    assert quiet_logs.records


async def test_a_block_that_writes_runs_where_hooks_want_it_to_and_nothing_behind_it_does() -> None:
    async with InMemoryStreamManager(hooks=[Carrying()]) as streams:
        async with streams.open("s") as stream:
            assert here.get() == "s"
            await stream.done()
        assert here.get() == "outside"
        other = await streams.open("t")
        assert here.get() == "outside"
        await other.done()


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_producer_that_a_runner_runs_has_a_place_of_its_own_which_is_left_when_all_of_it_is_over(
    quiet_logs: pytest.LogCaptureFixture,
) -> None:
    places: list[str] = []

    class Placing(Hooks):
        def producing(self, stream: StreamInfo) -> AbstractContextManager[object]:
            @contextmanager
            def within() -> Any:
                token = here.set(f"in {stream.id}")
                yield
                here.reset(token)  # ValueError: this is another context than it was entered in
                places.append(f"left {stream.id}")

            return within()

    async def produce(stream: StreamInput, _stop: anyio.Event) -> None:
        places.append(here.get())

    async with (
        InMemoryStreamManager(hooks=[Placing()]) as streams,
        Runner(streams, on_end=lambda _: places.append(f"end {here.get()}")) as runner,
    ):
        await runner.start("s", produce)
        assert here.get() == "outside"
    assert places == ["in s", "end in s", "left s"]
    assert not quiet_logs.records


def test_code_that_does_not_await_has_hooks_too() -> None:
    notes = Notes()
    with sync.StreamManager.connect("memory://", hooks=[notes]) as streams:
        with streams.open("s") as stream:
            stream.write("a")
            stream.done()
        assert len(list(streams.subscribe("s"))) == 2
    assert notes.told == ["s started", "s ended: done", "s's writer left: done", "s read after None", "s left"]


async def test_without_hooks_nothing_is_told_and_of_hooks_nothing_that_nobody_has_overridden(streams: StreamManager) -> None:
    class Ends(Hooks):
        def ended(self, stream: StreamInfo, outcome: Outcome) -> None:
            pass

    assert core_of(streams).telling is None
    async with InMemoryStreamManager(hooks=[Ends()]) as some:
        telling = core_of(some).telling
        assert telling is not None
        assert (telling.of_commits, telling.of_deliveries, telling.of_samples) == (False, False, False)
        async with some.open("s") as stream, some.subscribe("s") as events:
            await stream.done()
            assert events._reader is None


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_no_hook_wants_to_know_costs_writers_and_readers_not_one_call() -> None:
    class Ends(Hooks):
        def ended(self, stream: StreamInfo, outcome: Outcome) -> None:
            pass

    async def calls(hooks: Sequence[Hooks]) -> int:
        counted = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal counted
            counted += event in {"call", "c_call"}

        async with InMemoryStreamManager(hooks=hooks) as streams:
            stream = await streams.open("s")
            async with streams.subscribe("s") as events:
                sys.setprofile(count)
                try:
                    for _ in range(200):
                        await stream.write("a")
                        await anext(events)
                finally:
                    sys.setprofile(None)
            await stream.done()
        return counted

    # The least of some, and not to the last call: the session's thread may call in between.
    without, with_ends = [min([await calls(hooks) for _ in range(5)]) for hooks in ([], [Ends()])]
    assert without > 0
    assert with_ends - without < 100


# What hardly ever happens


class Place:
    """What a hook wants a producer to run in, and which fails."""

    def __init__(self, at: str) -> None:
        self.at = at

    def __enter__(self) -> None:
        if self.at == "entering":
            raise ValueError

    def __exit__(self, *exc_info: object) -> None:
        if self.at == "leaving":
            raise ValueError


@pytest.mark.parametrize("place", [Place("entering"), Place("leaving"), Place("never"), None, 42])
async def test_a_place_that_cannot_be_entered_or_left_harms_no_producer(
    place: Any, quiet_logs: pytest.LogCaptureFixture
) -> None:
    class Placing(Hooks):
        def producing(self, stream: StreamInfo) -> AbstractContextManager[object] | None:
            return place  # type: ignore[no-any-return]

    async with InMemoryStreamManager(hooks=[Placing()]) as streams, streams.open("s") as stream:
        assert await stream.write("a") == 0
        await stream.done()
    fails = isinstance(place, Place) and place.at != "never"
    assert [record.exc_info is not None for record in quiet_logs.records] == [True] * fails


async def test_a_stream_that_is_opened_while_its_manager_closes_has_one_beginning_and_one_end(
    storage: FaultyStorage, told: list[str]
) -> None:
    async with StreamManager(storage, hooks=[Notes("one", told)]) as streams, anyio.create_task_group() as tasks:
        await (await streams.open("first")).close()
        told.clear()
        hold = storage.hold("commit", after=True)

        async def open_late() -> None:
            with pytest.raises(StreamManagerClosedError):
                await streams.open("s")

        tasks.start_soon(open_late)
        await hold.reached.wait()
        tasks.start_soon(streams.aclose)
        await wait_all_tasks_blocked()
        hold.release()
    assert told == ["one: s started", "one: s's writer left: released"]


async def test_failures_are_told_from_any_thread_and_nobody_is_told_who_does_not_ask_or_is_not_there(
    storage: FaultyStorage,
) -> None:
    notes, failure = Notes(), StorageError("away")
    async with StreamManager(storage, hooks=[notes]) as streams:
        telling = core_of(streams).telling
        assert telling is not None
        await anyio.to_thread.run_sync(telling.storage_failed, "commit", failure)
        await wait_all_tasks_blocked()
    assert notes.failures == [StorageFailure("commit", "StorageError", is_retried=False)]
    Telling([notes], Background()).storage_failed("commit", failure)
    Telling([Carrying()], Background()).storage_retried("commit", failure)
    assert len(notes.failures) == 1

    class Deaf(Hooks):
        pass

    Telling([Deaf()], Background()).storage_failed("commit", failure)


async def test_the_end_of_the_program_is_passed_on_and_what_fails_again_later_is_logged_again(
    streams: StreamManager, quiet_logs: pytest.LogCaptureFixture
) -> None:
    raised: list[type[BaseException]] = [ValueError, ValueError, ValueError, KeyboardInterrupt]

    class Bad(Hooks):
        def sampled(self, sample: Sample) -> None:
            raise raised.pop(0)

    telling = Telling([Bad()], core_of(streams).background)
    sample = Sample("", 0, 0, 0, 0, None, None)
    await anyio.sleep(10)
    for pause in (0, 0, 2):
        await anyio.sleep(pause)
        telling.sampled(sample)
    assert len(quiet_logs.records) == 2
    with pytest.raises(KeyboardInterrupt):
        telling.sampled(sample)


async def test_a_writer_whose_storage_has_lost_its_head_is_told_to_have_lost_its_stream(
    memory: MemoryStorage, told: list[str]
) -> None:
    async with StreamManager(memory, hooks=[Notes("one", told)]) as streams:
        stream = await streams.open("s")
        page = await memory.read("s")
        assert page is not None
        assert await memory.commit("s", page.head.version, msgspec.structs.replace(page.head, version=page.head.version + 1))
        with pytest.raises(StorageCorruptError):
            await stream.write("a")
    assert told[:2] == ["one: s started", "one: s's writer left: lost"]


async def test_who_wants_to_know_of_readers_alone_is_told_of_them_and_a_reader_says_how_far_behind_it_is() -> None:
    left: list[int] = []

    class Reads(Hooks):
        def reader_left(self, reader: Reader) -> None:
            left.append(reader.number)

    async with InMemoryStreamManager(hooks=[Reads()]) as some, some.open("s") as stream:
        events = some.subscribe("s")
        assert events.lag == 0
        await stream.write("a")
        async with events:
            assert events.lag == 1
            for chunk in "bcd":
                await stream.write(chunk)
            await stream.done()
            for lag in (4, 3, 2, 1, 0):  # also of what is at hand, and not given yet
                await anext(events)
                assert events.lag == lag
    assert len(left) == 1
