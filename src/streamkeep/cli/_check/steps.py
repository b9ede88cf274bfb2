"""The steps of a check: what is asked, in which order, and what is cleaned up. What it means is for the rules."""

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final
from urllib.parse import urlencode

import anyio
import msgspec

from .._output import CommandError
from .exchange import BROWSERS_ENCODINGS, CLEANING_UP, Asking, Exchange, Reading, Request
from .rules import is_held, is_shown, is_start
from .seen import PROBE, PROBED_HEADERS, PROBED_QUERY, Greeting, Hello, Options, Preflight, Resumed, Seen, idle_seconds

GREETINGS: Final = 8
KNOWN: Final = 16
AT_ONCE: Final = 4
TRIES: Final = 3
"""How often an answer is asked for that comes late: once may be a busy machine."""
SPARE_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
"""How long it may take until the reader of a stopped stream is told."""
CLEAN_UP_SECONDS: Final = 10.0
SOME_BYTES: Final = 48
COARSE_BYTES: Final = 4096
SLOW_BYTES: Final = 40_000
SHARED_BYTES: Final = 3_000_000
"""About how much all readers of one answer may read together: a slow network is to carry it in time."""
LARGE_BODY_BYTES: Final = 2 << 20
BODY_SECONDS: Final = 60.0
"""Longer than most apps wait, which then say so themselves."""
_SSE: Final = ("accept", "text/event-stream")
PAGES_HEADERS: Final = ("authorization", "content-type", "idempotency-key", "last-event-id", "x-genkit-stream-id")

_hello: Final = msgspec.json.Decoder(Hello)


async def observe(asking: Asking, options: Options, say: Callable[[str], None]) -> Seen:
    """Take all steps. CommandError: there is no `CheckHTTP` at the URL, or it does not let us in.

    It ends, whatever the server does: each exchange has a bound. What was started is stopped in the end.
    """
    try:
        return await _observe(asking, options, say)
    finally:
        with anyio.move_on_after(CLEAN_UP_SECONDS, shield=True):
            await _clean_up(asking)


async def _observe(asking: Asking, options: Options, say: Callable[[str], None]) -> Seen:
    say("saying hello")
    first = _greeting(await _hello_to(asking), asking.target.url)
    seen = Seen(options, first, idle_seconds(options, first.hello.heartbeat), [first], exchanges=asking.exchanges)
    await _look_around(asking, seen)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_stay_silent, asking, seen)
        say("reading an answer at its pace")
        await _read_at_a_pace(asking, seen)
        say("cutting, reloading, resuming and stopping")
        async with anyio.create_task_group() as together:
            for step in (_cut, _reload, _start_twice, _read_together, _stop, _ask_around):
                together.start_soon(step, asking, seen)
        if seen.idle is None:
            say(f"waiting for the silent answer ({seen.idle_seconds:g} s)")
    return seen


# Each step


async def _hello_to(asking: Asking) -> tuple[Exchange, float]:
    sent = time.time()
    exchange = await asking.ask(Request("GET", "/hello", about="hello"))
    return exchange, sent


def _greeting(said: tuple[Exchange, float], url: str) -> Greeting:
    """Give a hello. CommandError: it is none."""
    exchange, sent = said
    greeting = _greeting_of(exchange, sent)
    if greeting is not None:
        return greeting
    code = exchange.status
    if code == 0:
        raise CommandError(f"{url} cannot be reached: {exchange.why or 'it does not answer'}")
    if code in {401, 403}:
        raise CommandError(f"{url} does not let us in ({code}): the `trust` of its CheckHTTP is to be in STREAMKEEP_TOKEN", 2)
    if code >= 500 or code == 429:
        raise CommandError(f"{url} cannot be reached: {code}, as whoever is before the app says where it does not answer")
    if 300 <= code < 400:
        raise CommandError(f"{url} is somewhere else: it answers {code}, {exchange.header('location')!r}", 2)
    sentence = f"there is no CheckHTTP at {url}: /hello below it is answered {code}"
    raise CommandError(f"{sentence}; mount one in the app, see docs/how-to/check.md", 2)


def _greeting_of(exchange: Exchange, sent: float) -> Greeting | None:
    try:
        hello = _hello.decode(bytes(exchange.body))
    except (msgspec.MsgspecError, ValueError):
        return None
    return Greeting(exchange, hello, hello.time - (sent + exchange.ended / 2)) if exchange.status == 200 else None


async def _look_around(asking: Asking, seen: Seen) -> None:
    async def greet() -> None:
        exchange, sent = await _hello_to(asking)
        if greeting := _greeting_of(exchange, sent):
            seen.greetings.append(greeting)
        elif exchange.status == 200 and exchange.end == "whole":
            exchange.why = "this is no hello of a CheckHTTP"

    async def probe() -> None:
        sent = time.time()
        request = Request("GET", f"/hello?{urlencode(PROBED_QUERY)}", PROBED_HEADERS, about="which headers arrive")
        seen.probe = _greeting_of(await asking.ask(request), sent)

    async def miss() -> None:
        seen.missing = await asking.ask(
            Request("GET", "/streams/streamkeep.check-none/info", about="a stream that is not there")
        )

    async def be_cut() -> None:
        seen.broken = await asking.ask(Request("GET", "/broken", [_SSE], about="an answer that the app breaks off"))

    async def send_much() -> None:
        size = min(seen.first.hello.max_body_bytes, LARGE_BODY_BYTES)
        seen.body = await asking.ask(Request("POST", "/body", body=b"x" * size, about="a large body"), _within(BODY_SECONDS))

    await _at_once([*[greet] * (GREETINGS - 1), probe, miss, be_cut, send_much])
    if seen.options.origin:
        await _ask_as_a_page(asking, seen)


async def _ask_as_a_page(asking: Asking, seen: Seen) -> None:
    origin = ("origin", seen.options.origin)
    stream = "/streams/streamkeep.check-none"
    for method, path in (("POST", "/streams"), ("GET", stream), ("DELETE", stream)):
        names = PAGES_HEADERS if method != "DELETE" else PAGES_HEADERS[:1]
        seen.preflights.append(await _preflight(asking, origin, method, path, names))
    start = _starting("/streams?chunks=2&pause=0.05", "a start from another origin", [origin])
    seen.cors_start = await asking.ask(start, _within(SPARE_SECONDS))
    seen.cors_missing = await asking.ask(Request("GET", f"{stream}/info", [origin], about="a 404 for another origin"))


async def _preflight(asking: Asking, origin: tuple[str, str], method: str, path: str, names: Sequence[str]) -> Preflight:
    """Ask whether a page may send a request. What refuses it as a whole, as Starlette does, is asked what it is that it refuses."""

    async def ask(*names: str) -> Exchange:
        named = [("access-control-request-headers", ",".join(names))] if names else []
        headers = [origin, ("access-control-request-method", method), *named]
        return await asking.ask(Request("OPTIONS", path, headers, about=f"preflight of a {method}", is_anonymous=True))

    exchange = await ask(*names)
    if exchange.is_success or not exchange.status:
        return Preflight(method, names, exchange)
    bare = await ask()
    return Preflight(method, names, exchange, bare, [await ask(name) for name in names] if bare.is_success else ())


async def _read_at_a_pace(asking: Asking, seen: Seen) -> None:
    for number in range(TRIES):
        coding = [("accept-encoding", BROWSERS_ENCODINGS)] if number == 0 else []
        about = "an answer, as a browser asks for it" if number == 0 else "the same without compression"
        exchange = await _start(asking, seen.options, about, coding)
        seen.paces.append(exchange)
        if not is_held(exchange, seen.options) and not exchange.header("content-encoding"):
            return
    if all(is_held(exchange, seen.options) for exchange in seen.paces[1:]):
        seen.coarse = await _start(asking, seen.options, "the same with larger chunks", size=COARSE_BYTES)


async def _cut(asking: Asking, seen: Seen) -> None:
    async def go_on(how: str) -> None:
        first = await _start_and_leave(asking, seen.options)
        stream, last = first.stream, first.last_id
        if not stream or not last:
            seen.resumed.append(Resumed(how, first, first))
            return
        match how:
            case "Last-Event-ID":
                request = Request(
                    "GET", f"/streams/{stream}", [_SSE, ("last-event-id", last)], about="going on by Last-Event-ID"
                )
            case "?lastEventId=":
                request = Request("GET", f"/streams/{stream}?lastEventId={last}", [_SSE], about="going on by ?lastEventId=")
            case _:
                request = Request("POST", "/streams", [_SSE, ("last-event-id", last)], about="sending the POST again")
        seen.resumed.append(Resumed(how, first, await asking.ask(request, _within(seen.options.seconds + SPARE_SECONDS))))

    async with anyio.create_task_group() as tasks:
        for how in ("Last-Event-ID", "?lastEventId=", "POST"):
            tasks.start_soon(go_on, how)


async def _reload(asking: Asking, seen: Seen) -> None:
    first = await _start_and_leave(asking, seen.options)
    if not first.stream:
        seen.resumed.append(Resumed("reload", first, first))
        return
    request = Request("GET", f"/streams/{first.stream}", [_SSE], about="reading it from its beginning")
    rest = await asking.ask(request, _within(seen.options.seconds + SPARE_SECONDS))
    seen.resumed.append(Resumed("reload", first, rest))
    if rest.terminal is not None:
        for _ in range(2):  # a cache would have it by now
            await asking.ask(request, _within(SPARE_SECONDS))


async def _start_twice(asking: Asking, seen: Seen) -> None:
    key = ("idempotency-key", f"{PROBE}-{time.time_ns()}")
    for about in ("a start with an Idempotency-Key", "the same start, sent again"):
        request = _starting(_path(seen.options), about, [key])
        seen.twice.append(await asking.ask(request, Reading(SPARE_SECONDS, until=lambda exchange: bool(exchange.last_id))))


async def _read_together(asking: Asking, seen: Seen) -> None:
    options, streams = seen.options, _Told()

    async def start() -> None:
        size = min(SLOW_BYTES, max(COARSE_BYTES, SHARED_BYTES // (options.chunks * (options.readers + 2))))
        request = _starting(_path(options, size=size), "an answer that several read")
        try:
            seen.started = await asking.ask(request, _within(options.seconds + SPARE_SECONDS, streams.told))
        finally:
            streams.tell("")

    async def read(*, stops_for: float = 0.0) -> None:
        about = "one of several readers" if not stops_for else "a slow reader"
        request = Request("GET", f"/streams/{stream}", [_SSE], about=about)
        reading = Reading(options.seconds + stops_for + SPARE_SECONDS, stops_for=stops_for)
        seen.readers.append(await asking.ask(request, reading))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
        stream = await streams.wait()
        if not stream:
            return
        for _ in range(options.readers):
            tasks.start_soon(read)
        await read(stops_for=options.seconds / 2)


async def _stop(asking: Asking, seen: Seen) -> None:
    options, streams = seen.options, _Told()
    is_over = False

    def until(exchange: Exchange) -> bool:
        streams.told(exchange)
        return is_over

    async def read() -> None:
        long = Options(options.seconds + STOP_SECONDS + SPARE_SECONDS)
        request = _starting(_path(long, size=COARSE_BYTES), "an answer that is stopped")
        try:
            seen.stopped = await asking.ask(request, Reading(long.seconds + SPARE_SECONDS, until))
        finally:
            streams.tell("")
            ended.set()

    ended = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        stream = await streams.wait()
        if not stream:
            return
        began = time.monotonic()
        for request in (
            Request("DELETE", f"/streams/{stream}", about="stopping it"),
            Request("POST", f"/streams/{stream}/cancel", about="stopping it by POST"),
        ):
            seen.stops.append(await asking.ask(request))
            if seen.stops[-1].status == 200:
                break
        if seen.stops[-1].status == 200:
            with anyio.move_on_after(STOP_SECONDS) as waiting:
                await ended.wait()
            seen.stopped_after = None if waiting.cancelled_caught else time.monotonic() - began
        is_over = True
        with anyio.move_on_after(STOP_SECONDS):
            await ended.wait()
        tasks.cancel_scope.cancel()


async def _ask_around(asking: Asking, seen: Seen) -> None:
    """Ask whoever answers whether they know a stream that runs."""
    first = await _start_and_leave(asking, seen.options, after=1)
    stream = first.stream
    if not stream:
        return

    async def ask() -> None:
        seen.known.append(await asking.ask(Request("GET", f"/streams/{stream}/info", about="is it known?")))

    await _at_once([ask] * KNOWN)


async def _stay_silent(asking: Asking, seen: Seen) -> None:
    quiet = seen.idle_seconds
    request = _starting(f"/streams?chunks=4&pause=0.2&quiet={quiet:.3f}", "an answer that is silent for long")
    idle = await asking.ask(request, _within(quiet + SPARE_SECONDS))
    if idle.terminal is None and idle.stream and idle.last_id:
        request = Request("GET", f"/streams/{idle.stream}", [_SSE, ("last-event-id", idle.last_id)], about="going on with it")
        seen.idle_rest = await asking.ask(request, _within(quiet + SPARE_SECONDS))
    seen.idle = idle


async def _clean_up(asking: Asking) -> None:
    """Stop what may still run. It is gone a minute after its end."""

    async def find(request: Request) -> None:
        again = replace(request, about=CLEANING_UP)  # its key leads to what it has started
        await asking.ask(again, Reading(CLEAN_UP_SECONDS / 2, until=lambda _: True))

    unknown = [
        exchange.request for exchange in asking.exchanges if is_start(exchange) and exchange.status == 0 and not exchange.why
    ]
    await _at_once([partial(find, request) for request in unknown])
    ended = {exchange.stream for exchange in asking.exchanges if exchange.terminal is not None}
    running = {exchange.stream for exchange in asking.exchanges if is_shown(exchange)} - ended - {""}

    async def stop(stream: str) -> None:
        for _ in range(2 * TRIES):  # another instance may know more
            exchange = await asking.ask(Request("DELETE", f"/streams/{stream}", about=CLEANING_UP))
            if exchange.status == 200:
                return

    await _at_once([partial(stop, stream) for stream in sorted(running)])


# What steps are made of


def _starting(path: str, about: str, headers: Sequence[tuple[str, str]] = ()) -> Request:
    """Give a request that starts a stream. It has a key, by which the stream is found if it is not known what came of it."""
    names = {name for name, _ in headers}
    key = [] if "idempotency-key" in names else [("idempotency-key", f"{PROBE}-{uuid.uuid4()}")]
    return Request("POST", path, [_SSE, *key, *headers], about=about)


class _Told:
    """The id of a stream, as soon as its reader has it."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._stream = ""

    def told(self, exchange: Exchange) -> bool:
        if exchange.stream:
            self.tell(exchange.stream)
        return False

    def tell(self, stream: str) -> None:
        if not self._event.is_set():
            self._stream = stream
            self._event.set()

    async def wait(self) -> str:
        await self._event.wait()
        return self._stream


async def _start(
    asking: Asking, options: Options, about: str, headers: Sequence[tuple[str, str]] = (), *, size: int = SOME_BYTES
) -> Exchange:
    request = _starting(_path(options, size=size), about, headers)
    return await asking.ask(request, _within(options.seconds + SPARE_SECONDS))


async def _start_and_leave(asking: Asking, options: Options, after: int | None = None) -> Exchange:
    count = options.chunks // 3 if after is None else after
    request = _starting(_path(options), "an answer that we leave")
    reading = Reading(options.seconds + SPARE_SECONDS, until=lambda exchange: len(exchange.chunks) >= count)
    return await asking.ask(request, reading)


def _path(options: Options, *, size: int = SOME_BYTES) -> str:
    return f"/streams?chunks={options.chunks}&pause={options.pause:.3f}&bytes={size}"


def _within(seconds: float, until: Callable[[Exchange], bool] | None = None) -> Reading:
    return Reading(seconds, until)


async def _at_once(steps: Sequence[Callable[[], Awaitable[None]]]) -> None:
    limit = anyio.Semaphore(AT_ONCE)

    async def take(step: Callable[[], Awaitable[None]]) -> None:
        async with limit:
            await step()

    async with anyio.create_task_group() as tasks:
        for step in steps:
            tasks.start_soon(take, step)
