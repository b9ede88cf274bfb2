"""Processes that start under one key at once, and are killed with `kill -9` wherever they are: real processes, a real file."""

import random
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from streamkeep import KeyInUseError, StreamInput, StreamManager
from streamkeep.storages.sqlite import SQLiteStorage

LEASE = timedelta(seconds=1)
GRACE = timedelta(seconds=0.5)
STARTERS = 4
ROUNDS = 3

STARTER = """
import asyncio, sys, uuid
from datetime import timedelta
from streamkeep import KeyInUseError, StreamCompletedError, StreamManager, StreamNotFoundError

async def main(url, run, replace):
    options = {"lease": timedelta(seconds=1), "grace": timedelta(seconds=0.5)}
    async with StreamManager.connect(url, **options) as streams:
        print("ready", flush=True)
        sys.stdin.readline()
        while True:
            try:
                stream = await streams.open(uuid.uuid4().hex, owner="ann", key="chat", run=run or None, replace=bool(replace))
                for number in range(20):
                    print(stream.id, await stream.write(number), flush=True)
                    await asyncio.sleep(0.01)
                await stream.done()
                if run:
                    return
            except KeyInUseError as told:
                print("told", told.stream, flush=True)
                if run:
                    return
                await asyncio.sleep(0.01)
            except (StreamCompletedError, StreamNotFoundError):
                pass

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def starters(url: str, *, run: str = "", replace: str = "") -> Generator[list["subprocess.Popen[str]"]]:
    """Have some processes start as soon as all are ready."""
    command = [sys.executable, "-c", STARTER, url, run, replace]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(STARTERS)
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            yield processes
        finally:
            for process in processes:
                process.kill()


async def start(streams: StreamManager, stream: str, **options: Any) -> StreamInput:
    """Start as soon as nothing runs under the key."""
    while True:
        try:
            return await streams.open(stream, owner="ann", key="chat", **options)
        except KeyInUseError:
            await anyio.sleep(0.05)


async def running_under(streams: StreamManager) -> set[str]:
    """Give the streams that are open, and whose writer lives."""
    listed = await streams.list(owner="ann", status="open", limit=1_000)
    assert listed.next is None
    return {info.id for info in listed if (await streams.info(info.id)).status == "open"}


@pytest.mark.promise("P23")
@pytest.mark.parametrize("replace", ["", pytest.param("replace", marks=pytest.mark.slow)], ids=["refusing", "replacing"])
async def test_whoever_is_killed_a_new_start_succeeds_and_one_runs(tmp_path: Path, replace: str) -> None:
    path = tmp_path / "streams.db"
    chance = random.Random(f"keys {replace}")
    with anyio.fail_after(100):
        async with SQLiteStorage(path) as storage, StreamManager(storage, lease=LEASE, grace=GRACE) as streams:
            for turn in range(ROUNDS):
                with starters(f"sqlite:///{path}", replace=replace) as processes:
                    for process in processes:
                        await anyio.sleep(chance.random() * 0.1)
                        process.send_signal(signal.SIGKILL)
                stream = await start(streams, f"new{turn}")
                # Whoever died between opening and naming has ended as soon as it is seen to be dead.
                while (running := await running_under(streams)) != {stream.id}:
                    assert stream.id in running
                    await anyio.sleep(0.2)
                await anyio.sleep((LEASE + GRACE).total_seconds() * 1.5)
                assert await running_under(streams) == {stream.id}
                assert (await streams.current("chat", "ann")).id == stream.id
                await stream.done()


@pytest.mark.promise("P23")
async def test_of_processes_that_repeat_one_start_one_runs_and_all_are_told_of_it(tmp_path: Path) -> None:
    path = tmp_path / "streams.db"
    with anyio.fail_after(60):
        async with SQLiteStorage(path) as storage, StreamManager(storage) as streams:
            for turn in range(ROUNDS):
                with starters(f"sqlite:///{path}", run=f"run {turn}", replace="replace" * (turn % 2)) as processes:
                    outputs = [(await anyio.to_thread.run_sync(process.communicate))[0].splitlines() for process in processes]
                told = [line.split()[1] for output in outputs for line in output if line.startswith("told")]
                (writer,) = {line.split()[0] for output in outputs for line in output if not line.startswith("told")}

                assert told == [writer] * (STARTERS - 1)
                assert (await streams.info(writer)).status == "done"
                assert len(await streams.list(owner="ann")) == turn + 1
