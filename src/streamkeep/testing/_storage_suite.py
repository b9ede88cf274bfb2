"""The contract of a storage, sentence by sentence, as tests. Speaks nothing but the contract."""

import time
from collections.abc import AsyncGenerator, Callable
from typing import Final

import anyio
import pytest
from msgspec.structs import replace

from streamkeep.storage import PAGE_BYTES, Doorbell, Head, Page, Storage

BOUND_SECONDS: Final = 10
LARGEST_VERSION: Final = 2**63 - 1
MANY: Final = 10_000

ODD_IDS: Final = (
    "a",
    "A",
    " ",
    "with space",
    "../../etc/passwd",
    "a/b?c=d#e&f%20",
    "quote'\"`;--",
    "%_*?[x]",
    "käse-ß-ẞ",
    "日本語",
    "\N{GRINNING FACE}",
    "new\nline\ttab",
    "x" * 255,
)


class StorageSuite:
    """Subclass it, say how your storage is opened, and pytest runs the whole contract against it.

        class TestMyStorage(StorageSuite):
            @pytest.fixture
            def open_storage(self, tmp_path):
                return lambda: MyStorage(tmp_path / "streams")

    `open_storage` gives a function, and each call of that a storage over the same data, which is empty when the test begins:
    the suite calls it twice to have a second handle, as another process would. It is not entered; the suite does that. A
    storage that only its own object can reach returns that object twice. Override `anyio_backend` to run it under trio as well.
    """

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    def anyio_backend(self) -> str:
        """Say which event loop the tests run on."""
        return "asyncio"

    @pytest.fixture
    def open_storage(self) -> Callable[[], Storage]:
        """Give a function whose every call gives a storage, not entered, over this test's data."""
        raise NotImplementedError("override the fixture open_storage")

    @pytest.fixture
    async def storage(self, open_storage: Callable[[], Storage]) -> AsyncGenerator[Storage]:
        """Give an open storage that holds nothing."""
        async with open_storage() as storage:
            yield storage

    @pytest.fixture
    async def second(self, storage: Storage, open_storage: Callable[[], Storage]) -> AsyncGenerator[Storage]:
        """Give another open storage over the same data."""
        async with open_storage() as second:
            yield second

    # -- commit

    async def test_a_commit_that_has_seen_nothing_creates_the_stream(self, storage: Storage) -> None:
        head = a_head(tail=2, state=b"state")
        assert await storage.commit("s", None, head, [b"one", b"two"])
        assert await all_of(storage, "s") == (head, [b"one", b"two"])

    async def test_a_stream_that_exists_is_not_created_again(self, storage: Storage) -> None:
        first = await create(storage, "s", b"kept")
        assert not await storage.commit("s", None, a_head(version=first.version + 1, tail=1), [b"lost"])
        assert await all_of(storage, "s") == (first, [b"kept"])

    async def test_a_commit_replaces_the_head_and_appends_the_records(self, storage: Storage) -> None:
        first = await create(storage, "s", b"one")
        second = Head(first.version + 1, 3, b"other state", first.expires_at + 60)
        assert await storage.commit("s", first.version, second, [b"two", b"three"])
        assert await all_of(storage, "s") == (second, [b"one", b"two", b"three"])

    async def test_a_commit_without_records_replaces_the_head_alone(self, storage: Storage) -> None:
        first = await create(storage, "s", b"one")
        second = replace(first, version=first.version + 1, state=b"other")
        assert await storage.commit("s", first.version, second)
        assert await all_of(storage, "s") == (second, [b"one"])

    @pytest.mark.parametrize("difference", [-1, 1])
    async def test_a_commit_that_has_not_seen_the_version_changes_nothing(self, storage: Storage, difference: int) -> None:
        first = await create(storage, "s", b"one")
        stale = first.version + difference
        assert not await storage.commit("s", stale, a_head(version=first.version + 5, tail=2), [b"lost"])
        assert await all_of(storage, "s") == (first, [b"one"])

    async def test_a_version_that_was_replaced_is_seen_no_more(self, storage: Storage) -> None:
        first = await create(storage, "s")
        second = await append(storage, "s", first, b"one")
        assert not await storage.commit("s", first.version, replace(second, version=second.version + 1, tail=2), [b"lost"])
        assert await all_of(storage, "s") == (second, [b"one"])

    async def test_a_commit_to_an_absent_stream_that_claims_to_have_seen_it_changes_nothing(self, storage: Storage) -> None:
        assert not await storage.commit("s", 1, a_head(version=2, tail=1), [b"lost"])
        assert await storage.read("s") is None

    async def test_a_commit_touches_no_other_stream(self, storage: Storage) -> None:
        other = await create(storage, "other", b"kept")
        await append(storage, "s", await create(storage, "s", b"one"), b"two")
        assert await all_of(storage, "other") == (other, [b"kept"])

    async def test_a_commit_is_seen_by_everybody_at_once(self, storage: Storage, second: Storage) -> None:
        first = await create(storage, "s", b"one")
        assert await all_of(second, "s") == (first, [b"one"])
        after = await append(second, "s", first, b"two")
        assert await all_of(storage, "s") == (after, [b"one", b"two"])
        assert not await storage.commit("s", first.version, replace(after, version=after.version + 1))

    @pytest.mark.parametrize("version", [1, 2**31, 2**53 + 1, LARGEST_VERSION])
    async def test_versions_up_to_63_bits_are_kept_exactly(self, storage: Storage, version: int) -> None:
        head = a_head(version=version)
        assert await storage.commit("s", None, head)
        assert await all_of(storage, "s") == (head, [])
        assert not await storage.commit("s", version - 1 or 2, replace(head, version=3))
        assert await storage.delete("s", version)

    async def test_a_version_names_a_commit_and_need_not_be_greater_than_the_last(self, storage: Storage) -> None:
        first = await create(storage, "s", b"one")
        lower = replace(first, version=first.version - 1_000_000, tail=2)
        assert await storage.commit("s", first.version, lower, [b"two"])
        assert not await storage.commit("s", first.version, replace(lower, version=first.version + 1, tail=3), [b"lost"])
        assert await all_of(storage, "s") == (lower, [b"one", b"two"])

    async def test_the_expiry_is_kept_to_the_microsecond(self, storage: Storage) -> None:
        head = a_head(expires_at=4_102_444_800.123_456)
        await storage.commit("s", None, head)
        page = await storage.read("s")
        assert page is not None
        assert page.head.expires_at == pytest.approx(head.expires_at, abs=1e-6, rel=0)

    @pytest.mark.parametrize(
        "data",
        [b"", b"\0", b"a\0b\0", b"\xff\xfe\x80", bytes(range(256)), b'{"json": "\\u0000"}', b"\r\n\r\n", b"x" * (1 << 20)],
        ids=["empty", "NUL", "NULs inside", "not UTF-8", "every byte", "JSON", "line ends", "a mebibyte"],
    )
    async def test_bytes_come_back_as_they_were(self, storage: Storage, data: bytes) -> None:
        head = a_head(tail=2, state=data)
        await storage.commit("s", None, head, [data, b"next"])
        assert await all_of(storage, "s") == (head, [data, b"next"])

    @pytest.mark.parametrize("stream", ODD_IDS, ids=ascii)
    async def test_any_id_is_just_a_name(self, storage: Storage, stream: str) -> None:
        bystander = await create(storage, stream + "!", b"untouched")
        first = await create(storage, stream, b"one")
        after = await append(storage, stream, first, b"two")
        assert await all_of(storage, stream) == (after, [b"one", b"two"])
        assert await ids_of(storage) == sorted([stream, stream + "!"])
        async with storage.watch(stream) as doorbell:
            assert await storage.delete(stream, after.version)
            await rung(doorbell)
        assert await storage.read(stream) is None
        assert await all_of(storage, stream + "!") == (bystander, [b"untouched"])

    async def test_ids_that_look_alike_are_different_streams(self, storage: Storage) -> None:
        alike = ["stream", "Stream", "stream ", "\u00e9", "e\u0301", "1", "01"]
        heads = {stream: await create(storage, stream, stream.encode()) for stream in alike}
        for stream in alike:
            assert await all_of(storage, stream) == (heads[stream], [stream.encode()])

    # -- read

    async def test_a_stream_that_does_not_exist_reads_as_none(self, storage: Storage) -> None:
        assert await storage.read("absent") is None
        assert await storage.read("absent", 5, 5) is None

    async def test_a_read_without_a_limit_gives_the_head_alone(self, storage: Storage) -> None:
        head = await create(storage, "s", b"one")
        assert contents(await storage.read("s")) == (head, [])
        assert contents(await storage.read("s", 0, 0)) == (head, [])

    @pytest.mark.parametrize(
        ("start", "limit", "expected"),
        [(0, 1, "a"), (0, 3, "abc"), (1, 2, "bc"), (4, 1, "e"), (3, 9, "de"), (0, 9, "abcde"), (5, 9, ""), (99, 9, "")],
    )
    async def test_a_read_gives_records_from_start_on_up_to_the_limit(
        self, storage: Storage, start: int, limit: int, expected: str
    ) -> None:
        head = await create(storage, "s", b"a", b"b", b"c", b"d", b"e")
        assert contents(await storage.read("s", start, limit)) == (head, [letter.encode() for letter in expected])

    async def test_records_of_many_commits_are_one_log(self, storage: Storage) -> None:
        head = await create(storage, "s")
        for size in (1, 3, 0, 2, 5):
            head = await append(storage, "s", head, *(b"%d" % (head.tail + i) for i in range(size)))
        page = await storage.read("s", 2, 7)
        assert contents(page) == (head, [b"2", b"3", b"4", b"5", b"6", b"7", b"8"])

    async def test_a_log_of_ten_thousand_records_is_read_whole_and_in_order(self, storage: Storage) -> None:
        head = await create(storage, "s")
        for first in range(0, MANY, 1000):
            head = await append(storage, "s", head, *(b"record %d" % i for i in range(first, first + 1000)))
        assert await all_of(storage, "s", limit=512) == (head, [b"record %d" % i for i in range(MANY)])
        assert contents(await storage.read("s", MANY - 1, 10)) == (head, [b"record %d" % (MANY - 1)])

    async def test_a_page_holds_about_a_mebibyte_at_most(self, storage: Storage) -> None:
        records = [bytes([i]) * (PAGE_BYTES // 4) for i in range(10)]
        head = await create(storage, "s", *records)
        page = await storage.read("s", 0, 10)
        assert page is not None
        assert 0 < sum(map(len, page.records)) <= PAGE_BYTES + len(records[0])
        assert await all_of(storage, "s") == (head, records)

    async def test_a_page_is_never_empty_when_there_are_records(self, storage: Storage) -> None:
        records = [b"x" * (PAGE_BYTES + 1), b"", b"y" * (PAGE_BYTES * 2), b"z"]
        await create(storage, "s", *records)
        for start in range(len(records)):
            page = await storage.read("s", start, 10)
            assert page is not None
            assert page.records
            assert page.records[0] == records[start]

    async def test_a_page_does_not_change_when_the_stream_does(self, storage: Storage) -> None:
        head = await create(storage, "s", b"one")
        page = await storage.read("s", 0, 10)
        await append(storage, "s", head, b"two")
        assert contents(page) == (head, [b"one"])

    async def test_head_and_records_are_of_one_moment(self, storage: Storage, second: Storage) -> None:
        """Each commit appends its version; so in every page the last record must be the head's, and the tail must fit."""
        head = a_head(tail=1)
        await storage.commit("s", None, head, [b"%d" % head.version])
        written = anyio.Event()
        pages = 0

        async def write() -> None:
            current = head
            for _ in range(200):
                version = current.version + 1
                current = await append(storage, "s", current, b"%d" % version)
                await anyio.lowlevel.checkpoint()
            written.set()

        async def check(reader: Storage) -> None:
            nonlocal pages
            tails = set()
            while not written.is_set():
                page = await reader.read("s", 0, 1000)
                assert page is not None
                assert len(page.records) == page.head.tail
                assert page.records[-1] == b"%d" % page.head.version
                tails.add(page.head.tail)
                await anyio.lowlevel.checkpoint()
            pages += len(tails) > 1

        with anyio.fail_after(BOUND_SECONDS * 3):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(check, storage)
                tasks.start_soon(check, second)
                tasks.start_soon(write)
        assert pages == 2, "the readers have not read while the writer wrote"

    # -- delete

    async def test_a_deletion_forgets_head_and_log(self, storage: Storage, second: Storage) -> None:
        head = await create(storage, "s", b"one")
        assert await storage.delete("s", head.version)
        assert await storage.read("s", 0, 10) is None
        assert await second.read("s", 0, 10) is None
        assert await ids_of(storage) == []

    async def test_a_deletion_that_has_not_seen_the_version_changes_nothing(self, storage: Storage) -> None:
        head = await create(storage, "s", b"one")
        assert not await storage.delete("s", head.version - 1)
        assert not await storage.delete("s", head.version + 1)
        assert not await storage.delete("absent", head.version)
        assert await all_of(storage, "s") == (head, [b"one"])

    async def test_a_deletion_touches_no_other_stream(self, storage: Storage) -> None:
        kept = await create(storage, "kept", b"one")
        gone = await create(storage, "gone", b"two")
        assert await storage.delete("gone", gone.version)
        assert await all_of(storage, "kept") == (kept, [b"one"])

    async def test_a_stream_created_again_after_deletion_begins_empty(self, storage: Storage, second: Storage) -> None:
        old = await append(storage, "s", await create(storage, "s", b"one"), b"two", b"three")
        assert await second.delete("s", old.version)
        assert not await storage.commit("s", old.version, replace(old, version=old.version + 1))
        new = a_head(version=old.version + 2, tail=1, state=b"new")
        assert await second.commit("s", None, new, [b"new"])
        assert await all_of(storage, "s") == (new, [b"new"])
        assert not await storage.commit("s", old.version, replace(old, version=old.version + 3))
        newer = await append(storage, "s", new, b"newer")
        assert await all_of(second, "s") == (newer, [b"new", b"newer"])

    async def test_a_big_stream_can_be_deleted(self, storage: Storage) -> None:
        head = await create(storage, "s", *[b"x" * 100] * MANY)
        assert await storage.delete("s", head.version)
        assert await storage.read("s") is None

    # -- first

    @pytest.mark.parametrize("first", [1, 3, 5])
    async def test_a_commit_forgets_what_is_before_its_first_record(
        self, storage: Storage, second: Storage, first: int
    ) -> None:
        before = await create(storage, "s", *letters(0, 4))
        head = replace(before, version=before.version + 1, tail=5, first=first)
        assert await storage.commit("s", before.version, head, letters(4, 5))
        for each in (storage, second):
            assert await all_of(each, "s") == (head, letters(first, 5))
            for start in range(first):
                page = await each.read("s", start, 10)
                assert page is not None
                assert (page.head, list(page.records)) == (head, [])
            assert await each.scan() == [("s", head)]

    async def test_a_log_goes_on_behind_what_was_forgotten_and_forgets_more(self, storage: Storage) -> None:
        head = await create(storage, "s")
        for number in range(0, 40, 4):
            forgotten = replace(head, first=max(0, number - 6))
            head = await append(storage, "s", forgotten, *letters(number, number + 4))
            assert await all_of(storage, "s") == (head, letters(head.first, number + 4))

    async def test_a_log_may_forget_all_it_has_and_what_is_just_appended(self, storage: Storage) -> None:
        head = await create(storage, "s", *letters(0, 3))
        emptied = replace(head, version=head.version + 1, first=3)
        assert await storage.commit("s", head.version, emptied)
        assert await all_of(storage, "s") == (emptied, [])
        head = replace(emptied, version=emptied.version + 1, tail=6, first=5)
        assert await storage.commit("s", emptied.version, head, letters(3, 6))
        assert await all_of(storage, "s") == (head, letters(5, 6))
        head = await append(storage, "s", head, *letters(6, 8))
        assert await all_of(storage, "s") == (head, letters(5, 8))

    async def test_a_commit_that_has_not_seen_the_version_forgets_nothing(self, storage: Storage) -> None:
        head = await create(storage, "s", *letters(0, 3))
        assert not await storage.commit("s", head.version + 1, replace(head, version=head.version + 2, first=2))
        assert await all_of(storage, "s") == (head, letters(0, 3))

    async def test_forgetting_touches_no_other_stream_and_no_later_one_of_the_same_id(self, storage: Storage) -> None:
        other = await create(storage, "other", *letters(0, 3))
        head = await create(storage, "s", *letters(0, 3))
        head = await append(storage, "s", replace(head, first=2), b"more")
        assert await all_of(storage, "other") == (other, letters(0, 3))
        assert await storage.delete("s", head.version)
        later = replace(a_head(version=head.version + 1), tail=3)
        assert await storage.commit("s", None, later, letters(0, 3))
        assert await all_of(storage, "s") == (later, letters(0, 3))

    async def test_logs_that_forget_at_once_keep_what_they_keep(self, storage: Storage) -> None:
        heads = {stream: await create(storage, stream, *letters(0, 3)) for stream in ("a", "b", "c")}

        async def forget(stream: str, first: int) -> None:
            heads[stream] = await append(storage, stream, replace(heads[stream], first=first), *letters(3, 5))

        async with anyio.create_task_group() as tasks:
            for first, stream in enumerate(heads):
                tasks.start_soon(forget, stream, 2 * first)
        for first, stream in enumerate(heads):
            assert await all_of(storage, stream) == (heads[stream], letters(2 * first, 5))

    async def test_a_long_log_forgets_most_of_itself(self, storage: Storage) -> None:
        head = await create(storage, "s", *letters(0, MANY))
        head = await append(storage, "s", replace(head, first=MANY - 7), b"more")
        assert await all_of(storage, "s") == (head, [*letters(MANY - 7, MANY), b"more"])

    # -- scan

    async def test_a_scan_of_nothing_is_empty(self, storage: Storage) -> None:
        assert await ids_of(storage) == []

    async def test_a_scan_gives_ids_in_code_point_order_page_by_page(self, storage: Storage) -> None:
        ids = [*ODD_IDS, "B", "b", "aa", "\ufffd", "\U0001f600", *(f"n{i}" for i in range(30))]
        for stream in ids:
            await storage.commit(stream, None, a_head())
        found: list[str] = []
        while page := await storage.scan(found[-1] if found else "", 7):
            assert len(page) <= 7
            found.extend(stream for stream, _ in page)
        assert found == sorted(set(ids))

    async def test_a_scan_begins_after_an_id_that_need_not_exist(self, storage: Storage) -> None:
        for stream in ("a", "c", "e"):
            await create(storage, stream)
        assert await ids_of(storage, "b", 10) == ["c", "e"]
        assert await ids_of(storage, "c", 10) == ["e"]
        assert await ids_of(storage, "e", 10) == []
        assert await ids_of(storage, "", 2) == ["a", "c"]

    async def test_a_scan_sees_what_was_created_and_deleted_in_between(self, storage: Storage, second: Storage) -> None:
        heads = {stream: await create(storage, stream) for stream in ("a", "b")}
        assert await ids_of(storage) == ["a", "b"]
        await second.delete("a", heads["a"].version)
        await create(second, "c")
        assert await ids_of(storage) == ["b", "c"]

    async def test_a_scan_gives_heads(self, storage: Storage, second: Storage) -> None:
        heads = {stream: await create(storage, stream, b"record") for stream in ("a", "b", "c")}
        heads["b"] = await append(second, "b", heads["b"], b"another")
        assert dict(await storage.scan()) == heads

    # -- expired

    async def test_expired_gives_what_has_expired_with_its_head_and_nothing_else(
        self, storage: Storage, second: Storage
    ) -> None:
        now = float(int(storage.time()))
        heads = {stream: a_head(expires_at=now + at) for stream, at in (("a", 1), ("b", 2), ("c", 3), ("d", 900))}
        for stream, head in heads.items():
            await storage.commit(stream, None, head)
        assert dict(await second.expired(now)) == {}
        assert dict(await second.expired(now + 2)) == {stream: heads[stream] for stream in ("a", "b")}

    async def test_expired_goes_by_the_newest_head(self, storage: Storage, second: Storage) -> None:
        now = float(int(storage.time()))
        soon, late = a_head(expires_at=now + 1), a_head(expires_at=now + 1000)
        await storage.commit("put off", None, soon)
        await storage.commit("put off", soon.version, replace(late, version=late.version + 1))
        await storage.commit("brought forward", None, late)
        await storage.commit("brought forward", late.version, replace(soon, version=soon.version + 1))
        assert [stream for stream, _ in await second.expired(now + 1)] == ["brought forward"]

    async def test_expired_gives_no_more_than_it_may_and_what_is_left_when_that_is_deleted(self, storage: Storage) -> None:
        now = float(int(storage.time()))
        for number in range(25):
            await storage.commit(f"s{number}", None, a_head(expires_at=now + 1 + number / 100))
        found: list[str] = []
        while page := await storage.expired(now + 10, 10):
            assert len(page) <= 10
            for stream, head in page:
                assert await storage.delete(stream, head.version)
                found.append(stream)
        assert sorted(found) == sorted(f"s{number}" for number in range(25))

    async def test_a_stream_that_was_deleted_and_created_again_expires_when_the_new_one_does(self, storage: Storage) -> None:
        now = float(int(storage.time()))
        first = a_head(expires_at=now + 1)
        await storage.commit("s", None, first)
        assert await storage.delete("s", first.version)
        await storage.commit("s", None, a_head(version=first.version + 1, expires_at=now + 1000))
        assert not await storage.expired(now + 10)

    # -- time and clone

    async def test_all_who_share_a_storage_have_one_time_and_it_goes_on(self, storage: Storage, second: Storage) -> None:
        before = storage.time()
        await anyio.sleep(0.05)
        after = storage.time()
        assert before < after
        assert abs(storage.time() - second.time()) < 2
        assert abs(storage.time() - time.time()) < 60  # the server of these tests is on this machine

    async def test_a_clone_is_another_storage_over_the_same_data_in_another_event_loop(self, storage: Storage) -> None:
        head = await create(storage, "s", b"record")
        clone = storage.clone()
        if clone is None:
            return  # nobody else can reach it

        async def use() -> bool:
            async with clone:
                seen = (await all_of(clone, "s")) == (head, [b"record"])
                return seen and await clone.commit("s", head.version, replace(head, version=head.version + 1))

        assert await anyio.to_thread.run_sync(lambda: anyio.run(use))
        page = await storage.read("s")
        assert page is not None
        assert page.head.version == head.version + 1

    # -- watch

    async def test_a_commit_rings(self, storage: Storage) -> None:
        head = await create(storage, "s")
        async with storage.watch("s") as doorbell:
            await append(storage, "s", head, b"one")
            await rung(doorbell)

    async def test_the_creation_of_the_stream_rings(self, storage: Storage, second: Storage) -> None:
        async with storage.watch("s") as here, second.watch("s") as there:
            await create(storage, "s")
            await rung(here)
            await rung(there)

    async def test_a_deletion_rings(self, storage: Storage, second: Storage) -> None:
        head = await create(storage, "s")
        async with storage.watch("s") as here, second.watch("s") as there:
            await storage.delete("s", head.version)
            await rung(here)
            await rung(there)

    async def test_a_commit_by_somebody_else_rings(self, storage: Storage, second: Storage) -> None:
        head = await create(storage, "s")
        async with storage.watch("s") as doorbell:
            for _ in range(5):
                head = await append(second, "s", head, b"one")
                await until_tail(storage, "s", doorbell, head.tail)

    async def test_a_commit_between_entering_and_waiting_rings(self, storage: Storage, second: Storage) -> None:
        head = await create(storage, "s")
        async with storage.watch("s") as doorbell:
            head = await append(second, "s", head, b"one")
            await append(storage, "s", head, b"two")
            await rung(doorbell)

    async def test_whoever_waits_is_woken(self, storage: Storage, second: Storage) -> None:
        head = await create(storage, "s")
        async with storage.watch("s") as doorbell:
            for writer in (storage, second):
                with anyio.fail_after(BOUND_SECONDS):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(until_tail, storage, "s", doorbell, head.tail + 1)
                        await anyio.wait_all_tasks_blocked()
                        head = await append(writer, "s", head, b"one")

    async def test_rings_may_merge_but_the_last_is_not_lost(self, storage: Storage, second: Storage) -> None:
        head = await create(storage, "s")
        async with storage.watch("s") as doorbell:
            for _ in range(100):
                head = await append(second, "s", head, b"one")
            await until_tail(storage, "s", doorbell, 100)

    async def test_every_watcher_is_rung(self, storage: Storage) -> None:
        head = await create(storage, "s")
        async with storage.watch("s") as one, storage.watch("s") as two, storage.watch("other"):
            await append(storage, "s", head, b"one")
            await rung(one)
            await rung(two)

    async def test_a_watcher_that_leaves_does_not_take_the_others_along(self, storage: Storage) -> None:
        head = await create(storage, "s")
        async with storage.watch("s") as stays:
            async with storage.watch("s"):
                pass
            await append(storage, "s", head, b"one")
            await rung(stays)

    async def test_a_cancelled_wait_loses_no_ring(self, storage: Storage, second: Storage) -> None:
        head = await create(storage, "s")
        async with storage.watch("s") as doorbell:
            for writer in (storage, second) * 10:
                await exhaust(doorbell)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(doorbell.wait)
                    await anyio.wait_all_tasks_blocked()
                    head = await append(writer, "s", head, b"one")
                    tasks.cancel_scope.cancel()
                # The wait may have returned before it was cancelled; then this commit, or a look, tells.
                page = await storage.read("s")
                assert page is not None
                assert page.head == head
                head = await append(writer, "s", head, b"two")
                await rung(doorbell)

    async def test_a_wait_that_is_cancelled_as_it_rings_loses_no_ring(self, storage: Storage) -> None:
        """The ring and the cancellation come in the same step, so the waiting task has seen neither."""
        head = await create(storage, "s")
        async with storage.watch("s") as doorbell:
            returned = False

            async def wait() -> None:
                nonlocal returned
                await doorbell.wait()
                returned = True

            await exhaust(doorbell)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                await append(storage, "s", head, b"one")
                tasks.cancel_scope.cancel()
            if not returned:
                await rung(doorbell)

    async def test_enter_watch_read_wait_never_misses_a_commit(self, storage: Storage, second: Storage) -> None:
        """The writer makes each commit only when the reader has followed the one before: one lost ring would stop both."""
        rounds = 200
        head = await create(storage, "s")
        followed = anyio.Event()

        async def follow() -> None:
            nonlocal followed
            tail = 0
            async with storage.watch("s") as doorbell:
                while tail < rounds:
                    page = await storage.read("s")
                    assert page is not None
                    if page.head.tail == tail:
                        await doorbell.wait()
                    else:
                        tail = page.head.tail
                        followed.set()

        with anyio.fail_after(BOUND_SECONDS * 3):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follow)
                for i in range(rounds):
                    followed = anyio.Event()
                    head = await append(second if i % 2 else storage, "s", head, b"x")
                    await followed.wait()

    # -- many at once

    async def test_commits_to_different_streams_at_once_all_succeed(self, storage: Storage) -> None:
        streams = [f"s{i}" for i in range(64)]

        async def write(stream: str) -> None:
            head = await create(storage, stream)
            for i in range(10):
                head = await append(storage, stream, head, f"{stream}/{i}".encode())
                await anyio.lowlevel.checkpoint()

        with anyio.fail_after(BOUND_SECONDS * 3):
            async with anyio.create_task_group() as tasks:
                for stream in streams:
                    tasks.start_soon(write, stream)
        for stream in streams:
            assert (await all_of(storage, stream))[1] == [f"{stream}/{i}".encode() for i in range(10)]

    async def test_of_rivals_exactly_one_wins_each_version(self, storage: Storage, second: Storage) -> None:
        head = await create(storage, "s")
        for _ in range(20):
            won: list[Head] = []

            async def compete(rival: Storage, name: int, seen: Head, won: list[Head]) -> None:
                new = replace(seen, version=seen.version + 1 + name, tail=seen.tail + 1)
                if await rival.commit("s", seen.version, new, [b"%d" % name]):
                    won.append(new)

            with anyio.fail_after(BOUND_SECONDS):
                async with anyio.create_task_group() as tasks:
                    for name in range(8):
                        tasks.start_soon(compete, second if name % 2 else storage, name, head, won)
            assert len(won) == 1
            assert (await all_of(storage, "s"))[0] == won[0]
            head = won[0]

    async def test_of_many_who_create_a_stream_exactly_one_does(self, storage: Storage, second: Storage) -> None:
        won: list[int] = []

        async def compete(rival: Storage, name: int) -> None:
            if await rival.commit("s", None, a_head(version=100 + name, tail=1), [b"%d" % name]):
                won.append(name)

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                for name in range(16):
                    tasks.start_soon(compete, second if name % 2 else storage, name)
        assert len(won) == 1
        assert (await all_of(storage, "s"))[1] == [b"%d" % won[0]]

    async def test_a_writer_and_a_deleter_do_not_both_win(self, storage: Storage, second: Storage) -> None:
        for i in range(20):
            stream = f"s{i}"
            head = await create(storage, stream, b"one")
            won: list[str] = []

            async def write(stream: str, head: Head, won: list[str]) -> None:
                if await storage.commit(stream, head.version, replace(head, version=head.version + 1, tail=2), [b"two"]):
                    won.append("written")

            async def delete(stream: str, head: Head, won: list[str]) -> None:
                if await second.delete(stream, head.version):
                    won.append("deleted")

            with anyio.fail_after(BOUND_SECONDS):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(write, stream, head, won)
                    tasks.start_soon(delete, stream, head, won)
            page = await storage.read(stream, 0, 10)
            assert won == (["deleted"] if page is None else ["written"])
            assert page is None or list(page.records) == [b"one", b"two"]

    async def test_a_cancelled_commit_is_done_or_not_and_the_next_one_works(self, storage: Storage) -> None:
        head = await create(storage, "s")
        for _ in range(20):
            new = replace(head, version=head.version + 1, tail=head.tail + 2)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(storage.commit, "s", head.version, new, [b"both", b"or neither"])
                # Its own task has begun when this one goes on.
                await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            # Whether it was done may still be in the making. Whoever tries to be the next learns it, one way or the other.
            takers = [replace(seen, version=head.version + 2, tail=seen.tail + 1) for seen in (head, new)]
            done = [await storage.commit("s", taker.version - 2 + i, taker, [b"next"]) for i, taker in enumerate(takers)]
            assert sum(done) == 1
            head = takers[done.index(True)]
            stored, records = await all_of(storage, "s")
            assert stored == head
            assert len(records) == head.tail
        assert await storage.delete("s", head.version)

    async def test_what_was_committed_is_there_when_the_storage_is_opened_again(
        self, storage: Storage, open_storage: Callable[[], Storage]
    ) -> None:
        async with open_storage() as other:
            head = await create(other, "s", b"one")
        async with open_storage() as other:
            assert await all_of(other, "s") == (head, [b"one"])
        assert await all_of(storage, "s") == (head, [b"one"])

    # -- leaving

    @pytest.mark.parametrize("cancelled", [False, True], ids=["left", "cancelled"])
    async def test_leaving_waits_for_the_commits_and_deletions_that_are_under_way(
        self, storage: Storage, open_storage: Callable[[], Storage], *, cancelled: bool
    ) -> None:
        head = await create(storage, "deleted", b"one")
        streams = [f"s{number:02}" for number in range(50)]
        done: list[str] = []

        async def commit(other: Storage, stream: str) -> None:
            await create(other, stream, b"one")
            done.append(stream)

        async def delete(other: Storage, stream: str) -> None:
            assert await other.delete(stream, head.version)
            done.append(stream)

        with anyio.fail_after(BOUND_SECONDS):
            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as leaver:
                    async with open_storage() as other:
                        tasks.start_soon(delete, other, "deleted")
                        for stream in streams:
                            tasks.start_soon(commit, other, stream)
                        # Their own tasks have begun when this one goes on.
                        await anyio.lowlevel.checkpoint()
                        if cancelled:
                            leaver.cancel()
        assert sorted(done) == ["deleted", *streams]
        assert await ids_of(storage) == streams


# -- the words of the tests


def a_head(version: int = 1_700_000_000_000_000, tail: int = 0, state: bytes = b"", expires_at: float = 0) -> Head:
    """Give a head that will not expire while a test runs."""
    return Head(version, tail, state, expires_at or float(int(time.time()) + 3600))


async def create(storage: Storage, stream: str, *records: bytes) -> Head:
    """Create the stream, and give its head."""
    head = a_head(tail=len(records), state=b"state of " + stream.encode())
    assert await storage.commit(stream, None, head, records)
    return head


async def append(storage: Storage, stream: str, seen: Head, *records: bytes) -> Head:
    """Append to a stream whose head is `seen`, or differs from it in its `first`, and give the new one."""
    head = replace(seen, version=seen.version + 1, tail=seen.tail + len(records))
    assert await storage.commit(stream, seen.version, head, records)
    return head


def letters(begin: int, end: int) -> list[bytes]:
    """Give records that say their offsets."""
    return [b"record %d" % offset for offset in range(begin, end)]


def contents(page: Page | None) -> tuple[Head, list[bytes]]:
    """Give what a page holds, to compare; there must be one."""
    assert page is not None
    return page.head, list(page.records)


async def all_of(storage: Storage, stream: str, limit: int = 1000) -> tuple[Head, list[bytes]]:
    """Read a stream page by page, from its first record to the end of its log."""
    records: list[bytes] = []
    page = await storage.read(stream)
    assert page is not None
    first = page.head.first
    while True:
        page = await storage.read(stream, first + len(records), limit)
        assert page is not None
        if not page.records:
            assert page.head.tail == first + len(records)
            return page.head, records
        assert len(page.records) <= limit
        records.extend(page.records)


async def ids_of(storage: Storage, after: str = "", limit: int = 100) -> list[str]:
    """Scan, and give the ids."""
    return [stream for stream, _ in await storage.scan(after, limit)]


async def rung(doorbell: Doorbell) -> None:
    """Wait for a ring, but not for ever."""
    with anyio.fail_after(BOUND_SECONDS):
        await doorbell.wait()


async def until_tail(storage: Storage, stream: str, doorbell: Doorbell, tail: int) -> None:
    """Look, and look again at each ring, until the log is that long."""
    with anyio.fail_after(BOUND_SECONDS):
        while len((await all_of(storage, stream))[1]) < tail:
            await doorbell.wait()


async def exhaust(doorbell: Doorbell) -> None:
    """Take what has rung so far, as far as one can know: a ring for something earlier may still come."""
    with anyio.move_on_after(0):
        await doorbell.wait()
