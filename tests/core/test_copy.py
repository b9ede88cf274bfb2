"""Copying: what is at the target afterwards, wherever it was interrupted, and whatever was there before."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from datetime import timedelta

import anyio
import pytest
from msgspec.structs import replace

from streamkeep import (
    KeyInUseError,
    Recovery,
    StorageCorruptError,
    StorageError,
    StreamBusyError,
    StreamEventType,
    StreamManager,
)
from streamkeep._copy import PAGE_RECORDS, SCAN_IDS, Copied, Outcome, copy_streams, ids_with
from streamkeep._names import Kind, name_id
from streamkeep.storage import PAGE_BYTES, Head, Page, Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

LONG = 2 * PAGE_RECORDS + 100


@pytest.fixture
async def source() -> AsyncIterator[FaultyStorage]:
    async with FaultyStorage(MemoryStorage()) as storage:
        yield storage


@pytest.fixture
async def target() -> AsyncIterator[FaultyStorage]:
    async with FaultyStorage(MemoryStorage()) as storage:
        yield storage


@pytest.fixture
async def writer(source: FaultyStorage) -> AsyncIterator[StreamManager]:
    """Give a manager over the source."""
    async with StreamManager(source, ttl=timedelta(hours=1)) as streams:
        yield streams


async def these(ids: Iterable[str]) -> AsyncGenerator[str]:
    for stream in ids:
        yield stream


async def copy(source: Storage, target: Storage, ids: Iterable[str] | None = None) -> dict[str, Copied]:
    done: list[Copied] = []
    moved: list[int] = []
    selected = ids_with(source, "") if ids is None else these(ids)
    with anyio.fail_after(20):
        await copy_streams(source, target, selected, report=done.append, progress=moved.append)
    assert sum(moved) == sum(copied.events for copied in done)
    return {copied.id: copied for copied in done}


async def content(storage: Storage, stream: str) -> tuple[Head, list[bytes]] | None:
    records: list[bytes] = []
    while page := await storage.read(stream, len(records), 1000):
        records += page.records
        if len(records) == page.head.tail:
            return page.head, records
    return None


async def write(streams: StreamManager, stream: str, chunks: int) -> None:
    async with streams.open(stream, metadata={"owner": "Ada"}) as handle:
        for number in range(chunks):
            handle.write_soon(number)
        await handle.done("all")


# What is copied


@pytest.mark.promise("P24")
@pytest.mark.parametrize("is_dead", [True, False])
async def test_a_stream_that_is_to_be_gone_on_with_is_gone_on_with_where_it_was_copied_to(
    source: FaultyStorage, target: FaultyStorage, *, is_dead: bool
) -> None:
    own = FaultyStorage(source)
    async with StreamManager(own) as writer:
        stream = await writer.open("s", recovery=Recovery("go", "why", backoff=timedelta(0)))
        await stream.write("a")
        own.is_down = is_dead
    source.ahead_seconds = 60.0  # since the last sign of life
    assert (await copy(source, target))["s"].outcome is Outcome.COPIED
    async with StreamManager(target) as streams, streams.recoveries("go") as lost:
        with anyio.fail_after(60):
            successor = await anext(lost)
        assert successor.recovery is not None
        assert successor.recovery.input == "why"
        await successor.done()


@pytest.mark.parametrize("chunks", [0, 1, PAGE_RECORDS - 1, PAGE_RECORDS, LONG])
async def test_a_copy_is_equal_to_the_byte(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager, chunks: int
) -> None:
    await write(writer, "s", chunks)

    done = await copy(source, target)

    assert done == {"s": Copied("s", Outcome.COPIED, chunks + 1)}
    assert await content(target, "s") == await content(source, "s")


async def test_all_streams_are_copied_page_by_page_of_ids(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    ids = [f"s{number:03}" for number in range(2 * SCAN_IDS + 10)]
    for stream in ids:
        await write(writer, stream, 2)

    done = await copy(source, target)

    assert sorted(done) == ids
    assert all(copied.is_whole for copied in done.values())
    for stream in ids:
        assert await content(target, stream) == await content(source, stream)


async def test_ids_with_a_prefix_are_those_that_begin_with_it(source: FaultyStorage, writer: StreamManager) -> None:
    for stream in ("a", "ab", "ab:1", "ab:2", "ac", "b"):
        await write(writer, stream, 0)

    assert [stream async for stream in ids_with(source, "ab")] == ["ab", "ab:1", "ab:2"]
    assert [stream async for stream in ids_with(source, "b")] == ["b"]
    assert [stream async for stream in ids_with(source, "ab:")] == ["ab:1", "ab:2"]


async def test_large_events_arrive_whole_and_no_commit_is_larger_than_a_writers(
    source: FaultyStorage, writer: StreamManager
) -> None:
    async with writer.open("s") as stream:
        for size in (1, 400_000, 400_000, 400_000, 3_000_000, 1, 3_000_000):
            await stream.write("x" * size)
        await stream.done()
    sizes: list[list[int]] = []

    class Target(MemoryStorage):
        async def commit(self, stream: str, seen: int | None, head: Head, records: Iterable[bytes] = ()) -> bool:
            sizes.append([len(record) for record in records])
            return await super().commit(stream, seen, head, list(records))

    target = Target()

    await copy(source, target)

    assert await content(target, "s") == await content(source, "s")
    assert all(len(commit) == 1 or sum(commit) <= PAGE_BYTES for commit in sizes)


async def test_what_has_expired_is_not_copied(source: FaultyStorage, target: FaultyStorage, writer: StreamManager) -> None:
    await write(writer, "s", 3)

    source.ahead_seconds = 3601

    done = await copy(source, target)

    assert done["s"].outcome is Outcome.MISSING
    assert await target.read("s") is None


async def test_a_stream_that_is_not_there_is_named(source: FaultyStorage, target: FaultyStorage) -> None:
    assert (await copy(source, target, ["nobodys"]))["nobodys"] == Copied(
        "nobodys", Outcome.MISSING, 0, "there is no such stream"
    )


async def test_a_stream_that_was_released_can_be_resumed_at_the_target(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    async with writer.open("s") as stream:
        await stream.write("here")

    assert (await copy(source, target))["s"].is_whole

    async with StreamManager(target) as streams:
        async with streams.open("s", resume=True) as stream:
            await stream.write("there")
            await stream.done()
        async with streams.subscribe("s") as events:
            assert [event.data async for event in events] == [b'"here"', b'"there"', b"null"]


# What is copied again


async def test_what_is_whole_is_not_copied_again(source: FaultyStorage, target: FaultyStorage, writer: StreamManager) -> None:
    for stream in ("a", "b"):
        await write(writer, stream, 5)
    await copy(source, target, ["a"])
    target.calls.clear()

    done = await copy(source, target)

    assert {stream: copied.outcome for stream, copied in done.items()} == {"a": Outcome.THERE, "b": Outcome.COPIED}
    assert target.calls["commit"] == 1


@pytest.mark.parametrize("loses_answer", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2])
async def test_a_copy_that_was_interrupted_at_any_commit_goes_on_there(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager, after: int, loses_answer: bool
) -> None:
    await write(writer, "s", LONG)
    target.skip("commit", times=after)
    (target.lose_answer if loses_answer else target.refuse)("commit")
    with pytest.raises(StorageError, match="was made to"):
        await copy(source, target)
    before = await content(target, "s")

    done = await copy(source, target)

    assert done["s"].events == LONG + 1 - (before[0].tail if before else 0)
    assert done["s"].is_whole
    assert await content(target, "s") == await content(source, "s")


async def test_a_copy_that_was_cancelled_goes_on_too(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await write(writer, "s", LONG)
    target.skip("commit")
    hold = target.hold("commit", after=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(copy, source, target)
        await hold.reached.wait()
        tasks.cancel_scope.cancel()

    done = await copy(source, target)

    assert done["s"] == Copied("s", Outcome.COPIED, LONG + 1 - 2 * PAGE_RECORDS)
    assert await content(target, "s") == await content(source, "s")


async def test_nobody_writes_to_half_a_copy_or_gives_it_up_and_its_readers_wait_for_the_rest(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await write(writer, "s", LONG)
    target.skip("commit")
    target.refuse("commit")
    with pytest.raises(StorageError):
        await copy(source, target)
    assert (half := await target.read("s")) is not None
    assert half.head.tail == PAGE_RECORDS

    async with StreamManager(target, lease=timedelta(seconds=1), grace=timedelta(0)) as streams:
        await streams.sweep()
        with pytest.raises(StreamBusyError):
            await streams.open("s", resume=True)
        async with streams.subscribe("s") as events:
            for _ in range(PAGE_RECORDS):
                await anext(events)
            await copy(source, target)
            rest = [event async for event in events]

    assert len(rest) == LONG + 1 - PAGE_RECORDS
    assert rest[-1].type is StreamEventType.DONE


async def test_two_copies_at_once_make_one(source: FaultyStorage, target: FaultyStorage, writer: StreamManager) -> None:
    await write(writer, "s", LONG)
    hold = target.hold("commit")
    done: list[Copied] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_copy_into, source, target, done)
        await hold.reached.wait()
        await copy(source, target)
        hold.release()

    assert done == [Copied("s", Outcome.THERE, 0)]
    assert await content(target, "s") == await content(source, "s")


async def _copy_into(source: Storage, target: Storage, done: list[Copied]) -> None:
    done.extend((await copy(source, target)).values())


# Streams that are being written


async def test_a_stream_that_is_being_written_is_copied_as_far_as_it_is_and_named(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    stream = await writer.open("s")
    for number in range(LONG):
        stream.write_soon(number)
    await stream.flush()

    first = await copy(source, target)
    assert first["s"] == Copied(
        "s", Outcome.WRITING, LONG, f"it is still being written, and its first {LONG} events are copied"
    )
    assert (await copy(source, target))["s"].events == 0
    await stream.write("more")
    await stream.done()
    last = await copy(source, target)

    assert last["s"] == Copied("s", Outcome.COPIED, 2)
    assert await content(target, "s") == await content(source, "s")


async def test_a_writer_that_releases_after_the_copy_has_the_copy_released_too(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    stream = await writer.open("s")
    await stream.write(1)
    await copy(source, target)
    await stream.close()

    assert (await copy(source, target))["s"] == Copied("s", Outcome.COPIED, 0)
    assert await content(target, "s") == await content(source, "s")


async def test_a_stream_that_goes_on_at_the_source_after_it_was_copied_is_copied_on(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await (await writer.open("s")).close()
    await copy(source, target)
    async with writer.open("s", resume=True) as stream:
        await stream.write(1)
        await stream.done()

    assert (await copy(source, target))["s"] == Copied("s", Outcome.COPIED, 2)
    assert await content(target, "s") == await content(source, "s")


async def test_a_writer_cannot_keep_a_copy_from_ending(source: FaultyStorage, target: FaultyStorage) -> None:
    class Busy(FaultyStorage):
        """Its writer writes a page more before every read."""

        async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
            for number in range(PAGE_RECORDS):
                handle.write_soon(number)
            await handle.flush()
            return await super().read(stream, start, limit)

    async with StreamManager(source) as streams:
        handle = await streams.open("s")
        done = await copy(Busy(source), target, ["s"])

    assert done["s"].outcome is Outcome.WRITING


async def test_a_copy_of_a_stream_that_is_deleted_meanwhile_is_taken_back(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await write(writer, "s", LONG)
    target.skip("commit")
    hold = target.hold("commit", after=True)
    done: list[Copied] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_copy_into, source, target, done)
        await hold.reached.wait()
        await writer.delete("s")
        hold.release()

    assert done == [Copied("s", Outcome.MISSING, 2 * PAGE_RECORDS, "it was deleted while it was copied")]
    assert await target.read("s") is None


async def test_a_stream_that_is_deleted_before_anything_is_copied_is_missing(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await write(writer, "s", 1)
    hold = target.hold("read")
    done: list[Copied] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_copy_into, source, target, done)
        await hold.reached.wait()
        await writer.delete("s")
        hold.release()

    assert done == [Copied("s", Outcome.MISSING, 0, "it was deleted while it was copied")]


# What is at the target already


async def refusal(source: Storage, target: Storage) -> str:
    before = await content(target, "s")
    done = (await copy(source, target))["s"]
    assert done.outcome is Outcome.REFUSED
    assert not done.is_whole
    assert await content(target, "s") == before
    return done.why


async def test_another_stream_under_the_same_id_is_left_alone(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await write(writer, "s", 3)
    async with StreamManager(target) as streams:
        await write(streams, "s", 3)

    assert await refusal(source, target) == "there is another stream under this id at the target"


async def test_a_stream_that_was_ended_at_the_target_is_left_alone(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await (await writer.open("s")).close()
    await copy(source, target)
    async with StreamManager(target) as streams:
        await streams.cancel("s")

    assert await refusal(source, target) == "it has ended at the target in another way than at the source"


async def test_a_stream_that_is_being_written_at_the_target_is_left_alone(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await (await writer.open("s")).close()
    await copy(source, target)
    async with StreamManager(target) as streams:
        stream = await streams.open("s", resume=True)

        assert await refusal(source, target) == "it is being written at the target"
        await stream.close()


@pytest.mark.parametrize("more_at_the_source", [0, 1, 2])
async def test_a_stream_that_has_gone_on_at_the_target_is_left_alone(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager, more_at_the_source: int
) -> None:
    async with writer.open("s") as stream:
        await stream.write("together")
    await copy(source, target)
    async with StreamManager(target) as streams, streams.open("s", resume=True) as stream:
        await stream.write("apart")
    async with writer.open("s", resume=True) as stream:
        for number in range(more_at_the_source):
            await stream.write(number)

    assert await refusal(source, target) == "other events were written to it at the target"


async def test_an_expired_stream_at_the_target_is_absent(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    async with StreamManager(target, ttl=timedelta(0)) as streams:
        await write(streams, "s", 3)
    await write(writer, "s", 1)

    assert (await copy(source, target))["s"].outcome is Outcome.COPIED
    assert await content(target, "s") == await content(source, "s")


async def test_a_stream_that_is_damaged_is_named_and_stops_no_other(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await write(writer, "s", 1)
    await write(writer, "t", 1)
    page = await source.read("s")
    assert page is not None
    await source.commit("s", page.head.version, replace(page.head, version=page.head.version + 1, state=b"?"))

    done = await copy(source, target)

    assert (done["s"].outcome, done["s"].why) == (
        Outcome.REFUSED,
        "the stream's head is damaged, or was written by a newer version of streamkeep",
    )
    assert done["t"].is_whole


async def test_a_head_at_the_target_that_cannot_be_read_is_left_alone(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await target.commit("s", None, Head(version=1, tail=1, state=b'{"new":1}', expires_at=1.0), [b"old"])
    await write(writer, "s", 1)

    assert "newer version" in (await copy(source, target))["s"].why
    assert (page := await target.read("s", 0, 10)) is not None
    assert page.records == [b"old"]


@pytest.mark.promise("P17")
@pytest.mark.parametrize("kept", [0, 5, PAGE_RECORDS, LONG])
async def test_a_log_whose_records_are_missing_is_named_in_a_few_reads_and_stops_no_other(
    target: FaultyStorage, kept: int
) -> None:
    memory = MemoryStorage()
    source = FaultyStorage(memory)
    async with StreamManager(source) as streams:
        for stream in "st":
            await write(streams, stream, LONG)
    del memory._streams["s"].records[kept:]
    source.calls.clear()

    done = await copy(source, target)

    assert (done["s"].outcome, done["s"].why) == (
        Outcome.REFUSED,
        f"the records from offset {kept} on are missing, and the stream should have {LONG + 1}",
    )
    assert done["t"].is_whole
    assert source.calls["read"] < 20


async def test_sessions_stay_where_they_are(source: FaultyStorage, target: FaultyStorage, writer: StreamManager) -> None:
    await write(writer, "s", 1)
    await copy(source, target)

    assert len(await source.scan()) == 2
    assert [stream for stream, _ in await target.scan()] == ["s"]


async def test_a_stream_whose_writers_session_was_not_renewed_for_long_is_not_being_written(
    source: FaultyStorage, target: FaultyStorage
) -> None:
    async with StreamManager(source) as streams:
        stream = await streams.open("s")
        await stream.write("a")
        assert (await copy(source, target))["s"].outcome is Outcome.WRITING
        source.ahead_seconds = 16  # since its last renewal

        assert (await copy(source, target))["s"].is_whole
        assert stream.tail == 1


async def test_a_storage_that_fails_while_ids_are_listed_ends_the_copy_with_its_own_error(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await write(writer, "s", 1)
    source.refuse("scan", error=StorageCorruptError("torn"))
    with pytest.raises(StorageCorruptError, match="torn"):
        await copy(source, target)


# What streams are called


async def open_under(streams: StreamManager, stream: str, *, key: str = "chat", run: str | None = None) -> None:
    async with streams.open(stream, owner="ann", key=key, run=run) as handle:
        await handle.done()


async def test_a_copy_is_found_by_its_owner_key_and_run(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    for stream in ("a", "b", "c"):
        await open_under(writer, stream, run=f"run of {stream}")
    await copy(source, target)

    async with StreamManager(target) as streams:
        assert (await streams.current("chat", "ann")).id == "c"
        assert [info.id for info in await streams.list(owner="ann")] == ["a", "b", "c"]
        with pytest.raises(KeyInUseError) as told:
            await streams.open("d", owner="ann", run="run of a")
        assert told.value.stream == "a"


async def test_a_copy_takes_a_key_from_an_older_stream_and_not_from_a_newer_one(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await open_under(writer, "a")
    await copy(source, target)
    await open_under(writer, "b")
    await copy(source, target)
    async with StreamManager(target) as streams:
        assert (await streams.current("chat", "ann")).id == "b"
        await open_under(streams, "c")
        await copy(source, target)
        assert (await streams.current("chat", "ann")).id == "c"


async def test_a_copy_that_is_there_is_named_by_the_next_if_the_first_was_interrupted(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await open_under(writer, "a")
    target.skip("commit")
    target.refuse("commit")
    with pytest.raises(StorageError):
        await copy(source, target)
    assert (await copy(source, target))["a"].outcome is Outcome.THERE

    async with StreamManager(target) as streams:
        assert (await streams.current("chat", "ann")).id == "a"


async def test_a_name_that_cannot_be_read_does_not_hinder_a_copy(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await open_under(writer, "a")
    name = name_id("ann", Kind.KEY, "chat")
    page = await source.read(name)
    assert page is not None
    await source.commit(name, page.head.version, Head(page.head.version + 1, 0, b"?", 9e9))

    assert (await copy(source, target))["a"].outcome is Outcome.COPIED
    async with StreamManager(target) as streams:
        assert [info.id for info in await streams.list(owner="ann")] == ["a"]
        assert not await streams.list(owner="ann", key_prefix="")


async def test_a_name_that_somebody_changes_meanwhile_is_looked_at_again(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    async with writer.open("a", key="chat") as handle:
        await handle.done()
    target.skip("commit")
    hold = target.hold("commit")
    async with StreamManager(target._storage) as streams, anyio.create_task_group() as tasks:
        tasks.start_soon(copy, source, target)
        await hold.reached.wait()
        async with streams.open("b", key="chat") as handle:
            await handle.done()
        hold.release()

    async with StreamManager(target) as streams:
        assert (await streams.current("chat")).id == "b"


async def test_a_copy_that_is_deleted_at_once_is_not_named(
    source: FaultyStorage, target: FaultyStorage, writer: StreamManager
) -> None:
    await open_under(writer, "a")
    hold = target.hold("commit", after=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(copy, source, target)
        await hold.reached.wait()
        page = await target.read("a")
        assert page is not None
        await target.delete("a", page.head.version)
        hold.release()

    assert await target.scan() == []


async def test_a_stream_without_its_entry_is_copied_without_one(source: FaultyStorage, target: FaultyStorage) -> None:
    own = FaultyStorage(source)
    async with StreamManager(own) as writer:
        await writer.open("s", recovery=Recovery("go"))
        own.is_down = True
    for id, head in await source.scan(".recovery.", 10):
        if id.startswith(".recovery."):
            await source.delete(id, head.version)
    source.ahead_seconds = 60.0
    assert (await copy(source, target))["s"].outcome is Outcome.COPIED
    assert [id for id, _ in await target.scan("", 10)] == ["s"]
