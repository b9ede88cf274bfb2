"""The rules of the Durable Streams protocol: what a stream becomes by a request, and what the request is answered.

Everything that decides lives in this file, as functions from values to values. It reads no clock, no storage and no event loop: the caller
reads a head, asks here what follows, and commits head and records on the condition that the head has not changed meanwhile. All that the
protocol keeps of a stream (its configuration, its producers, `Stream-Seq`, its closure, its expiry, where it was forked) is in the head's
opaque state, so whatever is appended and what is known of who appended it are stored together, or neither is.

Section numbers are those of the protocol's text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
from msgspec.structs import replace

from .._lifecycle import committed_at, version_after
from ..errors import StorageCorruptError
from ..storage import Head
from ._messages import is_json, messages_in, same_type, split_bytes, split_messages
from ._retention import FORGET_RECORDS, Kept, Mark, Retention, kept_after

NEVER: Final = 1e12
"""When a stream expires that does not; later than any time that a header can say."""
FORK_SLACK_SECONDS: Final = 300.0
"""How much longer than it lives a fork is kept: whoever sweeps it has to see that it is gone, and an engine may forget by itself."""
RENEW_PART: Final = 0.05
MAX_RENEW_SECONDS: Final = 60.0
"""A stream with a TTL lives that much of it longer, so that not each of its readers has to write."""
FORGET_PRODUCER_SECONDS: Final = 7 * 86_400.0
"""How long the state of a producer is certainly kept; after that, it makes room for others (5.2.1)."""

Headers = tuple[tuple[str, str], ...]


class Producer(msgspec.Struct, frozen=True, array_like=True):
    """What was last accepted of an idempotent producer, and when."""

    epoch: int
    seq: int
    at: float


class Closing(msgspec.Struct, frozen=True, array_like=True):
    """Which request of a producer has closed the stream."""

    producer: str
    epoch: int
    seq: int


class Origin(msgspec.Struct, frozen=True, array_like=True):
    """Where a stream was forked: of which one, and which life of it; behind how many records, and how far into the next one."""

    path: str
    life: str
    position: int
    sub: int
    is_tail: bool
    """No offset was asked for, which means the source's tail then."""


class State(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a head's opaque bytes say."""

    life: str
    """Tells this stream from others that live under its path before and after."""
    lineage: str
    """What its offsets end with: the life of the stream that it was forked from in the first place, for forks have the same offsets."""
    path: str
    content_type: str
    created_at: float
    by: str
    """Who has committed this. It makes heads unique."""
    ttl: int | None = None
    expires: str = ""
    """The absolute expiry, as it was asked for."""
    expires_at: float = NEVER
    is_closed: bool = False
    closed_by: Closing | None = None
    seq: str | None = None
    producers: Mapping[str, Producer] = {}
    size: int = 0
    """How many bytes have been appended to it, what is forgotten included."""
    appended_at: float = 0.0
    """When it was last appended to, by a server that has it forget; 0: not known."""
    marks: Sequence[Mark] = ()
    """Places from which on it may be kept, by `Retention`; the first of them may be one before which all is forgotten."""
    base: int = 0
    """How many records it has inherited; its own are behind them."""
    inherited_from: int = 0
    """How many of these its source had forgotten."""
    origin: Origin | None = None
    depth: int = 0
    """How many forks of forks it is."""
    is_deleted: bool = False
    """It is gone but for its forks (4.2)."""
    is_pinned: bool = False
    """It has had forks, for which it is kept although it may have expired."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream as it was, or will be, at one moment."""

    head: Head
    state: State

    @property
    def tail(self) -> int:
        """The position behind its last record, inherited ones included."""
        return self.state.base + self.head.tail

    @property
    def earliest(self) -> int:
        """The position of the oldest record that it still has."""
        return self.state.base + self.head.first if self.head.first else self.state.inherited_from


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered: an HTTP status, headers, and a sentence for whoever debugs."""

    code: int
    headers: Headers = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows of a request.

    Attributes:
        answer: its answer, which is true once the rest is stored.
        stream: what the stream becomes; None: it stays as it is.
        records: what is appended to it.
        deletes: whether it is removed.
    """

    answer: Answer
    stream: Stream | None = None
    records: Sequence[bytes] = ()
    deletes: bool = False


Decide = Callable[["Stream | None", float], Decision]
"""Says what follows of a request, from the stream that is there (None: there is none) and the storage's time."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one stream may hold.

    Attributes:
        max_bytes: all its own bytes together.
        max_records: its own appends.
        max_producers: idempotent producers whose state is kept.
        retention: what it forgets; None: nothing.
    """

    max_bytes: int
    max_records: int
    max_producers: int
    retention: Retention | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """What a PUT asks for. `content_type` is None if it does not say."""

    content_type: str | None
    ttl: int | None
    expires: str
    expires_at: float
    is_closed: bool


@dataclass(frozen=True, slots=True)
class ForkAsked:
    """What a PUT says of where it forks from; `offset` None: at the tail."""

    source: str
    offset: str | None
    sub: int


@dataclass(frozen=True, slots=True)
class Tag:
    """Producer-Id, Producer-Epoch and Producer-Seq of a request (5.2.1)."""

    producer: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Append:
    """What a POST asks for."""

    body: bytes
    content_type: str | None
    closes: bool = False
    seq: str | None = None
    tag: Tag | None = None
    _parsed: list[Sequence[bytes] | None] = field(default_factory=list, compare=False)

    def records(self, *, json: bool) -> Sequence[bytes] | None:
        """Give the body as records; None: it is not JSON. Empty: it holds nothing. Parsed once: a request may be decided upon again."""
        if not self._parsed:
            self._parsed.append(records_of(self.body, json=json))
        return self._parsed[0]


def records_of(body: bytes, *, json: bool) -> Sequence[bytes] | None:
    """Give a body as records: bytes in pieces, or the messages of JSON with commas between them (9.1); None: it is not JSON."""
    if not json:
        return split_bytes(body)
    messages = messages_in(body)
    return None if messages is None else split_messages(messages)


# Reading a head


def stream_of(head: Head) -> Stream:
    """Read a head. StorageCorruptError: it is none of these."""
    try:
        return Stream(head, _decoder.decode(head.state))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageCorruptError("the head is damaged, or was written by a newer version of streamkeep") from error


def is_expired(stream: Stream, now: float) -> bool:
    """Say whether the stream counts as absent because its time is over."""
    return stream.state.expires_at <= now


def ancestor(state: State) -> State:
    """Give what of a state never changes, and who reads a fork needs to know."""
    return State(
        life=state.life,
        lineage=state.lineage,
        path=state.path,
        content_type=state.content_type,
        created_at=state.created_at,
        by="",
        base=state.base,
        origin=state.origin,
    )


def before_its_end(state: State) -> State:
    """Give the state as who has not read all of the stream may know it."""
    return replace(state, is_closed=False)


def absence(stream: Stream | None, now: float) -> Answer | None:
    """Give the answer to whoever asks for a stream that is not there, or only for its forks; None if it is."""
    if stream is None:
        return Answer(404, reason="there is no such stream")
    if stream.state.is_deleted or (is_expired(stream, now) and stream.state.is_pinned):
        return Answer(410, reason="the stream was deleted")
    if is_expired(stream, now):
        return Answer(404, reason="there is no such stream")
    return None


# Offsets: section 8

ZERO: Final = "0" * 16
_DIGITS: Final = 16


def offset_of(state: State, position: int) -> str:
    """Give the offset of a position. It is as long as every other one, so that offsets have the order of positions."""
    return f"{position:0{_DIGITS}d}_{state.lineage}"


def position_of(state: State, offset: str) -> int | None:
    """Give the position of an offset; None if it is none of this stream's, such as one of an earlier stream under its path."""
    digits, _, lineage = offset.partition("_")
    if len(digits) != _DIGITS or not (digits.isascii() and digits.isdigit()):
        return None
    position = int(digits)
    return position if lineage == state.lineage or (position == 0 and lineage == ZERO) else None


# Creating: sections 5.1 and 4.2


def create(
    life: str, path: str, config: Config, records: Sequence[bytes], now: float, by: str, *, after_version: int
) -> Stream:
    """Make a stream that is not there. `after_version` is that of the one that was there before, 0 if there was none."""
    state = State(
        life=life,
        lineage=life,
        path=path,
        content_type=config.content_type or "application/octet-stream",
        created_at=now,
        by=by,
        ttl=config.ttl,
        expires=config.expires,
        is_closed=config.is_closed,
        size=sum(map(len, records)),
    )
    return _made(state, config, records, now, after_version)


def fork(
    life: str,
    path: str,
    config: Config,
    source: Stream,
    origin: Origin,
    base: int,
    records: Sequence[bytes],
    now: float,
    by: str,
    *,
    after_version: int,
) -> Stream:
    """Make a fork, with `base` records of its source. It begins without the source's producers and `Stream-Seq`, and open, unless it is to
    be closed.
    """
    old = source.state
    asks = config.ttl is not None or bool(config.expires)
    expiry = config if asks else Config(None, old.ttl, old.expires, old.expires_at, is_closed=False)
    state = State(
        life=life,
        lineage=old.lineage,
        path=path,
        content_type=old.content_type,
        created_at=now,
        by=by,
        ttl=expiry.ttl,
        expires=expiry.expires,
        is_closed=config.is_closed,
        size=sum(map(len, records)),
        base=base,
        inherited_from=min(source.earliest, base),
        origin=origin,
        depth=old.depth + 1,
    )
    return _made(state, expiry, records, now, after_version)


def _made(state: State, expiry: Config, records: Sequence[bytes], now: float, after_version: int) -> Stream:
    at = expiry.expires_at if state.ttl is None else _expiry_after(state.ttl, now)
    return _stream(Head(after_version, len(records), b"", 0), replace(state, expires_at=at), now)


def matches(state: State, config: Config, source: Stream | None, origin: Origin | None) -> bool:
    """Say whether a stream is what a PUT asks for, which then has nothing to do. `origin` is where it would be forked now."""
    if config.is_closed != state.is_closed or not _is_origin(state.origin, origin):
        return False
    if source is None:
        type_matches = same_type(config.content_type or "application/octet-stream", state.content_type)
        return type_matches and config.ttl == state.ttl and _same_time(config, state)
    return _fork_matches(state, config)


def is_fork_as_asked(state: State, config: Config, source: str, offset: str | None, sub: int) -> bool:
    """Say whether a stream is the fork that a PUT asks for, whose source cannot be forked any more."""
    there = state.origin
    if there is None or (there.path, there.sub) != (source, sub) or config.is_closed != state.is_closed:
        return False
    is_at = there.is_tail if offset is None else there.position == (0 if offset == "-1" else position_of(state, offset))
    return is_at and _fork_matches(state, config)


def _fork_matches(state: State, config: Config) -> bool:
    inherits = config.ttl is None and not config.expires
    type_matches = config.content_type is None or same_type(config.content_type, state.content_type)
    return type_matches and (inherits or (config.ttl == state.ttl and _same_time(config, state)))


def _same_time(config: Config, state: State) -> bool:
    return config.expires == state.expires or (bool(config.expires and state.expires) and config.expires_at == state.expires_at)


def _is_origin(there: Origin | None, asked: Origin | None) -> bool:
    if there is None or asked is None:
        return there is asked
    same_source = (there.path, there.life) == (asked.path, asked.life)
    same_place = (there.position, there.sub) == (asked.position, asked.sub)
    return same_source and (same_place or (there.is_tail and asked.is_tail))


# Appending and closing: sections 5.2 and 5.3


def append(stream: Stream | None, asked: Append, now: float, by: str, bounds: Bounds) -> Decision:
    """Decide upon a POST. What is wrong with it whatever the stream is, has been refused before.

    The order of the checks is the protocol's: an old epoch before the closure, that before the content, and `Stream-Seq` last.
    """
    if (gone := absence(stream, now)) is not None:
        return Decision(gone)
    assert stream is not None
    state, tag = stream.state, asked.tag
    producer = None if tag is None else state.producers.get(tag.producer)
    if tag is not None and producer is not None and tag.epoch < producer.epoch:
        return Decision(Answer(403, (("producer-epoch", str(producer.epoch)),), "the producer's epoch is over"))
    if state.is_closed:
        return _append_to_closed(stream, asked)
    records = _content(state, asked)
    if isinstance(records, Answer):
        return Decision(records)
    if tag is not None and (refusal := _refusal_of_tag(tag, producer, stream)) is not None:
        renews = refusal.code == 204 and is_renewal_due(state, now)
        return Decision(refusal, _changed(stream, state, now, by) if renews else None)
    return _grow(stream, asked, records, now, by, bounds)


def _content(state: State, asked: Append) -> Sequence[bytes] | Answer:
    """Give what is appended, or why it cannot be."""
    if not asked.body:
        return ()
    if asked.content_type is None or not same_type(asked.content_type, state.content_type):
        return Answer(409, reason="the content type is not the stream's")
    records = asked.records(json=is_json(state.content_type))
    if records is None:
        return Answer(400, reason="the body is not JSON")
    return records or Answer(400, reason="an empty array appends nothing")


def _grow(stream: Stream, asked: Append, records: Sequence[bytes], now: float, by: str, bounds: Bounds) -> Decision:
    state, tag = stream.state, asked.tag
    if asked.seq is not None and state.seq is not None and asked.seq.encode("latin-1") <= state.seq.encode("latin-1"):
        return Decision(Answer(409, (("stream-next-offset", offset_of(state, stream.tail)),), "Stream-Seq has not grown"))
    tail, size = stream.head.tail + len(records), state.size + sum(map(len, records))
    kept = _kept(stream, Mark(tail, size, now), bounds)
    if kept is None:
        return Decision(Answer(413, reason="the stream is as long as it may be"))
    producers = state.producers if tag is None else _producers_with(tag, state.producers, now, bounds)
    if producers is None:
        return Decision(Answer(429, (("retry-after", "60"),), "the stream has as many producers as it may have"))
    after = replace(
        state,
        producers=producers,
        seq=state.seq if asked.seq is None else asked.seq,
        size=size,
        appended_at=_appended_at(state, records, now, bounds),
        marks=kept.marks,
        is_closed=asked.closes,
        closed_by=Closing(tag.producer, tag.epoch, tag.seq) if tag is not None and asked.closes else None,
    )
    grown = _changed(stream, after, now, by, len(records), kept.first)
    code = 200 if tag is not None and asked.body else 204
    return Decision(Answer(code, _told(grown, tag, None if tag is None else tag.seq)), grown, records)


def _kept(stream: Stream, end: Mark, bounds: Bounds) -> Kept | None:
    """Give what is kept of a stream that grows to an end; None: that is too long."""
    state, kept = stream.state, Kept(stream.state.marks, stream.head.first)
    if end.position == stream.head.tail:
        return kept
    appended_at = min(state.appended_at or committed_at(stream.head), end.at)
    begin, there = Mark(0, 0, state.created_at), Mark(stream.head.tail, state.size, appended_at)
    for most in (0,) if state.is_pinned else (FORGET_RECORDS, end.position):
        if bounds.retention is not None:
            kept = kept_after(Kept(state.marks or (begin,), stream.head.first), there, end, bounds.retention, most=most)
        if end.size - kept.forgotten_bytes <= bounds.max_bytes and end.position - kept.first <= bounds.max_records:
            return kept
    return None


def _appended_at(state: State, records: Sequence[bytes], now: float, bounds: Bounds) -> float:
    if not records:
        return state.appended_at
    return 0.0 if bounds.retention is None else now


def _append_to_closed(stream: Stream, asked: Append) -> Decision:
    state, tag = stream.state, asked.tag
    is_repeated = tag is not None and state.closed_by == Closing(tag.producer, tag.epoch, tag.seq)
    if is_repeated and tag is not None:
        return Decision(Answer(204, _told(stream, tag, tag.seq)))
    if asked.closes and not asked.body and tag is None:
        return Decision(Answer(204, _told(stream, None, None)))
    return Decision(Answer(409, _told(stream, None, None), "the stream is closed"))


def _refusal_of_tag(tag: Tag, there: Producer | None, stream: Stream) -> Answer | None:
    if there is None or tag.epoch > there.epoch:
        if tag.seq == 0:
            return None
        if there is not None:
            return Answer(400, reason="a new epoch begins with the sequence number 0")
        return _gap(0, tag.seq)
    if tag.seq <= there.seq:
        return Answer(204, _told(stream, tag, there.seq))
    return None if tag.seq == there.seq + 1 else _gap(there.seq + 1, tag.seq)


def _gap(expected: int, received: int) -> Answer:
    headers = (("producer-expected-seq", str(expected)), ("producer-received-seq", str(received)))
    return Answer(409, headers, "requests of the producer are missing")


def _producers_with(tag: Tag, there: Mapping[str, Producer], now: float, bounds: Bounds) -> Mapping[str, Producer] | None:
    """Give the producers with one request more; None: there is no room for another one."""
    kept = dict(there)
    if tag.producer not in kept and len(kept) >= bounds.max_producers:
        kept = {name: producer for name, producer in kept.items() if now - producer.at < FORGET_PRODUCER_SECONDS}
        if len(kept) >= bounds.max_producers:
            return None
    kept[tag.producer] = Producer(tag.epoch, tag.seq, now)
    return kept


def _told(stream: Stream, tag: Tag | None, seq: int | None) -> Headers:
    state = stream.state
    producer = () if tag is None else (("producer-epoch", str(tag.epoch)), ("producer-seq", str(seq)))
    closed = (("stream-closed", "true"),) if state.is_closed else ()
    return (("stream-next-offset", offset_of(state, stream.tail)), *producer, *closed)


# Expiry: section 5.1


def is_renewal_due(state: State, now: float) -> bool:
    """Say whether whoever uses a stream with a TTL has to have its expiry put off."""
    return state.ttl is not None and state.expires_at < now + state.ttl


def renew(stream: Stream | None, now: float, by: str) -> Decision:
    """Put off the expiry of a stream that is read."""
    if (gone := absence(stream, now)) is not None:
        return Decision(gone)
    assert stream is not None
    due = is_renewal_due(stream.state, now)
    return Decision(Answer(200), _changed(stream, stream.state, now, by) if due else None)


def _expiry_after(ttl: int, now: float) -> float:
    # A little later than asked for, so that not each read has to put it off; never earlier.
    return min(now + ttl + (min(ttl * RENEW_PART, MAX_RENEW_SECONDS) if ttl else 0.0), NEVER)


# Forks and deletion: sections 4.2 and 5.4


def pin(stream: Stream | None, life: str, now: float, by: str) -> Decision:
    """Keep a stream for a fork that is about to be made; 404 or 409 where none can be."""
    if stream is not None and stream.state.life == life and stream.state.is_deleted:
        return Decision(Answer(409, reason="the source was deleted, and is only kept for its forks"))
    gone = absence(stream, now)
    if gone is not None or stream is None or stream.state.life != life:
        return Decision(Answer(409 if gone is not None and gone.code == 410 else 404, reason="there is no such source"))
    # Also if it is pinned already: whoever has just seen that it has no forks must not remove it now.
    return Decision(Answer(200), _stream(stream.head, replace(stream.state, is_pinned=True, by=by), now))


def unpin(stream: Stream | None, version: int, now: float, by: str) -> Decision:
    """See to a stream that had no forks any more as of a version: it is as others are, or removed if it was only kept for them."""
    if stream is None or stream.head.version != version:
        return Decision(Answer(409))
    if stream.state.is_deleted or is_expired(stream, now):
        return Decision(Answer(204), deletes=True)
    return Decision(Answer(200), _stream(stream.head, replace(stream.state, is_pinned=False, by=by), now))


def delete(stream: Stream | None, now: float, by: str) -> Decision:
    """Delete a stream; one that has, or may have, forks is kept for them alone."""
    if (gone := absence(stream, now)) is not None:
        return Decision(gone)
    assert stream is not None
    if stream.state.is_pinned:
        return Decision(Answer(204), _changed(stream, replace(stream.state, is_deleted=True), now, by))
    return Decision(Answer(204), deletes=True)


# Heads


def _changed(stream: Stream, state: State, now: float, by: str, more: int = 0, first: int | None = None) -> Stream:
    """Give what a stream becomes that is used: with what is behind its `more` new records, and its first one."""
    if is_renewal_due(state, now):
        assert state.ttl is not None
        state = replace(state, expires_at=_expiry_after(state.ttl, now))
    head = stream.head
    head = replace(head, tail=head.tail + more, first=head.first if first is None else first)
    return _stream(head, replace(state, by=by), now)


def _stream(after: Head, state: State, now: float) -> Stream:
    """Give a stream with tail and first record as in a head, and a version after that."""
    slack = 0.0 if state.origin is None else FORK_SLACK_SECONDS
    expires_at = NEVER if state.is_pinned else min(state.expires_at + slack, NEVER)
    # The bytes of the state are made when it is to be stored: of many requests in one commit, only the last one's are.
    return Stream(Head(version_after(after.version, now, state.by), after.tail, b"", expires_at, after.first), state)


def sealed(stream: Stream, by: str) -> Stream:
    """Give a stream whose head can be stored, by who commits it: two of these never have the same head."""
    head, state = stream.head, replace(stream.state, by=by)
    return Stream(replace(head, state=msgspec.json.encode(state)), state)


_decoder: Final = msgspec.json.Decoder(State)
