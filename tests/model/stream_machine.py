"""Random histories of streams: two managers over one storage, their writers and readers, compared after each step with the model.

Time stands still unless a step lets it pass, so whatever the managers do in the background is done at a step that is known.
"""

import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar
from weakref import ref

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.inside import feeds_of, tasks_of, writers_of

from streamkeep import Limits, StreamEvent, StreamEventType, StreamInfo, StreamInput, StreamManager
from streamkeep.errors import InvalidArgumentError, StreamBusyError, StreamkeepError, StreamManagerClosedError
from streamkeep.testing.clock import FakeClock

from . import stream_model as rules
from .kinds import Kind
from .portals import Portal
from .probes import ProbedStorage
from .stream_model import Event, Follower, Manager, Model, Writer
from .virtual_time import EPOCH, Workload

T = TypeVar("T")

IDS: Final = ("a", "b")
MANAGERS: Final = 2
SECONDS_UNTIL_DEAD: Final = 3 * int(rules.LEASE)
"""Twice the lease, and some looks: a session is observed anew when somebody removes its head meanwhile, because a clock jumped."""
LIMITS: Final = Limits(
    max_event_bytes=rules.MAX_EVENT_BYTES, max_events=rules.MAX_EVENTS, max_stream_bytes=rules.MAX_STREAM_BYTES
)

managers = st.integers(0, MANAGERS - 1)
picks = st.integers(0, 7)
chunks = st.one_of(
    st.integers(-9, 9),
    st.text(max_size=3),
    st.sampled_from([None, {"text": "word"}, "x" * 30, "too much " * 9, object()]),
)
offsets = st.one_of(st.none(), st.integers(0, rules.MAX_EVENTS))
naps = st.sampled_from(
    [before + nearly for before in (rules.LEASE, rules.LEASE + rules.GRACE, rules.TTL) for nearly in (-0.5, 0.5)]
)


@dataclass(eq=False)
class Reader:
    """A task that follows, and the model's."""

    model: Follower
    task: Future[str | type[StreamkeepError]]
    events: list[Event]


@dataclass(eq=False)
class Running:
    """A manager, and the model's."""

    streams: StreamManager
    leaving: AbstractContextManager[object]
    model: Manager


class StreamMachine(RuleBasedStateMachine):
    """Managers, handles and readers, each beside the model's. Steps are counted, and what calls came to."""

    def __init__(self, kind: Kind, counted: Counter[str]) -> None:
        super().__init__()
        self._counted = counted
        self._portal = Portal(kind.backend, stands_still=True)
        self._clock = FakeClock(EPOCH)
        self._model = Model(EPOCH)
        self._workload = Workload()
        open_storage = kind.at(self._portal.directory)
        self._storages = [
            self._portal.keep(ProbedStorage(open_storage(), self._workload, self._clock))[0] for _ in range(MANAGERS)
        ]
        self._pairs: list[tuple[StreamInput, Writer]] = []
        self._readers: list[Reader] = []
        self._closed: StreamManager | None = None
        self._managers = [self._start(index) for index in range(MANAGERS)]

    def teardown(self) -> None:
        try:
            for running in self._managers:
                with running.leaving:
                    pass
                assert tasks_of(running.streams) == writers_of(running.streams) == len(feeds_of(running.streams)) == 0
            self._pairs.clear()
            for reader in self._readers:
                reader.task.result(rules.LEASE)
        finally:
            self._portal.close()

    # Managers.

    @rule(manager=managers, pick=picks, metadata=st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=1))
    def open(self, manager: int, pick: int, metadata: dict[str, str]) -> None:
        self._open(manager, self._pick(pick), metadata, resume=False)

    @initialize(manager=managers)
    def open_the_first(self, manager: int) -> None:
        self._open(manager, IDS[0], {}, resume=False)

    @rule(manager=managers, pick=picks)
    def resume(self, manager: int, pick: int) -> None:
        self._open(manager, self._pick(pick), {}, resume=True)

    @rule(manager=managers, pick=picks)
    def resume_after_a_suspension(self, manager: int, pick: int) -> None:
        self.sleep_as_a_suspended_machine_does(rules.LEASE + 0.5)
        self._open(manager, self._pick(pick), {}, resume=True)

    @precondition(lambda self: self._model.logs)
    @rule(manager=managers, pick=picks)
    def cancel(self, manager: int, pick: int) -> None:
        running, stream = self._managers[manager], self._pick(pick)
        self._agree(lambda: running.streams.cancel(stream), lambda: self._model.cancel(running.model, stream))

    @precondition(lambda self: self._model.logs)
    @rule(manager=managers, pick=picks)
    def delete(self, manager: int, pick: int) -> None:
        running, stream = self._managers[manager], self._pick(pick)
        self._agree(lambda: running.streams.delete(stream), lambda: self._model.delete(running.model, stream))

    @precondition(lambda self: self._model.logs)
    @rule(manager=managers, pick=picks, after=st.sampled_from(["", "a", "ab", "b"]), limit=st.integers(1, 3))
    def ask(self, manager: int, pick: int, after: str, limit: int) -> None:
        streams, stream = self._managers[manager].streams, self._pick(pick)

        async def info() -> tuple[object, ...]:
            return _info(await streams.info(stream))

        async def list_streams() -> Sequence[tuple[object, ...]]:
            return [_info(info) for info in await streams.list(after, limit)]

        self._agree(info, lambda: self._model.info(stream))
        self._agree(list_streams, lambda: self._model.list_streams(after, limit))

    @rule(manager=managers)
    def sweep(self, manager: int) -> None:
        self._agree(self._managers[manager].streams.sweep, self._model.sweep)

    @rule(manager=managers)
    def close_a_manager_and_start_another(self, manager: int) -> None:
        running = self._managers[manager]
        with running.leaving:
            pass
        self._model.close_manager(running.model)
        self._closed = running.streams
        self._managers[manager] = self._start(manager)

    @rule(manager=managers, stream=st.sampled_from(["", ".hidden", "a b", "a" * 256, "é"]), offset=st.sampled_from([-1, 2**53]))
    def ask_for_what_cannot_be(self, manager: int, stream: str, offset: int) -> None:
        streams = self._managers[manager].streams
        assert self._outcome(lambda: _awaited(streams.open(stream))) is InvalidArgumentError
        assert self._outcome(lambda: streams.info(stream)) is InvalidArgumentError
        assert self._outcome(lambda: _read(streams, "a", offset, 1)) is InvalidArgumentError
        if (closed := self._closed) is not None:
            assert self._outcome(lambda: _awaited(closed.open("a"))) is StreamManagerClosedError
            assert self._outcome(lambda: closed.cancel("a")) is StreamManagerClosedError
            assert self._outcome(lambda: _read(closed, "a", None, 1)) is StreamManagerClosedError

    # Readers.

    @precondition(lambda self: self._model.logs)
    @rule(manager=managers, pick=picks, after=offsets)
    def read(self, manager: int, pick: int, after: int | None) -> None:
        running, stream = self._managers[manager], self._pick(pick)
        expected = _outcome_of(lambda: self._model.read(running.model, stream, after))
        number = len(expected) if isinstance(expected, list) else 1
        assert self._outcome(lambda: _read(running.streams, stream, after, number)) == expected

    @precondition(lambda self: self._model.logs and len(self._readers) < 4)
    @rule(manager=managers, pick=picks, after=offsets)
    def follow(self, manager: int, pick: int, after: int | None) -> None:
        running, stream = self._managers[manager], self._pick(pick)
        events: list[Event] = []
        task = self._portal.start(lambda: _follow(running.streams, stream, after, events))
        expected = _outcome_of(lambda: self._model.follow(running.model, stream, after))
        if isinstance(expected, Follower):
            self._readers.append(Reader(expected, task, events))
        else:
            assert task.result(rules.LEASE) == expected

    @precondition(lambda self: self._readers)
    @rule(data=st.data())
    def stop_following(self, data: st.DataObject) -> None:
        reader = self._readers.pop(data.draw(st.integers(0, len(self._readers) - 1), "reader"))
        reader.task.cancel()
        self._model.unfollow(reader.model)

    # Writers.

    @precondition(lambda self: self._pairs)
    @rule(data=st.data(), chunk=chunks)
    def write(self, data: st.DataObject, chunk: object) -> None:
        stream, model = self._draw(data)
        self._agree(lambda: stream.write(chunk), lambda: self._model.write(model, chunk))

    @precondition(lambda self: self._pairs)
    @rule(data=st.data(), chunk=chunks)
    def write_soon(self, data: st.DataObject, chunk: object) -> None:
        self._write_soon(*self._draw(data), chunk)

    @precondition(lambda self: self._pairs)
    @rule(data=st.data(), chunk=chunks)
    def write_soon_and_flush(self, data: st.DataObject, chunk: object) -> None:
        stream, model = self._draw(data)

        async def write_and_flush() -> int:
            offset = stream.write_soon(chunk)
            await stream.flush()
            return offset

        self._agree(write_and_flush, lambda: self._model.write_soon_and_flush(model, chunk))

    @precondition(lambda self: self._pairs)
    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        stream, model = self._draw(data)
        self._agree(stream.flush, lambda: self._model.flush(model))

    @precondition(lambda self: self._pairs)
    @rule(data=st.data(), end=st.sampled_from(["done", "error", "an exception leaves the block"]), output=chunks)
    def end(self, data: st.DataObject, end: str, output: object) -> None:
        stream, model = self._draw(data)
        error = ValueError("as it happens")
        match end:
            case "done":
                self._agree(lambda: stream.done(output), lambda: self._model.done(model, output))
            case "error":
                self._agree(lambda: stream.error(error), lambda: self._model.error(model))
            case _:
                self._agree(lambda: stream.__aexit__(ValueError, error, None), lambda: self._model.leave_by_exception(model))

    @precondition(lambda self: self._pairs)
    @rule(data=st.data(), last=st.one_of(st.none(), st.integers(0, 9)))
    def close(self, data: st.DataObject, last: int | None) -> None:
        stream, model = self._draw(data)
        if last is not None:
            self._write_soon(stream, model, last)
        self._agree(stream.close, lambda: self._model.close(model))

    @precondition(lambda self: self._pairs)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        stream, model = self._draw(data)
        was_kept = model in self._model.kept
        handle = ref(stream)
        self._pairs.remove((stream, model))
        self._model.drop(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del stream
        assert handle() is None or not was_kept, "a handle that was dropped is gone"

    # Time.

    @rule(seconds=naps)
    def sleep_as_a_suspended_machine_does(self, seconds: float) -> None:
        self._clock.advance(seconds)
        self._model.now += seconds

    @precondition(
        lambda self: not self._readers and all(log.writer or log.status != "open" for log in self._model.logs.values())
    )
    @rule()
    def sleep_for_more_than_a_day(self) -> None:
        self.sleep_as_a_suspended_machine_does(rules.FORGET + 60)

    @rule(seconds=st.integers(1, 20))
    def seconds_pass(self, seconds: int) -> None:
        for _ in range(seconds):
            self._pass_time(1)

    @precondition(lambda self: not self._readers and any(log.writer for log in self._model.logs.values()))
    @rule(data=st.data())
    def take_over_from_who_is_cut_off(self, data: st.DataObject) -> None:
        held = [log for log in self._model.logs.values() if log.writer]
        log = held[data.draw(st.integers(0, len(held) - 1), "log")]
        assert log.writer is not None
        there = next(index for index, running in enumerate(self._managers) if running.model is log.writer.manager)
        here = self._managers[(there + 1) % MANAGERS]
        self._storages[there].is_down = True
        found: object = None
        for _ in range(SECONDS_UNTIL_DEAD):
            found = self._outcome(lambda: _awaited(here.streams.open(log.id, resume=True)))
            if found is not StreamBusyError:
                break
            self._pass_time(1)
        self._storages[there].is_down = False
        assert isinstance(found, StreamInput), found
        self._pairs.append((found, self._model.open(here.model, log.id, {}, resume=True, is_cut_off=True)))
        for _ in range(4):  # until it has seen that its storage is back, and taken its mail, and has itself been seen
            self._pass_time(1)
        for writer in self._model.kept:
            self._model.look(writer)

    # What holds after each step.

    @invariant()
    def all_agree_with_the_model(self) -> None:
        self._counted["steps"] += 1
        self._settle()
        for reader in self._readers:
            assert reader.events == reader.model.events
            assert reader.task.done() is reader.model.is_over
            if reader.model.is_over:
                assert reader.task.result() == (reader.model.why or "the end")
        for stream, model in self._pairs:
            found = (stream.tail, stream.is_closed, stream.cancelled.is_set())
            assert found == (model.tail, model.why is not None, model.is_cancelled)
        for running in self._managers:
            assert feeds_of(running.streams).keys() == {log.id for log in running.model.feeds}
        assert self._portal.run(self._infos) == [self._model.list_streams("", len(IDS))] * MANAGERS

    async def _infos(self) -> Sequence[Sequence[object]]:
        return [[_info(info) for info in await running.streams.list()] for running in self._managers]

    # How it is done.

    def _start(self, index: int) -> Running:
        streams, leaving = self._portal.keep(
            StreamManager(
                self._storages[index],
                ttl=timedelta(seconds=rules.TTL),
                lease=timedelta(seconds=rules.LEASE),
                grace=timedelta(seconds=rules.GRACE),
                limits=LIMITS,
            )
        )
        self._settle()
        return Running(streams, leaving, self._model.start())

    def _open(self, manager: int, stream: str, metadata: dict[str, str], *, resume: bool) -> None:
        running = self._managers[manager]
        found = self._outcome(lambda: _awaited(running.streams.open(stream, resume=resume, metadata=metadata)))
        expected = _outcome_of(lambda: self._model.open(running.model, stream, metadata, resume=resume))
        if isinstance(found, StreamInput):
            assert isinstance(expected, Writer), f"opened, instead of {expected}"
            self._pairs.append((found, expected))
        else:
            assert found == expected

    def _write_soon(self, stream: StreamInput, model: Writer, chunk: object) -> None:
        async def write_soon() -> int:
            return stream.write_soon(chunk)

        self._agree(write_soon, lambda: self._model.write_soon(model, chunk))

    def _draw(self, data: st.DataObject) -> tuple[StreamInput, Writer]:
        return self._pairs[-1 - data.draw(st.integers(0, len(self._pairs) - 1), "handle")]  # the newest most of all

    def _pick(self, pick: int) -> str:
        """Give mostly a stream that is there."""
        there = sorted(self._model.logs) if pick else IDS
        return (there or IDS)[pick % len(there or IDS)]

    def _agree(self, real: Callable[[], Awaitable[T]], model: Callable[[], T]) -> None:
        found = self._outcome(real)
        assert found == _outcome_of(model)

    def _outcome(self, call: Callable[[], Awaitable[T]]) -> T | type[StreamkeepError]:
        async def outcome() -> T | type[StreamkeepError]:
            try:
                return await call()
            except StreamkeepError as error:
                return type(error)

        found = self._portal.run(outcome)
        self._settle()
        self._counted[found.__name__ if isinstance(found, type) else "success"] += 1
        return found

    def _pass_time(self, seconds: float) -> None:
        self._clock.advance(seconds)
        self._portal.pass_time(seconds)
        self._settle()
        self._model.pass_time(seconds)

    def _settle(self) -> None:
        self._portal.settle(self._workload)


async def _awaited(opening: Awaitable[T]) -> T:
    return await opening


async def _read(streams: StreamManager, stream: str, after: int | None, number: int) -> list[Event]:
    events: list[Event] = []
    async with streams.subscribe(stream, after) as subscription:
        while len(events) < number:
            events.append(_event(await anext(subscription)))
    return events


async def _follow(streams: StreamManager, stream: str, after: int | None, events: list[Event]) -> str | type[StreamkeepError]:
    try:
        async with streams.subscribe(stream, after) as subscription:
            async for event in subscription:
                events.append(_event(event))  # noqa: PERF401 (it is looked at while it grows)
    except StreamkeepError as error:
        return type(error)
    return "the end"


def _event(event: StreamEvent[Any]) -> Event:
    match event.type:
        case StreamEventType.CHUNK:
            return "chunk", event.chunk
        case StreamEventType.DONE:
            return "done", event.output
        case StreamEventType.ERROR:
            return "error", event.error.status
        case _:
            raise AssertionError(event)


def _outcome_of(model: Callable[[], T]) -> T | type[StreamkeepError]:
    try:
        return model()
    except StreamkeepError as error:
        return type(error)


def _info(info: StreamInfo) -> tuple[object, ...]:
    is_held = bool(info.session)
    return (
        info.id,
        info.status,
        info.error,
        info.tail,
        info.created_at,
        is_held,
        info.expires_at,
        dict(info.metadata),
    )
