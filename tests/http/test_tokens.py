"""Signed tokens: who has one may do one thing with one stream for a while, and nothing else lets a token in."""

import hmac
import json
import logging
import secrets
from base64 import urlsafe_b64encode
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Final

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request, Response
from genkit import ActionRunContext
from pydantic import SecretStr
from starlette.types import ASGIApp
from tests.http.conftest import GenkitClient
from tests.http.servers import STREAM_ID, STREAMING, Reading, count, durable_app, http_to, serving, wrapped_app

from streamkeep import InMemoryStreamManager, StreamManager
from streamkeep.client import stop, subscribe
from streamkeep.errors import InvalidArgumentError, PublicError, RefusedError, StreamNotFoundError
from streamkeep.http import Access, SSEFraming, StreamsHTTP
from streamkeep.http.tokens import MAX_EXPIRES_IN, TokenKeys, TokenUse, token_of
from streamkeep.integrations.openai import OpenAIResponses, ResponseRequest
from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing.clock import FakeClock
from streamkeep.wire import cursor_prefix

KEY: Final = "the-first-key-Zmlyc3QtMDEyMzQ1Njc4OWFiY2RlZg"
OLD_KEY: Final = b"the-second-key-c2Vjb25kLTAxMjM0NTY3ODlhYmNkZWY"
MINUTE: Final = timedelta(minutes=1)
NOT_FOUND: Final = {"error": {"status": "NOT_FOUND", "message": "stream not found", "details": None}}


def authorize(access: Access) -> str:
    """Know who says a name; nobody else may come."""
    name = access.headers.get("x-name")
    if name is None:
        raise PublicError("UNAUTHENTICATED", "sign in")
    return name


class House:
    """A server whose streams are under /streams, and under /chat in endpoints of the app's own."""

    def __init__(self, http: httpx.AsyncClient, serve: StreamsHTTP, clock: FakeClock) -> None:
        self.http = http
        self.serve = serve
        self.streams = serve.streams
        self.clock = clock

    async def stored(self, stream: str = "s", *, owner: str = "Ada", route: str = "/chat") -> str:
        """Store a stream that runs."""
        async with self.streams.open(stream, owner=owner, metadata={"route": route}) as writing:
            await writing.write({"n": 0})
        return stream

    async def codes(self, token: str, stream: str = "s", **headers: str) -> list[int]:
        """Give the codes of all ways to get at a stream with a token in the query, and then with one in a header."""
        by_query = await self.answers(stream, {"token": token}, headers)
        by_header = await self.answers(stream, {}, {"Authorization": f"Bearer {token}", **headers})
        assert [answer.status_code for answer in by_query] == [answer.status_code for answer in by_header]
        return [answer.status_code for answer in by_query]

    async def answers(self, stream: str, query: dict[str, str], headers: dict[str, str]) -> list[httpx.Response]:
        shown = {**query, "follow": "false"}
        named = {**headers, STREAM_ID: stream}
        return [
            await self.http.get(f"/streams/{stream}", params=shown, headers=headers),
            await self.http.head(f"/streams/{stream}", params=query, headers=headers),
            await self.http.get(f"/streams/{stream}/info", params=query, headers=headers),
            await self.http.head(f"/chat/{stream}", params=query, headers=headers),
            await self.http.delete(f"/chat/{stream}", params=query, headers=headers),
            await self.http.post(f"/streams/{stream}/cancel", params=query, headers=headers),
            await self.http.delete(f"/streams/{stream}", params=query, headers=headers),
            await self.http.get("/streams/", params=query, headers=named),
        ]


READS: Final = [200, 200, 200, 200, 404, 404, 404, 401]
STOPS: Final = [404, 404, 404, 204, 200, 200, 200, 401]
REFUSED: Final = [404, 404, 404, 204, 404, 404, 404, 401]
EXPIRED: Final = [401, 401, 401, 401, 404, 404, 404, 401]


def altered(token: str) -> str:
    """Give a token with another signature."""
    return token[:-1] + ("A" if token[-1] != "A" else "B")


def app_of(serve: StreamsHTTP) -> ASGIApp:
    app = FastAPI(lifespan=serve.lifespan)
    app.mount("/streams", serve)

    async def chunks() -> AsyncGenerator[int]:
        yield 0

    @app.post("/chat")
    async def ask(request: Request) -> Response:
        return await serve.respond(request, chunks(), framing=SSEFraming())

    @app.api_route("/chat/{stream}", methods=["GET", "HEAD"])
    async def show(request: Request, stream: str) -> Response:
        return await serve.follow(request, stream)

    @app.delete("/chat/{stream}")
    async def stop(request: Request, stream: str) -> Response:
        return await serve.cancel(request, stream)

    @app.api_route("/keys/{key}/{stream}", methods=["GET", "HEAD"])
    async def show_either(request: Request, key: str, stream: str) -> Response:
        return await serve.follow(request, stream, key=key)

    @app.delete("/keys/{key}/{stream}")
    async def stop_either(request: Request, key: str, stream: str) -> Response:
        return await serve.cancel(request, stream, key=key)

    @app.api_route("/keys/{key}", methods=["GET", "HEAD"])
    async def show_key(request: Request, key: str) -> Response:
        return await serve.follow(request, key=key)

    @app.get("/mine/{stream}")
    async def mine(request: Request, stream: str) -> Response:
        return await serve.follow(request, stream, owner=request.headers.get("x-name", ""))

    return app


@asynccontextmanager
async def house(**options: Any) -> AsyncGenerator[House]:
    """Serve streams by a clock that stands still."""
    clock = FakeClock(1_000_000.0)
    options = {"authorize": authorize, "token_keys": [KEY], **options}
    async with MemoryStorage(clock=clock) as storage:
        serve = StreamsHTTP(StreamManager(storage), **options)
        async with http_to(app_of(serve)) as http:
            yield House(http, serve, clock)


async def test_a_token_reads_one_stream_in_every_way_that_shows_it_and_does_nothing_else() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        assert await at.codes(token) == READS
        assert (await at.streams.info("s")).status == "open"
        answer = await at.http.get("/streams/s", params={"token": token, "follow": "false"})
        assert answer.text.count("event: chunk") == 1


async def test_a_token_stops_one_stream_and_does_nothing_else() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="stop", expires_in=MINUTE)
        assert await at.codes(token) == STOPS
        assert (await at.streams.info("s")).error == "CANCELLED"


async def test_a_post_that_resumes_takes_a_token_and_who_comes_with_a_cursor_is_told_in_events_that_it_has_expired() -> None:
    async with house() as at:
        await at.stored(route="/chat")
        async with at.streams.open("s", resume=True) as writing:
            await writing.done(1)
        token = await at.serve.token("s", can="read", expires_in=MINUTE)
        cursor = f"s/{(await at.streams.info('s')).life[:8]}/0"
        for place in ({STREAM_ID: "s"}, {"Last-Event-ID": cursor}):
            answer = await at.http.post("/chat", params={"token": token}, headers=place)
            assert (answer.status_code, "event: done" in answer.text) == (200, True)
        at.clock.advance(60)
        by_id = await at.http.post("/chat", params={"token": token}, headers={STREAM_ID: "s"})
        assert by_id.status_code == 401
        by_cursor = await at.http.post("/chat", params={"token": token}, headers={"Last-Event-ID": cursor})
        assert (by_cursor.status_code, by_cursor.headers["content-type"]) == (200, "text/event-stream")
        assert "event: error" in by_cursor.text
        assert "the token has expired" in by_cursor.text
        assert "event: done" not in by_cursor.text


async def test_who_has_a_token_is_not_asked_for() -> None:
    asked: list[Access] = []
    async with house(authorize=asked.append) as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        assert (await at.http.get("/streams/s/info", params={"token": token})).status_code == 200
        assert (await at.http.delete("/streams/s", params={"token": token})).status_code == 404
    assert asked == []


async def test_a_token_never_starts_or_lists_anything() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        for headers in ({}, {"Authorization": f"Bearer {token}"}):
            assert (await at.http.post("/chat", params={"token": token}, headers=headers)).status_code == 401
            assert (await at.http.get("/streams/", params={"token": token}, headers=headers)).status_code == 401


def every_change(token: str) -> Iterator[str]:
    """Give the token with each character changed, left out, doubled; and cut off at each place."""
    for at, old in enumerate(token):
        yield from (token[:at] + new + token[at + 1 :] for new in "A0z_-.=~ \0\xe9" if new != old)
        yield from (token[:at] + chr(ord(old) ^ bit) + token[at + 1 :] for bit in (1, 2, 4, 8, 16, 32, 64))
        yield token[:at] + token[at + 1 :]
        yield token[:at] + old + token[at:]
        yield token[:at] + "0" + token[at:]
        yield token[:at]


@pytest.mark.parametrize("holder", [None, "Ada"])
def test_no_change_of_a_token_is_one(holder: str | None) -> None:
    keys = TokenKeys([KEY, OLD_KEY])
    token = keys.sign("read", 1_000_060, "s", "life", holder)
    sound = token_of([token])
    assert sound is not None
    assert keys.has_signed(sound, "s", "life", holder)
    changed = [*every_change(token), token.upper(), token * 2, token + "\n", token + "=", " " + token, token.replace(".", ",")]
    changed += [token.replace("read", "stop"), token.replace("1000060", "9000060"), token.replace("1000060", "01000060")]
    changed += [token.replace("skt1", "skt2"), token.replace("read.", "read.held."), token.replace(".held", "")]
    read = [(text, token_of([text])) for text in changed if text != token]
    assert len(read) > 1_000
    accepted = [text for text, found in read if found is not None and keys.has_signed(found, "s", "life", holder)]
    assert accepted == []


@pytest.mark.parametrize(
    ("stream", "life", "holder"),
    [("s2", "life", "Ada"), ("s", "life2", "Ada"), ("s", "life", "Eve"), ("s", "life", None), ("", "slife", "Ada")],
)
def test_a_token_is_for_one_stream_one_life_and_one_holder(stream: str, life: str, holder: str | None) -> None:
    keys = TokenKeys([KEY])
    token = token_of([keys.sign("read", 1_000_060, "s", "life", "Ada")])
    assert token is not None
    assert keys.has_signed(token, "s", "life", "Ada")
    assert not keys.has_signed(token, stream, life, holder)


@pytest.mark.parametrize(
    "text",
    [
        "skt1.",
        "skt1.read.1000060.",
        "skt0.read.1000060." + "A" * 43,
        "skt2.read.1000060." + "A" * 43,
        "skt1.none.1000060." + "A" * 43,
        "skt1.read.1000060." + "A" * 43,
        "skt1.read.-1." + "A" * 43,
        "skt1.read.9999999999999." + "A" * 43,
        "skt1.read.\u0661\u0662." + "A" * 43,
        "skt1." + "A" * 20_000,
        "skt1.\xe9\U0001f511",
        "skt1.read.1000060." + "A" * 42 + "\0",
        "skt1.eyJhbGciOiJub25lIn0.eyJzdWIiOiJzIn0.",
    ],
)
async def test_what_only_looks_like_a_token_is_refused_as_an_unknown_stream_is(text: str) -> None:
    async with house() as at:
        await at.stored()
        for stream in ("s", "unknown"):
            answer = await at.http.get(f"/streams/{stream}", params={"token": text}, headers={"X-Name": "Ada"})
            assert (answer.status_code, answer.json()) == (404, NOT_FOUND)


@pytest.mark.parametrize(
    "query", ["token=&token=", "token=%ff%fe", "token=%73&%74oken", "token[]=skt1.", "Token=skt1.x", "skt1.x"]
)
async def test_what_does_not_look_like_one_is_left_to_authorize(query: str) -> None:
    async with house() as at:
        await at.stored()
        assert (await at.http.get(f"/streams/s?{query}")).status_code == 401
        assert (await at.http.get(f"/streams/s?{query}&follow=false", headers={"X-Name": "Ada"})).status_code == 200


async def test_the_apps_own_tokens_are_the_apps() -> None:
    seen: list[tuple[str, str]] = []

    def own(access: Access) -> str:
        seen.append((access.query.get("token", ""), access.headers.get("authorization", "")))
        return "Ada"

    jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJBZGEifQ.c2ln"
    async with house(authorize=own) as at:
        await at.stored()
        assert (await at.http.get("/streams/s/info", params={"token": jwt})).status_code == 200
        assert (await at.http.get("/streams/s/info", headers={"Authorization": f"Bearer {jwt}"})).status_code == 200
        assert (await at.http.get("/streams/s/info", headers={"Authorization": "Basic c2t0MS4="})).status_code == 200
    assert seen == [(jwt, ""), ("", f"Bearer {jwt}"), ("", "Basic c2t0MS4=")]


async def test_of_several_tokens_none_counts_unless_they_are_one() -> None:
    async with house() as at:
        one, two = [await at.serve.token(await at.stored(stream), can="read", expires_in=MINUTE) for stream in ("s", "other")]
        bearer = {"Authorization": f"Bearer {one}"}
        codes = [
            (await at.http.get(f"/streams/s/info?{query}", headers=headers)).status_code
            for query, headers in [
                (f"token={one}&token={one}", {}),
                (f"token={one}", bearer),
                (f"token={one}", {"Authorization": f"bEARER  {one}"}),
                (f"token={one}&token=mine", {}),
                (f"token={one}&token={two}", {}),
                (f"token={two}", bearer),
                ("", {"Authorization": f"Bearer {two}"}),
            ]
        ]
    assert codes == [200, 200, 200, 200, 404, 404, 404]


@pytest.mark.parametrize("stream", ["s", "_a~b.c:d@e=f+g-h", "0" * 255])
async def test_a_token_is_for_no_other_stream_whatever_its_name(stream: str) -> None:
    others = [stream + "x", stream[:-1], stream.swapcase(), stream + "%2F.."]
    async with house() as at:
        token = await at.serve.token(await at.stored(stream), can="read", expires_in=MINUTE)
        for other in {*others} - {stream}:
            with suppress(InvalidArgumentError):
                await at.stored(other)
            answer = await at.http.get(f"/streams/{other}/info", params={"token": token})
            assert answer.status_code in {400, 404}
        assert (await at.http.get(f"/streams/{stream}/info", params={"token": token})).status_code == 200


@pytest.mark.promise("P21")
async def test_a_token_is_for_no_later_stream_under_its_id() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        stop = await at.serve.token("s", can="stop", expires_in=MINUTE)
        await at.streams.delete("s")
        assert await at.codes(token) == REFUSED
        await at.stored()
        assert await at.codes(token) == REFUSED
        assert await at.codes(stop) == REFUSED


async def test_a_refused_token_is_answered_as_for_an_unknown_stream_byte_for_byte() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        stop = await at.serve.token("s", can="stop", expires_in=MINUTE)
        forged = token[:-1] + ("A" if token[-1] != "A" else "B")
        for text in (stop, forged):
            known = [(answer.status_code, answer.content) for answer in (await at.answers("s", {"token": text}, {}))[:4]]
            unknown = [(answer.status_code, answer.content) for answer in (await at.answers("u", {"token": text}, {}))[:4]]
            assert known == unknown


async def test_a_token_expires_by_the_storages_clock_when_it_says_so_and_no_moment_before() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        at.clock.advance(59.999)
        assert await at.codes(token) == READS
        at.clock.advance(0.001)
        assert await at.codes(token) == EXPIRED
        answer = await at.http.get("/streams/s", params={"token": token}, headers={"X-Name": "Ada"})
        told = {"status": "UNAUTHENTICATED", "message": "the token has expired", "details": None}
        assert (answer.status_code, answer.json()["error"]) == (401, told)
        assert answer.headers["www-authenticate"].startswith('Bearer error="invalid_token"')
        at.clock.advance(-1)
        assert await at.codes(token) == READS


async def test_what_is_expired_and_forged_is_only_refused() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        assert await at.codes(token.replace("1000060", "999")) == REFUSED
        at.clock.advance(61)
        assert await at.codes(token.replace("1000060", "2000000")) == REFUSED
        await at.streams.delete("s")
        assert await at.codes(token) == REFUSED


async def test_a_connection_that_is_open_goes_on_when_its_token_expires() -> None:
    async with house() as at, at.streams.open("s", owner="Ada") as writing:
        await writing.write(0)
        token = await at.serve.token("s", can="read", expires_in=MINUTE)
        async with at.http.stream("GET", "/streams/s", params={"token": token}) as answer:
            reading = Reading(answer)
            await reading.until(b"data: 0\n")
            at.clock.advance(3600)
            await writing.done(1)
            assert b"event: done" in await reading.whole()
        assert (await at.http.get("/streams/s", params={"token": token})).status_code == 401


async def test_keys_are_changed_without_a_token_being_refused_and_one_that_is_gone_signs_nothing_more() -> None:
    before: list[str | bytes] = [OLD_KEY]
    both: list[str | bytes] = [KEY, OLD_KEY]
    after: list[str | bytes] = [KEY]
    async with house(token_keys=before) as at:
        old = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)

        async def codes(token: str, keys: list[str | bytes]) -> int:
            reading = StreamsHTTP(at.streams, authorize=authorize, token_keys=keys)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=reading), base_url="http://streams") as http:
                return (await http.get("/s/info", params={"token": token})).status_code

        new = await StreamsHTTP(at.streams, token_keys=both).token("s", can="read", expires_in=MINUTE)
        assert [await codes(old, keys) for keys in (before, both, after)] == [200, 200, 404]
        assert [await codes(new, keys) for keys in (before, both, after)] == [404, 200, 200]
        assert [await codes(token, []) for token in (old, new)] == [401, 401]  # where tokens mean nothing


def test_a_signature_that_a_secret_has_made_for_something_else_is_none_here() -> None:
    signed = json.dumps(["read", False, 1_000_060, "s", "life", None]).encode()
    signature = urlsafe_b64encode(hmac.digest(KEY.encode(), signed, "sha256")).rstrip(b"=").decode()
    token = token_of([f"skt1.read.1000060.{signature}"])
    assert token is not None
    assert not TokenKeys([KEY]).has_signed(token, "s", "life")


@pytest.mark.parametrize(
    "key",
    ["", "hunter2", b"short", "a" * 64, "changeme" * 8, b"\0" * 32, "x" * 31, f"\udcff{OLD_KEY.decode()}", f"{KEY}\ud800"],
)
def test_a_weak_key_is_refused_and_not_repeated(key: str | bytes) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        TokenKeys([KEY, key])
    assert len(key) < 3 or str(key) not in str(refused.value)


@pytest.mark.parametrize(
    "keys",
    [
        *(KEY, OLD_KEY, [None], [32], [SecretStr(KEY)], [list(OLD_KEY)], None, bytearray(OLD_KEY)),
        *(map(str, [KEY]), iter([KEY]), {KEY}, {KEY: 1}),  # which can be read once only, or have no first one
    ],
)
def test_what_is_no_list_of_keys_is_told_at_once(keys: Any) -> None:
    with pytest.raises(TypeError) as refused:
        StreamsHTTP("memory://", token_keys=keys)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("written", [f" {KEY}", f"{KEY}\n", f"\t{KEY}\r\n"])
def test_a_key_is_the_same_whatever_is_blank_around_it(written: str) -> None:
    """Such as of `"old, new"`, which is split at the comma, and is turned round to `"new, old"`."""
    token = token_of([TokenKeys([written]).sign("read", 1_000_060, "s", "life")])
    assert token is not None
    assert TokenKeys([KEY]).has_signed(token, "s", "life")
    with pytest.raises(InvalidArgumentError):
        TokenKeys([" " * 20 + KEY[:20]])


def test_keys_of_many_kinds_are_strong_enough() -> None:
    keys: list[str | bytes] = [
        secrets.token_bytes(32),
        secrets.token_hex(16),
        secrets.token_urlsafe(32),
        "\u0434\u044f\u0436\u043b\u043e\u0444\u0446\u044b" * 2,
    ]
    assert TokenKeys(keys)


def test_no_key_and_no_signature_is_shown() -> None:
    keys = TokenKeys([KEY])
    token = keys.sign("read", 1, "s", "life")
    shown = f"{keys!r} {token_of([token])!r} {vars(keys)!r} {StreamsHTTP('memory://', token_keys=[KEY])!r}"
    assert KEY not in shown
    assert token.rpartition(".")[2] not in shown


async def test_a_server_for_one_route_takes_tokens_of_that_route_only() -> None:
    async with house(route="/chat") as at:
        of_chat = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        of_other = await at.serve.token(await at.stored("t", route="/other"), can="read", expires_in=MINUTE)
        assert await at.codes(of_chat) == READS
        by_mount = [answer.status_code for answer in (await at.answers("t", {"token": of_other}, {}))[:3]]
        assert by_mount == [404, 404, 404]


async def test_a_token_of_one_holder_is_nobody_elses() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE, holder="Bob")
        assert "Bob" not in token
        assert (await at.codes(token, **{"X-Name": "Bob"}))[:7] == READS[:7]
        assert (await at.codes(token, **{"X-Name": "Eve"}))[:7] == REFUSED[:7]
        assert (await at.codes(token, **{"X-Name": "Ada"}))[:7] == REFUSED[:7]  # whose it is comes without it
        nobody = [(answer.status_code, answer.content) for answer in await at.answers("s", {"token": token}, {})]
        assert [code for code, _ in nobody] == [401, 401, 401, 401, 404, 404, 404, 401]
        unknown = [(answer.status_code, answer.content) for answer in await at.answers("u", {"token": token}, {})]
        assert unknown == nobody
        at.clock.advance(60)
        assert (await at.codes(token, **{"X-Name": "Bob"}))[:7] == EXPIRED[:7]
        assert (await at.codes(token, **{"X-Name": "Eve"}))[:7] == REFUSED[:7]


async def test_an_endpoint_that_says_who_is_asking_looks_at_no_token() -> None:
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        assert (await at.http.get("/mine/s", params={"token": token})).status_code == 204
        async with at.http.stream("GET", "/mine/s", params={"token": "skt1.x"}, headers={"X-Name": "Ada"}) as answer:
            assert answer.status_code == 200


async def test_where_a_key_is_named_beside_the_stream_a_token_that_is_refused_is_not_made_good_by_who_asks() -> None:
    async with house() as at:
        async with at.streams.open("s", owner="Ada", key="k") as writing:
            await writing.write({"n": 0})
        read = await at.serve.token("s", can="read", expires_in=MINUTE)
        ada, forged = {"X-Name": "Ada"}, altered(read)
        for token, stream in ((read, "other"), (forged, "s"), (forged, "other")):
            assert (await at.http.head(f"/keys/k/{stream}", params={"token": token}, headers=ada)).status_code == 204
        for token in (read, forged):
            assert (await at.http.delete("/keys/k/s", params={"token": token}, headers=ada)).status_code == 404
        assert (await at.streams.info("s")).status == "open"
        assert (await at.http.head("/keys/k/s", params={"token": read})).status_code == 200
        assert (await at.http.head("/keys/k/other", headers=ada)).status_code == 200
        assert (await at.http.delete("/keys/k/other", headers=ada)).json() == {"stopped": True}


async def test_where_a_key_alone_is_named_tokens_mean_nothing_also_to_who_comes_back_with_a_cursor() -> None:
    async with house() as at:
        async with at.streams.open("s", owner="Ada", key="k") as writing:
            await writing.write({"n": 0})
            await writing.write({"n": 1})
        async with at.streams.subscribe("s", follow=False) as events:
            cursor = f"{cursor_prefix('s', events.life)}0"
        read = await at.serve.token("s", can="read", expires_in=MINUTE)
        for token in (read, altered(read)):
            for place in ({}, {"Last-Event-ID": cursor}):
                nobody = await at.http.head("/keys/k", params={"token": token}, headers=place)
                ada = await at.http.head("/keys/k", params={"token": token}, headers={"X-Name": "Ada", **place})
                assert (nobody.status_code, ada.status_code) == (401, 200)
        at.clock.advance(60)
        back = {"X-Name": "Ada", "Last-Event-ID": cursor}
        assert (await at.http.head("/keys/k", params={"token": read}, headers=back)).status_code == 200


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"can": "delete"}, InvalidArgumentError),
        ({"expires_in": timedelta(0)}, InvalidArgumentError),
        ({"expires_in": -MINUTE}, InvalidArgumentError),
        ({"expires_in": MAX_EXPIRES_IN + timedelta(microseconds=1)}, InvalidArgumentError),
        ({"expires_in": timedelta.max}, InvalidArgumentError),
        ({"owner": "Bob"}, StreamNotFoundError),
        ({"owner": ""}, StreamNotFoundError),
        ({"owner": True}, TypeError),
        ({"holder": ""}, InvalidArgumentError),
        ({"holder": b"Ada"}, TypeError),
        ({"stream": "unknown"}, StreamNotFoundError),
        ({"stream": "../s"}, InvalidArgumentError),
    ],
)
async def test_a_token_that_should_not_be_is_not_given(options: dict[str, Any], error: type[Exception]) -> None:
    async with house() as at:
        sound: dict[str, Any] = {"stream": await at.stored(), "can": "read", "expires_in": MINUTE, "owner": "Ada"}
        with pytest.raises(error):
            await at.serve.token(**sound | options)
        longest: dict[str, Any] = {**sound, "expires_in": MAX_EXPIRES_IN, "holder": "\ud800"}
        assert await at.serve.token(**longest)


async def test_without_keys_there_are_no_tokens_and_without_authorize_no_holders() -> None:
    async with house(token_keys=[]) as at:
        with pytest.raises(RuntimeError, match="token_keys"):
            await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
    async with house(authorize=None) as at:
        with pytest.raises(InvalidArgumentError, match="holder"):
            await at.serve.token(await at.stored(), can="read", expires_in=MINUTE, holder="Ada")
        token = await at.serve.token("s", can="read", expires_in=MINUTE)
        assert (await at.http.get("/streams/s/info", params={"token": token})).status_code == 200
        assert (await at.http.get("/streams/s/info")).status_code == 404  # it is Ada's


@pytest.mark.parametrize("path", ["/streams/s", "/streams/s?follow=false", "/streams/s/info", "/chat/s"])
async def test_what_a_url_with_a_token_answers_is_kept_nowhere_and_tells_nobody_of_it(path: str) -> None:
    async with house() as at:
        async with at.streams.open("s", owner="Ada") as writing:
            await writing.done(1)
        token = await at.serve.token("s", can="read", expires_in=MINUTE)
        for method in ("GET", "HEAD"):
            for text in (token, "skt1.forged"):
                answer = await at.http.request(method, path, params={**httpx.URL(path).params, "token": text})
                assert answer.headers.get_list("referrer-policy") == ["no-referrer"]
                (kept,) = answer.headers.get_list("cache-control")
                assert "no-store" in kept
            by_header = await at.http.request(method, path, headers={"Authorization": f"Bearer {token}"})
            assert "referrer-policy" not in by_header.headers


@pytest.mark.parametrize("app_of", [None, durable_app, wrapped_app], ids=["endpoints", "durable_flow", "DurableStreaming"])
async def test_so_is_what_a_resume_and_a_stop_are_answered_with_and_every_refusal(app_of: Any) -> None:
    async def talk(_: None) -> int:
        return 1

    async with house() as at:
        path = "/chat" if app_of is None else "/talk"
        async with at.streams.open("s", owner="Ada", metadata={"route": path}) as writing:
            await writing.write(0)
        async with at.streams.open("u", owner="Ada", metadata={"route": path}) as writing:
            await writing.done(0)
        app = app_of and app_of(talk, streams=StreamsHTTP(at.streams, authorize=authorize, token_keys=[KEY]))
        async with http_to(app) if app else nullcontext(at.http) as http:
            stop = await at.serve.token("s", can="stop", expires_in=MINUTE)
            read = await at.serve.token("u", can="read", expires_in=MINUTE)
            cursor = f"u/{(await at.streams.info('u')).life[:8]}/0"
            asked = [
                ("DELETE", path if app else "/chat/s", {STREAM_ID: "s"}, stop, 200),
                ("DELETE", path if app else "/chat/s", {STREAM_ID: "s"}, "skt1.forged", 404),
                ("POST", path, {STREAM_ID: "u"}, read, 200),
                ("POST", path, {STREAM_ID: "u"}, stop, 204),
                *([("POST", path, {"Last-Event-ID": cursor}, "skt1.forged", 200)] if app_of is not durable_app else []),
                *([("GET", "/chat/u", {"Last-Event-ID": cursor}, read, 204)] if app is None else []),
            ]
            for method, url, headers, token, code in asked:
                answer = await http.request(method, url, params={"token": token}, headers=headers)
                assert answer.status_code == code
                assert answer.headers.get_list("referrer-policy") == ["no-referrer"]
                assert "no-store" in answer.headers["cache-control"]
            at.clock.advance(60)
            expired = await http.request("POST", path, params={"token": read}, headers={STREAM_ID: "u"})
            assert (expired.status_code, expired.headers["referrer-policy"]) == (401, "no-referrer")


async def test_neither_the_log_nor_the_storage_has_a_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the client's own log has its URLs
    async with house() as at:
        token = await at.serve.token(await at.stored(), can="read", expires_in=MINUTE)
        caplog.clear()
        params = {"token": token, "x": "y"}
        headers = {"X-Name": "Ada", "Authorization": f"Bearer {token}", "Idempotency-Key": "1"}
        started = await at.http.post("/chat", params=params, headers=headers)
        info = await at.streams.info(started.headers[STREAM_ID])
        assert token not in str(info)
        await at.codes(token)
        at.clock.advance(60)
        await at.codes(token)
        await at.codes(token[:-1])
        pages = [await at.streams.storage.read(stream) for stream, _ in await at.streams.storage.scan()]
        assert token.rpartition(".")[2] not in str(pages)
    ours = [record.getMessage() + str(vars(record)) for record in caplog.records if record.name.startswith("streamkeep")]
    assert ours
    assert not any("skt1" in line for line in ours)


@pytest.mark.parametrize("app_of", [durable_app, wrapped_app], ids=["durable_flow", "DurableStreaming"])
async def test_a_token_resumes_or_stops_a_genkit_flow_and_starts_none(app_of: Any) -> None:
    ran: list[str] = []

    async def talk(_: None, ctx: ActionRunContext) -> int:
        ran.append("talk")
        ctx.send_chunk("begun")
        return 1

    serve = StreamsHTTP(InMemoryStreamManager(), authorize=authorize, token_keys=[KEY])
    async with http_to(app_of(talk, streams=serve)) as http:
        stream = (await http.post("/talk", json={}, headers={**STREAMING, "X-Name": "Ada"})).headers[STREAM_ID]
        read = await serve.token(stream, can="read", expires_in=MINUTE)
        stop = await serve.token(stream, can="stop", expires_in=MINUTE)
        for named in ({"params": {"token": read}}, {"headers": {"Authorization": f"Bearer {read}"}}):
            headers = {**STREAMING, STREAM_ID: stream, **named.get("headers", {})}
            resumed = await http.post("/talk", headers=headers, params=named.get("params"))
            assert (resumed.status_code, "begun" in resumed.text) == (200, True)
            assert (await http.delete("/talk", headers=headers, params=named.get("params"))).status_code == 404
        assert (await http.post("/talk", headers={STREAM_ID: stream}, params={"token": stop})).status_code == 204
        assert (await http.delete("/talk", headers={STREAM_ID: stream}, params={"token": stop})).json() == {"stopped": False}
        count = len(ran)
        assert (await http.post("/talk", json={}, headers=STREAMING, params={"token": read})).status_code == 401
        assert app_of is wrapped_app or len(ran) == count


@pytest.mark.promise("P21")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/streams/s?follow=false"),
        ("DELETE", "/streams/s"),
        ("POST", "/streams/s/cancel"),
        ("GET", "/chat/s"),
        ("DELETE", "/chat/s"),
    ],
)
@pytest.mark.parametrize("is_held", [False, True], ids=["owner", "holder"])
async def test_who_was_let_in_to_a_stream_is_shown_and_stops_no_later_one_under_its_id(
    method: str, path: str, *, is_held: bool
) -> None:
    houses: list[House] = []

    async def slow(access: Access) -> str:
        """Answer when the stream that is asked about has been replaced by somebody else's."""
        (at,) = houses
        if access.stream is not None and access.stream.owner == "Ada":
            await at.streams.delete("s")
            await at.stored(owner="Bob")
        return "Ada"

    async with house(authorize=slow) as at:
        houses.append(at)
        can: TokenUse = "read" if method == "GET" else "stop"
        token = await at.serve.token(await at.stored(), can=can, expires_in=MINUTE, holder="Ada")
        headers = {"Authorization": f"Bearer {token}"} if is_held else {}
        with anyio.fail_after(10):
            answer = await at.http.request(method, path, headers=headers)
        assert answer.status_code in {204, 400, 404}
        info = await at.streams.info("s")
        assert (info.owner, info.status) == ("Bob", "open")


@pytest.mark.promise("P21")
@pytest.mark.parametrize("status", ["open", "done"])
@pytest.mark.parametrize("query", ["", "?stream=true"])
async def test_who_was_let_in_to_a_response_is_shown_no_later_one_under_its_id(query: str, status: str) -> None:
    async def replacing(access: Access) -> str:
        if access.stream is not None and access.stream.owner == "Ada":
            await serve.streams.delete("resp_1")
            await respond("Bob")
        return "Ada"

    async def respond(owner: str) -> None:
        async with serve.streams.open("resp_1", owner=owner, metadata={"route": "/v1/responses"}) as writing:
            await writing.write({"type": "response.created", "response": {"id": "resp_1", "output": [], "user": owner}})
            if status == "done":
                await writing.done({"id": "resp_1", "status": "completed", "output": [], "user": owner})

    serve = StreamsHTTP(InMemoryStreamManager(), authorize=replacing)
    app = FastAPI(lifespan=serve.lifespan)
    app.mount("/v1", OpenAIResponses(serve, lambda _: iter(())))
    async with http_to(app) as http:
        await respond("Ada")
        with anyio.fail_after(10):
            answer = await http.get(f"/v1/responses/resp_1{query}")
        assert (answer.status_code, "Bob" in answer.text) in {(404, False), (400, False)}


async def test_of_openais_api_a_token_reads_responses_and_stops_and_deletes_none() -> None:
    async def words(_: ResponseRequest) -> AsyncGenerator[str]:
        yield "one"
        await anyio.sleep_forever()

    serve = StreamsHTTP(InMemoryStreamManager(), authorize=authorize, token_keys=[KEY])
    app = FastAPI(lifespan=serve.lifespan)
    app.mount("/v1", OpenAIResponses(serve, words))
    async with http_to(app) as http:
        wanted = {"model": "m", "input": "hello", "background": True}
        id = (await http.post("/v1/responses", json=wanted, headers={"X-Name": "Ada"})).json()["id"]
        stop = await serve.token(id, can="stop", expires_in=MINUTE)
        read = await serve.token(id, can="read", expires_in=MINUTE)
        codes = [
            (await http.request(method, f"/v1/responses/{id}{below}", params={"token": token})).status_code
            for method, below, token in [
                ("GET", "", read),
                ("GET", "", stop),
                ("DELETE", "", read),
                ("DELETE", "", stop),
                ("POST", "/cancel", read),
                ("POST", "/cancel", stop),
            ]
        ]
        shown = await http.get(f"/v1/responses/{id}", params={"token": read})
    assert codes == [200, 404, 401, 401, 401, 401]  # a stop is answered with the response, which is to be read
    assert shown.json()["status"] == "in_progress"
    assert shown.headers["referrer-policy"] == "no-referrer"


async def test_a_client_goes_on_with_a_new_token_where_the_old_one_has_expired() -> None:
    async with house() as at, at.streams.open("s", owner="Ada") as writing:
        await writing.write(0)
        token = await at.serve.token("s", can="read", expires_in=MINUTE)
        url = f"{at.http.base_url}/streams/s?token={token}&follow=false"
        events = subscribe(url)
        async with events:
            assert [event.offset async for event in events] == [0]
        cursor = events.cursor
        at.clock.advance(60)
        with pytest.raises(RefusedError) as refused:
            async with subscribe(url):
                pass
        assert (refused.value.status, refused.value.http_status) == ("UNAUTHENTICATED", 401)
        assert "skt1" not in str(refused.value)
        await writing.write(1)
        token = await at.serve.token("s", can="read", expires_in=MINUTE)
        async with subscribe(f"{at.http.base_url}/streams/s?token={token}", after=cursor, follow=False) as events:
            assert [event.offset async for event in events] == [1]
        stopping = await at.serve.token("s", can="stop", expires_in=MINUTE)
        assert await stop(f"{at.http.base_url}/streams/s?token={stopping}")


async def test_genkits_own_client_resumes_a_flow_by_a_token(genkit_client: GenkitClient) -> None:
    serve = StreamsHTTP(InMemoryStreamManager(), authorize=authorize, token_keys=[KEY])
    async with serving(durable_app(count, streams=serve)) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            started = await http.post("/count", json={"data": 2}, headers={**STREAMING, "X-Name": "Ada"})
        stream = started.headers[STREAM_ID]
        token = await serve.token(stream, can="read", expires_in=MINUTE)
        of_stop = await serve.token(stream, can="stop", expires_in=MINUTE)
        by_query = await genkit_client(url=f"{url}/count?token={token}", streamId=stream)
        by_header = await genkit_client(url=f"{url}/count", streamId=stream, headers={"Authorization": f"Bearer {token}"})
        refused = await genkit_client(url=f"{url}/count?token={of_stop}", streamId=stream)
    assert by_query == by_header == [{"streamId": stream}, {"chunk": 0}, {"chunk": 1}, {"output": {"counted": 2}}]
    assert [*refused[-1]] == ["error"]
