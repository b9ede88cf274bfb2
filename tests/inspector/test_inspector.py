"""The inspector over HTTP, on a real server: who is let in, what is shown, and that neither many nor long streams are too much."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI, HTTPException
from tests.http.servers import http_to, until

from streamkeep import Hooks, InMemoryStreamManager, PublicError, StreamManager
from streamkeep.errors import StorageCorruptError
from streamkeep.http import Access
from streamkeep.inspector import Authorize, Inspector
from streamkeep.inspector import app as inspector_app
from streamkeep.storage import Head

OURS = {"X-Streamkeep-Inspector": "1"}
WAIT_SECONDS = 20

pytestmark = pytest.mark.timeout(90)


def everybody(_: Access) -> bool:
    return True


@pytest.fixture
async def streams() -> AsyncIterator[StreamManager]:
    async with InMemoryStreamManager() as streams:
        yield streams


@asynccontextmanager
async def inspected(
    streams: StreamManager, authorize: Authorize = everybody, **options: Any
) -> AsyncGenerator[httpx.AsyncClient]:
    """Give a client of an app that has an inspector at /inspector, whose requests are as the page's own."""
    app = FastAPI()
    app.mount("/inspector", Inspector(streams, authorize=authorize, **options))
    async with http_to(app) as http:
        http.headers.update(OURS)
        http.base_url = http.base_url.join("/inspector/")
        yield http


async def write(streams: StreamManager, stream: str, *chunks: object, done: bool = True, **options: Any) -> None:
    async with streams.open(stream, **options) as input:
        for chunk in chunks:
            await input.write(chunk)
        if done:
            await input.done("the end")


async def listed(http: httpx.AsyncClient, **query: str | int) -> list[str]:
    """Give the ids that all pages of a list have."""
    ids: list[str] = []
    after = ""
    while after is not None:
        page = (await http.get("api/streams", params={**query, "after": after})).raise_for_status().json()
        ids += [stream["id"] for stream in page["streams"]]
        after = page["next"]
    return ids


class Live:
    """What a page is told that follows a stream."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()

    async def next(self, *kinds: str) -> dict[str, Any]:
        """Give the next message of one of these kinds."""
        with anyio.fail_after(WAIT_SECONDS):
            async for line in self._lines:
                if line:
                    message: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if message["kind"] in kinds:
                        return message
        raise AssertionError("it has ended")


@asynccontextmanager
async def following(http: httpx.AsyncClient, stream: str) -> AsyncGenerator[Live]:
    async with http.stream("GET", f"api/streams/{stream}/live") as response:
        response.raise_for_status()
        yield Live(response)


# Who may

ALL = [
    ("GET", ""),
    ("GET", "main.js"),
    ("GET", "api/streams"),
    ("GET", "api/streams/ID"),
    ("GET", "api/streams/ID/live"),
    ("GET", "api/streams/ID/events"),
    ("GET", "api/streams/ID/events/0"),
    ("GET", "api/streams/ID/timing"),
    ("GET", "api/streams/ID/copy"),
    ("POST", "api/streams/ID/stop"),
    ("DELETE", "api/streams/ID"),
]


async def test_there_is_no_inspector_without_somebody_who_says_who_may(streams: StreamManager) -> None:
    with pytest.raises(TypeError):
        Inspector(streams)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="authorize"):
        Inspector(streams, authorize=None)  # type: ignore[arg-type]


async def test_who_is_not_let_in_sees_nothing_does_nothing_and_cannot_tell_which_ids_there_are(streams: StreamManager) -> None:
    await write(streams, "secret", "secret", owner="ann", done=False)

    async with inspected(streams, lambda _: False) as http:
        for method, path in ALL:
            answer = await http.request(method, path.replace("ID", "secret"))
            unknown = await http.request(method, path.replace("ID", "nobodys"))
            assert answer.status_code == 403
            assert answer.content == unknown.content
            assert b"ann" not in answer.content

    assert (await streams.info("secret")).status == "open"


async def test_each_request_is_asked_about_as_what_it_does(streams: StreamManager) -> None:
    await write(streams, "one", 1, owner="ann")
    asked: list[tuple[str, str | None]] = []

    async def authorize(access: Access) -> bool:
        asked.append((access.action, access.stream.owner if access.stream else None))
        return True

    async with inspected(streams, authorize) as http:
        for method, path in ALL:
            assert (await http.request(method, path.replace("ID", "one"))).status_code == 200

    reading = [("read", "ann")] * 6
    assert asked == [("page", None), ("page", None), ("list", None), *reading, ("stop", "ann"), ("delete", "ann")]


@pytest.mark.parametrize("answer", ["ann", 1, None, ""])
async def test_what_is_neither_true_nor_false_lets_nobody_in(
    streams: StreamManager, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with inspected(streams, lambda _: answer) as http:
        assert (await http.get("api/streams")).status_code == 500
    assert "gives True or False" in caplog.text


async def test_a_refusal_of_the_apps_own_is_passed_on(streams: StreamManager) -> None:
    def by_password(access: Access) -> bool:
        if access.headers.get("authorization") != "Basic YW5uOnB3":
            raise HTTPException(401, "who are you?", {"WWW-Authenticate": "Basic"})
        return True

    async with inspected(streams, by_password) as http:
        refused = await http.get("")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Basic")
        assert (await http.get("", auth=("ann", "pw"))).status_code == 200


async def test_an_error_of_the_app_that_is_raised_in_authorize_lets_nobody_in(streams: StreamManager) -> None:
    def broken(_: Access) -> bool:
        raise PublicError("UNAUTHENTICATED", "log in first")

    async with inspected(streams, broken) as http:
        assert (await http.get("api/streams")).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Streamkeep-Inspector": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
    ],
)
async def test_another_site_cannot_have_a_browser_read_stop_or_delete(streams: StreamManager, headers: dict[str, str]) -> None:
    await write(streams, "one", 1, done=False)
    async with inspected(streams) as http:
        for method, path in ALL:
            if path.startswith("api/"):
                assert (await http.request(method, path.replace("ID", "one"), headers=headers)).status_code == 403
    assert (await streams.info("one")).status == "open"


async def test_the_page_itself_may_be_linked_to_and_asks_as_the_same_origin(streams: StreamManager) -> None:
    async with inspected(streams) as http:
        assert (await http.get("", headers={"X-Streamkeep-Inspector": "", "Sec-Fetch-Site": "cross-site"})).status_code == 200
        assert (await http.get("api/streams", headers={"Sec-Fetch-Site": "same-origin"})).status_code == 200
        own = f"http://{http.base_url.netloc.decode()}"
        assert (await http.get("api/streams", headers={"Origin": own})).status_code == 200


@pytest.mark.parametrize(
    ("origin", "host", "is_ours"),
    [
        ("https://ops.example", "ops.example", True),
        ("https://ops.example", "ops.example:443", True),
        ("http://ops.example", "OPS.example:80", True),
        ("http://ops.example:8080", "ops.example:8080", True),
        ("https://ops.example", "ops.example:80", False),
        ("http://ops.example:8080", "ops.example", False),
        ("https://evil.example", "ops.example:443", False),
        ("https://:443", "", False),
    ],
)
async def test_the_origin_is_compared_with_the_host_whichever_of_them_names_the_usual_port(
    streams: StreamManager, origin: str, host: str, is_ours: bool
) -> None:
    await write(streams, "one", 1, done=False)
    async with inspected(streams) as http:
        answer = await http.post("api/streams/one/stop", headers={"Origin": origin, "Host": host})
    assert answer.status_code == (200 if is_ours else 403)


async def test_an_authorize_that_meets_a_damaged_storage_of_its_own_lets_nobody_delete(streams: StreamManager) -> None:
    await write(streams, "one", 1)

    def damaged(_: Access) -> bool:
        raise StorageCorruptError("the storage of who may do what")

    async with inspected(streams, damaged) as http:
        assert (await http.delete("api/streams/one")).status_code == 500
    assert (await streams.info("one")).status == "done"


async def test_a_reading_inspector_stops_and_deletes_nothing(streams: StreamManager) -> None:
    await write(streams, "one", 1, done=False)

    async with inspected(streams, read_only=True) as http:
        assert (await http.post("api/streams/one/stop")).status_code == 403
        assert (await http.delete("api/streams/one")).status_code == 403
        assert (await http.get("api/streams")).json()["read_only"] is True

    assert (await streams.info("one")).status == "open"


async def test_every_answer_forbids_scripts_frames_and_caches(streams: StreamManager) -> None:
    await write(streams, "one", 1)

    async with inspected(streams) as http:
        for path in [
            "",
            "main.js",
            "style.css",
            "nothing",
            "api/streams",
            "api/streams/one/live",
            "api/streams/nobodys",
            "api/x",
        ]:
            headers = (await http.get(path)).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"].startswith("no-store")
            assert headers.get_list("cache-control") == [headers["cache-control"]]


@pytest.mark.parametrize("path", ["../app.py", "..%2fapp.py", "page/index.html", "/etc/passwd", "%2e%2e/app.py", "app.py"])
async def test_no_path_leads_out_of_the_page(streams: StreamManager, path: str) -> None:
    async with inspected(streams) as http:
        assert (await http.get(f"{http.base_url}{path}")).status_code == 404


async def test_a_mount_without_its_slash_leads_to_the_page(streams: StreamManager) -> None:
    inspector = Inspector(streams, authorize=everybody)

    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await inspector({**scope, "root_path": "/a b"}, receive, send)

    async with http_to(mounted, lifespan="off") as http:
        answer = await http.get("/a b")
        assert (answer.status_code, answer.headers["location"]) == (307, "a%20b/")
        assert (await http.get("/a b/")).status_code == 200


@pytest.mark.parametrize("mount", ["/inspector", "/admin/inspector"])
async def test_a_proxy_may_take_a_prefix_off_the_path(streams: StreamManager, mount: str) -> None:
    inspector = Inspector(streams, authorize=everybody)

    async def behind_proxy(scope: Any, receive: Any, send: Any) -> None:
        await inspector({**scope, "root_path": f"/prefix{mount}"}, receive, send)

    async with http_to(behind_proxy, lifespan="off") as http:
        for prefix in ["", "/prefix"]:
            assert (await http.get(f"{prefix}{mount}")).headers["location"] == "inspector/"
            assert (await http.get(f"{prefix}{mount}/main.js")).status_code == 200
            assert (await http.get(f"{prefix}{mount}/api/streams", headers=OURS)).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("POST", "api/streams/one/stop"), ("DELETE", "api/streams/one")])
async def test_who_is_let_in_to_a_stream_does_nothing_to_one_that_takes_its_id_meanwhile(
    streams: StreamManager, method: str, path: str
) -> None:
    async def slow(_: Access) -> bool:
        await streams.delete("one")
        await write(streams, "one", "another", done=False)
        return True

    await write(streams, "one", 1, done=False)
    async with inspected(streams, slow) as http:
        assert (await http.request(method, path)).status_code == 404
    assert (await streams.info("one")).status == "open"


# What is shown


async def test_lists_are_filtered_by_status_owner_key_and_id_over_many_pages(streams: StreamManager) -> None:
    for number in range(300):
        owner = ("", "ann", "bob")[number % 3]
        await write(streams, f"{'ab'[number % 2]}-{number:03d}", owner=owner, key=f"chat-{number}", done=number != 250)

    async with inspected(streams) as http:
        every = [f"{'ab'[number % 2]}-{number:03d}" for number in range(300)]
        assert await listed(http, limit=17) == sorted(every)
        assert await listed(http, status="open") == ["a-250"]
        assert await listed(http, owner="ann", limit=7) == sorted(every[1::3])
        assert await listed(http, key="chat-29") == sorted([every[29], *every[290:]])
        assert await listed(http, id="b-1", limit=3) == sorted(id for id in every if id.startswith("b-1"))
        assert await listed(http, id="b-151") == ["b-151"]
        assert await listed(http, owner="ann", key="chat-1", id="a-", limit=2, status="done") == sorted(
            id for number, id in enumerate(every) if number % 6 == 4 and str(number).startswith("1")
        )
        assert await listed(http, id="c") == []
        assert (await http.get("api/streams", params={"status": "happy"})).status_code == 400
        assert (await http.get("api/streams", params={"limit": "many"})).status_code == 400


async def test_a_rare_stream_among_thousands_is_found_in_bounded_answers(streams: StreamManager) -> None:
    for number in range(3000):
        await write(streams, f"s-{number:04d}", done=number != 2900)

    async with inspected(streams) as http:
        assert await listed(http, status="open") == ["s-2900"]
        page = (await http.get("api/streams", params={"limit": 100_000})).json()
        assert len(page["streams"]) == 200


async def test_what_is_known_of_a_stream_is_told_with_its_writer_and_readers(streams: StreamManager) -> None:
    async with streams.open("one", owner="ann", key="chat", metadata={"model": "alice"}) as input:
        await input.write(1)
        async with inspected(streams) as http, streams.subscribe("one", last=0), following(http, "one"):
            about = (await http.get("api/streams/one")).json()
        await input.done()

    assert about["stream"]["metadata"] == {"model": "alice"}
    assert (about["stream"]["owner"], about["stream"]["key"], about["stream"]["tail"]) == ("ann", "chat", 1)
    assert about["writer"] == {"where": "here", "silent": 0.0, "dead_after": 15.0}
    assert about["readers"] == {"app": 1, "pages": 1}


async def test_what_hooks_keep_with_a_stream_is_not_shown() -> None:
    class Keeping(Hooks):
        def opening(self, stream: str, writer: str) -> Mapping[str, str]:
            return {"traceparent": f"of {stream}"}

    async with InMemoryStreamManager(hooks=[Keeping()]) as streams, inspected(streams) as http, streams.open("one"):
        assert (await streams.info("one")).carrier
        answers = [(await http.get(path)).text for path in ("api/streams", "api/streams/one", "api/streams/one/events")]
    assert [answer for answer in answers if "traceparent" in answer or "carrier" in answer] == []


async def test_a_window_of_events_is_bounded_and_each_event_can_be_had_whole(streams: StreamManager) -> None:
    await write(streams, "one", *range(600), "x" * 5000)

    async with inspected(streams) as http:
        window = (await http.get("api/streams/one/events", params={"from": 550, "limit": 10})).json()
        assert [(row[0], row[2]) for row in window["rows"]] == [(offset, str(offset)) for offset in range(550, 560)]
        assert window["tail"] == 602
        assert len((await http.get("api/streams/one/events", params={"limit": 10**6})).json()["rows"]) == 500
        last = (await http.get("api/streams/one/events", params={"from": 600})).json()["rows"]
        assert [(row[1], len(row[2]), row[3]) for row in last] == [("chunk", 320, 5002), ("done", 9, 9)]
        assert (await http.get("api/streams/one/events/600")).json()["chunk"] == "x" * 5000
        assert (await http.get("api/streams/one/events", params={"from": 602})).json()["rows"] == []
        assert (await http.get("api/streams/one/events", params={"from": 10**15})).json()["rows"] == []
        assert (await http.get("api/streams/one/events/700")).status_code == 404
        assert (await http.get("api/streams/one/events", params={"from": "-1"})).status_code == 400


async def test_a_preview_that_ends_within_a_character_is_text(streams: StreamManager) -> None:
    await write(streams, "one", "é" * 500)

    async with inspected(streams) as http:
        row = (await http.get("api/streams/one/events")).json()["rows"][0]
    assert row[2] == '"' + "é" * 159


async def test_a_copied_number_has_all_its_digits_in_a_browser_too(streams: StreamManager) -> None:
    await write(streams, "one", 9007199254740993, 1.0)
    async with inspected(streams) as http:
        lines = (await http.get("api/streams/one/copy")).json()["lines"]
    assert lines[:2] == [
        '{"offset":0,"type":"chunk","chunk":9007199254740993}',
        '{"offset":1,"type":"chunk","chunk":1.0}',
    ]


async def test_all_of_a_stream_can_be_copied_a_part_at_a_time(streams: StreamManager) -> None:
    chunks = [{"n": number, "text": "x" * 700_000 if number % 2 else ""} for number in range(8)]
    await write(streams, "one", *chunks)

    async with inspected(streams) as http:
        lines: list[Any] = []
        while len(lines) < 9:
            part = (await http.get("api/streams/one/copy", params={"from": len(lines)})).json()
            assert len(part["lines"]) < 9
            lines += [json.loads(line) for line in part["lines"]]
            assert part["next"] == len(lines)

    assert [line["chunk"] for line in lines[:8]] == chunks
    assert lines[8] == {"offset": 8, "type": "done", "output": "the end"}


@pytest.mark.parametrize("show", [False, True])
async def test_a_producers_exception_is_shown_only_where_that_is_wanted(streams: StreamManager, show: bool) -> None:
    async with streams.open("one") as input:
        await input.error(RuntimeError("the password is hunter2"))

    async with inspected(streams, show_internal=show) as http:
        for path in ["api/streams/one/events", "api/streams/one/events/0", "api/streams/one/copy"]:
            answer = await http.get(path)
            assert ("internal" in answer.text, "hunter2" in answer.text) == (True, show)


async def test_a_producers_exception_is_not_told_live_either(streams: StreamManager) -> None:
    async with inspected(streams) as http, streams.open("one") as input, following(http, "one") as live:
        await live.next("begin")
        await input.error(RuntimeError("the password is hunter2"))
        news = await live.next("events")
    assert "hunter2" not in json.dumps(news)


async def test_stopping_ends_a_stream_and_deleting_forgets_it(streams: StreamManager) -> None:
    async with inspected(streams) as http, streams.open("one") as input:
        life = (await streams.info("one")).life
        assert (await http.post("api/streams/one/stop", params={"life": life})).json() == {"stopped": True}
        assert input.cancelled.is_set()
        assert (await http.post("api/streams/one/stop", params={"life": life})).json() == {"stopped": False}
        assert (await http.delete("api/streams/one", params={"life": life})).json() == {"deleted": True}
        assert (await http.get("api/streams/one")).status_code == 404
        assert (await http.delete("api/streams/one")).status_code == 404


async def test_a_page_that_shows_an_earlier_life_of_an_id_cannot_touch_a_later_one(streams: StreamManager) -> None:
    await write(streams, "one", 1, done=False)
    life = (await streams.info("one")).life
    await streams.delete("one")
    await write(streams, "one", 2, done=False)

    async with inspected(streams) as http:
        for method, path in ALL:
            if "ID" in path:
                answer = await http.request(method, path.replace("ID", "one"), params={"life": life})
                assert answer.status_code == 404

    assert (await streams.info("one")).status == "open"


async def test_a_stream_that_cannot_be_read_is_listed_said_to_be_so_and_can_be_deleted(streams: StreamManager) -> None:
    await streams.storage.commit("broken", None, Head(1 << 60, 0, b"no state of ours", 1e12))

    async with inspected(streams) as http:
        assert await listed(http, status="unreadable") == ["broken"]
        assert (await http.get("api/streams/broken")).status_code == 500
        assert (await http.get("api/streams/broken/live")).status_code == 500
        assert (await http.delete("api/streams/broken")).status_code == 200
        assert await listed(http) == []


@pytest.mark.parametrize(("method", "path"), [("PUT", "api/streams/one"), ("GET", "api/streams/one/stop"), ("POST", "")])
async def test_other_methods_are_not_allowed(streams: StreamManager, method: str, path: str) -> None:
    await write(streams, "one", 1)
    async with inspected(streams) as http:
        assert (await http.request(method, path)).status_code == 405


@pytest.mark.parametrize("path", ["api/streams/a%2Fb", "api/streams/.hidden", "api/streams/one/more", "api/streams/one/copy/1"])
async def test_what_can_be_no_stream_is_refused(streams: StreamManager, path: str) -> None:
    async with inspected(streams) as http:
        assert (await http.get(path)).status_code in {400, 404}


# Live


async def test_events_are_told_as_they_come_with_the_times_at_which_they_did(streams: StreamManager) -> None:
    async with inspected(streams) as http, streams.open("one") as input:
        await input.write("before")
        async with following(http, "one") as live:
            begin = await live.next("begin")
            await input.write("first")
            first = await live.next("events")
            await input.write("second")
            second = await live.next("events")
            await input.done("the end")
            last = await live.next("events")
            end = await live.next("end")
        timing = (await http.get("api/streams/one/timing")).json()["runs"]
        rows = (await http.get("api/streams/one/events")).json()["rows"]

    assert (begin["first"], begin["stream"]["tail"]) == (1, 1)
    told = [row for news in (first, second, last) for row in news["rows"]]
    assert [row[:3] for row in told] == [[1, "chunk", '"first"'], [2, "chunk", '"second"'], [3, "done", '"the end"']]
    assert end["why"] is None
    times = [row[4] for row in told]
    assert times == sorted(times)
    assert [row[4] for row in rows] == [None, *times]
    assert [run[0] for run in timing][:1] == [1]
    assert sum(run[1] for run in timing) == 3


async def test_a_page_whose_connection_is_slow_is_told_of_events_less_often_and_of_the_end_at_once(
    streams: StreamManager,
) -> None:
    async with (
        inspected(streams) as http,
        streams.open("one") as stream,
        http.stream("GET", "api/streams/one/live?pause=9000") as answer,
    ):
        live = Live(answer)
        await live.next("begin")
        await stream.write(0)
        assert (await live.next("events", "state"))["count"] == 1
        await stream.write(1)
        assert (await live.next("events", "state"))["kind"] == "state"
        await stream.done()
        assert (await live.next("events"))["tail"] == 3
        assert (await live.next("end"))["why"] is None


async def test_of_a_burst_only_the_newest_rows_are_told_and_all_is_counted(streams: StreamManager) -> None:
    async with inspected(streams) as http, streams.open("one") as input, following(http, "one") as live:
        await live.next("begin")
        for number in range(20_000):
            if number % 5000 == 4999:
                await input.flush()
            input.write_soon(number)
        await input.done()
        count = told = tail = 0
        while tail < 20_001:
            news = await live.next("events")
            count, told, tail = count + news["count"], told + len(news["rows"]), news["tail"]
            assert len(news["rows"]) <= 200
            assert len(news["runs"]) <= 500
            assert news["rows"][-1][0] == tail - 1
        assert (await live.next("end"))["why"] is None

    assert count == 20_001
    assert told < 20_001


async def test_who_follows_a_stream_that_has_ended_is_told_so_at_once(streams: StreamManager) -> None:
    await write(streams, "one", 1)
    async with inspected(streams) as http, following(http, "one") as live:
        assert (await live.next("begin"))["first"] == 2
        assert (await live.next("end"))["why"] is None


async def test_who_follows_a_stream_that_is_deleted_is_told_that_it_is_gone(streams: StreamManager) -> None:
    async with inspected(streams) as http:
        await write(streams, "one", 1, done=False)
        async with following(http, "one") as live:
            await live.next("begin")
            await streams.delete("one")
            assert (await live.next("end"))["why"] == "gone"


async def test_a_page_that_leaves_is_counted_no_more_and_a_page_too_many_is_refused(
    streams: StreamManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspector_app, "MAX_PAGES", 1)
    await write(streams, "one", 1, done=False)
    info = await streams.info("one")

    async with inspected(streams) as http:
        async with following(http, "one") as live:
            await live.next("begin")
            assert streams.presence(info).readers == 1
            assert (await http.get("api/streams/one/live")).status_code == 429
        await until(lambda: streams.presence(info).readers == 0)
        async with following(http, "one") as live:
            await live.next("begin")


async def test_pages_too_many_that_come_at_once_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inspector_app, "MAX_PAGES", 2)
    codes: list[int] = []

    async with StreamManager.connect(f"sqlite:///{tmp_path / 'streams.db'}") as streams:
        await write(streams, "one", 1, done=False)
        async with inspected(streams) as http, anyio.create_task_group() as tasks:

            async def follow() -> None:
                async with http.stream("GET", "api/streams/one/live") as response:
                    codes.append(response.status_code)
                    await anyio.sleep_forever()

            for _ in range(6):
                tasks.start_soon(follow)
            await until(lambda: len(codes) == 6)
            tasks.cancel_scope.cancel()

    assert sorted(codes) == [200, 200, 429, 429, 429, 429]


async def test_pages_that_follow_do_not_hold_up_a_shutdown(streams: StreamManager) -> None:
    inspector = Inspector(streams, authorize=everybody)
    await write(streams, "one", 1, done=False)

    async with http_to(inspector, lifespan="off", timeout_graceful_shutdown=None) as http:
        http.headers.update(OURS)
        async with following(http, "one") as live:
            await live.next("begin")
            await inspector.drain()
            assert (await live.next("end"))["why"] == "closed"


async def test_of_few_streams_it_is_kept_when_their_events_came(
    streams: StreamManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspector_app, "MAX_SEEN", 3)
    inspector = Inspector(streams, authorize=everybody)

    async with http_to(inspector, lifespan="off") as http:
        http.headers.update(OURS)
        for number in range(10):
            await write(streams, f"s-{number}", 1)
            assert (await http.get(f"/api/streams/s-{number}/timing")).json() == {"runs": []}
    assert list(inspector._seen) == ["s-7", "s-8", "s-9"]
