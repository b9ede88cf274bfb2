"""What a check has seen: the answers of each of its steps, for the rules to judge."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from .exchange import Exchange

MAX_PAUSE_SECONDS: Final = 0.5
MIN_PAUSE_SECONDS: Final = 0.05
CHUNKS: Final = 25
IDLE_SPARE_SECONDS: Final = 5.0
PROBE: Final = "streamkeep-check"
PROBED_HEADERS: Final = (
    ("last-event-id", PROBE),
    ("x-genkit-stream-id", PROBE),
    ("x-genkit-stream-offset", "7"),
    ("idempotency-key", PROBE),
)
PROBED_QUERY: Final = (("lastEventId", PROBE), ("after", "7"))
"""What is sent to see whether it arrives as it is."""
MAX_USUAL_IDLE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """What a check is told.

    Attributes:
        seconds: how long each answer lasts.
        idle: how long the silent one is silent; None: as long as it takes for a heartbeat.
        origin: the origin of pages on another one; empty: there are none.
        readers: how many read one answer at once.
    """

    seconds: float = 5.0
    idle: float | None = None
    origin: str = ""
    readers: int = 5

    @property
    def pause(self) -> float:
        """Seconds between chunks."""
        return min(max(self.seconds / CHUNKS, MIN_PAUSE_SECONDS), MAX_PAUSE_SECONDS)

    @property
    def chunks(self) -> int:
        """How many chunks an answer has."""
        return max(8, round(self.seconds / self.pause))


class Hello(msgspec.Struct, frozen=True, rename="camel"):
    """What the app says of itself, and of the request as it has arrived there."""

    instance: str
    time: float
    path: str
    scheme: str
    http_version: str
    headers: dict[str, str]
    query: dict[str, str]
    heartbeat: float
    longest: float
    max_body_bytes: int


@dataclass(frozen=True, slots=True)
class Greeting:
    """A hello, and how far the app's clock was ahead of ours then, in seconds."""

    exchange: Exchange
    hello: Hello
    clock_ahead: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """An answer that we left, or that was cut; and how it went on, over another connection.

    Attributes:
        how: `Last-Event-ID`, `?lastEventId=`, `POST`, or `reload`, which begins again.
        first: what came before.
        rest: what came then.
    """

    how: str
    first: Exchange
    rest: Exchange


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a browser asks before it lets a page send a request to another origin.

    Attributes:
        method: of the request that is to be sent.
        names: its headers.
        exchange: what was answered.
        bare: where that is a refusal: what was answered without these headers.
        alone: and with each of them alone, where it is not refused without them.
    """

    method: str
    names: Sequence[str]
    exchange: Exchange
    bare: Exchange | None = None
    alone: Sequence[Exchange] = ()


@dataclass(slots=True)
class Seen:
    """All of it. What a step has not come to is None, or empty.

    Attributes:
        options: what was asked for.
        first: the first hello.
        greetings: all of them.
        probe: the one that had the headers by which readers go on.
        missing: what was answered for a stream that does not exist.
        broken: an answer that the app has broken off.
        body: what was answered to a large body; and how large it was.
        preflights: of the origin.
        cors_start: a start from the origin.
        cors_missing: what the origin is told of a stream that does not exist.
        paces: answers at a steady pace, as browsers ask for them, then plainly.
        coarse: one of large chunks, where small ones were held back.
        resumed: answers that were gone on with.
        twice: the answers to a start that was sent twice.
        started: what the readers read, as who started it was answered.
        readers: their answers, that of the slow one last.
        stopped: the answer of who read what was stopped; `stops` has what the stops were answered; `stopped_at` when that was.
        idle: the silent answer; `idle_rest` how it went on where it was cut.
        known: what was answered, over new connections, to the question whether a stream is known.
    """

    options: Options
    first: Greeting
    idle_seconds: float
    greetings: list[Greeting] = field(default_factory=list)
    probe: Greeting | None = None
    missing: Exchange | None = None
    broken: Exchange | None = None
    body: Exchange | None = None
    preflights: list[Preflight] = field(default_factory=list)
    cors_start: Exchange | None = None
    cors_missing: Exchange | None = None
    paces: list[Exchange] = field(default_factory=list)
    coarse: Exchange | None = None
    resumed: list[Resumed] = field(default_factory=list)
    twice: list[Exchange] = field(default_factory=list)
    started: Exchange | None = None
    readers: list[Exchange] = field(default_factory=list)
    stopped: Exchange | None = None
    stops: list[Exchange] = field(default_factory=list)
    stopped_after: float | None = None
    idle: Exchange | None = None
    idle_rest: Exchange | None = None
    known: list[Exchange] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)


def idle_seconds(options: Options, heartbeat: float) -> float:
    """Give how long the silent answer is silent."""
    if options.idle is not None:
        return options.idle
    return min(heartbeat + IDLE_SPARE_SECONDS, MAX_USUAL_IDLE_SECONDS)
