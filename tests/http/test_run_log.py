"""What the log has of a run: a line at its start, and one at its end."""

import logging
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any

import anyio
import pytest
from tests.http.servers import until

from streamkeep import InMemoryStreamManager, PublicError, Recovery, StreamInput, StreamManager
from streamkeep.http.bounds import Bounds
from streamkeep.http.runner import Runner
from streamkeep.storages.memory import MemoryStorage

pytestmark = pytest.mark.anyio

SECRET = "what nobody is to read in a log"


def lines_in(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """Give the lines of runs, and their extra."""
    names = ("stream", "route", "owner", "key", "outcome", "events")
    return [
        (record.getMessage(), {name: vars(record)[name] for name in names if name in vars(record)})
        for record in caplog.records
        if "its run" in record.getMessage()
    ]


async def writes(stream: StreamInput, _stop: anyio.Event) -> str:
    await stream.write(SECRET)
    return SECRET


async def fails(stream: StreamInput, _stop: anyio.Event) -> None:
    await stream.write(SECRET)
    raise PublicError("NOT_FOUND", "no such thing")


async def waits(stream: StreamInput, _stop: anyio.Event) -> None:
    await stream.write(SECRET)
    await anyio.sleep_forever()


@pytest.fixture
async def streams(caplog: pytest.LogCaptureFixture) -> AsyncGenerator[StreamManager]:
    caplog.set_level(logging.INFO, "streamkeep")
    async with InMemoryStreamManager() as manager:
        yield manager


@pytest.mark.parametrize(("produce", "outcome"), [(writes, "done"), (fails, "NOT_FOUND")])
async def test_a_run_has_a_line_at_its_start_and_at_its_end(
    streams: StreamManager, caplog: pytest.LogCaptureFixture, produce: Any, outcome: str
) -> None:
    async with Runner(streams) as runner:
        await runner.start("s", produce, metadata={"route": "/ask"}, owner="ada", key="chat")
    known = {"stream": "s", "route": "/ask", "owner": "ada", "key": "chat"}
    (begun, begun_extra), (ended, ended_extra) = lines_in(caplog)
    assert (begun, begun_extra) == ("stream s: its run has started (/ask)", known)
    assert ended.startswith(f"stream s: its run has ended (/ask): {outcome}, after 0.")
    assert ended_extra == {**known, "outcome": outcome, "events": 2}
    assert SECRET not in caplog.text


async def test_a_run_that_is_stopped_or_meets_a_bound_says_so(streams: StreamManager, caplog: pytest.LogCaptureFixture) -> None:
    async with Runner(streams, stop_grace=timedelta(0)) as runner:
        await runner.start("cancelled", waits)
        await runner.start("silent", waits, bounds=Bounds(max_silence=timedelta(milliseconds=10)))
        await until(lambda: streams.is_running and len(lines_in(caplog)) >= 3)
        await streams.cancel("cancelled")
        await until(lambda: len(lines_in(caplog)) == 4)
    outcomes = {extra["stream"]: extra["outcome"] for _, extra in lines_in(caplog) if "outcome" in extra}
    assert outcomes == {"cancelled": "stopped", "silent": "DEADLINE_EXCEEDED"}


async def test_a_run_that_is_handed_over_goes_on_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "streamkeep")
    storage = MemoryStorage()
    async with StreamManager(storage) as one:
        async with Runner(one, drain=timedelta(0), stop_grace=timedelta(0)) as runner:
            await runner.start("s", waits, recovery=Recovery("go", backoff=timedelta(0)))
            await anyio.sleep(0.05)
        async with StreamManager(storage) as two, Runner(two) as other:
            other.recover(["go"], lambda _: writes)
            await until(lambda: len(lines_in(caplog)) == 4)
    assert [extra.get("outcome", line.partition(": ")[2]) for line, extra in lines_in(caplog)] == [
        *("its run has started (go)", "handed over", "its run goes on here (go)", "done"),
    ]
