"""Retention: a stream that goes on forgets its beginning, and whoever asks for that is told (4, 5.6)."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Final

import anyio
import httpx
import pytest
from tests.durable_streams.conftest import Open

from streamkeep.durable_streams import DurableStreamsLimits, Retention, durable_streams
from streamkeep.durable_streams._retention import FORGET_RECORDS, MAX_MARKS, Kept, Mark, kept_after
from streamkeep.durable_streams._rules import NEVER, Append, Bounds, Config, append, create
from streamkeep.errors import InvalidArgumentError
from streamkeep.storage import Page, Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage
from streamkeep.testing.faults import FaultyStorage

JSON: Final = {"content-type": "application/json"}
TEXT: Final = {"content-type": "text/plain"}
TEN: Final = Retention(max_records=10)


@pytest.fixture(params=["memory", "sqlite"])
def open_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Storage]:
    memory = MemoryStorage()
    return lambda: memory if request.param == "memory" else SQLiteStorage(tmp_path / "streams.db")


@pytest.fixture
async def client(open_client: Open, open_storage: Callable[[], Storage]) -> AsyncGenerator[httpx.AsyncClient]:
    async with open_storage() as storage, open_client(storage, retention=TEN) as client:
        yield client


@pytest.fixture
async def other(open_client: Open, open_storage: Callable[[], Storage]) -> AsyncGenerator[httpx.AsyncClient]:
    """A second server of the same streams."""
    async with open_storage() as storage, open_client(storage, retention=TEN) as client:
        yield client


async def made(client: httpx.AsyncClient, path: str = "s", **headers: str) -> str:
    answer = await client.put(path, headers={**JSON, **headers})
    assert answer.status_code == 201, answer.text
    return answer.headers["stream-next-offset"]


async def appended(client: httpx.AsyncClient, begin: int, end: int, path: str = "s") -> list[str]:
    """Append numbers, and give the offset behind each."""
    offsets = []
    for number in range(begin, end):
        answer = await client.post(path, headers=JSON, content=str(number))
        assert answer.status_code == 204, answer.text
        offsets.append(answer.headers["stream-next-offset"])
    return offsets


async def read(client: httpx.AsyncClient, offset: str, path: str = "s") -> list[int]:
    answer = await client.get(path, params={"offset": offset})
    assert answer.status_code == 200, answer.text
    numbers: list[int] = answer.json()
    return numbers


# What a reader meets


async def test_a_stream_keeps_at_least_what_it_is_to_and_an_eighth_more_at_most(client: httpx.AsyncClient) -> None:
    await made(client)
    for number in range(0, 60, 3):
        await appended(client, number, number + 3)
        there = await read(client, "-1")
        assert there == list(range(there[0], number + 3))
        assert len(there) == number + 3 or 10 <= len(there) <= 12


async def test_an_offset_that_is_forgotten_is_gone_and_the_others_are_what_they_were(client: httpx.AsyncClient) -> None:
    offsets = [await made(client), *await appended(client, 0, 40)]
    [first, *_] = await read(client, "-1")
    assert first > 20
    for number, offset in enumerate(offsets):
        if number >= first:
            assert await read(client, offset) == list(range(number, 40))
            continue
        for live in ({}, {"live": "long-poll"}, {"live": "sse"}):
            gone = await client.get("s", params={"offset": offset, **live})
            assert gone.status_code == 410
            assert gone.json()["error"]["code"] == "GONE"
    assert (await client.head("s")).status_code == 200
    assert (await client.get("s", params={"offset": "now"})).json() == []


@pytest.mark.parametrize("live", ["long-poll", "sse"])
async def test_live_readers_begin_at_the_oldest_that_is_kept(client: httpx.AsyncClient, live: str) -> None:
    await made(client)
    await appended(client, 0, 40)
    there = await read(client, "-1")
    await client.post("s", headers={"stream-closed": "true"})
    answer = await client.get("s", params={"offset": "-1", "live": live})
    assert str(there).replace(" ", "") in answer.text.replace(" ", "")


async def test_what_is_forgotten_is_forgotten_by_all_who_share_the_storage(
    client: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    await made(client)
    for number in range(0, 60, 2):
        await appended(client, number, number + 1)
        await appended(other, number + 1, number + 2)
        assert await read(client, "-1") == await read(other, "-1")
    assert len(await read(client, "-1")) <= 12


async def test_a_live_reader_follows_a_stream_that_forgets_behind_it(
    client: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    await made(client)
    seen: list[int] = []

    async def follow() -> None:
        offset, is_closed = "-1", False
        while not is_closed:
            answer = await other.get("s", params={"offset": offset, "live": "long-poll"})
            assert answer.status_code in {200, 204}
            seen.extend(answer.json() if answer.status_code == 200 else [])
            offset, is_closed = answer.headers["stream-next-offset"], "stream-closed" in answer.headers

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            for number in range(60):
                await appended(client, number, number + 1)
                while len(seen) <= number:  # noqa: ASYNC110
                    await anyio.sleep(0.001)
            await client.post("s", headers={"stream-closed": "true"})
    assert seen == list(range(60))


async def test_a_reader_that_a_flood_has_left_behind_skips_nothing_unseen(
    client: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    """It reads on where it was, or is told that this is gone."""
    await made(client)
    total = 0
    for _ in range(10):
        offset = (await client.head("s")).headers["stream-next-offset"]
        expected, answers = total, list[httpx.Response]()

        async def poll(offset: str = offset, answers: list[httpx.Response] = answers) -> None:
            answers.append(await other.get("s", params={"offset": offset, "live": "long-poll"}))

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(poll)
                while not answers:
                    async with anyio.create_task_group() as writers:
                        for number in range(total, total + 30):
                            writers.start_soon(appended, client, number, number + 1)
                    total += 30
        assert answers[0].status_code == 410 or len(answers[0].json()) > 0
        if answers[0].status_code == 200:
            block = answers[0].json()
            assert expected <= block[0] < expected + 30


async def test_a_response_of_events_whose_reader_fell_behind_ends_and_its_offset_is_gone(open_client: Open) -> None:
    memory = MemoryStorage()
    faulty = FaultyStorage(memory)
    async with open_client(memory, retention=TEN) as client, open_client(faulty, retention=TEN) as other:
        offset = await made(client)
        seen = ""
        with anyio.fail_after(30):
            async with other.stream("GET", "s", params={"offset": offset, "live": "sse"}) as response:
                async for text in response.aiter_text():
                    if not seen:  # it follows; now it cannot read for a second
                        faulty.refuse("read")
                        await appended(client, 0, 40)
                    seen += text
        assert "event: data" not in seen
        assert (await other.get("s", params={"offset": offset, "live": "sse"})).status_code == 410


class Slow(FaultyStorage):
    """While anything is read, the stream goes on."""

    async def go_on(self) -> None:
        """What happens meanwhile."""

    async def read(self, stream: str, start: int = 0, limit: int = 0) -> Page | None:
        page = await super().read(stream, start, limit)
        if limit:
            await self.go_on()
        return page


@pytest.mark.parametrize("more", [2, 8])
async def test_a_stream_is_read_from_its_start_although_that_moves_faster_than_it_is_read(open_client: Open, more: int) -> None:
    memory = MemoryStorage()
    slow, total = Slow(memory), 40
    async with open_client(memory, retention=TEN) as client, open_client(slow, retention=TEN) as other:
        await made(client)
        await appended(client, 0, total)

        async def go_on() -> None:
            nonlocal total
            await appended(client, total, total + more)
            total += more

        slow.go_on = go_on  # type: ignore[method-assign]  # now that there is something to be read
        with anyio.fail_after(20):
            answer = await other.get("s", params={"offset": "-1"})
        assert answer.status_code == 200
        numbers = answer.json()
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert numbers[-1] >= total - 1 - more
        assert await read(client, answer.headers["stream-next-offset"]) == list(range(numbers[-1] + 1, total))


# What is kept elsewhere


@pytest.mark.parametrize("live", [{}, {"live": "long-poll"}])
async def test_the_beginning_of_a_stream_that_forgets_is_asked_for_anew(open_client: Open, live: dict[str, str]) -> None:
    """A cache that gave an old one would lead its reader to what is gone, and from there back to the old one."""
    storage = MemoryStorage()
    async with open_client(storage, retention=TEN) as client, open_client(storage) as other:
        await made(client)
        [*_, offset] = await appended(client, 0, 5)
        params = {"offset": "-1", **live}
        begin = await client.get("s", params=params)
        assert begin.headers["cache-control"] == "private, no-cache"
        etag = {"if-none-match": begin.headers["etag"]}
        assert (await client.get("s", params=params, headers=etag)).status_code == 304
        await appended(client, 5, 40)
        for each in (client, other):  # also where nothing is forgotten
            answer = await each.get("s", params=params, headers=etag)
            assert (answer.status_code, answer.headers["cache-control"]) == (200, "private, no-cache")
        assert (await client.get("s", params={**params, "offset": offset}, headers=etag)).status_code == 410
        [*_, last, _] = await appended(client, 40, 42)
        assert "max-age" in (await client.get("s", params={**params, "offset": last})).headers["cache-control"]
        await made(other, "t")
        await appended(other, 0, 1, "t")
        assert "max-age" in (await other.get("t", params=params)).headers["cache-control"]


# What is bounded


async def test_the_length_of_a_stream_is_what_is_kept_of_it(open_client: Open) -> None:
    limits = DurableStreamsLimits(max_stream_bytes=2_000, max_append_bytes=100)
    async with open_client(retention=Retention(max_bytes=1_000), limits=limits) as client:
        await client.put("s", headers=TEXT)
        for number in range(100):
            assert (await client.post("s", headers=TEXT, content=f"{number:050}")).status_code == 204
        kept = (await client.get("s", params={"offset": "-1"})).text
        assert 1_000 <= len(kept) <= 1_000 + 125 + 50
        assert kept.endswith("99")


async def test_what_is_older_is_forgotten(open_client: Open) -> None:
    now = 1e9
    async with open_client(MemoryStorage(clock=lambda: now), retention=Retention(age=timedelta(hours=8))) as client:
        await made(client)
        for hour in range(48):
            await appended(client, hour, hour + 1)
            there = await read(client, "-1")
            assert there == list(range(there[0], hour + 1))
            assert there[0] == 0 or 8 <= len(there) <= 9
            now += 3600


async def test_what_came_before_a_silence_is_not_as_young_as_what_came_behind_it(open_client: Open) -> None:
    now = 1e9
    async with open_client(MemoryStorage(clock=lambda: now), retention=Retention(age=timedelta(hours=8))) as client:
        await made(client, **{"stream-ttl": "50000"})
        await appended(client, 0, 5)
        for _ in range(9):
            now += 3600
            assert await read(client, "-1") == [0, 1, 2, 3, 4]  # which puts off its expiry
        await appended(client, 5, 6)
        assert await read(client, "-1") == [5]


async def test_what_was_appended_by_a_server_without_a_retention_is_kept_as_long(open_client: Open) -> None:
    now = 1e9
    storage = MemoryStorage(clock=lambda: now)
    async with open_client(storage, retention=Retention(age=timedelta(hours=8))) as client, open_client(storage) as other:
        await made(client)
        for each, hours in [(client, 7), (other, 7), (client, 0)]:
            await appended(each, 0, 1)
            now += 3600 * hours
        assert await read(client, "-1") == [0, 0, 0]
        now += 3600 * 2
        await appended(client, 0, 1)
        assert len(await read(client, "-1")) == 2


async def test_a_clock_that_was_ahead_and_went_back_does_not_keep_a_stream_from_forgetting(open_client: Open) -> None:
    now = 1e9 + 1e8
    async with open_client(MemoryStorage(clock=lambda: now), retention=Retention(age=timedelta(hours=8))) as client:
        await made(client)
        await appended(client, 0, 5)
        now = 1e9
        for hour in range(5, 40):
            await appended(client, hour, hour + 1)
            now += 3600
        there = await read(client, "-1")
        assert 8 <= len(there) <= 10
        assert there[-1] == 39


async def test_an_append_for_which_there_would_be_no_room_forgets_all_that_it_may(open_client: Open) -> None:
    """Records that are much larger than those before them come faster than a hundred at a time make room."""
    limits = DurableStreamsLimits(max_stream_bytes=15_000, max_append_bytes=3_000)
    async with open_client(retention=Retention(max_bytes=10_000), limits=limits) as client:
        await client.put("s", headers=TEXT)
        for _ in range(10_000 // 5):
            assert (await client.post("s", headers=TEXT, content="small")).status_code == 204
        for _ in range(20):
            assert (await client.post("s", headers=TEXT, content="L" * 3_000)).status_code == 204


async def test_without_a_retention_nothing_is_forgotten(open_client: Open) -> None:
    storage = MemoryStorage()
    async with open_client(storage) as client:
        await made(client)
        await appended(client, 0, 300)
        assert len(await read(client, "-1")) == 300
    [(_, head)] = await storage.scan("", 10)
    assert b"marks" not in head.state


async def test_a_retention_that_begins_late_forgets_a_little_at_a_time(open_client: Open) -> None:
    storage = MemoryStorage()
    async with open_client(storage) as client:
        await made(client)
        for _ in range(5):
            await appended(client, 0, 100)
    async with open_client(storage, retention=TEN) as client:
        lengths = []
        for _ in range(30):
            await appended(client, 0, 1)
            lengths.append(len(await read(client, "-1")))
    assert all(before - after < FORGET_RECORDS for before, after in zip([500, *lengths], lengths, strict=False))
    assert 10 <= lengths[-1] <= 12


@pytest.mark.parametrize(
    ("retention", "limits"),
    [
        (Retention(max_bytes=0), DurableStreamsLimits()),
        (Retention(max_records=-1), DurableStreamsLimits()),
        (Retention(max_bytes=256 << 20), DurableStreamsLimits()),
        (Retention(max_records=1_000_000), DurableStreamsLimits()),
        (Retention(max_bytes=100), DurableStreamsLimits(max_stream_bytes=1_000)),
    ],
)
def test_a_retention_that_cannot_be_kept_is_refused(retention: Retention, limits: DurableStreamsLimits) -> None:
    with pytest.raises(InvalidArgumentError, match="a retention's max_"):
        durable_streams("memory://", retention=retention, limits=limits)


def test_an_age_is_a_duration() -> None:
    with pytest.raises(TypeError, match="timedelta"):
        durable_streams("memory://", retention=Retention(age=3600))  # type: ignore[arg-type]


# Forks


async def test_a_stream_that_has_forks_forgets_nothing_until_they_are_gone(client: httpx.AsyncClient) -> None:
    await made(client)
    await appended(client, 0, 5)
    await made(client, "fork", **{"stream-forked-from": "/s"})
    await appended(client, 5, 40)
    assert await read(client, "-1") == list(range(40))
    assert await read(client, "-1", "fork") == list(range(5))
    await client.delete("fork")
    await appended(client, 40, 41)
    assert 10 <= len(await read(client, "-1")) <= 12


async def test_a_fork_has_what_its_source_still_had_and_its_own_beginning_is_there(client: httpx.AsyncClient) -> None:
    offsets = [await made(client), *await appended(client, 0, 40)]
    there = await read(client, "-1")
    for offset in (offsets[1], offsets[there[0] - 1]):
        refused = await client.put("other", headers={**JSON, "stream-forked-from": "/s", "stream-fork-offset": offset})
        assert refused.status_code == 410
    await made(client, "fork", **{"stream-forked-from": "/s", "stream-fork-offset": offsets[35]})
    assert await read(client, "-1", "fork") == list(range(there[0], 35))
    assert (await client.get("fork", params={"offset": offsets[1]})).status_code == 410
    await made(client, "empty", **{"stream-forked-from": "/s", "stream-fork-offset": "-1"})
    assert await read(client, "-1", "empty") == []
    await appended(client, 35, 36, "fork")
    await made(client, "grandchild", **{"stream-forked-from": "/fork"})
    assert await read(client, "-1", "grandchild") == list(range(there[0], 36))


async def test_a_fork_forgets_what_it_has_inherited_and_then_what_is_its_own(client: httpx.AsyncClient) -> None:
    await made(client)
    await appended(client, 0, 5)
    await made(client, "fork", **{"stream-forked-from": "/s"})
    offsets = await appended(client, 5, 45, "fork")
    there = await read(client, "-1", "fork")
    assert there == list(range(there[0], 45))
    assert 10 <= len(there) <= 12
    assert (await client.get("fork", params={"offset": offsets[0]})).status_code == 410
    assert await read(client, offsets[there[0] - 5], "fork") == there[1:]


async def held(
    storage: FaultyStorage, skipped: int, ask: Callable[[], Awaitable[httpx.Response]], then: Callable[[], Awaitable[object]]
) -> httpx.Response:
    """Ask, have something else done after so many reads and one, and give the answer."""
    storage.skip("read", times=skipped)
    hold = storage.hold("read", after=True)
    answers: list[httpx.Response] = []

    async def run() -> None:
        answers.append(await ask())

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await hold.reached.wait()
            await then()
            hold.release()
    return answers[0]


@pytest.mark.parametrize(("inherits", "reads"), [(True, 0), (True, 1), (False, 1)])
async def test_a_fork_is_read_from_its_start_while_it_forgets(open_client: Open, inherits: bool, reads: int) -> None:
    storage = MemoryStorage()
    faulty = FaultyStorage(storage)
    async with open_client(storage, retention=TEN) as client, open_client(faulty, retention=TEN) as other:
        offsets = [await made(client), *await appended(client, 0, 40)]
        [first, *_] = await read(client, "-1")
        begin = first + 5 if inherits else first
        await made(client, "fork", **{"stream-forked-from": "/s", "stream-fork-offset": offsets[begin]})
        await appended(client, begin, 45, "fork")
        answer = await held(
            faulty, reads, lambda: other.get("fork", params={"offset": "-1"}), lambda: appended(client, 45, 90, "fork")
        )
        assert answer.status_code == 200
        numbers = answer.json()
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert numbers[0] in {first, (await read(client, "-1", "fork"))[0]}
        assert await read(client, "-1", "fork") == list(range(90))[-len(await read(client, "-1", "fork")) :]


async def test_no_fork_is_made_at_what_its_source_has_just_forgotten(open_client: Open) -> None:
    storage = MemoryStorage()
    faulty = FaultyStorage(storage)
    async with open_client(storage, retention=TEN) as client, open_client(faulty, retention=TEN) as other:
        offset = [await made(client), *await appended(client, 0, 5)][3]
        headers = {**JSON, "stream-forked-from": "/s", "stream-fork-offset": offset}
        answer = await held(faulty, 1, lambda: other.put("fork", headers=headers), lambda: appended(client, 5, 40))
        assert answer.status_code == 410
        assert (await client.head("fork")).status_code == 404
        await appended(client, 40, 80)
        assert len(await read(client, "-1")) <= 12


async def test_a_fork_that_took_very_long_to_be_made_has_what_it_inherits_or_is_not_there(open_client: Open) -> None:
    storage = FaultyStorage(MemoryStorage())
    async with open_client(storage, retention=TEN) as one, open_client(storage, retention=TEN) as other:
        await made(other)
        await appended(other, 0, 5)
        storage.skip("commit", times=2)
        hold = storage.hold("commit")
        codes: list[int] = []

        async def fork() -> None:
            codes.append((await one.put("f", headers={**JSON, "stream-forked-from": "s"})).status_code)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fork)
                await hold.reached.wait()
                storage.ahead_seconds = 100.0
                await made(other, "g", **{"stream-forked-from": "s"})
                assert (await other.delete("g")).status_code == 204
                await appended(other, 5, 40)
                assert len(await read(other, "-1")) <= 12
                hold.release()
        assert codes == [410]
        assert (await other.get("f")).status_code == 404
        await appended(other, 40, 80)
        assert len(await read(other, "-1")) <= 12


# The rule


@pytest.mark.parametrize("seed", range(20))
def test_what_is_forgotten_is_beyond_something_and_what_is_kept_is_an_eighth_more_at_most(seed: int) -> None:
    """Whatever is appended, and whatever is to be kept, all of it together."""
    random = Random(seed)
    age, max_bytes, max_records = (random.choice([None, *some]) for some in ([8, 100], [1, 100, 1_000], [1, 3, 10, 100]))
    retention = Retention(None if age is None else timedelta(seconds=age), max_bytes, max_records)
    bounds = Bounds(1 << 40, 1 << 40, 1, retention)
    now, log = 1e9, list[tuple[float, int]]()
    stream = create("life", "s", Config("text/plain", None, "", NEVER, is_closed=False), [], now, "", after_version=0)
    for _ in range(500):
        now += random.choice([0.0, 0.1, 0.1, 0.1, 0.1, 5.0, 30.0, 300.0])
        log.append((now, random.choice([1, 1, 5, 50, 700])))
        decision = append(stream, Append(b"x" * log[-1][1], "text/plain"), now, "", bounds)
        assert decision.stream is not None
        stream = decision.stream
        first = stream.head.first
        records, size = len(log) - first, sum(size for _, size in log[first:])
        if first:
            assert (
                (age is not None and now - log[first - 1][0] >= age - 1e-3)
                or (max_bytes is not None and size >= max_bytes)
                or (max_records is not None and records >= max_records)
            )
        assert age is None or now - log[first][0] <= age * 9 / 8 + 1e-3
        assert max_bytes is None or size <= max_bytes * 9 / 8 + 700
        assert max_records is None or records <= max_records * 9 / 8 + 1
        assert len(stream.state.marks) <= MAX_MARKS


def test_marks_are_bounded_while_nothing_may_be_forgotten() -> None:
    kept, there = Kept((Mark(0, 0, 0.0),), 0), Mark(0, 0, 0.0)
    for number in range(1, 5_000):
        after = Mark(number, 10 * number, float(number))
        kept = kept_after(kept, there, after, TEN, most=0)
        there = after
        assert (kept.first, kept.forgotten_bytes) == (0, 0)
        assert len(kept.marks) <= MAX_MARKS
    for number in range(5_000, 5_100):
        after = Mark(number, 10 * number, float(number))
        kept = kept_after(kept, there, after, TEN, most=FORGET_RECORDS)
        there = after
    assert 10 <= there.position - kept.first <= 12
    assert kept.forgotten_bytes <= 10 * kept.first
