"""That each end is told once, whoever makes it: real processes over one file, which race one another, and one that is killed."""

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

STREAMS = 12

PROCESS = """
import asyncio, sys
from datetime import timedelta
from streamkeep import Hooks, StreamCompletedError, StreamManager, StreamNotFoundError

class Told(Hooks):
    def ended(self, stream, outcome):
        print("ended", stream.id, outcome, flush=True)

async def one(streams, verb, id):
    try:
        if verb == "write":
            stream = await streams.open(id)
            print("written", id, flush=True)
            await stream.cancelled.wait()
        elif verb == "follow":
            async with streams.subscribe(id) as events:
                async for _ in events:
                    pass
        else:
            await getattr(streams, verb)(id)
    except (StreamNotFoundError, StreamCompletedError):
        pass

async def main(url):
    second = timedelta(seconds=1)
    async with StreamManager.connect(url, lease=second, grace=second, hooks=[Told()]) as streams:
        while line := (await asyncio.to_thread(sys.stdin.readline)).split():
            verb, *ids = line
            await asyncio.gather(*(one(streams, verb, id) for id in ids))
            print("did", verb, flush=True)

asyncio.run(main(sys.argv[1]))
"""


class Process:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.told: list[str] = []

    def ask(self, verb: str, ids: list[str]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{verb} {' '.join(ids)}\n")
        self.process.stdin.flush()

    def until(self, line: str, times: int = 1) -> None:
        """Read what it says, until it has said this so often."""
        assert self.process.stdout is not None
        while times:
            said = self.process.stdout.readline()
            assert said, "the process has ended"
            if said.startswith("ended "):
                self.told.append(said.strip())
            times -= said.startswith(line)


@contextmanager
def processes(url: str, count: int) -> Generator[list[Process]]:
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen([sys.executable, "-c", PROCESS, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(count)
        ]
        for process in started:
            stack.callback(process.kill)
        yield [Process(process) for process in started]


@pytest.mark.promise("P26")
@pytest.mark.parametrize(
    ("verb", "outcome", "is_killed"),
    [("follow", "ABORTED", True), ("cancel", "CANCELLED", False), ("delete", "deleted", False)],
)
def test_of_processes_that_end_streams_at_once_one_tells_each_end(
    tmp_path: Path, verb: str, outcome: str, is_killed: bool
) -> None:
    ids = [f"s{number}" for number in range(STREAMS)]
    with processes(f"sqlite:///{tmp_path}/s.db", 4) as (writer, *others):
        writer.ask("write", ids)
        writer.until("written", STREAMS)
        for other in others:
            other.ask(verb, ids)
        if is_killed:
            writer.process.send_signal(signal.SIGKILL)
        for process in others if is_killed else (writer, *others):
            process.until("did")
        told = Counter(line for process in (writer, *others) for line in process.told)
    assert told == Counter(f"ended {id} {outcome}" for id in ids)
