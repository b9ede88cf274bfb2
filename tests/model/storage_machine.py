"""Random histories of a storage, compared after each step with a model that is a dict of heads and lists.

It speaks the contract of `streamkeep.storage` and nothing else, so it runs over anything that keeps it (`kinds`).
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Literal

import anyio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamkeep.storage import PAGE_BYTES, Doorbell, Head, Page, Storage

from .kinds import Kind
from .portals import Portal

HANDLES: Final = 2
FAR: Final = 4e9
"""When nothing here has expired yet, so that a storage may forget nothing."""

# The last two are in one order by code points, and in the other by UTF-16.
IDS: Final = ("a", "A b/c?%_'", "käse\n", "\uffff", "\N{GRINNING FACE}")

Seen = Literal["the newest", "an older one", "none", "absurd"]

handles = st.integers(0, HANDLES - 1)
ids = st.sampled_from(IDS)
seens = st.one_of(st.just("the newest"), st.sampled_from(["the newest", "an older one", "none", "absurd"]))
large_batches = st.builds(
    lambda count, size, letter: [letter * size] * count,
    st.integers(1, 3),
    st.sampled_from([PAGE_BYTES // 2, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1]),
    st.sampled_from([b"\0", b"\xff"]),
)
many_small = st.builds(lambda count: [b"%d" % number for number in range(count)], st.integers(50, 600))
batches = st.one_of(
    st.lists(st.binary(max_size=40), max_size=6),
    st.lists(st.binary(max_size=40), max_size=6),
    st.lists(st.binary(max_size=40), max_size=6),
    many_small,
    large_batches,
)
offsets = st.one_of(st.integers(0, 8), st.integers(0, 700), st.just(2**62))
limits = st.one_of(st.integers(0, 4), st.sampled_from([512, 10**6]))


@dataclass(slots=True)
class Stream:
    """What the model keeps of a stream."""

    head: Head
    records: list[bytes]

    def page(self, start: int, limit: int) -> Page:
        """Give what reading must give."""
        page: list[bytes] = []
        for record in self.records[start : start + limit]:
            page.append(record)
            if sum(map(len, page)) >= PAGE_BYTES:
                break
        return Page(self.head, page)


@dataclass(eq=False, slots=True)
class Watcher:
    """A doorbell, and whether it must ring because something happened since it last did."""

    handle: int
    stream: str
    doorbell: Doorbell
    leaving: AbstractContextManager[object]
    is_due: bool = False

    async def ring(self) -> None:
        """Return when it rings."""
        await self.doorbell.wait()


class StorageMachine(RuleBasedStateMachine):
    """Several handles over the same data, and the model. Steps are counted."""

    def __init__(self, kind: Kind, counted: Counter[str]) -> None:
        super().__init__()
        self._counted = counted
        self._portal = Portal(kind.backend)
        self._kind = kind
        self._open_storage = kind.at(self._portal.directory)
        self._storages: list[tuple[Storage, AbstractContextManager[object]]] = []
        self._streams: dict[str, Stream] = {}
        self._older: dict[str, int] = {}  # a version that each id had once
        self._watchers: list[Watcher] = []
        self._version = 0
        self._steps = 0
        for _ in range(HANDLES):
            self._storages.append(self._portal.keep(self._open_storage()))

    def teardown(self) -> None:
        self._portal.close()

    # What is done.

    @rule(handle=handles, stream=ids, seen=seens, records=batches, state=st.binary(max_size=20), far=st.floats(FAR, FAR * 2))
    def commit(self, handle: int, stream: str, seen: Seen, records: list[bytes], state: bytes, far: float) -> None:
        version = self._seen(stream, seen)
        head = self._next_head(stream, records, state, far)
        committed = self._portal.run(lambda: self._storages[handle][0].commit(stream, version, head, records))
        assert committed is (version == self._version_of(stream))
        if committed:
            self._replace(stream, head, records)

    @precondition(lambda self: self._kind.backend == "asyncio")  # trio starts tasks in no order
    @rule(handle=handles, stream=ids, batches=st.lists(st.lists(st.binary(max_size=9), max_size=3), min_size=2, max_size=5))
    def commit_one_after_the_other_without_waiting(self, handle: int, stream: str, batches: list[list[bytes]]) -> None:
        storage = self._storages[handle][0]
        answers: list[bool] = []

        async def commit(seen: int | None, head: Head, records: list[bytes]) -> None:
            answers.append(await storage.commit(stream, seen, head, records))

        async def commit_all() -> None:
            async with anyio.create_task_group() as tasks:
                for records in batches:
                    seen, head = self._version_of(stream), self._next_head(stream, records)
                    self._replace(stream, head, records)
                    tasks.start_soon(commit, seen, head, records)

        self._portal.run(commit_all)
        assert answers == [True] * len(batches)

    @rule(stream=ids, batches=st.lists(st.lists(st.binary(max_size=9), max_size=3), min_size=HANDLES, max_size=HANDLES))
    def rivals_commit_at_once(self, stream: str, batches: list[list[bytes]]) -> None:
        seen = self._version_of(stream)
        offers = [(self._next_head(stream, records), records) for records in batches]
        winners: list[tuple[Head, list[bytes]]] = []

        async def commit(storage: Storage, head: Head, records: list[bytes]) -> None:
            if await storage.commit(stream, seen, head, records):
                winners.append((head, records))

        async def commit_all() -> None:
            async with anyio.create_task_group() as tasks:
                for (storage, _), (head, records) in zip(self._storages, offers, strict=True):
                    tasks.start_soon(commit, storage, head, records)

        self._portal.run(commit_all)
        assert len(winners) == 1
        self._replace(stream, *winners[0])

    @rule(handle=handles, stream=ids, seen=seens)
    def delete(self, handle: int, stream: str, seen: Seen) -> None:
        version = self._seen(stream, seen)
        if version is None:
            version = 0  # nobody deletes what was not there
        deleted = self._portal.run(lambda: self._storages[handle][0].delete(stream, version))
        assert deleted is (version == self._version_of(stream))
        if deleted:
            self._older[stream] = version
            del self._streams[stream]
            self._ring(stream)

    @rule(handle=handles, stream=ids, start=offsets, limit=limits)
    def read(self, handle: int, stream: str, start: int, limit: int) -> None:
        page = self._portal.run(lambda: self._storages[handle][0].read(stream, start, limit))
        self._compare(stream, page, start, limit)

    @rule(handle=handles, after=st.one_of(st.just(""), ids, st.text(max_size=2)), limit=st.integers(1, len(IDS) + 1))
    def scan(self, handle: int, after: str, limit: int) -> None:
        found = self._portal.run(lambda: self._storages[handle][0].scan(after, limit))
        assert list(found) == self._heads(after)[:limit]

    @rule(handle=handles, before=st.floats(FAR, FAR * 2), limit=st.integers(1, len(IDS) + 1))
    def ask_what_has_expired(self, handle: int, before: float, limit: int) -> None:
        found = self._portal.run(lambda: self._storages[handle][0].expired(before, limit))
        due = {stream: head for stream, head in self._heads() if head.expires_at <= before}
        assert len(found) == min(limit, len(due))
        assert dict(found).items() <= due.items()

    # Doorbells.

    @precondition(lambda self: len(self._watchers) < 6)
    @rule(handle=handles, stream=ids)
    def watch(self, handle: int, stream: str) -> None:
        doorbell, leaving = self._portal.keep(self._storages[handle][0].watch(stream))
        self._watchers.append(Watcher(handle, stream, doorbell, leaving))

    @precondition(lambda self: any(watcher.is_due for watcher in self._watchers))
    @rule(data=st.data())
    def hear_a_doorbell_that_must_ring(self, data: st.DataObject) -> None:
        due = [watcher for watcher in self._watchers if watcher.is_due]
        watcher = due[data.draw(st.integers(0, len(due) - 1), "watcher")]
        self._portal.run(watcher.ring)
        watcher.is_due = False

    @precondition(lambda self: self._watchers)
    @rule(data=st.data())
    def cancel_a_wait(self, data: st.DataObject) -> None:
        watcher = self._draw(data)

        async def wait_a_little() -> bool:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await watcher.ring()
                return True
            return False

        if not self._portal.run(wait_a_little) and watcher.is_due:
            self._portal.run(watcher.ring)  # a cancelled wait has lost no ring
        watcher.is_due = False

    @precondition(lambda self: self._watchers)
    @rule(data=st.data())
    def stop_watching(self, data: st.DataObject) -> None:
        watcher = self._draw(data)
        self._leave(watcher)

    @rule(handle=handles)
    def leave_and_enter_again(self, handle: int) -> None:
        for watcher in [watcher for watcher in self._watchers if watcher.handle == handle]:
            self._leave(watcher)
        with self._storages[handle][1]:
            pass
        self._storages[handle] = self._portal.keep(self._open_storage())

    @invariant()
    def every_handle_sees_what_the_model_holds(self) -> None:
        self._steps += 1
        self._counted["steps"] += 1
        self._portal.run(self._look_through_every_handle)

    async def _look_through_every_handle(self) -> None:
        for storage, _ in self._storages:
            await self._look_at_all(storage)

    async def _look_at_all(self, storage: Storage) -> None:
        assert list(await storage.scan("", len(IDS) + 1)) == self._heads()
        for stream in IDS:
            known = self._streams.get(stream)
            start = self._steps * 7 % (len(known.records) + 2) if known else 0
            limit = self._steps % 5
            self._compare(stream, await storage.read(stream, start, limit), start, limit)

    def _draw(self, data: st.DataObject) -> Watcher:
        return self._watchers[data.draw(st.integers(0, len(self._watchers) - 1), "watcher")]

    # The model.

    def _heads(self, after: str = "") -> list[tuple[str, Head]]:
        return [(stream, self._streams[stream].head) for stream in sorted(self._streams) if stream > after]

    def _compare(self, stream: str, page: Page | None, start: int, limit: int) -> None:
        known = self._streams.get(stream)
        if known is None:
            assert page is None
        else:
            assert page is not None
            assert Page(page.head, list(page.records)) == known.page(start, limit)

    def _version_of(self, stream: str) -> int | None:
        known = self._streams.get(stream)
        return known.head.version if known else None

    def _seen(self, stream: str, seen: Seen) -> int | None:
        match seen:
            case "the newest":
                return self._version_of(stream)
            case "an older one":
                return self._older.get(stream, 1 << 40)
            case "none":
                return None
            case "absurd":
                return 2**63 - 1

    def _next_head(self, stream: str, records: Sequence[bytes], state: bytes = b"", far: float = FAR) -> Head:
        self._version += 1
        tail = len(self._streams[stream].records) if stream in self._streams else 0
        return Head(self._version, tail + len(records), state, far)

    def _replace(self, stream: str, head: Head, records: Sequence[bytes]) -> None:
        known = self._streams.setdefault(stream, Stream(head, []))
        if known.head is not head:
            self._older[stream] = known.head.version
        known.head = head
        known.records.extend(records)
        self._ring(stream)

    def _ring(self, stream: str) -> None:
        for watcher in self._watchers:
            if watcher.stream == stream:
                watcher.is_due = True

    def _leave(self, watcher: Watcher) -> None:
        self._watchers.remove(watcher)
        with watcher.leaving:
            pass
