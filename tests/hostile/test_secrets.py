"""What exceptions say is for those who run the service: no byte of it reaches a client, whoever raises it, and wherever."""

import json
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import pytest
from genkit import ActionRunContext, GenkitError
from genkit import PublicError as GenkitPublicError
from pydantic import BaseModel, TypeAdapter, field_serializer
from tests.hostile.servers import APPS, ID, KNOWN, STREAMING, House, serve
from tests.hostile.sockets import Connection, request
from tests.test_cli import run

from streamkeep import StreamManager, errors
from streamkeep.cli._output import shown_url
from streamkeep.cli._serving import reading_app
from streamkeep.errors import (
    InvalidArgumentError,
    PublicError,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StreamkeepError,
)
from streamkeep.http import Access, DurableStreaming, StreamsHTTP
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.faults import FaultyStorage, Operation

SECRET: Final = "hunter2-7f3a"
SECRET_URL: Final = f"postgresql://streams:{SECRET}@db.internal:5432/streams"
JSON: Final = b"Content-Type: application/json"


def with_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class UnprintableError(Exception):
    """An exception whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError(SECRET_URL)


class SlyError(Exception):
    """An exception with everything that a public one has but the name."""

    status = "PERMISSION_DENIED"
    public = True
    details: Final = {"url": SECRET_URL}
    original_message = SECRET_URL


class LeakyModel(BaseModel):
    """A model that fails when it is written, and says why."""

    url: str

    @field_serializer("url")
    def refuse(self, url: str) -> str:
        """Fail."""
        raise ValueError(f"cannot write {url}")


def ours() -> Iterator[Exception]:
    """Give one of each of our errors that are not for readers, with a secret in it."""
    for class_ in vars(errors).values():
        if isinstance(class_, type) and issubclass(class_, StreamkeepError) and not class_.public:
            yield class_(SECRET_URL)


def foreign() -> Iterator[Exception]:
    """Give exceptions of others."""
    for class_ in (ValueError, KeyError, OSError, RuntimeError, ConnectionError, TimeoutError, AssertionError, LookupError):
        yield class_(SECRET_URL)
    yield FileNotFoundError(2, "No such file", f"/srv/{SECRET}/streams.db")
    yield UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET)
    yield ExceptionGroup(SECRET, [ValueError(SECRET), PublicError("ABORTED", SECRET)])
    yield with_cause(RuntimeError("harmless"), ValueError(SECRET))
    yield GenkitError(message=SECRET_URL, status="NOT_FOUND", details={"url": SECRET_URL})
    yield GenkitError(message="harmless", cause=ValueError(SECRET))
    yield SlyError(SECRET)
    yield UnprintableError(SECRET)
    yield type(SECRET, (Exception,), {})(SECRET)
    try:
        TypeAdapter(int).validate_python(SECRET)
    except ValueError as error:
        yield error


HIDDEN: Final = {f"{type(error).__name__}-{number}": error for number, error in enumerate((*ours(), *foreign()))}


async def raises(which: str, ctx: ActionRunContext) -> None:
    """Raise one of them after a chunk."""
    ctx.send_chunk("begun")
    raise HIDDEN[which]


async def writes_badly(_: None, ctx: ActionRunContext) -> None:
    """Send a chunk whose serializer fails."""
    ctx.send_chunk([{"nested": LeakyModel(url=SECRET_URL)}])


async def returns_badly(_: None) -> LeakyModel:
    """Return an output whose serializer fails."""
    return LeakyModel(url=SECRET_URL)


@contextmanager
def leaky(app: str, storage: FaultyStorage, authorize: Any = None) -> Generator[House]:
    """Serve flows that fail, over a storage that can."""
    streams = StreamManager(storage)
    streams_http = StreamsHTTP(streams, authorize=authorize)
    flows = (raises, writes_badly, returns_badly)
    with serve(APPS[app](*flows, streams=streams_http), streams, streams_http, passes_on=app == "DurableStreaming") as target:
        yield target


@pytest.fixture(scope="module", params=APPS)
def failing(request: pytest.FixtureRequest) -> Generator[House]:
    """Give a server of flows that fail."""
    with leaky(request.param, FaultyStorage(MemoryStorage())) as target:
        yield target


@pytest.fixture(autouse=True)
def quietly(caplog: pytest.LogCaptureFixture) -> None:
    """The log is where all of it goes; nobody needs to read it here."""
    caplog.set_level(logging.CRITICAL + 1)


def all_that_is_sent(target: House, path: bytes, data: object) -> bytes:
    """Give every byte of every answer about one run of a flow: once, streamed, resumed, read, described, stopped."""
    body = json.dumps({"data": data}).encode()
    streamed = sent_back(target, request("POST", path, STREAMING, JSON, body=body))
    stream = streamed.lower().partition(b"x-genkit-stream-id: ")[2].partition(b"\r\n")[0]
    about = (
        request("POST", path, ID + stream, body=b""),
        request("GET", b"/streams/" + stream),
        request("GET", b"/streams/" + stream + b"/info"),
        request("DELETE", path, ID + stream, body=b""),
    )
    # Without streaming an app in `DurableStreaming` answers by itself.
    once = b"" if target.passes_on else sent_back(target, request("POST", path, JSON, body=body))
    return b"".join((once, streamed, *(sent_back(target, asked) for asked in about)))


def sent_back(target: House, data: bytes) -> bytes:
    """Send a request, and give all that comes."""
    with Connection(target.address) as connection:
        connection.send(data.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        return connection.rest()


def expect_no_secret(sent: bytes) -> None:
    assert b"hunter2" not in sent
    assert b"db.internal" not in sent
    assert b"Traceback" not in sent
    assert b".py" not in sent


@pytest.mark.parametrize("which", HIDDEN)
def test_what_a_flow_raises_reaches_nobody(failing: House, which: str) -> None:
    sent = all_that_is_sent(failing, b"/raises", which)
    assert b'"error"' in sent
    expect_no_secret(sent)


@pytest.mark.parametrize("path", [b"/writes_badly", b"/returns_badly"])
def test_what_a_serializer_says_reaches_nobody(failing: House, path: bytes) -> None:
    sent = all_that_is_sent(failing, path, None)
    assert b'"error"' in sent
    expect_no_secret(sent)


def test_a_public_errors_text_does_reach_readers() -> None:
    """The search above finds what there is to find."""
    for public in (PublicError("ABORTED", SECRET), GenkitPublicError("ABORTED", SECRET)):
        HIDDEN["public"] = public
        try:
            with leaky("durable_flow", FaultyStorage(MemoryStorage())) as target:
                assert all_that_is_sent(target, b"/raises", "public").count(SECRET.encode()) == 6
        finally:
            del HIDDEN["public"]


# Storages, and who is asked who may

KINDS: Final = ("commit", "read", "watch", "delete", "scan")


def requests_about(stream: bytes) -> Sequence[bytes]:
    """Give one request of each kind."""
    return (
        request("POST", b"/returns_badly", STREAMING, JSON, body=b'{"data":null}'),
        request("POST", b"/returns_badly", ID + stream, body=b""),
        request("DELETE", b"/returns_badly", ID + stream, body=b""),
        request("GET", b"/streams/" + stream),
        request("GET", b"/streams/" + stream + b"/info"),
        request("DELETE", b"/streams/" + stream),
        request("POST", b"/streams/" + stream + b"/cancel", body=b""),
        request("GET", b"/healthz"),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [StorageError, StorageFullError, StorageCorruptError])
def test_what_a_storage_says_when_it_fails_reaches_nobody(error: type[StorageError], kind: Operation) -> None:
    storage = FaultyStorage(MemoryStorage())
    with leaky("durable_flow", storage) as target:
        for asked in requests_about(KNOWN.encode()):
            storage.refuse(kind, times=3, error=error(SECRET_URL))
            expect_no_secret(sent_back(target, asked))
            storage._steps.clear()
        assert target.is_alive()


@pytest.mark.parametrize("app", APPS)
def test_what_authorize_raises_reaches_nobody(app: str) -> None:
    raised: list[Exception] = []

    def authorize(_: Access) -> None:
        if raised:
            raise raised[0]

    with leaky(app, FaultyStorage(MemoryStorage()), authorize) as target:
        for error in HIDDEN.values():
            raised[:] = [error]
            for asked in requests_about(KNOWN.encode())[:-1]:
                expect_no_secret(sent_back(target, asked))
        raised.clear()
        assert target.is_alive()


def test_a_health_check_does_not_say_what_is_wrong() -> None:
    storage = FaultyStorage(MemoryStorage())
    streams = StreamManager(storage)
    streams_http = StreamsHTTP(streams)
    # Only for its lifespan: the command's app has none of its own.
    with serve(DurableStreaming(reading_app(streams_http), streams_http), streams, streams_http) as target:
        storage.refuse("scan", error=StorageError(SECRET_URL))
        sent = sent_back(target, request("GET", b"/healthz"))
        assert b" 503 " in sent
        expect_no_secret(sent)
        assert b" 200 " in sent_back(target, request("GET", b"/healthz"))


# URLs

URLS: Final = (
    f"{SECRET_URL}?password={SECRET}",
    f"redis://:{SECRET}@cache.internal:6379/0?password={SECRET}",
    f"sqlite://streams:{SECRET}@host/streams.db",
    f"sqlite:///streams.db?password={SECRET}",
    f"streams:{SECRET}@db.internal/streams",
    f"carrier-pigeon://{SECRET}",
    f"sqlite://[{SECRET}",
)


@pytest.mark.parametrize("url", URLS)
def test_a_url_that_names_no_storage_is_not_repeated(url: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        StreamManager.connect(url)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("arguments", [["list"], ["serve", "--port", "0"], ["list", "--help"]], ids=" ".join)
def test_the_command_does_not_print_a_password(arguments: list[str]) -> None:
    result = run(*arguments, STREAMKEEP_STORAGE=SECRET_URL)
    assert SECRET not in result.stdout + result.stderr


@pytest.mark.parametrize("url", [SECRET_URL, f"redis://:{SECRET}@cache.internal/0", f"x://a:{SECRET}@h/{SECRET}?p={SECRET}"])
def test_what_the_command_says_of_a_url_has_no_password(url: str) -> None:
    assert f":{SECRET}@" not in shown_url(url)


@pytest.mark.parametrize("scheme", ["http", "https", "nats", "tls"])
def test_what_the_command_says_of_a_url_has_no_token(scheme: str) -> None:
    assert shown_url(f"{scheme}://{SECRET}@host/storage") == f"{scheme}://***@host/storage"
