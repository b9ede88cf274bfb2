"""`streamkeep tail URL` and `cancel URL`, as processes of their own."""

import json
import subprocess

import anyio
import pytest
from tests.client.forms import answer, cut, told
from tests.http.servers import serving
from tests.test_cli import assert_fails, run

from streamkeep import InMemoryStreamManager, PublicError
from streamkeep.http import Access, StreamsHTTP


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


async def test_it_says_once_an_outage_what_it_waits_for() -> None:
    events = [b"event: chunk\ndata: 1\nid: s/a1a1a1a1/%d\n\n" % number for number in range(2)]
    busy = answer(b"", status=b"503 Busy")
    answers = cut(b"retry: 1\n" + events[0]), busy, busy, cut(events[1]), busy, busy
    async with told(*answers, answer(b"event: done\ndata: 1\nid: s/a1a1a1a1/2\n\n")) as server:
        result = await run_beside("tail", server.url.replace("//", "//me:secret@"), "--json")
    assert [json.loads(line)["offset"] for line in result.stdout.splitlines()] == [0, 1, 2]
    said = f"streamkeep: waiting for {server.url.removeprefix('http://')}: UNAVAILABLE: HTTP 503"
    assert (result.returncode, result.stderr.splitlines()) == (0, [said] * 2)


async def test_a_long_wait_is_said_at_once() -> None:
    busy = answer(b"", status=b"429 Many", headers=b"Retry-After: 1\r\n")
    async with told(busy, answer(b"event: done\ndata: 1\nid: s/a1a1a1a1/0\n\n")) as server:
        result = await run_beside("tail", server.url, "--json")
    assert "for 1 seconds, as it asks" in result.stderr
    assert result.returncode == 0


@pytest.mark.parametrize("command", ["tail", "cancel"])
@pytest.mark.parametrize(
    ("status", "hint"), [(b"401 No", "STREAMKEEP_TOKEN"), (b"403 No", "--header"), (b"404 No", "https://HOST/streams/ID")]
)
async def test_a_refusal_has_a_hint_of_what_helps(command: str, status: bytes, hint: str) -> None:
    async with told(answer(b"", status=status)) as server:
        assert_fails(await run_beside(command, server.url), 1, hint)


async def test_a_stream_is_stopped_by_its_url() -> None:
    streams = InMemoryStreamManager()
    streams_http = StreamsHTTP(streams, authorize=authorize)
    async with streams_http, serving(streams_http, lifespan="off") as url:
        stream = await streams.open("s")
        refused = await run_beside("cancel", f"{url}/s")
        first = await run_beside("cancel", f"{url}/s", STREAMKEEP_TOKEN="secret")
        second = await run_beside("cancel", f"{url}/s", "--json", "--header", "Authorization: Bearer secret")
        assert stream.cancelled.is_set()
    assert (refused.returncode, first.returncode, second.returncode) == (1, 0, 0)
    assert first.stdout == f"{url}/s: stopped\n"
    assert json.loads(second.stdout) == {"id": f"{url}/s", "stopped": False}


def authorize(access: Access) -> str:
    if access.headers.get("authorization") != "Bearer secret":
        raise PublicError("PERMISSION_DENIED", "who are you?")
    return ""


@pytest.mark.parametrize("command", ["tail", "cancel"])
async def test_the_token_goes_to_the_server_of_the_url_only_and_not_in_its_users_place(command: str) -> None:
    async with told(answer(b"", status=b"404 No")) as other:
        moved = answer(b"", status=b"307 Moved", headers=b"Location: %b/s\r\n" % other.url.encode())
        async with told(moved) as server:
            assert_fails(await run_beside(command, server.url, STREAMKEEP_TOKEN="secret"), 1, other.url)
            await run_beside(command, server.url.replace("//", "//me:mine@"), STREAMKEEP_TOKEN="secret")
    assert server.header("authorization") == ["Bearer secret", "Basic bWU6bWluZQ=="]
    assert other.requests == []


@pytest.mark.parametrize("command", ["tail", "cancel"])
async def test_the_token_does_not_go_to_what_stands_before_a_password_with_a_slash(command: str) -> None:
    async with told() as server:
        assert_fails(await run_beside(command, f"{server.url}/3@host/streams/s", STREAMKEEP_TOKEN="secret"), 2, "%40")
    assert server.requests == []


async def test_a_token_in_clear_text_is_warned_of() -> None:
    """What goes to a proxy goes over this machine, so that nothing is asked of another."""
    async with told(answer(b"event: done\ndata: 1\nid: s/a1a1a1a1/0\n\n")) as proxy:
        result = await run_beside("tail", "http://far.example/s", STREAMKEEP_TOKEN="secret", http_proxy=proxy.url)
        without = await run_beside("tail", "http://far.example/s", http_proxy=proxy.url)
    assert (result.returncode, without.returncode, without.stderr) == (0, 0, "")
    assert result.stderr.startswith("streamkeep: a token or a password is sent to far.example in clear text")
    assert len(result.stderr.splitlines()) == 1


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
        (["http://me:se#cret@127.0.0.1:1/s"], "percent-encoded"),
    ],
)
@pytest.mark.parametrize("command", ["tail", "cancel"])
def test_a_wrong_call_is_one_sentence(command: str, arguments: list[str], sentence: str) -> None:
    if command == "cancel" and "--after" in arguments:
        return  # it has no such option
    result = run(command, *arguments)
    assert_fails(result, 2, sentence)
    assert "secret" not in result.stderr
