"""CheckHTTP: what `streamkeep check` asks is within bounds, for those who are trusted, and never anybody's stream."""

from collections.abc import AsyncIterator, Coroutine
from datetime import timedelta
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from streamkeep import InvalidArgumentError, StreamManager
from streamkeep.http import CheckHTTP, StreamsHTTP
from streamkeep.http.check import MAX_STREAMS, OWNER

TOKEN = "a token of our own"
WAIT_SECONDS = 20


@pytest.fixture
async def streams() -> AsyncIterator[StreamManager]:
    async with StreamManager.connect("memory://") as streams:
        yield streams


@pytest.fixture
async def http(streams: StreamManager) -> AsyncIterator[httpx.AsyncClient]:
    async with StreamsHTTP(streams, drain=timedelta(seconds=0.1), max_body_bytes=1000) as streams_http:
        app = Starlette(routes=[Mount("/check", CheckHTTP(streams_http, trust=TOKEN)), Mount("/streams", streams_http)])
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://app/check", headers={"Authorization": f"Bearer {TOKEN}"}
        ) as http:
            with anyio.fail_after(WAIT_SECONDS):
                yield http


async def test_who_is_not_trusted_is_told_nothing_whatever_is_asked(http: httpx.AsyncClient, streams: StreamManager) -> None:
    asked = [
        ("GET", "/hello"),
        ("POST", "/streams?chunks=2"),
        ("POST", "/body"),
        ("GET", "/streams/streamkeep.check-1"),
        ("GET", "/x"),
    ]
    for method, path in asked:
        for authorization in ("", "Bearer wrong", f"Basic {TOKEN}"):
            answer = await http.request(method, path, headers={"Authorization": authorization})
            assert (answer.status_code, answer.json()["error"]["status"]) == (401, "UNAUTHENTICATED")
            assert not [name for name in answer.headers if name.startswith("x-streamkeep")]
    assert not await streams.list()


async def test_a_token_that_could_be_guessed_is_refused_when_it_is_given() -> None:
    with pytest.raises(InvalidArgumentError, match="at least 16"):
        CheckHTTP(StreamsHTTP("memory://"), trust="short")


async def test_a_function_says_who_is_trusted(streams: StreamManager) -> None:
    async def trust(headers: object) -> bool:
        return "x-inside" in str(headers)

    async with StreamsHTTP(streams) as streams_http:
        app = CheckHTTP(streams_http, trust=trust)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as http:
            assert (await http.get("/hello")).status_code == 401
            assert (await http.get("/hello", headers={"x-inside": "1"})).status_code == 200


@pytest.mark.parametrize(
    "token",
    [f"{TOKEN * 2}\n", f" {TOKEN * 2}", f"{TOKEN * 2}\u00fc", f"{TOKEN}\0{TOKEN}"],
    ids=["line", "blank", "letter", "control"],
)
async def test_a_token_that_no_header_can_have_is_refused_when_it_is_given(token: str) -> None:
    with pytest.raises(InvalidArgumentError, match="ASCII"):
        CheckHTTP(StreamsHTTP("memory://"), trust=token)


@pytest.mark.parametrize("trust", [None, b"a token of sixteen bytes", True], ids=repr)
async def test_what_is_neither_a_token_nor_a_function_is_refused_when_it_is_given(trust: Any) -> None:
    with pytest.raises(TypeError, match="`trust`"):
        CheckHTTP(StreamsHTTP("memory://"), trust=trust)


async def is_nobody(_: object) -> bool:
    return False


forgotten: list[Coroutine[Any, Any, bool]] = []


async def forgets_to_await(headers: object) -> Any:
    forgotten.append(is_nobody(headers))
    return forgotten[-1]


@pytest.mark.parametrize("trust", [forgets_to_await, lambda _: "ann", lambda _: 1], ids=["await", "name", "number"])
async def test_what_a_function_gives_other_than_true_lets_nobody_in(streams: StreamManager, trust: Any) -> None:
    async with StreamsHTTP(streams) as streams_http:
        app = CheckHTTP(streams_http, trust=trust)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as http:
            assert (await http.get("/hello")).status_code == 500
    for coroutine in forgotten:
        coroutine.close()


async def test_a_stream_of_a_check_is_its_own_and_nobody_elses(http: httpx.AsyncClient, streams: StreamManager) -> None:
    answer = await http.post("/streams?chunks=3&pause=0.01&bytes=100")
    stream = answer.headers["x-genkit-stream-id"]
    info = await streams.info(stream)
    assert (info.owner, info.tail, info.status) == (OWNER, 4, "done")
    assert (await http.get(f"/streams/{stream}")).text == answer.text
    assert (await http.get(f"http://app/streams/{stream}")).status_code == 404


@pytest.mark.parametrize("name", ["somebodys", "streamkeep.check-somebodys"])
async def test_no_other_stream_is_read_named_or_stopped(http: httpx.AsyncClient, streams: StreamManager, name: str) -> None:
    async with streams.open(name, owner="ann") as stream:
        await stream.write("secret")
        cursor = f"{name}/{(await streams.info(name)).life[:8]}/0"
        answers = [
            await http.get(f"/streams/{name}"),
            await http.get(f"/streams/{name}/info"),
            await http.delete(f"/streams/{name}"),
            await http.post(f"/streams/{name}/cancel"),
            await http.post("/streams", headers={"Last-Event-ID": cursor}),
            await http.post("/streams", headers={"X-Genkit-Stream-Id": name}),
        ]
        assert not stream.is_closed
        assert all("secret" not in answer.text for answer in answers)
        assert (await streams.info(name)).status == "open"
        await stream.done(None)


@pytest.mark.parametrize(
    "query",
    [
        "chunks=0",
        "chunks=2001",
        "chunks=-1",
        "chunks=1e9",
        "chunks=٣",
        "pause=0.001",
        "pause=nan",
        "bytes=65537",
        "chunks=2000&bytes=65536",
        "chunks=2000&pause=1",
        "quiet=601",
        "quiet=inf",
        "chunks=9999999999999999999",
    ],
)
async def test_what_would_be_too_much_is_refused_and_starts_nothing(
    http: httpx.AsyncClient, streams: StreamManager, query: str
) -> None:
    assert (await http.post(f"/streams?{query}")).status_code == 400
    assert not await streams.list()


async def test_no_more_streams_run_at_a_time_than_may_and_each_that_ends_makes_room(
    http: httpx.AsyncClient, streams: StreamManager
) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(MAX_STREAMS):
            tasks.start_soon(http.post, "/streams?chunks=5&pause=10")
        while len(running := [stream for stream in await streams.list() if stream.status == "open"]) < MAX_STREAMS:  # noqa: ASYNC110 - no event tells
            await anyio.sleep(0.01)
        assert (await http.post("/streams?chunks=1")).status_code == 429
        assert (await http.delete(f"/streams/{running[0].id}")).json() == {"stopped": True}
        while (await http.post("/streams?chunks=1")).status_code == 429:  # noqa: ASYNC110 - no event tells
            await anyio.sleep(0.05)
        for stream in running:
            await http.delete(f"/streams/{stream.id}")


async def test_a_start_that_is_sent_twice_is_one_and_takes_one_place(http: httpx.AsyncClient, streams: StreamManager) -> None:
    for _ in range(MAX_STREAMS + 1):
        assert (await http.post("/streams?chunks=1", headers={"Idempotency-Key": "k"})).status_code == 200
    assert len(await streams.list()) == 1


async def test_a_body_is_measured_and_one_that_is_too_long_is_refused(http: httpx.AsyncClient) -> None:
    assert (await http.post("/body", content=b"x" * 1000)).json() == {"bytes": 1000}
    assert (await http.post("/body", content=b"x" * 1001)).status_code == 413


async def test_no_two_answers_have_the_same_mark(http: httpx.AsyncClient) -> None:
    answers = [await http.get("/hello") for _ in range(3)]
    assert len({answer.headers["x-streamkeep-answer"] for answer in answers}) == 3
    assert answers[0].json()["instance"] == answers[0].headers["x-streamkeep-instance"]


@pytest.mark.parametrize("path", ["", "/", "/hello/", "/streams/", "/streams/a/b", "/nothing"])
async def test_other_paths_are_not_there(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).status_code in {404, 405}
