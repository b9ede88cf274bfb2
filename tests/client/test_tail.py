"""`streamkeep tail URL`, as a process of its own."""

import json
import subprocess

import anyio
import pytest
from tests.client.forms import answer, cut, told
from tests.http.servers import serving
from tests.test_cli import assert_fails, run

from streamkeep import InMemoryStreamManager, PublicError
from streamkeep.http import StreamsHTTP


async def run_beside(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return await anyio.to_thread.run_sync(lambda: run(*arguments, **environment))


async def test_it_prints_the_events_of_a_url_and_begins_and_ends_where_it_is_told_to() -> None:
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams)
    async with streams_http, serving(streams_http, lifespan="off") as url:
        async with streams.open("s") as stream:
            for number in range(3):
                await stream.write(number)
            await stream.error(PublicError("RESOURCE_EXHAUSTED", "used up"))
        whole = await run_beside("tail", f"{url}/s")
        middle = await run_beside("tail", f"{url}/s", "--after", "1", "--json")
        end = await run_beside("tail", f"{url}/s", "--last", "1", "--no-follow", "--json")
    assert whole.stdout.splitlines()[0].split() == ["0", "chunk", "0"]
    assert [result.returncode for result in (whole, middle, end)] == [1, 1, 1]
    assert [json.loads(line)["offset"] for line in middle.stdout.splitlines()] == [2, 3]
    assert [json.loads(line)["error"]["message"] for line in end.stdout.splitlines()] == ["used up"]


async def test_it_comes_back_and_sends_the_headers_and_the_token_that_it_was_given() -> None:
    first = cut(b"retry: 1\nevent: chunk\ndata: 1\nid: s/a1a1a1a1/0\n\n")
    async with told(first, answer(b"event: done\ndata: 1\nid: s/a1a1a1a1/1\n\n")) as server:
        result = await run_beside("tail", server.url, "--json", "--header", "X-Own: a:b", STREAMKEEP_TOKEN="secret")
    assert [json.loads(line)["offset"] for line in result.stdout.splitlines()] == [0, 1]
    assert (result.returncode, result.stderr) == (0, "")
    assert (server.header("authorization"), server.header("x-own")) == (["Bearer secret"] * 2, ["a:b"] * 2)


@pytest.mark.parametrize(
    ("given", "code", "sentence"),
    [
        (
            answer(b'{"error":{"status":"NOT_FOUND","message":"stream not found"}}', status=b"404 No"),
            1,
            "NOT_FOUND: stream not found",
        ),
        (answer(b"<html>", content_type=b"text/html"), 1, "'text/html'"),
        (answer(b"", status=b"429 Many", headers=b"Retry-After: 9999\r\n"), 1, "HTTP 429"),
    ],
)
async def test_what_goes_wrong_is_one_sentence(given: bytes, code: int, sentence: str) -> None:
    async with told(given) as server:
        assert_fails(await run_beside("tail", server.url), code, sentence)


async def test_who_is_lost_is_told_where_to_go_on() -> None:
    first = cut(b"event: chunk\ndata: 1\nid: s/a1a1a1a1/7\n\n")
    async with told(first, answer(b"", status=b"503 Busy", headers=b"Retry-After: 9999\r\n")) as server:
        result = await run_beside("tail", server.url, "--after", "6")
    assert result.returncode == 1
    assert "go on with --after 7" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["http://127.0.0.1:1/s", "--header", "secret"], "NAME:VALUE"),
        (["s", "--header", "a:b"], "--header is for"),
        (["s"], "which storage?"),
        (["http://127.0.0.1:1/s", "--after", "1", "--last", "1"], "give one of them"),
        (["http://127.0.0.1:1/s", "--header", "a:b\nc"], "none can have"),
    ],
)
def test_a_wrong_call_is_one_sentence(arguments: list[str], sentence: str) -> None:
    result = run("tail", *arguments)
    assert_fails(result, 2, sentence)
    assert "secret" not in result.stderr
