"""Starting under keys and runs: who starts, who is told of whom, and what is left behind. And finding streams by what they are called."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from math import inf
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from tests.core.helpers import BackupStorage, Process, core_of, resumed

from streamkeep import (
    InvalidArgumentError,
    KeyInUseError,
    Recovery,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StreamAlreadyExistsError,
    StreamBusyError,
    StreamCompletedError,
    StreamInput,
    StreamManager,
    StreamNotFoundError,
    StreamTakenOverError,
)
from streamkeep._cancel import read_life
from streamkeep._lifecycle import FORGET_OPEN_SECONDS
from streamkeep._listing import SCAN_STREAMS
from streamkeep._names import Kind, is_name, name_id
from streamkeep.storage import Head
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

Clock = Callable[[], float]
KEY = name_id("", Kind.KEY, "chat")
RUN = name_id("", Kind.RUN, "r1")
HELD: list[StreamInput] = []
"""Handles that nobody drops while a test runs."""


@pytest.fixture(autouse=True)
def let_go() -> Iterator[None]:
    yield
    HELD.clear()


async def names(storage: MemoryStorage) -> list[str]:
    return [id for id, _ in await storage.scan("", 10_000) if is_name(id)]


async def stored(storage: MemoryStorage) -> list[str]:
    return [id for id, _ in await storage.scan("/", 10_000)]


async def refused(call: Callable[[], Awaitable[object]]) -> str:
    """Give the stream that somebody is told to follow."""
    with pytest.raises(KeyInUseError) as told:
        await call()
    assert told.value.http_code == 409
    return told.value.stream


# Starting


@pytest.mark.promise("P23")
async def test_who_starts_what_runs_is_told_of_it_and_leaves_nothing(
    streams: StreamManager, elsewhere: StreamManager, memory: MemoryStorage
) -> None:
    HELD.append(await streams.open("a", key="chat"))
    assert HELD[0].key == "chat"
    before = await memory.read(KEY)
    for manager in (streams, elsewhere):
        assert await refused(lambda manager=manager: manager.open("b", key="chat")) == "a"  # type: ignore[misc]

    assert await stored(memory) == ["a"]
    assert await memory.read(KEY) == before


@pytest.mark.promise("P23")
@pytest.mark.parametrize("end", ["done", "error", "cancel", "delete", "expire"])
async def test_what_has_ended_is_in_nobodys_way(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, end: str
) -> None:
    stream = await streams.open("a", key="chat")
    match end:
        case "error":
            await stream.error(ValueError("x"))
        case "cancel" | "delete":
            await getattr(elsewhere, end)("a")
        case _:
            await stream.done()
    storage.ahead_seconds = 301 if end == "expire" else 0
    HELD.append(await elsewhere.open("b", key="chat"))

    assert (await streams.current("chat")).id == "b"
    assert await refused(lambda: streams.open("c", key="chat")) == "b"


@pytest.mark.promise("P23")
async def test_the_stream_of_a_dead_process_is_in_the_way_for_its_lease_and_grace(
    streams: StreamManager, mortal: Process
) -> None:
    HELD.append(await mortal.streams.open("a", key="chat", run="r1"))
    mortal.die()
    began_at = anyio.current_time()
    while True:
        try:
            HELD.append(await streams.open("b", key="chat"))
        except KeyInUseError:
            await anyio.sleep(0.5)
        else:
            break

    assert 14 <= anyio.current_time() - began_at <= 18
    assert (await streams.info("a")).error == "ABORTED"
    assert await refused(lambda: streams.open("c", run="r1")) == "a"
    mortal.come_back()


@pytest.mark.promise("P23")
async def test_what_was_released_is_in_the_way_and_keeps_its_key(streams: StreamManager, elsewhere: StreamManager) -> None:
    await (await streams.open("a", key="chat")).close()
    assert await refused(lambda: elsewhere.open("b", key="chat")) == "a"
    HELD.append(await elsewhere.open("a", resume=True))

    assert await refused(lambda: streams.open("b", key="chat")) == "a"
    assert (await streams.current("chat")).session


async def test_an_id_that_is_taken_is_told_as_ever(streams: StreamManager, memory: MemoryStorage) -> None:
    HELD.append(await streams.open("a"))
    with pytest.raises(StreamAlreadyExistsError) as told:
        HELD.append(await streams.open("a", key="chat", owner="ann"))

    assert not isinstance(told.value, KeyInUseError)
    with pytest.raises(StreamNotFoundError):
        await streams.current("chat", "ann")
    assert not await streams.list(owner="ann")


@pytest.mark.promise("P23")
async def test_keys_and_runs_are_their_owners_own(streams: StreamManager) -> None:
    for number, owner in enumerate(["", "ann", "bob"]):
        HELD.append(await streams.open(f"s{number}", owner=owner, key="chat", run="chat"))

    assert [(await streams.current("chat", owner)).id for owner in ("", "ann", "bob")] == ["s0", "s1", "s2"]


@pytest.mark.promise("P23")
async def test_a_run_starts_one_stream_as_long_as_that_is_kept(streams: StreamManager, storage: FaultyStorage) -> None:
    stream = await streams.open("a", run="r1")
    assert await refused(lambda: streams.open("b", run="r1")) == "a"
    await stream.done()
    for replace in (False, True):
        assert await refused(lambda replace=replace: streams.open("b", run="r1", replace=replace)) == "a"  # type: ignore[misc]
    storage.ahead_seconds = 301
    HELD.append(await streams.open("b", run="r1"))

    assert await refused(lambda: streams.open("c", run="r1")) == "b"


@pytest.mark.promise("P23")
async def test_who_replaces_cancels_what_runs(streams: StreamManager, elsewhere: StreamManager) -> None:
    old = await elsewhere.open("a", key="chat")
    new = await streams.open("b", key="chat", replace=True)
    await old.cancelled.wait()

    with pytest.raises(StreamCompletedError):
        await old.write(1)
    await new.done()
    HELD.append(await streams.open("c", key="chat", replace=True))
    assert [(info.id, info.error) for info in await streams.list()] == [("a", "CANCELLED"), ("b", None), ("c", None)]


@pytest.mark.promise("P23")
async def test_a_start_that_is_repeated_does_not_replace_itself(streams: StreamManager, elsewhere: StreamManager) -> None:
    outcomes: list[object] = []

    async def start(manager: StreamManager, id: str) -> None:
        try:
            outcomes.append(await manager.open(id, key="chat", run="r1", replace=True))
        except KeyInUseError as told:
            outcomes.append(told.stream)

    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(start, (streams, elsewhere)[number % 2], f"s{number}")

    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, StreamInput)]
    assert [outcome for outcome in outcomes if isinstance(outcome, str)] == [winner.id] * 9
    assert [info.id for info in await streams.list()] == [winner.id]
    await winner.done()


async def test_a_start_that_is_repeated_between_its_claims_does_not_replace_itself(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    HELD.append(await streams.open("warm"))
    storage.skip("commit", times=2)
    hold = storage.hold("commit")
    opened: list[StreamInput] = []

    async def start() -> None:
        opened.append(await streams.open("a", key="chat", run="r1", replace=True))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
        await hold.reached.wait()
        assert await refused(lambda: elsewhere.open("b", key="chat", run="r1", replace=True)) == "a"
        hold.release()

    assert await opened[0].write("it runs") == 0
    assert (await elsewhere.current("chat")).id == "a"


async def test_a_writer_that_is_replaced_while_it_opens_is_told(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    HELD.append(await streams.open("warm"))
    storage.skip("commit")
    hold = storage.hold("commit", after=True)
    opened: list[StreamInput] = []

    async def open_it() -> None:
        opened.append(await streams.open("a", key="chat"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_it)
        await hold.reached.wait()
        HELD.append(await elsewhere.open("b", key="chat", replace=True))
        hold.release()

    with anyio.fail_after(2):
        await opened[0].cancelled.wait()


@pytest.mark.parametrize("error", [None, StorageError("lost")], ids=["refused", "answer lost"])
async def test_who_was_replaced_before_it_knew_that_it_had_won_does_not_replace_again(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, error: StorageError | None
) -> None:
    """Its claim was sent twice, as `RetryingStorage` does, and the second answer, which says no, is the one it has."""
    HELD.append(await streams.open("warm"))

    original = storage.commit

    async def commit(stream: str, seen: int | None, head: Head, records: object = ()) -> bool:
        if stream == KEY and seen is None:
            await original(stream, seen, head)
            storage.commit = original  # type: ignore[method-assign]
            HELD.append(await elsewhere.open("b", key="chat", replace=True))
            if error is not None:
                raise error
            return False
        return await original(stream, seen, head, records)  # type: ignore[arg-type]

    storage.commit = commit  # type: ignore[method-assign]
    if error is None:
        stream = await streams.open("a", key="chat", replace=True)
        with anyio.fail_after(2):
            await stream.cancelled.wait()
    else:
        with pytest.raises(StorageError):
            HELD.append(await streams.open("a", key="chat", replace=True))

    assert (await streams.current("chat")).id == "b"
    assert (await streams.info("b")).status == "open"


# Starting at once, and failing


@pytest.mark.promise("P23")
@pytest.mark.parametrize("replace", [False, True])
async def test_of_those_who_start_at_once_one_runs(
    streams: StreamManager, elsewhere: StreamManager, memory: MemoryStorage, *, replace: bool
) -> None:
    opened: list[StreamInput] = []
    told: list[str] = []

    async def start(manager: StreamManager, id: str) -> None:
        try:
            opened.append(await manager.open(id, owner="ann", key="chat", run=id, replace=replace))
        except KeyInUseError as error:
            told.append(error.stream)

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(start, (streams, elsewhere)[number % 2], f"s{number}")
    await anyio.sleep(1)
    running = [info.id for info in await streams.list(status="open")]

    assert running == [(await streams.current("chat", "ann")).id] == [input.id for input in opened if not input.is_closed]
    if replace:
        assert len(opened) == 20
    else:
        assert len(opened) == 1
        assert told == running * 19
        assert await stored(memory) == running


@pytest.mark.promise("P23")
async def test_who_loses_the_race_is_told_of_who_has_won(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, memory: MemoryStorage
) -> None:
    HELD.append(await streams.open("warm"))
    storage.skip("commit")
    hold = storage.hold("commit")
    told: list[str] = []

    async def start() -> None:
        told.append(await refused(lambda: streams.open("a", key="chat")))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
        await hold.reached.wait()
        HELD.append(await elsewhere.open("b", key="chat"))
        hold.release()

    assert told == ["b"]
    assert await stored(memory) == ["b", "warm"]


@pytest.mark.promise("P23")
async def test_who_loses_the_race_to_one_that_has_ended_by_then_starts(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    HELD.append(await streams.open("warm"))
    storage.skip("commit")
    hold = storage.hold("commit")

    async def start() -> None:
        HELD.append(await streams.open("a", key="chat"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
        await hold.reached.wait()
        await (await elsewhere.open("b", key="chat")).done()
        hold.release()

    assert (await elsewhere.current("chat")).id == "a"


async def test_who_replaces_what_is_deleted_meanwhile_starts(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    HELD.append(await streams.open("a", key="chat"))
    storage.skip("read", times=2)
    hold = storage.hold("read")

    async def start() -> None:
        HELD.append(await elsewhere.open("b", key="chat", replace=True))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
        await hold.reached.wait()
        page = await storage.read("a")
        assert page is not None
        await storage.delete("a", page.head.version)
        hold.release()

    assert (await streams.current("chat")).id == "b"


@pytest.mark.promise("P23")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("commit", range(4))
async def test_a_start_that_is_cancelled_blocks_nobody(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, commit: int, *, after: bool
) -> None:
    HELD.append(await streams.open("warm"))
    storage.skip("commit", times=commit)
    hold = storage.hold("commit", after=after)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: _awaited(streams.open("a", owner="ann", key="chat", run="r1")))
        await hold.reached.wait()
        tasks.cancel_scope.cancel()
    await anyio.sleep(1)

    assert await stored(memory) == ["warm"]
    HELD.append(await streams.open("b", owner="ann", key="chat", run="r1"))
    assert [info.id for info in await streams.list(owner="ann")] == ["b"]


async def _awaited(opening: Awaitable[StreamInput]) -> None:
    await opening


@pytest.mark.promise("P23")
@pytest.mark.parametrize("commit", range(4))
async def test_a_start_whose_answer_was_lost_succeeds_if_what_it_stored_is_there(
    streams: StreamManager, storage: FaultyStorage, commit: int
) -> None:
    HELD.append(await streams.open("warm"))
    storage.skip("commit", times=commit)
    storage.lose_answer("commit")
    HELD.append(await streams.open("a", owner="ann", key="chat", run="r1"))

    assert (await streams.current("chat", "ann")).id == "a"
    assert [info.id for info in await streams.list(owner="ann")] == ["a"]
    assert await refused(lambda: streams.open("b", owner="ann", run="r1")) == "a"


@pytest.mark.promise("P23")
@pytest.mark.parametrize("error", [StorageError("down"), StorageFullError("full")], ids=["down", "full"])
@pytest.mark.parametrize("commit", [1, 2])
async def test_a_start_whose_claim_fails_leaves_no_stream(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, commit: int, error: StorageError
) -> None:
    HELD.append(await streams.open("warm"))
    storage.skip("commit", times=commit)
    storage.refuse("commit", error=error)
    with pytest.raises(type(error)):
        HELD.append(await streams.open("a", key="chat", run="r1"))
    await anyio.sleep(1)

    assert await stored(memory) == ["warm"]
    HELD.append(await streams.open("a", key="chat", run="r1"))


async def test_a_start_in_a_full_storage_says_so(clock: Clock) -> None:
    async with StreamManager(MemoryStorage(max_streams=1, clock=clock)) as streams:
        HELD.append(await streams.open("a"))
        with pytest.raises(StorageFullError):
            HELD.append(await streams.open("b", owner="ann", key="chat"))
        assert not await streams.list(owner="ann")


async def test_whose_a_stream_is_is_noted_again_if_that_failed_beside_its_creation(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    HELD.append(await streams.open("warm"))
    storage.refuse("commit")  # begins first
    with pytest.raises(StorageError):
        HELD.append(await streams.open("a", owner="ann"))
    storage.skip("commit")
    storage.refuse("commit")
    HELD.append(await streams.open("a", owner="ann"))

    assert [info.id for info in await streams.list(owner="ann")] == ["a"]


async def test_an_id_that_is_its_owners_already_stays_so(streams: StreamManager) -> None:
    HELD.append(await streams.open("a", owner="ann"))
    with pytest.raises(StreamAlreadyExistsError):
        HELD.append(await streams.open("a", owner="ann"))
    assert [info.id for info in await streams.list(owner="ann")] == ["a"]


async def test_an_id_that_lives_again_is_its_new_owners(streams: StreamManager) -> None:
    for owner in ("ann", "ann", "bob"):
        await (await streams.open("a", owner=owner)).done()
        assert [info.id for info in await streams.list(owner=owner)] == ["a"]
        await streams.delete("a")

    HELD.append(await streams.open("a", owner="bob"))
    assert not await streams.list(owner="ann")


@pytest.mark.promise("P13")
async def test_what_cannot_be_a_name_is_refused(streams: StreamManager) -> None:
    wrong = [{"key": ""}, {"run": ""}, {"key": "a" * 300}, {"owner": "\ud800"}]
    for options in (*wrong, {"key": "a", "resume": True}, {"run": "a", "resume": True}):
        with pytest.raises(InvalidArgumentError):
            await streams.open("s", **options)  # type: ignore[arg-type]
    for key, owner in (("", ""), ("a", "\ud800")):
        with pytest.raises(InvalidArgumentError):
            await streams.current(key, owner)
    for asked in ({"owner": "\ud800"}, {"key_prefix": "\ud800"}):
        with pytest.raises(InvalidArgumentError):
            await streams.list(**asked)  # type: ignore[arg-type]


# Starts that died before their names were theirs


async def dead_start(mortal: Process, id: str) -> None:
    """Have a process die when a stream is there, and nothing names it."""
    HELD.append(await mortal.streams.open(f"warm-{id}"))
    mortal.storage.skip("commit")
    hold = mortal.storage.hold("commit")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: _awaited(mortal.streams.open(id, owner="ann", key="chat", run=id)))
        await hold.reached.wait()
        mortal.die()
        tasks.cancel_scope.cancel()


@pytest.mark.promise("P23")
async def test_a_stream_whose_start_died_is_not_gone_on_with_while_another_runs_under_its_key(
    streams: StreamManager, elsewhere: StreamManager, mortal: Process
) -> None:
    await dead_start(mortal, "a")
    HELD.append(await elsewhere.open("b", owner="ann", key="chat"))

    assert await refused(lambda: resumed(streams, "a")) == "b"
    assert await HELD[-1].write("it runs") == 0
    mortal.come_back()


@pytest.mark.promise("P23")
async def test_a_stream_whose_start_died_is_gone_on_with_under_its_names(
    streams: StreamManager, elsewhere: StreamManager, mortal: Process, memory: MemoryStorage
) -> None:
    await dead_start(mortal, "a")
    assert await names(memory) == []
    HELD.append(await resumed(streams, "a"))

    assert await refused(lambda: elsewhere.open("b", owner="ann", key="chat")) == "a"
    assert await refused(lambda: elsewhere.open("b", owner="ann", run="a")) == "a"
    assert (await elsewhere.started_by("a", "ann")).id == "a"
    assert [info.id for info in await elsewhere.list(owner="ann")] == ["a"]
    mortal.come_back()


async def test_who_goes_on_and_loses_the_race_for_its_key_releases_the_stream(
    streams: StreamManager, elsewhere: StreamManager, mortal: Process, storage: FaultyStorage
) -> None:
    HELD.append(await streams.open("warm"))
    await dead_start(mortal, "a")
    await anyio.sleep(5)
    with pytest.raises(StreamBusyError):
        await streams.open("a", resume=True)
    await anyio.sleep(12)
    original = storage.commit

    async def commit(stream: str, seen: int | None, head: Head, records: Sequence[bytes] = ()) -> bool:
        is_stored = await original(stream, seen, head, records)
        if stream == "a" and is_stored:
            storage.commit = original  # type: ignore[method-assign]
            HELD.append(await elsewhere.open("b", owner="ann", key="chat"))
        return is_stored

    storage.commit = commit  # type: ignore[method-assign]
    assert await refused(lambda: streams.open("a", resume=True)) == "b"
    await anyio.sleep(1)
    assert not (await streams.info("a")).session
    mortal.come_back()


@pytest.mark.promise("P23")
@pytest.mark.parametrize("is_own", [True, False], ids=["own", "another's"])
async def test_what_a_storage_that_went_back_has_opened_again_is_in_nobodys_way(clock: Clock, *, is_own: bool) -> None:
    backup = BackupStorage(clock=clock)
    async with StreamManager(backup) as streams, StreamManager(backup) as elsewhere:
        HELD.append(await streams.open("a", key="chat"))
        backup.back_up()
        await HELD[-1].done()
        backup.go_back()
        await anyio.sleep(400)
        starter = streams if is_own else elsewhere
        assert await refused(lambda: starter.open("b", key="chat")) == "a"
        await anyio.sleep(15)
        HELD.append(await starter.open("b", key="chat"))
        assert (await streams.info("a")).error == "ABORTED"


class Text(str):
    """A subclass, as those of markup and of templates."""

    __slots__ = ()


async def test_subclasses_of_text_are_text(streams: StreamManager, elsewhere: StreamManager) -> None:
    options = {"owner": Text("ann"), "key": Text("chat"), "run": Text("r1")}
    HELD.append(await streams.open(Text("a"), metadata={Text("b"): Text("c")}, **options))  # type: ignore[arg-type]
    info = await streams.current(Text("chat"), Text("ann"))

    assert (info.id, info.metadata) == ("a", {"b": "c", "owner": "ann"})
    assert [info.id for info in await streams.list(Text("Z"), owner=Text("ann"))] == ["a"]
    assert await elsewhere.cancel(Text("a"))


@pytest.mark.promise("P13")
@pytest.mark.parametrize(
    "asked",
    [
        {"after": "\ud800" * 300},
        {"after": "\0"},
        {"after": None},
        {"limit": 0},
        {"limit": 1.5},
        {"limit": None},
        {"status": "x"},
    ],
    ids=str,
)
async def test_a_page_that_cannot_be_asked_for_is_refused(streams: StreamManager, asked: dict[str, Any]) -> None:
    for owner in (None, "ann"):
        with pytest.raises(InvalidArgumentError):
            await streams.list(**asked, owner=owner)
    assert not await streams.list("\0", owner="ann", key_prefix="")


# Names that cannot be read


async def test_a_name_that_cannot_be_read_is_told(streams: StreamManager, storage: FaultyStorage) -> None:
    await storage.commit(KEY, None, Head(1, 0, b"?", 9e9))
    for call in (lambda: _awaited(streams.open("a", key="chat")), lambda: streams.current("chat")):
        with pytest.raises(StorageCorruptError):
            await call()
    assert not await streams.list(key_prefix="")


@pytest.mark.parametrize("what", ["name", "stream"])
async def test_who_replaces_what_cannot_be_read_runs(streams: StreamManager, storage: FaultyStorage, what: str) -> None:
    HELD.append(await streams.open("a", key="chat", run="r1"))
    damaged = KEY if what == "name" else "a"
    page = await storage.read(damaged)
    assert page is not None
    await storage.commit(damaged, page.head.version, Head(page.head.version + 1, 0, b"?", 9e9))
    with pytest.raises(StorageCorruptError):
        HELD.append(await streams.open("b", key="chat"))
    if what == "stream":
        with pytest.raises(StorageCorruptError):
            HELD.append(await streams.open("b", run="r1", replace=True))
    HELD.append(await streams.open("b", key="chat", replace=True))

    assert (await streams.current("chat")).id == "b"
    assert await refused(lambda: streams.open("c", key="chat")) == "b"


async def test_who_replaces_what_cannot_be_read_and_is_gone_by_then_runs(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    HELD.append(await streams.open("warm"))
    await storage.commit(KEY, None, Head(1, 0, b"?", 9e9))
    hold = storage.hold("read", after=True)

    async def start() -> None:
        HELD.append(await streams.open("b", key="chat", replace=True))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
        await hold.reached.wait()
        await storage.delete(KEY, 1)
        hold.release()

    assert (await streams.current("chat")).id == "b"


async def test_a_stream_that_cannot_be_read_is_listed_under_its_names(streams: StreamManager, storage: FaultyStorage) -> None:
    HELD.append(await streams.open("a", owner="ann", key="chat"))
    page = await storage.read("a")
    assert page is not None
    await storage.commit("a", page.head.version, Head(page.head.version + 1, 0, b"?", 9e9))

    for listed in (await streams.list(owner="ann"), await streams.list(owner="ann", key_prefix="c")):
        assert [(info.id, info.status) for info in listed] == [("a", "unreadable")]
    with pytest.raises(StorageCorruptError):
        await streams.current("chat", "ann")


# How long names are kept


@pytest.mark.promise("P23")
async def test_names_go_with_their_stream(streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage) -> None:
    await (await streams.open("a", owner="ann", key="chat", run="r1")).done()
    await (await streams.open("b", owner="ann", key="chat", run="r2")).done()
    storage.ahead_seconds = 200
    await (await streams.open("c", owner="ann", key="chat", run="r3")).done()
    assert len(await names(memory)) == 7
    storage.ahead_seconds = 301
    await streams.sweep()

    assert await stored(memory) == ["c"]
    kept = ((Kind.KEY, "chat"), (Kind.OWN, "c"), (Kind.RUN, "r3"))
    assert await names(memory) == [name_id("ann", kind, text) for kind, text in kept]
    assert (await streams.current("chat", "ann")).id == "c"


@pytest.mark.promise("P23")
@pytest.mark.parametrize("how", ["deleted", "begun anew", "cancelled", "there already", "resumed"])
async def test_names_go_with_a_stream_that_does_not_wait_for_the_sweeper(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, how: str
) -> None:
    names_of_a: dict[str, Any] = {"owner": "ann", "key": "chat", "run": "r1"}
    match how:
        case "deleted":
            HELD.append(await streams.open("a", **names_of_a))
            await streams.delete("a")
        case "begun anew":
            await (await streams.open("a", **names_of_a)).done()
            storage.ahead_seconds = 301
            HELD.append(await streams.open("a"))
        case "cancelled":
            HELD.append(await streams.open("warm"))
            storage.skip("commit", times=3)
            hold = storage.hold("commit", after=True)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: _awaited(streams.open("a", **names_of_a)))
                await hold.reached.wait()
                assert len(await names(memory)) == 3
                tasks.cancel_scope.cancel()
        case "there already":
            HELD.append(await streams.open("a"))
            with pytest.raises(StreamAlreadyExistsError):
                HELD.append(await streams.open("a", owner="ann"))
        case _:
            await (await streams.open("a")).close()
            HELD.append(await streams.open("a", resume=True, owner="ann"))
    await anyio.sleep(1)

    assert await names(memory) == []


async def test_names_that_cannot_be_forgotten_with_what_is_deleted_expire(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage
) -> None:
    await (await streams.open("a", key="chat")).done()
    await anyio.sleep(1)
    storage.skip("read")
    storage.refuse("read")
    await streams.delete("a")
    await anyio.sleep(1)
    assert await names(memory) == [KEY]
    storage.ahead_seconds = 2 * FORGET_OPEN_SECONDS + 301
    await streams.sweep()

    assert await names(memory) == []


async def test_names_that_cannot_be_removed_with_their_stream_go_when_they_expire(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    await (await streams.open("a", key="chat")).done()
    await memory.commit(RUN, None, Head(1, 0, b"?", storage.time() + 302))
    storage.ahead_seconds = 301
    await wait_all_tasks_blocked()
    storage.refuse("read")
    with pytest.raises(StorageError):
        await streams.sweep()
    assert await names(memory) == [KEY, RUN]
    storage.ahead_seconds = 2 * FORGET_OPEN_SECONDS + 301
    await streams.sweep()

    assert await names(memory) == []
    assert "swept" not in quiet_logs.text


async def test_a_name_is_forgotten_only_if_it_names_what_is_forgotten(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage
) -> None:
    await (await streams.open("a", key="chat", run="r1")).done()
    page = await memory.read(KEY)
    assert page is not None
    await memory.commit(KEY, page.head.version, Head(page.head.version + 1, 0, b"?", 9e9))
    await memory.delete(RUN, (await memory.read(RUN)).head.version)  # type: ignore[union-attr]
    storage.ahead_seconds = 301
    await streams.sweep()

    assert await stored(memory) == []
    assert await names(memory) == [KEY]


@pytest.mark.promise("P23")
@pytest.mark.parametrize("is_quiet", [True, False], ids=["quiet", "writing"])
async def test_a_name_is_kept_as_long_as_its_stream_is_written(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, *, is_quiet: bool
) -> None:
    stream = await streams.open("a", owner="ann", key="chat", run="r1")
    for _ in range(10):
        storage.ahead_seconds += FORGET_OPEN_SECONDS * 0.6
        if not is_quiet:
            await stream.write(1)
        await anyio.sleep(700)
    for name in await names(memory):
        page = await memory.read(name)
        assert page is not None
        assert page.head.expires_at > storage.time() + FORGET_OPEN_SECONDS

    await stream.done()
    assert (await streams.current("chat", "ann")).id == "a"


async def test_names_are_kept_later_if_the_storage_fails(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage, quiet_logs: pytest.LogCaptureFixture
) -> None:
    stream = await streams.open("a", key="chat")
    await wait_all_tasks_blocked()
    before = await memory.read(KEY)
    storage.ahead_seconds = FORGET_OPEN_SECONDS * 0.6
    storage.refuse("read", times=1)
    await stream.write(1)
    await wait_all_tasks_blocked()

    assert await memory.read(KEY) == before
    assert "its names cannot be kept" in quiet_logs.text
    await stream.done()


async def test_only_names_that_are_still_a_streams_own_are_kept_with_it(
    streams: StreamManager, storage: FaultyStorage, memory: MemoryStorage
) -> None:
    stream = await streams.open("a", key="chat", run="r1")
    await memory.delete(RUN, (await memory.read(RUN)).head.version)  # type: ignore[union-attr]
    page = await memory.read(KEY)
    assert page is not None
    other = Head(page.head.version + 1, 0, page.head.state.replace(b'"a"', b'"b"').replace(b",", b',"'), 9e9)
    await memory.commit(KEY, page.head.version, other)
    storage.ahead_seconds = FORGET_OPEN_SECONDS * 0.6
    await stream.write(1)
    await wait_all_tasks_blocked()

    assert await names(memory) == [KEY]
    assert (await memory.read(KEY)).head == other  # type: ignore[union-attr]
    await stream.done()


async def test_names_are_kept_for_a_writer_that_takes_over(
    streams: StreamManager, mortal: Process, memory: MemoryStorage, storage: FaultyStorage
) -> None:
    HELD.append(await mortal.streams.open("a", key="chat"))
    mortal.die()
    storage.ahead_seconds = FORGET_OPEN_SECONDS / 2
    HELD.append(await resumed(streams, "a"))
    await wait_all_tasks_blocked()
    page = await memory.read(KEY)

    assert page is not None
    assert page.head.expires_at > storage.time() + 2 * FORGET_OPEN_SECONDS
    mortal.come_back()


@pytest.mark.promise("P23")
async def test_a_clock_that_jumps_by_days_takes_no_name_from_a_living_stream(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage, memory: MemoryStorage
) -> None:
    stream = await streams.open("a", owner="ann", key="chat", run="r1")
    storage.ahead_seconds = 10 * FORGET_OPEN_SECONDS
    await elsewhere.sweep()

    assert len(await names(memory)) == 3
    assert not [id for id, _ in await memory.expired(storage.time()) if is_name(id)]
    assert (await streams.current("chat", "ann")).id == "a"
    await stream.done()


async def test_names_do_not_count_as_streams(clock: Clock) -> None:
    async with StreamManager(MemoryStorage(max_streams=2, clock=clock)) as streams:
        HELD.extend([await streams.open(id, owner="ann", key=id, run=id) for id in ("s0", "s1")])
        assert [info.id for info in await streams.list()] == ["s0", "s1"]


# Finding


@pytest.mark.promise("P23")
async def test_the_newest_stream_of_a_key_is_found_running_or_ended(
    streams: StreamManager, elsewhere: StreamManager, mortal: Process
) -> None:
    with pytest.raises(StreamNotFoundError):
        await streams.current("chat")
    await (await streams.open("a", owner="ann", key="chat")).done()
    assert (await elsewhere.current("chat", "ann")).status == "done"
    HELD.append(await mortal.streams.open("b", owner="ann", key="chat"))
    info = await elsewhere.current("chat", "ann")
    assert (info.id, info.owner, info.key, info.metadata) == ("b", "ann", "chat", {"owner": "ann"})
    mortal.die()
    assert (await elsewhere.current("chat", "ann")).status == "open"
    await anyio.sleep(18)
    assert (await elsewhere.current("chat", "ann")).error == "ABORTED"
    await streams.delete("b")
    with pytest.raises(StreamNotFoundError):
        await elsewhere.current("chat", "ann")
    mortal.come_back()


@pytest.mark.promise("P23")
async def test_streams_are_found_by_owner_without_reading_those_of_others(
    streams: StreamManager, storage: FaultyStorage
) -> None:
    for number in range(300):
        await (await streams.open(f"s{number:03}", owner="bob" if number % 50 else "ann", metadata={"owner": "eve"})).done()
    HELD.append(await streams.open("none"))
    storage.calls.clear()
    page = await streams.list(owner="ann", limit=4)
    rest = await streams.list(page.next or "", owner="ann", limit=4)

    assert [info.id for info in page] == ["s000", "s050", "s100", "s150"]
    assert [info.id for info in page[1:2]] == [page[1].id]
    assert page[0].metadata == {"owner": "ann"}
    assert ([info.id for info in rest], rest.next) == (["s200", "s250"], None)
    assert (storage.calls["scan"], storage.calls["read"]) == (3, 6)
    assert [info.id for info in await streams.list(owner="")] == ["none"]
    assert len(await streams.list(owner="bob", limit=1_000)) == 294


@pytest.mark.promise("P23")
async def test_the_newest_streams_are_found_by_key_prefix(streams: StreamManager) -> None:
    keys = ["a", "chat", "chat/1", "chat/2", "chat/ä", "chat0", "d"]
    for number, key in enumerate(keys):
        for turn in range(2):
            await (await streams.open(f"s{number}-{turn}", owner="ann", key=key)).done()
    await streams.delete("s3-1")
    page = await streams.list(owner="ann", key_prefix="chat", limit=2)
    second = await streams.list(page.next or "", owner="ann", key_prefix="chat", limit=2)

    assert [(info.id, info.key) for info in page] == [("s1-1", "chat"), ("s2-1", "chat/1")]
    assert [info.key for info in second] == ["chat/ä", "chat0"]
    assert not await streams.list(second.next or "", owner="ann", key_prefix="chat")
    assert [info.key for info in await streams.list(owner="ann", key_prefix="")] == [key for key in keys if key != "chat/2"]
    assert not await streams.list(key_prefix="")


@pytest.mark.promise("P23")
async def test_streams_are_found_by_status(streams: StreamManager) -> None:
    for number in range(3):
        await (await streams.open(f"done{number}", owner="ann")).done()
        HELD.append(await streams.open(f"open{number}", owner="ann"))

    for owner in (None, "ann"):
        assert [info.id for info in await streams.list(owner=owner, status="open")] == ["open0", "open1", "open2"]
        assert not await streams.list(owner=owner, status="error")
    assert len(await streams.list(owner="ann", status="done", limit=2)) == 2


@pytest.mark.promise("P23")
@pytest.mark.parametrize("owner", [None, "ann"])
async def test_a_search_that_finds_nothing_for_long_answers_page_by_page(
    streams: StreamManager, storage: FaultyStorage, owner: str | None
) -> None:
    for number in range(SCAN_STREAMS + 500):
        await (await streams.open(f"s{number:05}", owner="ann")).done()
    HELD.append(await streams.open("t", owner="ann"))
    storage.calls.clear()
    page = await streams.list(owner=owner, status="open", limit=10)

    assert not page
    assert page.next is not None
    assert storage.calls["scan"] < 10
    assert storage.calls["read"] <= 2 * SCAN_STREAMS
    assert [info.id for info in await streams.list(page.next, owner=owner, status="open", limit=10)] == ["t"]


async def test_who_lists_is_told_that_the_storage_failed(streams: StreamManager, storage: FaultyStorage) -> None:
    HELD.append(await streams.open("a", owner="ann"))
    await wait_all_tasks_blocked()
    storage.refuse("read")
    with pytest.raises(StorageError):
        await streams.list(owner="ann")


async def test_an_open_that_was_taken_for_dead_before_it_had_its_key_has_no_stream(
    streams: StreamManager, elsewhere: StreamManager, storage: FaultyStorage
) -> None:
    await streams.open("other")
    await wait_all_tasks_blocked()
    storage.skip("commit", times=2)  # the recovery's entry, and the stream
    hold = storage.hold("commit")
    raised: list[BaseException] = []

    async def open_late() -> None:
        with pytest.raises(StreamTakenOverError) as info:
            await streams.open("late", key="chat", recovery=Recovery("words"))
        raised.append(info.value)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_late)
        await hold.reached.wait()
        core, life = core_of(elsewhere), await read_life(core_of(elsewhere), "late")
        assert await core._abandon("late", life, inf, core.terms)
        await elsewhere.open("quick", key="chat")
        hold.release()
    assert raised
    assert (await streams.info("quick")).status == "open"
