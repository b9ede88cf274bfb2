"""examples/deploy: two instances behind nginx, and behind Caddy, on one PostgreSQL; and what its other files say."""

import json
import time
import uuid
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import httpx
import pytest
from tests.deploy.servers import until
from tests.engines.postgres import Postgres
from tests.examples.deployed import ProxyName, deployed, program_of

from streamkeep import StreamEventType
from streamkeep.client import subscribe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WAIT_SECONDS: Final = 120
each_proxy = pytest.mark.parametrize("proxy", ["nginx", "caddy"])


@pytest.fixture(scope="module")
def postgres() -> Generator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def storage(postgres: Postgres) -> str:
    return postgres.empty().url


def question_of(words: int) -> tuple[str, list[str]]:
    names = [f"word-{number}" for number in range(words)]
    return "+".join(names), names


class Reader:
    """A reader with our client, which comes back by itself: `words` are what it has, in order."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.ended: str | None = None
        self.begun = anyio.Event()

    async def read(self, url: str, method: str) -> None:
        headers = {"Idempotency-Key": str(uuid.uuid4())} if method == "POST" else {}
        async with subscribe(url, method=method, headers=headers) as events:
            async for event in events:
                if event.type is StreamEventType.CHUNK:
                    self.words.append(event.chunk["text"])
                elif event.type in {StreamEventType.DONE, StreamEventType.ERROR, StreamEventType.RESTARTED}:
                    self.ended = event.type.value
                self.begun.set()


@each_proxy
async def test_a_reload_that_lands_on_the_other_instance_goes_on_where_the_reader_was(
    proxy: ProxyName, storage: str, tmp_path: Path
) -> None:
    question, words = question_of(60)
    with deployed(proxy, program_of(proxy), tmp_path, storage, words_per_second=20) as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=30) as http:
            async with http.stream("POST", f"/chat/c?question={question}") as answer:
                writer, seen, cursor = answer.headers["X-Instance"], *await some_of(answer, 3)
            reader, rest = writer, list[str]()
            with anyio.fail_after(WAIT_SECONDS):
                while reader == writer:
                    async with http.stream("GET", "/chat/c/stream", headers={"Last-Event-ID": cursor}) as answer:
                        reader = answer.headers["X-Instance"]
                        rest, _ = await some_of(answer, 1 if reader == writer else None)
    assert {writer, reader} == set(service.instances)
    assert seen + rest == words


async def some_of(answer: httpx.Response, words: int | None) -> tuple[list[str], str]:
    """Read so many words, or all, and give them with the id of the last."""
    found: list[str] = []
    cursor = ""
    with anyio.fail_after(WAIT_SECONDS):
        async for line in answer.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "data" and isinstance(data := json.loads(value), dict):
                found.append(data["text"])
            # The id of an event comes before its data, or behind: it is taken where the event ends.
            if name == "id":
                cursor = value
            if not line and words is not None and len(found) >= words:
                break
    return found, cursor


@each_proxy
async def test_a_rolling_restart_under_load_loses_no_word_and_shows_none_twice(
    proxy: ProxyName, storage: str, tmp_path: Path
) -> None:
    question, words = question_of(100)
    starters, followers = ([Reader() for _ in range(8)] for _ in range(2))
    with deployed(proxy, program_of(proxy), tmp_path, storage, words_per_second=10, drain_seconds=0.5) as service:
        with anyio.fail_after(WAIT_SECONDS):
            async with anyio.create_task_group() as reading:
                for number, reader in enumerate(starters):
                    reading.start_soon(reader.read, f"{service.url}/chat/{number}?question={question}", "POST")
                for reader in starters:
                    await reader.begun.wait()
                for number, reader in enumerate(followers):
                    reading.start_soon(reader.read, f"{service.url}/chat/{number}/stream", "GET")
                for reader in followers:
                    await reader.begun.wait()
                for name in service.instances:
                    await anyio.to_thread.run_sync(service.restart, name)
        logs = "".join(process.log for process in service.instances.values())
    assert [reader.words for reader in [*starters, *followers]] == [words] * 16
    assert {reader.ended for reader in [*starters, *followers]} == {"done"}
    assert logs.count("Shutting down") == 2
    assert "Traceback" not in logs


@each_proxy
async def test_while_instances_are_restarted_one_right_after_the_other_the_proxy_always_finds_one(
    proxy: ProxyName, storage: str, tmp_path: Path
) -> None:
    """With starts that nobody repeats. One that reaches an instance in the moment in which that is told to stop is refused by it."""
    answers = Counter[str]()
    with deployed(proxy, program_of(proxy), tmp_path, storage, words_per_second=100, drain_seconds=0.5) as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=30) as http, anyio.create_task_group() as starting:

            async def start() -> None:
                while True:
                    answer = await http.post(f"/chat/{uuid.uuid4()}?question=word")
                    is_ours = answer.status_code == 200 or '"status":"UNAVAILABLE"' in answer.text
                    answers["an instance's" if is_ours else f"{answer.status_code} {answer.text[:80]}"] += 1
                    await anyio.sleep(0.05)

            for _ in range(4):
                starting.start_soon(start)
            for name in service.instances:
                await anyio.to_thread.run_sync(service.restart, name)
            starting.cancel_scope.cancel()
    assert set(answers) == {"an instance's"}


@each_proxy
async def test_of_an_instance_that_is_killed_under_load_no_word_is_lost_or_shown_twice(
    proxy: ProxyName, storage: str, tmp_path: Path
) -> None:
    """The other one goes on, when the dead one has given no sign of life for lease and grace."""
    question, words = question_of(40)
    readers = [Reader() for _ in range(6)]
    with deployed(proxy, program_of(proxy), tmp_path, storage, words_per_second=10) as service, anyio.fail_after(WAIT_SECONDS):
        async with anyio.create_task_group() as reading:
            for number, reader in enumerate(readers):
                reading.start_soon(reader.read, f"{service.url}/chat/{number}?question={question}", "POST")
            for reader in readers:
                await reader.begun.wait()
            next(iter(service.instances.values())).kill()
    assert [reader.words for reader in readers] == [words] * len(readers)
    assert {reader.ended for reader in readers} == {"done"}


@each_proxy
async def test_an_instance_learns_of_a_client_that_is_gone_before_it_next_says_something(
    proxy: ProxyName, storage: str, tmp_path: Path
) -> None:
    question, _ = question_of(2)
    with deployed(proxy, program_of(proxy), tmp_path, storage, words_per_second=0.001, drain_seconds=0.5) as service:
        async with (
            httpx.AsyncClient(base_url=service.url, timeout=30) as http,
            http.stream("POST", f"/chat/c?question={question}") as answer,
        ):
            port = int(answer.headers["X-Instance"])
            assert connections_to(port)
        with anyio.fail_after(10):  # a heartbeat comes after 15 seconds
            await until(lambda: not connections_to(port))


def connections_to(port: int) -> int:
    """Count the established connections of a server of this machine."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


@each_proxy
async def test_a_model_that_is_silent_for_longer_than_the_proxy_waits_is_heard_out(
    proxy: ProxyName, storage: str, tmp_path: Path
) -> None:
    question, words = question_of(2)
    with deployed(
        proxy, program_of(proxy), tmp_path, storage, words_per_second=0.2, heartbeat_seconds=0.5, read_timeout_seconds=3
    ) as service:
        began = time.monotonic()
        async with (
            httpx.AsyncClient(base_url=service.url, timeout=30) as http,
            http.stream("POST", f"/chat/c?question={question}") as answer,
        ):
            found, _ = await some_of(answer, None)
    assert found == words
    assert time.monotonic() - began > 2 * 3  # it was silent for longer


@each_proxy
async def test_without_heartbeats_the_proxy_cuts_a_silent_answer_and_a_reader_that_comes_back_has_all_of_it(
    proxy: ProxyName, storage: str, tmp_path: Path
) -> None:
    question, words = question_of(3)
    with deployed(
        proxy, program_of(proxy), tmp_path, storage, words_per_second=0.2, heartbeat_seconds=60, read_timeout_seconds=2
    ) as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=30) as http:
            # nginx cuts, too; Caddy 2.6 ends the answer as if that were all, and only the missing `done` tells.
            with suppress(httpx.RemoteProtocolError):
                async with http.stream("POST", f"/chat/c?question={question}") as answer:
                    found, _ = await some_of(answer, None)
                    assert found == []
        reader = Reader()
        with anyio.fail_after(WAIT_SECONDS):
            await reader.read(f"{service.url}/chat/c/stream", "GET")
    assert (reader.words, reader.ended) == (words, "done")
