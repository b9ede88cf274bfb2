"""The rules of subscriptions: durable cursors that wake workers when streams have something for them (6, 7). Pure: values to values.

A subscription is one head. Its links (which streams, how far they are processed, how far they go), its generation, its lease and when its
next attempt is due are its state, so that what was promised to a worker outlives whoever promised it, and only one process makes the next
wake: the one whose commit was first.

The head has so many links, and no more. A pattern may match any number of streams: links that have no room are *parked*, each in a head of
its own, which is written before the subscription's head is, and come back when they have something to be processed and there is room. So a
stream that a pattern matches, and that is neither linked nor parked, is younger than the subscription: all of it is to be processed.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Literal

import msgspec
from msgspec.structs import replace

from .._lifecycle import version_after
from ..errors import StorageCorruptError
from ..storage import Head
from ._rules import NEVER, ZERO

FIRST_RETRY_SECONDS: Final = 1.0
LAST_RETRY_SECONDS: Final = 60.0
RETRY_JITTER: Final = 0.2
ANNOUNCE_SECONDS: Final = 5.0
"""After so long a wake whose event may not have been written is announced again."""
MAX_LINKS: Final = 1_000
"""How many links by its pattern a subscription has in its head; more are parked."""
MAX_EXPLICIT: Final = 1_000
"""How many streams a subscription may have explicitly: all of them are in one head, and in each wake."""
MAX_SEGMENTS: Final = 64


class Link(msgspec.Struct, frozen=True, array_like=True):
    """One stream of a subscription: how far it is processed, and how far it goes, and which life of the stream that is."""

    acked: str
    tail: str
    life: str
    is_glob: bool = False
    is_explicit: bool = False

    @property
    def is_pending(self) -> bool:
        """Whether there is something to be processed."""
        return self.tail > self.acked


class Parked(msgspec.Struct, frozen=True, array_like=True):
    """A link that has no room in its subscription's head, in a head of its own."""

    path: str
    link: Link


class Wake(msgspec.Struct, frozen=True):
    """A wake that is in flight, or whose worker holds the lease."""

    id: str
    issued_at: float
    holder: str = ""
    lease_until: float = 0.0
    """0: nobody has claimed it yet."""
    is_announced: bool = False
    tails: Mapping[str, str] = {}
    """How far the streams went when it was made."""


class Config(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a subscription was created as."""

    type: Literal["webhook", "pull-wake"]
    pattern: str = ""
    streams: tuple[str, ...] = ()
    url: str = ""
    wake_stream: str = ""
    lease_ms: int = 30_000
    description: str = ""

    @property
    def hash(self) -> str:
        """What tells whether another configuration is the same."""
        return sha256(msgspec.json.encode(self)).hexdigest()


class Subscription(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a head's opaque bytes say."""

    id: str
    life: str
    by: str
    config: Config
    created_at: float
    base_url: str = ""
    """The root of all streams, as who created it knows it."""
    links: Mapping[str, Link] = {}
    generation: int = 0
    wake: Wake | None = None
    failures: int = 0
    next_attempt_at: float = 0.0
    is_backfilled: bool = False
    has_parked: bool = False
    """Whether any link was ever parked."""
    waiting: int = 0
    """How often links were parked that had something to be processed; 0: there are none."""

    @property
    def is_pending(self) -> bool:
        """Whether any linked stream has something to be processed."""
        return any(link.is_pending for link in self.links.values())

    @property
    def room(self) -> int:
        """How many parked links could come back."""
        told = {} if self.wake is None else self.wake.tails
        stay = sum(not link.is_explicit and (link.is_pending or path in told) for path, link in self.links.items())
        return max(0, MAX_LINKS - stay)

    @property
    def lease(self) -> float:
        """How many seconds a worker may be silent."""
        return self.config.lease_ms / 1_000


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a worker's request is not done: an error code of the protocol, and its HTTP status."""

    code: int
    name: str
    reason: str
    details: Mapping[str, str | int] | None = None


FENCED: Final = Refusal(409, "FENCED", "the wake is over")


def subscription_of(head: Head) -> Subscription:
    """Read a head. StorageCorruptError: it is none of these."""
    try:
        return _decoder.decode(head.state)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageCorruptError("the head is damaged, or was written by a newer version of streamkeep") from error


def head_of(subscription: Subscription, after_version: int, now: float, by: str) -> Head:
    """Give the head to be stored."""
    state = msgspec.json.encode(replace(subscription, by=by))
    return Head(version_after(after_version, now, by), 0, state, NEVER)


def parked_of(head: Head) -> Parked:
    """Read the head of a parked link. StorageCorruptError: it is none."""
    try:
        return _parked_decoder.decode(head.state)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageCorruptError("the head is damaged, or was written by a newer version of streamkeep") from error


def parked_head(path: str, link: Link, after_version: int, now: float, by: str) -> Head:
    """Give the head of a parked link."""
    return Head(version_after(after_version, now, by), 0, msgspec.json.encode(Parked(path, link)), NEVER)


# Which streams


def segments_of(pattern: str) -> tuple[str, ...]:
    """Give the segments of a pattern."""
    return tuple(pattern.split("/"))


def matches(pattern: Sequence[str], path: str) -> bool:
    """Say whether a path matches: `*` is one segment, `**` any number. It takes as long as both are long, whatever they are."""
    reached = {0}
    reached = _skip(pattern, reached)
    for segment in path.split("/"):
        following: set[int] = set()
        for at in reached:
            if at < len(pattern):
                if pattern[at] == "**":
                    following.add(at)
                elif pattern[at] in ("*", segment):
                    following.add(at + 1)
        reached = _skip(pattern, following)
    return len(pattern) in reached


def _skip(pattern: Sequence[str], reached: Collection[int]) -> set[int]:
    found = set(reached)
    for at in range(len(pattern)):
        if at in found and pattern[at] == "**":
            found.add(at + 1)
    return found


def covers(config: Config, path: str) -> bool:
    """Say whether a pattern links a stream. Its own wake stream is never linked by one: each wake would make the next."""
    return bool(config.pattern) and path != config.wake_stream and matches(segments_of(config.pattern), path)


@dataclass(frozen=True, slots=True)
class Place:
    """A stream as it was found: which life of it, where its own records begin, and how far it goes. `life` is empty where there is none."""

    life: str
    base: str
    tail: str


@dataclass(frozen=True, slots=True)
class Noted:
    """What a subscription becomes, and which links are parked before that is stored."""

    there: Subscription
    parked: Mapping[str, Link]


def notice(there: Subscription, found: Mapping[str, Place], parked: Mapping[str, Link]) -> Noted:
    """Take note of how far streams go. `parked` are those of their links that are parked."""
    links = dict(there.links)
    for path, place in found.items():
        if path in links:
            links[path] = _moved(links[path], place)
        elif place.life and covers(there.config, path):
            old = parked.get(path)
            link = _moved(old or Link(place.base, place.base, place.life, is_glob=True), place)
            if link.is_pending and not (link == old and there.waiting):  # it may wait already
                links[path] = link
    return fitted(there, links)


def _moved(link: Link, place: Place) -> Link:
    if not place.life:
        return link
    if link.life != place.life:  # another stream lives under the path now
        return replace(link, acked=place.base, tail=place.tail, life=place.life)
    return replace(link, tail=max(link.tail, place.tail))


def fitted(there: Subscription, links: Mapping[str, Link]) -> Noted:
    """Give a subscription other links, and park what has no room: first what is processed, and of which no worker has been told."""
    told = {} if there.wake is None else there.wake.tails
    globs = {path: link for path, link in links.items() if not link.is_explicit}
    surplus = max(0, len(globs) - MAX_LINKS)
    done = [path for path, link in globs.items() if not link.is_pending and path not in told]
    rest = [path for path in reversed(globs) if path not in there.links and globs[path].is_pending]
    parked = {path: globs[path] for path in [*done, *rest][:surplus]}
    kept = {path: link for path, link in links.items() if path not in parked}
    if kept == there.links and not parked:
        return Noted(there, {})
    # Counted each time: who has looked for parked links, and found none, has not seen these.
    more = any(link.is_pending for link in parked.values())
    has_parked = there.has_parked or bool(parked)
    return Noted(replace(there, links=kept, has_parked=has_parked, waiting=there.waiting + more), parked)


def unparked(there: Subscription, found: Mapping[str, Link], *, are_all: bool) -> Noted:
    """Link what was parked again. `are_all`: there is nothing parked any more that has something to be processed."""
    noted = fitted(there, {**found, **there.links})
    if are_all and not any(link.is_pending for link in noted.parked.values()):
        return Noted(replace(noted.there, waiting=0), noted.parked)
    return noted


def merged(parked: Link, link: Link) -> Link:
    """Give what is parked of a link that is parked already: by who does not know it, or before it came back."""
    if parked.life != link.life:
        return link
    return replace(link, acked=max(parked.acked, link.acked), tail=max(parked.tail, link.tail))


def link(there: Subscription, found: Mapping[str, Place], parked: Mapping[str, Link], *, explicit: bool) -> Noted:
    """Link streams, explicitly or by the pattern, at their current tails; what is linked already, or parked, stays where it is."""
    links = dict(there.links)
    for path, place in found.items():
        old = links.get(path) or parked.get(path) or Link(place.tail, place.tail, place.life)
        links[path] = replace(old, is_explicit=old.is_explicit or explicit, is_glob=old.is_glob or covers(there.config, path))
    noted = fitted(there, links)
    return Noted(replace(noted.there, is_backfilled=there.is_backfilled or not explicit), noted.parked)


def add(there: Subscription, found: Mapping[str, Place], parked: Mapping[str, Link]) -> Noted | Refusal:
    """Link streams explicitly, as long as there is room for them."""
    noted = link(there, found, parked, explicit=True)
    if noted.there != there and sum(link.is_explicit for link in noted.there.links.values()) > MAX_EXPLICIT:
        return Refusal(429, "RATE_LIMITED", f"a subscription has at most {MAX_EXPLICIT} streams of its own")
    return noted


def unlink(there: Subscription, path: str) -> Subscription:
    """Remove an explicit link; one by the pattern stays."""
    old = there.links.get(path)
    if old is None or not old.is_explicit:
        return there
    links = dict(there.links)
    if old.is_glob:
        links[path] = replace(old, is_explicit=False)
    else:
        del links[path]
    return replace(there, links=links)


def forget(there: Subscription, gone: Mapping[str, str], now: float, wake_id: str = "") -> Subscription:
    """Take note of streams that are gone, each with the tail that it had: nobody can read what is pending there.

    A link that its pattern makes is made again by the next stream under the path; an explicit one stays, and waits for that. While a
    worker has the lease nothing changes, because it may still say how far it came; `wake_id` is a wake that nobody was told of yet.
    """
    wake = there.wake
    if is_leased(there, now) and (wake is None or wake.id != wake_id):
        return there
    links = dict(there.links)
    for path, tail in gone.items():
        old = links.get(path)
        if old is None or old.tail != tail:  # another stream is there now
            continue
        if old.is_explicit:
            links[path] = replace(old, acked=old.tail)
        else:
            del links[path]
    after = replace(there, links=links)
    return after if after.is_pending else replace(after, wake=None)


# Wakes and leases: section 7.3


def is_leased(there: Subscription, now: float) -> bool:
    """Say whether a worker has the lease."""
    return there.wake is not None and there.wake.lease_until > now


def advance(there: Subscription, now: float, wake_id: str) -> Subscription:
    """Do what is due: end a lease that is over, and make the next wake if there is work for it."""
    wake = there.wake
    if wake is not None and wake.lease_until and wake.lease_until <= now:
        there, wake = replace(there, wake=None), None
    if wake is None and there.is_pending and there.next_attempt_at <= now:
        return _woken(there, now, wake_id)
    return there


def _woken(there: Subscription, now: float, wake_id: str) -> Subscription:
    tails = {path: link.tail for path, link in there.links.items()}
    is_webhook = there.config.type == "webhook"
    until = now + there.lease if is_webhook else 0.0
    wake = Wake(wake_id, now, "webhook" if is_webhook else "", until, is_announced=False, tails=tails)
    return replace(there, wake=wake, generation=there.generation + 1)


def due_at(there: Subscription) -> float:
    """Say when there is something to be done if nothing happens until then; NEVER: nothing is."""
    wake = there.wake
    if wake is None:
        return there.next_attempt_at if there.is_pending else NEVER
    if wake.lease_until:
        return wake.lease_until
    return NEVER if wake.is_announced else max(wake.issued_at + ANNOUNCE_SECONDS, there.next_attempt_at)


def claim(there: Subscription, worker: str, now: float, wake_id: str) -> Subscription | Refusal:
    """Give a worker the lease (7.2)."""
    wake = there.wake
    if wake is not None and is_leased(there, now):
        details: Mapping[str, str | int] = {"current_holder": wake.holder, "generation": there.generation}
        return Refusal(409, "ALREADY_CLAIMED", "another worker has the lease", details)
    if wake is None or wake.lease_until:
        if not there.is_pending:
            return Refusal(409, "NO_PENDING_WORK", "there is nothing to be processed")
        there = _woken(replace(there, wake=None), now, wake_id)
        wake = there.wake
    assert wake is not None
    tails = {path: link.tail for path, link in there.links.items()}
    return replace(there, wake=replace(wake, holder=worker, lease_until=now + there.lease, is_announced=True, tails=tails))


def is_current(there: Subscription, wake_id: str, generation: int, now: float) -> bool:
    """Say whether a request is of the wake that is in flight, and its lease is not over."""
    wake = there.wake
    return wake is not None and wake.id == wake_id and there.generation == generation and wake.lease_until > now


def ack(
    there: Subscription, wake_id: str, generation: int, acks: Mapping[str, str], now: float, *, done: bool
) -> Subscription | Refusal:
    """Note what a worker has processed, and extend its lease, or end it."""
    wake = there.wake
    if wake is None or not is_current(there, wake_id, generation, now):
        return FENCED
    links = dict(there.links)
    for path, offset in acks.items():
        old = links.get(path)
        if old is None or offset > old.tail or _lineage(offset) != _lineage(old.tail) or len(offset) != len(old.tail):
            return Refusal(409, "INVALID_OFFSET", "the stream has no such offset, or is not the subscription's")
        links[path] = replace(old, acked=max(old.acked, offset))
    after = replace(there, links=links, failures=0, next_attempt_at=0.0)
    return replace(after, wake=None if done else replace(wake, lease_until=now + there.lease))


def release(there: Subscription, wake_id: str, generation: int, now: float) -> Subscription | Refusal:
    """End a lease; what was not processed makes another wake."""
    return replace(there, wake=None) if is_current(there, wake_id, generation, now) else FENCED


def delivered(there: Subscription, wake_id: str, *, done: bool) -> Subscription:
    """Note that a webhook has taken a wake, and, if it is done, that all of the wake is processed (7.1)."""
    wake = there.wake
    if wake is None or wake.id != wake_id:
        return there
    there = replace(there, failures=0, next_attempt_at=0.0)
    if not done:
        return replace(there, wake=replace(wake, is_announced=True))
    links = {path: _acked(link, wake.tails.get(path)) for path, link in there.links.items()}
    return replace(there, wake=None, links=links)


def announced(there: Subscription, wake_id: str) -> Subscription:
    """Note that the wake's event was written."""
    wake = there.wake
    if wake is None or wake.id != wake_id:
        return there
    return replace(there, wake=replace(wake, is_announced=True), failures=0, next_attempt_at=0.0)


def failed(there: Subscription, wake_id: str, now: float) -> Subscription:
    """Note that a wake could not be delivered: it is over, and the next one has to wait."""
    wake = there.wake
    if wake is None or wake.id != wake_id or wake.is_announced:
        return there
    pause = min(FIRST_RETRY_SECONDS * 2.0 ** min(there.failures, 10), LAST_RETRY_SECONDS)
    pause *= random.uniform(1.0 - RETRY_JITTER, 1.0 + RETRY_JITTER)  # noqa: S311 - jitter
    return replace(there, wake=None, failures=there.failures + 1, next_attempt_at=now + pause)


def _acked(link: Link, tail: str | None) -> Link:
    if tail is None or _lineage(tail) != _lineage(link.tail):
        return link
    return replace(link, acked=max(link.acked, tail))


def _lineage(offset: str) -> str:
    return offset.partition("_")[2]


ZERO_OFFSET: Final = f"{ZERO}_{ZERO}"
NOWHERE: Final = Place("", ZERO_OFFSET, ZERO_OFFSET)
"""Where a stream is that does not exist."""

_decoder: Final = msgspec.json.Decoder(Subscription)
_parked_decoder: Final = msgspec.json.Decoder(Parked)
