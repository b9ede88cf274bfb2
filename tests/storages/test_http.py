"""HTTPStorage keeps the contract over a server in another process, which has its streams in SQLite."""

import itertools
import math
import ssl
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import anyio
import httpx
import msgspec
import pytest
from fastapi import FastAPI
from tests.engines.http import TOKEN, Server
from tests.http.servers import serving
from tests.network.proxy import End, Fate, bad_network

from streamkeep import (
    InMemoryStreamManager,
    InvalidArgumentError,
    PublicError,
    RemoteStreamManager,
    StorageError,
    StreamManager,
)
from streamkeep.http import StorageHTTP
from streamkeep.http.response import Send
from streamkeep.storage import Head, Storage
from streamkeep.storages._http_messages import CONTENT_TYPE
from streamkeep.storages.http import HTTPStorage
from streamkeep.testing import StorageSuite, StreamsSuite
from streamkeep.testing._streams_suite import OpenManager

TRUSTED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    with Server(tmp_path_factory.mktemp("http") / "server") as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    server.name = f"test-{uuid.uuid4().hex[:8]}"
    return server.url


class TestHTTPStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: HTTPStorage(url)


@pytest.mark.slow
class TestStreamsOverHTTP(StreamsSuite):
    @pytest.fixture
    def open_storage(self, url: str) -> Callable[[], Storage]:
        return lambda: HTTPStorage(url)

    @pytest.fixture
    def open_manager(self, url: str) -> OpenManager:
        """The class that users name; what plays dead, or the time, is a storage between a manager and an HTTPStorage."""
        return partial(RemoteStreamManager, url)


@pytest.fixture
async def asking(url: str) -> AsyncGenerator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url.replace(TOKEN + "@", ""), headers=TRUSTED) as client:
        yield client


# Who may


@pytest.mark.parametrize("token", ["", "a-token-for-tests-onl", "another"])
async def test_who_is_not_trusted_is_told_so_when_entering(url: str, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMKEEP_STORAGE_TOKEN", raising=False)
    with pytest.raises(StorageError, match="does not trust who asks: 401"):
        async with HTTPStorage(url.replace(TOKEN, quote(token, safe="%"))):
            pass


@pytest.mark.parametrize("token", ["%00", "a%20b", "a%0D%0AHost:%20other", "%C3%A9"])
def test_what_cannot_be_a_token_is_no_url(token: str) -> None:
    with pytest.raises(InvalidArgumentError):
        StreamManager.connect(f"https://{token}@host")


async def test_a_token_is_in_the_url_the_headers_or_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = url.replace(TOKEN + "@", "")
    async with RemoteStreamManager(bare, headers=TRUSTED) as streams, streams.open("s") as stream:
        await stream.done("kept")
    monkeypatch.setenv("STREAMKEEP_STORAGE_TOKEN", TOKEN)
    async with StreamManager.connect(bare) as others, others.subscribe("s") as events:
        assert [event.output async for event in events] == ["kept"]


async def test_a_function_may_say_who_is_trusted() -> None:
    async def trust(headers: Mapping[str, str]) -> bool:
        if "x-banned" in headers:
            raise PublicError("PERMISSION_DENIED", "not you")
        return headers.get("x-who") == "a worker"

    async with StorageHTTP(InMemoryStreamManager(), trust=trust) as app, serving(app) as url:
        async with RemoteStreamManager(url, headers={"X-Who": "a worker"}) as streams, streams.open("s") as stream:
            await stream.done()
        for headers, code in (({}, 401), ({"x-banned": ""}, 403)):
            with pytest.raises(StorageError, match=f"does not trust who asks: {code}"):
                async with RemoteStreamManager(url, headers=headers):
                    pass


async def test_it_runs_while_an_app_does_whose_lifespan_it_is() -> None:
    storage_http = StorageHTTP("memory://", trust=lambda _: True)
    app = FastAPI(lifespan=storage_http.lifespan)
    app.mount("/storage", storage_http)
    async with serving(app) as url, RemoteStreamManager(f"{url}/storage") as streams, streams.open("s") as stream:
        await stream.done()
        assert storage_http.streams.is_running
    assert not storage_http.streams.is_running


async def test_a_certificate_may_say_who_asks_and_an_authority_of_ones_own_who_answers(
    requires: Callable[[str], str], tmp_path: Path
) -> None:
    for name, more in (
        ("ca", []),
        ("server", ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:localhost"]),
    ):
        command = [requires("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        command += [*more, "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        await anyio.run_process(command, cwd=tmp_path)
    believing = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    known = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    known.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    tls: dict[str, Any] = {"ssl_certfile": tmp_path / "server.pem", "ssl_keyfile": tmp_path / "server.key"}
    asked: dict[str, Any] = {"ssl_ca_certs": tmp_path / "ca.pem", "ssl_cert_reqs": ssl.CERT_REQUIRED}
    async with (
        StorageHTTP(InMemoryStreamManager(), trust=lambda _: True) as app,
        serving(app, **tls, **asked) as plain,
    ):
        url = plain.replace("http://127.0.0.1", "https://localhost")
        async with RemoteStreamManager(url, ssl_context=known) as streams, streams.open("s") as stream:
            await stream.done()
        for context in (None, believing):
            with pytest.raises(StorageError):
                async with HTTPStorage(url, ssl_context=context):
                    pass


def test_a_token_is_not_short() -> None:
    with pytest.raises(InvalidArgumentError, match="at least 16"):
        StorageHTTP("memory://", trust="fifteen letters")


@pytest.mark.parametrize(
    "url",
    ["http://", "https://host?query", "https://host#fragment", "https://user:password@host", "http://host:port", "http://["],
)
def test_what_is_no_url_is_told_without_what_may_be_secret(url: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        StreamManager.connect(url)
    assert "password" not in str(raised.value)


async def test_something_else_that_answers_is_told_so() -> None:
    async def page(_: object, __: object, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"<p>Sign in"})

    async with serving(page) as url:
        with pytest.raises(StorageError, match="there is no StorageHTTP at"):
            async with StreamManager.connect(url):
                pass


# Hostile requests


@pytest.mark.parametrize("what", ["read", "change", "scan", "expired", "watch"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"{}",
        b"\x90" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        msgspec.msgpack.encode(["s", "\0"]),
        msgspec.msgpack.encode({"stream": "s", "start": -1, "limit": 2**63}),
        msgspec.msgpack.encode({"after": "", "limit": -5}),
        msgspec.msgpack.encode(
            [{"stream": "s", "seen": 2**64 - 1, "head": {"version": -1, "tail": -1, "state": b"", "expires_at": "x"}}]
        ),
        msgspec.msgpack.encode([{"stream": "s", "seen": None, "head": None}]),
    ],
    ids=range(11),
)
async def test_a_strange_body_is_refused_and_nothing_breaks(asking: httpx.AsyncClient, what: str, body: bytes) -> None:
    with anyio.move_on_after(2):  # what may be watched is watched
        answer = await asking.post(what, content=body, headers={"content-type": CONTENT_TYPE})
        assert answer.status_code in {200, 400}, answer.content
    good = msgspec.msgpack.encode({"after": "", "limit": 1})
    assert (await asking.post("scan", content=good, headers={"content-type": CONTENT_TYPE})).status_code == 200


async def test_other_requests_are_refused(asking: httpx.AsyncClient) -> None:
    kind = {"content-type": CONTENT_TYPE}
    assert (await asking.get("scan", headers=kind)).status_code == 405
    assert (await asking.post("scan", content=b"")).status_code == 415
    assert (await asking.post("other", content=b"", headers=kind)).status_code == 404
    assert (await asking.post("scan", content=b"", headers={**kind, "authorization": "Basic eA=="})).status_code == 401
    assert (await asking.post("scan", content=bytes((64 << 20) + 1), headers=kind)).status_code == 413


# Several servers


async def test_a_writer_and_a_reader_go_on_when_another_server_answers(tmp_path: Path) -> None:
    with Server(tmp_path / "both") as first, Server(tmp_path / "both") as second:
        second.name = first.name
        servers = itertools.cycle([second, first])
        async with bad_network(first.url) as network:
            url = first.through(urlsplit(network.path()).port or 0)
            read: list[object] = []
            async with (
                RemoteStreamManager(url) as writing,
                RemoteStreamManager(url) as reading,
                anyio.create_task_group() as tasks,
            ):
                stream = await writing.open("s")

                async def follow() -> None:
                    async with reading.subscribe("s") as events:
                        read.extend([event.data async for event in events])

                tasks.start_soon(follow)
                for number in range(40):
                    if number % 10 == 5:
                        network.url = next(servers).url
                        network.meet(Fate(End.RST))
                    await stream.write(number)
                await stream.done("end")
    assert read == [*map(str.encode, map(str, range(40))), b'"end"']


# One for all


async def test_a_change_that_is_refused_is_not_the_others_fault(url: str) -> None:
    def head(expires_at: float) -> Head:
        return Head(1, 0, b"", expires_at)

    async with HTTPStorage(url) as storage, anyio.create_task_group() as tasks:
        outcomes: dict[str, object] = {}

        async def commit(stream: str, expires_at: float) -> None:
            try:
                outcomes[stream] = await storage.commit(stream, None, head(expires_at))
            except StorageError as error:
                outcomes[stream] = str(error)

        for stream, expires_at in (("a", 9e9), ("b", math.inf), ("c", 9e9)):
            tasks.start_soon(commit, stream, expires_at)
    assert (outcomes["a"], outcomes["c"]) == (True, True)
    assert "a time at which it expires" in str(outcomes["b"])


async def test_what_is_too_long_together_is_sent_in_parts() -> None:
    async with (
        StorageHTTP(InMemoryStreamManager(), trust=TOKEN, max_body_bytes=100_000) as app,
        serving(app) as url,
        HTTPStorage(url, headers=TRUSTED) as storage,
    ):
        done: list[bool] = []

        async def commit(stream: str) -> None:
            done.append(await storage.commit(stream, None, Head(1, 1, b"", 9e9), [bytes(60_000)]))

        async with anyio.create_task_group() as tasks:
            for number in range(6):
                tasks.start_soon(commit, f"s{number}")
        assert done == [True] * 6
        with pytest.raises(StorageError, match="takes no request of this length"):
            await storage.commit("long", None, Head(1, 1, b"", 9e9), [bytes(200_000)])


@pytest.mark.parametrize("time", ["nan", "inf", "never"])
async def test_what_cannot_be_a_time_is_not_believed(time: str) -> None:
    async def app(_: object, __: object, send: Send) -> None:
        headers = [(b"content-type", CONTENT_TYPE.encode()), (b"streamkeep-time", time.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": msgspec.msgpack.encode([])})

    async with serving(app) as url:
        with pytest.raises(StorageError, match="has answered what cannot be"):
            async with HTTPStorage(url):
                pass
