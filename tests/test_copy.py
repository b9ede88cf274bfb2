"""`streamkeep copy`, as a process of its own, from one engine to another, and killed in the middle."""

import signal
import subprocess
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import anyio.to_thread
import pytest
from tests.core.test_copy import content, copy, write
from tests.test_cli import COMMAND, ENVIRONMENT, WAIT_SECONDS, assert_fails, lines_of, run, run_beside

from streamkeep import StreamManager
from streamkeep._copy import ids_with
from streamkeep.storages import storage_for
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage


@pytest.mark.parametrize("way", ["out of SQLite", "into SQLite"])
async def test_streams_go_from_one_engine_to_another(tmp_path: Path, way: str) -> None:
    async with SQLiteStorage(tmp_path / "streams.db") as database, MemoryStorage() as memory:
        source, target = (database, memory) if way == "out of SQLite" else (memory, database)
        async with StreamManager(source) as streams:
            for number in range(20):
                await write(streams, f"s{number}", 100 * number)

        done = await copy(source, target)

        assert len(done) == 20
        for stream in done:
            assert await content(target, stream) == await content(source, stream)


# The command


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[StreamManager]:
    async with StreamManager.connect(sqlite_url, ttl=timedelta(hours=1)) as streams:
        yield streams


@pytest.fixture
def target_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'target.db'}"


async def same(one_url: str, other_url: str) -> list[str]:
    """Give the ids of the streams in one storage, which must be in the other one as they are."""
    async with storage_for(one_url) as one, storage_for(other_url) as other:
        ids = [stream async for stream in ids_with(one, "")]
        for stream in ids:
            assert await content(one, stream) == await content(other, stream)
    return ids


async def test_the_command_copies_all_and_says_so(database: StreamManager, sqlite_url: str, target_url: str) -> None:
    for number in range(3):
        await write(database, f"s{number}", 10)

    first = await run_beside("copy", sqlite_url, target_url)
    second = await run_beside("copy", sqlite_url, target_url)

    assert (first.returncode, first.stdout, first.stderr) == (0, "3 streams copied (33 events)\n", "")
    assert (second.returncode, second.stdout) == (0, "0 streams copied (0 events), 3 there already\n")
    assert await same(sqlite_url, target_url) == ["s0", "s1", "s2"]


async def test_the_command_copies_those_that_are_named_or_begin_with_a_prefix(
    database: StreamManager, sqlite_url: str, target_url: str
) -> None:
    for stream in ("a1", "a2", "b1", "b2", "c"):
        await write(database, stream, 0)

    named = lines_of(await run_beside("copy", sqlite_url, target_url, "b2", "b2", "c", "--json"))
    begun = lines_of(await run_beside("copy", sqlite_url, target_url, "--prefix", "a", "--json"))

    assert sorted(line["id"] for line in named[:-1]) == ["b2", "c"]
    assert sorted(line["id"] for line in begun[:-1]) == ["a1", "a2"]
    assert begun[-1] == {"events": 2, "copied": 2, "there": 0, "writing": 0, "refused": 0, "missing": 0}
    async with storage_for(target_url) as target:
        assert [stream async for stream in ids_with(target, "")] == ["a1", "a2", "b2", "c"]


async def test_the_command_names_what_is_not_whole_and_exits_with_1(
    database: StreamManager, sqlite_url: str, target_url: str
) -> None:
    await write(database, "other", 1)
    await write(database, "whole", 1)
    writer = await database.open("written")
    await writer.write(1)
    async with StreamManager.connect(target_url) as streams:
        await write(streams, "other", 1)

    result = await run_beside("copy", sqlite_url, target_url)

    *lines, last = result.stdout.splitlines()
    assert result.returncode == 1
    assert sorted(lines) == [
        "other: refused: there is another stream under this id at the target",
        "written: writing: it is still being written, and its first 1 events are copied",
    ]
    assert last == "1 streams copied (3 events), 1 still being written, 1 refused"
    await writer.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
async def test_a_copy_that_is_killed_or_interrupted_goes_on_when_it_is_run_again(
    database: StreamManager, sqlite_url: str, target_url: str, number: signal.Signals
) -> None:
    for stream in range(60):
        await write(database, f"s{stream:02}", 2000)

    code, errors = await anyio.to_thread.run_sync(lambda: stop_when_it_has_begun(sqlite_url, target_url, number))
    lines = lines_of(await run_beside("copy", sqlite_url, target_url, "--json"))

    if number is signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert (code, errors) == (130, "streamkeep: interrupted: run it again, and it goes on from here\n")
    assert 0 < lines[-1]["there"] < 60, "it was to be stopped in the middle"
    assert lines[-1]["there"] + lines[-1]["copied"] == 60
    assert lines[-1]["events"] < 60 * 2001
    assert len(await same(sqlite_url, target_url)) == 60


def stop_when_it_has_begun(source: str, target: str, number: signal.Signals) -> tuple[int, str]:
    """Send a signal to a copy that has said that one stream is whole; give its exit code and what it says of it."""
    command = [*COMMAND, "copy", source, target, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as copying:
        assert copying.stdout is not None
        assert copying.stderr is not None
        assert copying.stdout.readline()
        copying.send_signal(number)
        copying.stdout.read()
        return copying.wait(WAIT_SECONDS), copying.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["sqlite:///{0}/none.db", "sqlite:///{0}/target.db"], 1, "there is no database at"),
        (["memory://", "sqlite:///{0}/target.db"], 1, "memory://"),
        (["sqlite:///{0}/a.db", "sqlite:///{0}/a.db"], 2, "the two storages are the same"),
        (["sqlite:///{0}/a.db", "pigeon://home"], 2, "names no storage"),
        (["sqlite:///{0}/a.db", "sqlite:///{0}/b.db", "s", "--prefix", "t"], 2, "not both"),
        (["sqlite:///{0}/a.db", "sqlite:///{0}/b.db", "s", "\udcff"], 2, "a stream id is"),
        (["sqlite:///{0}/a.db", "sqlite:///{0}/b.db", "--prefix", "\udcff"], 2, "a stream id is"),
    ],
)
def test_a_copy_that_cannot_be_is_one_sentence(tmp_path: Path, arguments: list[str], code: int, sentence: str) -> None:
    assert_fails(run("copy", *(argument.format(tmp_path) for argument in arguments)), code, sentence)
    assert list(tmp_path.iterdir()) == []
