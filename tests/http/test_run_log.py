"""What the log has of a run: a line at its start, and one at its end."""

import logging
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any

import anyio
import pytest
from fastapi import HTTPException
from tests.http.servers import until

from streamkeep import ErrorInfo, InMemoryStreamManager, LimitExceededError, PublicError, Recovery, StreamInput, StreamManager
from streamkeep.http.bounds import Bounds
from streamkeep.http.response import errors_answered
from streamkeep.http.runner import FULL_SECONDS, Runner
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage

pytestmark = pytest.mark.anyio

SECRET = "what nobody is to read in a log"


def lines_in(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """Give the lines of runs, and their extra."""
    names = ("stream", "route", "owner", "key", "outcome", "events", "stored")
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
    assert ended_extra == {**known, "outcome": outcome, "events": 2, "stored": True}
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


async def test_a_run_whose_writer_is_asked_to_stop_it_is_stopped_as_one_that_others_end(
    streams: StreamManager, caplog: pytest.LogCaptureFixture
) -> None:
    async def is_asked(stream: StreamInput, _stop: anyio.Event) -> None:
        stream.end_soon(ErrorInfo("CANCELLED", "the stream was cancelled"))  # as by a note in the mailbox of its session

    async def gives_up(stream: StreamInput, _stop: anyio.Event) -> None:
        await stream.error(ErrorInfo("CANCELLED", "the user has left"))

    async with Runner(streams) as runner:
        await runner.start("asked", is_asked)
        await runner.start("given-up", gives_up)
    outcomes = {extra["stream"]: extra["outcome"] for _, extra in lines_in(caplog) if "outcome" in extra}
    assert outcomes == {"asked": "stopped", "given-up": "CANCELLED"}


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


async def test_what_a_client_has_sent_is_on_one_line(streams: StreamManager, caplog: pytest.LogCaptureFixture) -> None:
    path = "/ask/x\nstream s: its run has ended: done\r\x1b[31m\u2028\udcff é"
    async with Runner(streams) as runner:
        await runner.start("s", writes, metadata={"route": path.replace("\udcff", "")})
    assert "(/ask/x\\nstream s: its run has ended: done\\r\\x1b[31m\\u2028 é)" in caplog.text
    assert {extra["route"] for _, extra in lines_in(caplog)} == {path.replace("\udcff", "")}
    refused = [PublicError("NOT_FOUND", f"nothing at {path}"), HTTPException(404, f"nothing at {path}")]
    for error in refused:
        caplog.clear()

        async def answered(message: Any) -> None:
            pass

        async with errors_answered(answered):
            raise error
        (record,) = caplog.records
        assert record.getMessage().isprintable()
        assert "\\x1b[31m\\u2028\\udcff é" in record.getMessage()


async def test_names_that_the_apps_own_records_have_stay_the_apps(
    streams: StreamManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = logging.getLogRecordFactory()

    def with_route(*args: Any, **options: Any) -> logging.LogRecord:
        record = make(*args, **options)
        record.route, record.stream = "the app's", "the app's"
        return record

    logging.setLogRecordFactory(with_route)
    try:
        async with Runner(streams) as runner:
            await runner.start("s", writes, metadata={"route": "/ask"}, owner="ada")
    finally:
        logging.setLogRecordFactory(make)
    (begun, begun_extra), (ended, ended_extra) = lines_in(caplog)
    assert begun == "stream s: its run has started (/ask)"
    assert begun_extra == {"stream": "the app's", "route": "the app's", "owner": "ada", "key": ""}
    assert ended.startswith("stream s: its run has ended (/ask): done")
    assert ended_extra == {**begun_extra, "outcome": "done", "events": 2, "stored": True}


async def test_what_a_handler_of_the_apps_raises_ends_no_run_and_is_told_on_stderr(
    streams: StreamManager, capfd: pytest.CaptureFixture[str]
) -> None:
    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise KeyError("no space left")

    logger, handler = logging.getLogger("streamkeep"), Raises()
    logger.addHandler(handler)
    try:
        async with Runner(streams, max_producers=1) as runner:
            for name in ("one", "two"):
                await runner.start(name, writes)
                await until(lambda: not runner._runs)
    finally:
        logger.removeHandler(handler)
    assert [(await streams.info(name)).status for name in ("one", "two")] == ["done", "done"]
    assert capfd.readouterr().err.count("KeyError: 'no space left'\n") >= 4


async def test_what_is_not_stored_when_a_run_has_ended_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Its producer has ended, and the storage has not what it gave."""
    caplog.set_level(logging.INFO, "streamkeep")
    storage = FaultyStorage(MemoryStorage())
    stored: list[Any] = []
    async with StreamManager(storage) as streams:
        for name, is_to_be_away in (("whole", False), ("late", True), ("unended", True)):

            async def produce(
                stream: StreamInput, stop: anyio.Event, name: str = name, is_to_be_away: bool = is_to_be_away
            ) -> None:
                await stream.write(1)
                storage.is_down = is_to_be_away
                if name == "late":
                    stream.write_soon(2)

            async with Runner(streams, drain=timedelta(0), stop_grace=timedelta(0)) as runner:
                await runner.start(name, produce)
            storage.is_down = False
            line, extra = lines_in(caplog)[-1]
            stored.append((extra["stream"], extra["outcome"], extra["events"], extra["stored"], line.partition("; ")[2]))
    assert stored == [
        ("whole", "done", 2, True, ""),
        ("late", "done", 1, False, "not all of it is stored"),
        ("unended", "done", 1, False, "not all of it is stored"),
    ]


async def test_starts_that_are_refused_are_told_once_in_a_while(
    streams: StreamManager, caplog: pytest.LogCaptureFixture
) -> None:
    async with Runner(streams, max_producers=1, drain=timedelta(0), stop_grace=timedelta(0)) as runner:
        await runner.start("one", waits)
        for told in (1, 2):
            for _ in range(3):
                with pytest.raises(LimitExceededError):
                    await runner.start("more", writes)
            assert caplog.text.count("1 streams are being produced here (max_producers), and more are refused") == told
            runner._says_full_at -= FULL_SECONDS
