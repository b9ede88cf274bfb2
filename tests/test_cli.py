"""The command, as a process of its own beside the one that writes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import anyio
import httpx
import pytest
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream
from tests.demo.server import Demo
from tests.http.servers import without_lives

from streamkeep import PublicError, StreamInput, StreamManager
from streamkeep.cli._output import Output

WAIT_SECONDS = 30
COMMAND = [sys.executable, "-m", "streamkeep.cli"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "STREAMKEEP_STORAGE"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=WAIT_SECONDS,
        check=False,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "utf-8", **environment},
    )


def assert_fails(result: subprocess.CompletedProcess[str], code: int, sentence: str) -> None:
    assert result.returncode == code, result
    assert sentence in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def lines_of(result: subprocess.CompletedProcess[str]) -> list[Any]:
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
async def streams(sqlite_url: str) -> AsyncIterator[StreamManager]:
    """Give the manager of the process that writes: this one."""
    async with StreamManager.connect(sqlite_url, ttl=timedelta(hours=1)) as streams:
        yield streams
    _held.clear()


_held: list[StreamInput] = []


async def write_on(streams: StreamManager, stream: str) -> None:
    """Write a chunk to a stream whose writer lives as long as the process does."""
    _held.append(await streams.open(stream))
    await _held[-1].write(1)


async def write_some(streams: StreamManager) -> None:
    """Store a stream of each kind: `done`, `failed` and `open`."""
    async with streams.open("done", metadata={"model": "alice"}) as stream:
        for word in ("Hello", " wörld"):
            await stream.write(word)
        await stream.done({"text": "Hello wörld"})
    async with streams.open("failed") as stream:
        await stream.error(PublicError("RESOURCE_EXHAUSTED", "the budget is used up"))
    await write_on(streams, "open")


async def run_beside(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it in a thread, so that this process's streams live on."""
    return await anyio.to_thread.run_sync(lambda: run(*arguments))


# Looking


async def test_list_shows_every_stream_by_id(streams: StreamManager, sqlite_url: str) -> None:
    await write_some(streams)

    table = (await run_beside("list", "--storage", sqlite_url)).stdout.splitlines()

    assert [line.split()[:2] for line in table] == [
        ["stream", "status"],
        ["done", "done"],
        ["failed", "error"],
        ["open", "open"],
    ]
    assert "RESOURCE_EXHAUSTED" in table[2]


async def test_list_json_is_one_object_a_line(streams: StreamManager, sqlite_url: str) -> None:
    await write_some(streams)

    listed = lines_of(await run_beside("list", "--json", "--storage", sqlite_url))

    assert [(stream["id"], stream["status"], stream["tail"]) for stream in listed] == [
        ("done", "done", 3),
        ("failed", "error", 1),
        ("open", "open", 1),
    ]


async def test_list_goes_through_all_pages(streams: StreamManager, sqlite_url: str) -> None:
    ids = [f"stream-{number:03}" for number in range(250)]
    for stream in ids:
        await (await streams.open(stream)).done(None)

    listed = lines_of(await run_beside("list", "--json", "--storage", sqlite_url))

    assert [stream["id"] for stream in listed] == ids


async def test_list_prints_a_page_before_it_has_the_next(
    streams: StreamManager, sqlite_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await write_some(streams)
    output = Output()
    output.streams(await streams.list(limit=2))
    first = capsys.readouterr().out
    output.streams(await streams.list("failed"))
    output.end_of_streams()

    assert [line.split()[0] for line in first.splitlines()] == ["stream", "done", "failed"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["open"]


async def test_list_is_one_table_however_many_pages_it_has(streams: StreamManager, sqlite_url: str) -> None:
    for number in range(300):
        await (await streams.open(f"s{number:03}" + "x" * (number // 100), owner="ann")).done(None)

    async with await anyio.open_process([*COMMAND, "list", "--storage", sqlite_url], env=ENVIRONMENT) as process:
        assert process.stdout is not None
        table = "".join([text async for text in TextReceiveStream(process.stdout)])

    rows = table.splitlines()
    assert len(rows) == 301
    assert rows[0].split()[:2] == ["stream", "status"]
    assert len({row.index("done ") for row in rows[1:101]}) == 1
    assert "s299xx" in rows[-1]


async def test_list_finds_streams_by_owner_key_and_status(streams: StreamManager, sqlite_url: str) -> None:
    await write_some(streams)
    for owner, key in (("ann", "chat/1"), ("ann", "chat/2"), ("bob", "chat/1")):
        await (await streams.open(f"{owner}-{key[-1]}", owner=owner, key=key)).done(None)
    await (await streams.open("ann-old", owner="ann")).done(None)

    async def listed(*arguments: str) -> list[str]:
        found = lines_of(await run_beside("list", "--json", "--storage", sqlite_url, *arguments))
        return [stream["id"] for stream in found]

    assert await listed("--owner", "ann") == ["ann-1", "ann-2", "ann-old"]
    assert await listed("--owner", "ann", "--key-prefix", "chat/") == ["ann-1", "ann-2"]
    assert await listed("--status", "open") == ["open"]
    assert await listed("--owner", "", "--status", "error") == ["failed"]
    assert "key           chat/1" in (await run_beside("info", "bob-1", "--storage", sqlite_url)).stdout
    assert_fails(await run_beside("list", "--storage", sqlite_url, "--status", "odd"), 2, "status")


async def test_list_and_info_say_whose_a_stream_is_and_what_it_was_opened_under(
    streams: StreamManager, sqlite_url: str
) -> None:
    await (await streams.open("adas", owner="Ada", key="chat/1")).done(None)
    await (await streams.open("keyed", key="job")).done(None)
    await (await streams.open("nobodys")).done(None)

    header, *rows = (await run_beside("list", "--storage", sqlite_url)).stdout.splitlines()
    listed = lines_of(await run_beside("list", "--json", "--storage", sqlite_url))
    info = (await run_beside("info", "adas", "--storage", sqlite_url)).stdout
    known = lines_of(await run_beside("info", "adas", "--json", "--storage", sqlite_url))

    owner, key = header.index("owner"), header.index("key")
    assert [(row[owner:key].strip(), row[key:].strip()) for row in rows] == [("Ada", "chat/1"), ("", "job"), ("", "")]
    assert key - owner == len("owner  ")
    assert [(stream["owner"], stream["key"]) for stream in listed] == [("Ada", "chat/1"), ("", "job"), ("", "")]
    assert [line.split() for line in info.splitlines()][-2:] == [["owner", "Ada"], ["key", "chat/1"]]
    assert (known[0]["owner"], known[0]["key"]) == ("Ada", "chat/1")


async def test_what_others_have_named_is_one_line_of_the_list_and_moves_no_cursor(
    streams: StreamManager, sqlite_url: str
) -> None:
    await (await streams.open("s", owner="[bold]\x1b[31mAda\nt  done", key="\u202ekey\r")).done(None)

    listed = (await run_beside("list", "--storage", sqlite_url)).stdout
    info = (await run_beside("info", "s", "--storage", sqlite_url)).stdout

    assert listed.splitlines()[1].endswith(r"  [bold]\x1b[31mAda\nt  done  \u202ekey\r")
    assert len(listed.splitlines()) == 2
    for text in (r"[bold]\x1b[31mAda", r"\u202ekey\r"):
        assert text in info
    assert not {"\x1b", "\r", "\u202e"} & {*listed, *info}


async def test_info_shows_no_metadata_as_a_fact(streams: StreamManager, sqlite_url: str) -> None:
    await (await streams.open("s", key="chat", metadata={"status": "open", "key": "another"})).done(None)

    shown = [line.split() for line in (await run_beside("info", "s", "--storage", sqlite_url)).stdout.splitlines()]

    assert ["status", "done"] in shown[:2]
    assert shown[-3:] == [["key", "chat"], ["status", "open"], ["key", "another"]]


async def test_list_says_when_there_are_none(streams: StreamManager, sqlite_url: str) -> None:
    assert (await run_beside("list", "--storage", sqlite_url)).stdout == "no streams\n"


async def test_the_storage_may_come_from_the_environment(streams: StreamManager, sqlite_url: str) -> None:
    await write_some(streams)

    result = await anyio.to_thread.run_sync(lambda: run("info", "done", "--json", STREAMKEEP_STORAGE=sqlite_url))

    assert lines_of(result)[0]["metadata"] == {"model": "alice"}


async def test_info_says_whether_there_is_a_writer(streams: StreamManager, sqlite_url: str) -> None:
    stream = await streams.open("answer")
    assert "writer        session " in (await run_beside("info", "answer", "--storage", sqlite_url)).stdout

    await stream.close()

    assert "released" in (await run_beside("info", "answer", "--storage", sqlite_url)).stdout


# Tailing


async def test_tail_prints_a_stream_and_exits_with_0_when_it_is_done(streams: StreamManager, sqlite_url: str) -> None:
    await write_some(streams)

    result = await run_beside("tail", "done", "--json", "--storage", sqlite_url)

    assert result.returncode == 0
    assert lines_of(result) == [
        {"offset": 0, "type": "chunk", "chunk": "Hello"},
        {"offset": 1, "type": "chunk", "chunk": " wörld"},
        {"offset": 2, "type": "done", "output": {"text": "Hello wörld"}},
    ]


async def test_tail_exits_with_1_when_the_stream_ends_in_an_error(streams: StreamManager, sqlite_url: str) -> None:
    await write_some(streams)

    result = await run_beside("tail", "failed", "--storage", sqlite_url)
    nothing_left = await run_beside("tail", "failed", "--after", "0", "--storage", sqlite_url)

    assert (result.returncode, nothing_left.returncode) == (1, 1)
    assert "RESOURCE_EXHAUSTED: the budget is used up" in result.stdout
    assert nothing_left.stdout == ""


async def test_tail_goes_on_after_an_offset(streams: StreamManager, sqlite_url: str) -> None:
    await write_some(streams)

    result = await run_beside("tail", "done", "--after", "0", "--json", "--storage", sqlite_url)

    assert [event["offset"] for event in lines_of(result)] == [1, 2]


async def test_tail_follows_a_writer_in_another_process(streams: StreamManager, sqlite_url: str) -> None:
    stream = await streams.open("answer")
    await stream.write("stored before")
    async with tailing("answer", sqlite_url) as (process, lines):
        assert json.loads(await anext(lines))["chunk"] == "stored before"

        await stream.write("written after")
        assert json.loads(await anext(lines))["chunk"] == "written after"

        await stream.done("all")
        assert json.loads(await anext(lines))["output"] == "all"
        assert await process.wait() == 0


async def test_tail_is_told_of_a_cancel_from_a_third_process(streams: StreamManager, sqlite_url: str) -> None:
    stream = await streams.open("answer")
    await stream.write(1)
    async with tailing("answer", sqlite_url) as (process, lines):
        await anext(lines)

        stopped = lines_of(await run_beside("cancel", "answer", "--json", "--storage", sqlite_url))

        assert stopped == [{"id": "answer", "stopped": True}]
        assert json.loads(await anext(lines))["error"]["status"] == "CANCELLED"
        assert await process.wait() == 1
        with anyio.fail_after(WAIT_SECONDS):
            await stream.cancelled.wait()


async def test_ctrl_c_ends_tail_with_130_and_without_a_traceback(streams: StreamManager, sqlite_url: str) -> None:
    await write_on(streams, "answer")
    async with tailing("answer", sqlite_url) as (process, lines):
        await anext(lines)

        process.send_signal(signal.SIGINT)

        assert await process.wait() == 130
        assert process.stderr is not None
        assert [part async for part in process.stderr] == []


async def test_tail_shows_control_characters_and_does_not_send_them(streams: StreamManager, sqlite_url: str) -> None:
    async with streams.open("answer") as stream:
        await stream.write("[bold]\x1b[31m\x9b31m\u202e")
        await stream.done(None)

    shown = (await run_beside("tail", "answer", "--storage", sqlite_url)).stdout

    assert r"[bold]\u001b[31m\x9b31m\u202e" in shown


async def test_tail_into_a_pipe_that_is_closed_ends_quietly(streams: StreamManager, sqlite_url: str) -> None:
    async with streams.open("answer") as stream:
        for number in range(20_000):
            stream.write_soon("some text that fills a pipe")
            if number % 1000 == 0:
                await stream.flush()
        await stream.done(None)

    assert await anyio.to_thread.run_sync(lambda: read_one_line("tail", "answer", "--storage", sqlite_url)) == (141, "")


# Changing


async def test_cancel_says_when_it_had_ended_already(streams: StreamManager, sqlite_url: str) -> None:
    await write_some(streams)

    result = await run_beside("cancel", "done", "--storage", sqlite_url)

    assert (result.returncode, result.stdout) == (0, "done: had ended already\n")


async def test_delete_forgets_a_stream(streams: StreamManager, sqlite_url: str) -> None:
    await write_some(streams)

    assert lines_of(await run_beside("delete", "done", "--json", "--storage", sqlite_url)) == [{"id": "done", "deleted": True}]

    assert [stream.id for stream in await streams.list()] == ["failed", "open"]


# Being called wrongly


@pytest.mark.parametrize("command", ["info", "tail", "cancel", "delete"])
async def test_an_unknown_stream_is_one_sentence(streams: StreamManager, sqlite_url: str, command: str) -> None:
    assert_fails(await run_beside(command, "nobodys", "--storage", sqlite_url), 1, "stream not found")


@pytest.mark.parametrize("command", ["list", "info x", "tail x", "cancel x", "delete x", "serve --port 0"])
def test_looking_at_a_database_that_is_not_there_does_not_create_it(sqlite_url: str, tmp_path: Path, command: str) -> None:
    assert_fails(run(*command.split(), "--storage", sqlite_url), 1, f"there is no database at {tmp_path / 'streams.db'}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_in_memory", [False, True])
def test_serving_the_protocol_makes_a_storage_that_is_not_there(sqlite_url: str, *, is_in_memory: bool) -> None:
    with serving("--durable-streams", "--storage", "memory://" if is_in_memory else sqlite_url) as (_, url):
        assert httpx.put(f"{url}/v1/stream/log").status_code == 201


def test_a_file_that_is_no_database_is_one_sentence(sqlite_url: str, tmp_path: Path) -> None:
    (tmp_path / "streams.db").write_text("Dear diary, " * 1000)

    assert_fails(run("list", "--storage", sqlite_url), 1, "streams.db")


@pytest.mark.parametrize("url", ["streams.db", "sqlite://", "carrier-pigeon://home", "sqlite:///x.db?synchronous=MAYBE"])
def test_a_url_that_names_no_storage_is_a_wrong_call(url: str) -> None:
    assert_fails(run("list", "--storage", url), 2, "names no storage")


def test_memory_cannot_be_looked_at_from_outside() -> None:
    assert_fails(run("list", "--storage", "memory://"), 1, "memory://")


@pytest.mark.parametrize(
    "arguments", [["list"], ["info", "--storage", "sqlite:///x.db"], ["tial"], ["tail", "x", "--after", "soon"]]
)
def test_a_wrong_call_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_bad_id_is_a_wrong_call(tmp_path: Path, sqlite_url: str) -> None:
    (tmp_path / "streams.db").touch()
    assert_fails(run("info", "a/b", "--storage", sqlite_url), 2, "a stream id is")


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [("cyclopts", [], "streamkeep[cli]"), ("rich", [], "streamkeep[cli]"), ("genkit", ["demo"], "streamkeep[demo]")],
)
def test_a_missing_extra_is_named(missing: str, arguments: list[str], extra: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {arguments}; from streamkeep.cli import main; main()"
    )

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)

    assert_fails(result, 1, f"pip install '{extra}'")
    assert missing in result.stderr


# Serving


async def test_serve_gives_the_streams_of_other_processes(streams: StreamManager, sqlite_url: str) -> None:
    await write_some(streams)
    with serving("--storage", sqlite_url) as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=WAIT_SECONDS) as client:
            events = await client.get("/streams/done")
            info = await client.get("/streams/open/info")
            stopped = await client.delete("/streams/open")
            answers = [(await client.get(path)).status_code for path in ("/healthz", "/", "/streams/", "/streams/nobodys")]

        assert b'event: chunk\ndata: " w\\u00f6rld"\nid: 1\n\n' in without_lives(events.content)
        assert (info.json()["status"], stopped.json()) == ("open", {"stopped": True})
        assert answers == [200, 404, 404, 404]
        assert (await streams.info("open")).error == "CANCELLED"
        assert end(process) == 0


async def test_serve_keeps_to_itself_what_belongs_to_somebody(streams: StreamManager, sqlite_url: str) -> None:
    await (await streams.open("adas", owner="Ada")).done(None)
    with serving("--storage", sqlite_url) as (_, url):
        async with httpx.AsyncClient(timeout=WAIT_SECONDS) as client:
            assert (await client.get(f"{url}/streams/adas")).status_code == 404


async def test_serve_does_not_wait_for_readers_of_a_stream_that_goes_on(streams: StreamManager, sqlite_url: str) -> None:
    await write_on(streams, "open")
    with serving("--storage", sqlite_url) as (process, url):
        async with httpx.AsyncClient(timeout=WAIT_SECONDS) as client, client.stream("GET", f"{url}/streams/open") as response:
            lines = response.aiter_lines()
            while await anext(lines) != "event: chunk":
                pass

            code = await anyio.to_thread.run_sync(lambda: end(process))

            rest: list[str] = []
            with pytest.raises(httpx.RemoteProtocolError):  # EventSource comes back by itself
                rest += [line async for line in lines]
        assert code == 0
        assert "event: error" not in rest


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", ""])
def test_serve_lets_other_machines_in_only_when_told_to(sqlite_url: str, host: str) -> None:
    assert_fails(run("serve", "--storage", sqlite_url, "--host", host, "--port", "0"), 2, "--allow-remote")


def test_a_port_that_is_taken_is_one_sentence(sqlite_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_fails(
            run("serve", "--storage", sqlite_url, "--port", port),
            1,
            f"cannot listen on 127.0.0.1 port {port}: Address already in use",
        )


async def test_a_server_that_is_told_to_stop_ends_its_streams_first(sqlite_url: str, tmp_path: Path) -> None:
    with log_file(tmp_path) as log, Demo(sqlite_url, log, tokens_per_second=20) as demo:
        async with httpx.AsyncClient(timeout=WAIT_SECONDS) as client, asking(client, demo) as (response, lines):
            assert '"message":"Alice"' in await anext(lines)

            assert await anyio.to_thread.run_sync(demo.stop) == 0

            last = [line async for line in lines if line][-1]
        assert last.startswith("error: ")
        assert json.loads(last.removeprefix("error: "))["error"]["status"] == "ABORTED"
        stream = response.headers["X-Genkit-Stream-Id"]
    assert lines_of(await run_beside("info", stream, "--json", "--storage", sqlite_url))[0]["error"] == "ABORTED"


async def test_a_second_ctrl_c_ends_the_server_at_once(sqlite_url: str, tmp_path: Path) -> None:
    with log_file(tmp_path) as log, Demo(sqlite_url, log, tokens_per_second=1, drain=1000) as demo:
        async with httpx.AsyncClient(timeout=WAIT_SECONDS) as client, asking(client, demo) as (_, lines):
            await anext(lines)

            demo.interrupt()
            await wait_for_text(tmp_path / "log", "stopping")
            demo.interrupt()

            assert await anyio.to_thread.run_sync(demo.wait) == 130


# Helpers


@contextmanager
def serving(*arguments: str) -> Generator[tuple[subprocess.Popen[str], str]]:
    command = [*COMMAND, "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found
            yield process, found[0]
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(WAIT_SECONDS)


def read_one_line(*arguments: str) -> tuple[int, str]:
    """Do as `streamkeep ... | head -1` does; give the exit code and what is said on stderr."""
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        return process.wait(WAIT_SECONDS), process.stderr.read()


@asynccontextmanager
async def tailing(stream: str, storage: str) -> AsyncGenerator[tuple[Process, AsyncIterator[str]]]:
    command = [*COMMAND, "tail", stream, "--json", "--storage", storage]
    with anyio.fail_after(WAIT_SECONDS):
        async with await anyio.open_process(command, env=ENVIRONMENT) as process:
            try:
                yield process, lines_from(process)
            finally:
                if process.returncode is None:
                    process.kill()


async def lines_from(process: Process) -> AsyncIterator[str]:
    assert process.stdout is not None
    rest = ""
    async for text in TextReceiveStream(process.stdout):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line


@asynccontextmanager
async def asking(client: httpx.AsyncClient, demo: Demo) -> AsyncGenerator[tuple[httpx.Response, AsyncIterator[str]]]:
    headers = {"Accept": "text/event-stream"}
    async with client.stream("POST", f"{demo.url}/answer", json={"data": "Well?"}, headers=headers) as response:
        yield response, response.aiter_lines()


def log_file(directory: Path) -> IO[str]:
    return (directory / "log").open("w")


async def wait_for_text(path: Path, text: str) -> None:
    with anyio.fail_after(WAIT_SECONDS):
        while text not in await anyio.Path(path).read_text():  # noqa: ASYNC110 (another process writes it)
            await anyio.sleep(0.02)
