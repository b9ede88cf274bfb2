"""Who asks: where credentials go, where they do not, and what is shown of them."""

import logging
import traceback
from base64 import b64encode
from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import uuid4

import httpx2
import pytest
from tests.client.forms import Form, answer, cut, told

from streamkeep import InvalidArgumentError, UnexpectedAnswerError
from streamkeep._credentials import is_loopback
from streamkeep.client import Retry, events, stop
from streamkeep.storages.http import HTTPStorage

EVENT = b"id: 1\ndata: a\n\n"


@pytest.mark.parametrize("name", ["events", "stream_flow"])
async def test_the_user_of_a_url_is_sent_as_a_header_and_shown_nowhere(
    form: Form, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "httpx2")
    moved = answer(b"", status=b"307 Moved", headers=b"Location: http://me:secret@%b/new\r\n")
    async with told(answer(EVENT), moved) as server:
        url = server.url.replace("http://", "http://me:s%40cret@") + "/s"
        await form.read(name, url, retry=Retry(tries=0))
        had = await form.read(name, url, retry=Retry(tries=0))
    assert server.header("authorization") == ["Basic " + b64encode(b"me:s@cret").decode()] * len(server.requests)
    assert b"HTTP Request" in caplog.text.encode()
    assert "cret" not in caplog.text
    assert "cret" not in str(had.error)


async def test_a_redirect_to_the_same_server_shows_no_user_either(form: Form, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "httpx2")
    async with told(answer(EVENT)) as server:
        location = server.url.replace("http://", "http://me:secret@").encode()
        first = answer(b"", status=b"307 Moved", headers=b"Location: %b/new\r\n" % location)
        async with told(first, first) as other:
            had = await form.read("events", other.url)
            assert isinstance(had.error, UnexpectedAnswerError)
            assert f"{server.url}/new" in str(had.error)
            assert "secret" not in str(had.error)
    assert "secret" not in caplog.text
    assert server.requests == []


async def test_a_header_counts_before_the_user_of_a_url(form: Form) -> None:
    async with told(answer(EVENT)) as server:
        url = server.url.replace("http://", "http://me:secret@")
        await form.read("events", url, headers={"authorization": "Bearer mine"})
    assert server.header("authorization") == ["Bearer mine"]


@pytest.mark.parametrize(
    "url",
    [
        "http://me:sec#ret@h/",
        "http://me:sec/ret@h/",
        "http://me:sec ret\n@h",
        "http://me:pa[sec@h/",
        "http://me:pa[sec-ret]ss@h/",
    ],
)
async def test_a_url_that_is_none_is_not_repeated_in_parts(form: Form, url: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        await form.read("events", url)
    shown = "".join(traceback.format_exception(refused.value, chain=True))
    words = [line for line in shown.splitlines() if not line.startswith(" ")]  # a line of code in this file may say it
    assert "sec" not in "\n".join(words)
    assert "percent-encoded" in str(refused.value)


@pytest.mark.parametrize("behind", ["/se@cret/s", "/se/s@cret", "?se@cret", "#se@cret"])
@pytest.mark.parametrize("user", ["", "me:mine@"])
async def test_what_stands_before_a_password_with_a_slash_is_no_server_that_gets_credentials(
    form: Form, behind: str, user: str
) -> None:
    headers = {} if user else {"Authorization": "Bearer mine"}
    async with told(answer(EVENT), answer(EVENT)) as server:
        url = server.url.replace("//", f"//{user}")
        for name in ("events", "subscribe", "stream_flow"):
            with pytest.raises(InvalidArgumentError, match="%40") as refused:
                await form.read(name, url + behind, headers=headers)
            assert "cret" not in str(refused.value)
        assert server.requests == []
        await form.read("events", url + behind.replace("@", "%40"), headers=headers)
        await form.read("events", server.url + behind)  # which has nothing to lose
    assert len(server.requests) == 2


@pytest.mark.parametrize("url", ["http://sec:ret@h/", "http://se/cret@h/", "http://se#cret@h/", "http://[se@cret/"])
def test_a_storage_does_not_repeat_its_url_either(url: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        HTTPStorage(url)
    assert not {"se", "cret", "sec", "ret"} & set(str(refused.value).replace("/", " ").split())


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["localhost.example", "10.0.0.1", "example", "::2", "0.0.0.0", ""]))


def _answered(request: httpx2.Request) -> httpx2.Response:
    del request

    async def pieces() -> AsyncIterator[bytes]:
        yield EVENT

    headers = {"Content-Type": "text/event-stream", "Content-Length": str(len(EVENT))}
    return httpx2.Response(200, headers=headers, content=pieces())


async def test_a_token_in_clear_text_beyond_this_machine_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    host, with_storage, token = f"h{uuid4().hex}", f"s{uuid4().hex}", {"Authorization": "Bearer secret"}
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(_answered)) as own:
        for url, headers in [
            (f"http://{host}/", {}),
            (f"https://{host}/", token),
            ("http://127.0.0.1/", token),
            (f"http://{host}/", token),
            (f"http://me:secret@{host}/", {}),
        ]:
            async with events(url, headers=headers, client=own) as read:
                assert len([event async for event in read]) == 1
    HTTPStorage(f"http://{with_storage}/", headers=token)
    HTTPStorage(f"http://secret-token@{with_storage}/")
    said = [record.getMessage() for record in caplog.records if record.name == "streamkeep"]
    assert [host in said[0], with_storage in said[1], len(said)] == [True, True, 2]
    assert "secret" not in "".join(said)


@pytest.mark.parametrize("code", [b"301", b"302", b"303"])
@pytest.mark.parametrize("method", ["DELETE", "POST"])
async def test_a_stop_never_becomes_a_get(form: Form, code: bytes, method: str) -> None:
    moved = answer(b"", status=code + b" Moved", headers=b"Location: /login?next=secret\r\n")
    async with told(moved, answer(b'{"stopped":true}', content_type=b"application/json")) as server:
        with pytest.raises(UnexpectedAnswerError, match=r"GET of http://.*/login: not followed") as refused:
            await form.call("stop", server.url + "/s", method=method)
    assert "secret" not in str(refused.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [b"307", b"308"])
async def test_a_stop_that_is_led_on_stays_one(form: Form, code: bytes) -> None:
    moved = answer(b"", status=code + b" Moved", headers=b"Location: /new\r\n")
    async with told(moved, answer(b'{"stopped":true}', content_type=b"application/json")) as server:
        assert await form.call("stop", server.url + "/s") is True
    assert [request.split()[:2] for request in server.requests] == [[b"DELETE", b"/s"], [b"DELETE", b"/new"]]


async def test_no_post_of_a_stream_or_a_flow_becomes_a_get(form: Form) -> None:
    async with told(answer(b"", status=b"302 Moved", headers=b"Location: /new\r\n")) as server:
        for had in (
            await form.read("events", server.url, method="POST"),
            await form.read("subscribe", server.url, method="POST"),
            await form.read("stream_flow", server.url),
        ):
            assert isinstance(had.error, UnexpectedAnswerError)
        with pytest.raises(UnexpectedAnswerError):
            await form.call("run_flow", server.url)
    assert [request.split()[0] for request in server.requests] == [b"POST"] * 4


async def test_from_http_to_https_of_a_host_only_what_has_no_authorization_is_led() -> None:
    asked: list[httpx2.URL] = []

    def answered(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url)
        if request.url.scheme == "http":
            return httpx2.Response(301, headers={"Location": f"https://{request.url.host}/s"})
        return _answered(request)

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(answered)) as own:
        async with events("http://example/s", client=own) as read:
            assert len([event async for event in read]) == 1
        with pytest.raises(UnexpectedAnswerError, match="https://example/s"):
            await events("http://example/s", headers={"Authorization": "Bearer a"}, client=own).__aenter__()
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(answered), auth=("me", "secret")) as own:
        with pytest.raises(UnexpectedAnswerError, match="https://example/s"):
            await stop("http://example/s", client=own)
        with pytest.raises(UnexpectedAnswerError, match="https://example/s"):
            await events("http://example/s", client=own).__aenter__()
    assert [url.scheme for url in asked] == ["http", "https", "http", "http", "http"]


async def test_a_secret_in_a_query_is_in_no_error_and_no_log_of_ours(form: Form, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown = list[str]()
    for answers in (
        [cut(b""), cut(b""), cut(EVENT), answer(b"", status=b"403 No")],
        [answer(b"", content_type=b"text/html")],
        [cut(b"")],
    ):
        async with told(*answers) as server:
            had = await form.read(
                "events", server.url + "/s?signature=secret", retry=Retry(tries=3, first=timedelta(milliseconds=1))
            )
        shown += traceback.format_exception(had.error) if had.error else []
    ours = [record.getMessage() for record in caplog.records if record.name == "streamkeep"]
    assert (len(shown) > 0, len(ours) > 0) == (True, True)
    assert "secret" not in "".join(ours) + "".join(line for line in shown if not line.startswith("  File"))


TOKEN = "skt1.read.1796083200.c2lnbmF0dXJl"


@pytest.mark.parametrize("name", ["events", "subscribe", "stream_flow"])
async def test_a_token_of_ours_in_a_url_is_sent_as_a_header_and_shown_nowhere(
    form: Form, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "httpx2")
    moved = answer(b"", status=b"307 Moved", headers=b"Location: /new\r\n")
    async with told(answer(EVENT), moved) as server:
        url = f"{server.url}/s?a=1&token={TOKEN}&b=%20"
        await form.read(name, url, retry=Retry(tries=0))
        had = await form.read(name, url, retry=Retry(tries=0))
    assert server.header("authorization") == [f"Bearer {TOKEN}"] * len(server.requests)
    assert server.requests[0].split(b"\r\n")[0].split()[1] in {b"/s?a=1&b=%20", b"/s?a=1&b=+"}
    assert "HTTP Request" in caplog.text
    assert TOKEN not in caplog.text
    assert TOKEN not in str(had.error)


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("token=mine", {}),
        ("token=eyJh.bGci.OiJI", {}),
        (f"token={TOKEN}&token=mine", {}),
        ("token=skt1.%C3%A9", {}),  # what no header can hold
        ("token=skt1.%0D%0AX-Other%3A1", {}),
        ("token=skt1.%00", {}),
        (f"token={TOKEN}", {"Authorization": "Bearer mine"}),
    ],
)
async def test_a_token_of_others_stays_where_it_is_and_a_header_counts_before_one(
    form: Form, query: str, headers: dict[str, str]
) -> None:
    async with told(answer(EVENT)) as server:
        await form.read("events", f"{server.url}/s?{query}", headers=headers)
    assert server.header("authorization") == [headers.get("Authorization")]
    assert query.encode() in server.requests[0]
