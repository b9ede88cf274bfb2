"""What streams of the protocol may answer: a model of them, simple enough to be believed, and a check of histories against it.

A history is what several clients have asked at the same time, and what they were answered, if they were. It is possible if there is an
order of the requests, in which none is before one that had been answered when it was sent, and in which the model gives each of these
answers (linearizability). A request without an answer may have been done at any time since, or not at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

Origin = tuple[str, int, int, bool]
"""A fork's source: its path, its life, behind how many records, and whether that was its tail."""
MAX_TRIED: Final = 50_000


@dataclass(frozen=True)
class Stream:
    """One stream; `life` is the number of the request that has created it, `root` that of the first of a chain of forks."""

    life: int
    root: int
    texts: tuple[str, ...] = ()
    kind: str = "text/plain"
    is_closed: bool = False
    closed_by: tuple[str, int, int] | None = None
    producers: tuple[tuple[str, int, int], ...] = ()
    seq: str = ""
    origin: Origin | None = None
    is_deleted: bool = False


@dataclass(frozen=True)
class State:
    """All streams; `lineages` has what offsets of streams end with, where an answer has said it."""

    streams: frozenset[tuple[str, Stream]] = frozenset()
    lineages: frozenset[tuple[int, str]] = frozenset()

    def find(self, path: str) -> Stream | None:
        """Give the stream under a path."""
        return next((stream for name, stream in self.streams if name == path), None)

    def having(self, path: str, stream: Stream | None) -> "State":
        """Give the state with another stream under a path, or none."""
        rest = frozenset(item for item in self.streams if item[0] != path)
        return replace(self, streams=rest if stream is None else rest | {(path, stream)})

    def has_forks(self, path: str, life: int) -> bool:
        """Say whether a stream has forks."""
        return any(stream.origin is not None and stream.origin[:2] == (path, life) for _, stream in self.streams)

    def lineage(self, root: int) -> str | None:
        """Give what offsets end with, if that is known."""
        return next((lineage for known, lineage in self.lineages if known == root), None)


@dataclass(frozen=True)
class Asked:
    """One request. `offset` is what an earlier answer has said; None: the tail of a fork's source, the beginning of a read."""

    what: Literal["put", "fork", "post", "delete", "head", "get", "long-poll"]
    path: str
    text: str = ""
    closes: bool = False
    kind: str = "text/plain"
    tag: tuple[str, int, int] | None = None
    seq: str = ""
    source: str = ""
    offset: str | None = None


@dataclass(frozen=True)
class Answer:
    """What was answered. `texts` are the records of a body; `root` and `end` make the offset, which `offset` is as it was seen."""

    code: int
    is_closed: bool = False
    producer: tuple[str, ...] = ()
    texts: tuple[str, ...] | None = None
    end: int | None = None
    root: int | None = field(default=None, compare=False)
    lineage: str | None = field(default=None, compare=False)


@dataclass
class Request:
    """A request of a history: when it was sent, and answered, in the order in which such things happened. `is_nothing`: it was not sent."""

    number: int
    asked: Asked
    sent: int
    answered: float = float("inf")
    answer: Answer | None = None
    is_nothing: bool = False


Outcome = tuple[Answer, State]


def outcomes(state: State, number: int, asked: Asked) -> Iterator[Outcome]:
    """Give what a request may be answered, and what it may make of the streams."""
    stream = state.find(asked.path)
    if stream is not None and stream.is_deleted and not state.has_forks(asked.path, stream.life):
        yield from outcomes(
            state.having(asked.path, None), number, asked
        )  # it was only kept for its forks: it goes at any time
    match asked.what:
        case "put":
            yield _put(state, number, asked, stream)
        case "fork":
            yield from _fork(state, number, asked, stream)
        case _:
            if stream is None or stream.is_deleted:
                yield Answer(404 if stream is None else 410), state
                if asked.what == "delete":  # it has failed, and somebody else has done it: nobody knows who it was
                    yield Answer(204), state
            elif asked.what == "delete":
                yield Answer(204), state.having(asked.path, replace(stream, is_deleted=True))
                if not state.has_forks(asked.path, stream.life):
                    yield Answer(204), state.having(asked.path, None)
            elif asked.what == "post":
                yield _post(state, asked, stream)
            else:
                yield _read(state, asked, stream), state


def _there(code: int, stream: Stream) -> Answer:
    return Answer(code, stream.is_closed, end=len(stream.texts), root=stream.root)


def _put(state: State, number: int, asked: Asked, stream: Stream | None) -> Outcome:
    if stream is not None and stream.is_deleted:
        return Answer(409), state
    if stream is not None:
        is_same = (stream.is_closed, stream.origin, stream.kind) == (asked.closes, None, asked.kind)
        return (_there(200, stream) if is_same else Answer(409)), state
    made = Stream(number, number, (asked.text,) if asked.text else (), asked.kind, asked.closes)
    return _there(201, made), state.having(asked.path, made)


def _fork(state: State, number: int, asked: Asked, stream: Stream | None) -> Iterator[Outcome]:
    # It looks at its path and at its source one after the other: which of both refuses it, is of no consequence.
    for code in (400, 404, 409):
        yield Answer(code), state
    if stream is not None:
        if stream.origin is not None and stream.origin[0] == asked.source and not stream.is_deleted:
            yield _there(200, stream), state
        return
    source = state.find(asked.source)
    if source is None:  # one that was deleted meanwhile is kept for it
        return
    if asked.offset is None:
        positions: Sequence[int] = range(len(source.texts) + 1)  # its tail, when it looked
    else:
        digits, _, lineage = asked.offset.partition("_")
        if state.lineage(source.root) != lineage or int(digits) > len(source.texts):
            return
        positions = (int(digits),)
    for position in positions:
        origin = (asked.source, source.life, position, asked.offset is None)
        texts = source.texts[:position] + ((asked.text,) if asked.text else ())
        made = Stream(number, source.root, texts, source.kind, asked.closes, origin=origin)
        yield _there(201, made), state.having(asked.path, made)


def _read(state: State, asked: Asked, stream: Stream) -> Answer:
    if asked.what == "head":
        return _there(200, stream)
    position = 0
    if asked.offset is not None:
        digits, _, lineage = asked.offset.partition("_")
        position = int(digits)
        if state.lineage(stream.root) != lineage:
            return Answer(410)
        if position > len(stream.texts):
            return Answer(400)
    texts = stream.texts[position:]
    if asked.what == "long-poll" and not texts:
        return _there(204, stream)
    return replace(_there(200, stream), texts=texts)


def _post(state: State, asked: Asked, stream: Stream) -> Outcome:
    tag = asked.tag
    known = {name: (epoch, seq) for name, epoch, seq in stream.producers}
    there = None if tag is None else known.get(tag[0])
    if tag is not None and there is not None and tag[1] < there[0]:
        return Answer(403, producer=(f"producer-epoch={there[0]}",)), state
    if stream.is_closed:
        if tag is not None and tag == stream.closed_by:
            return replace(_there(204, stream), producer=_said(tag[1], tag[2])), state
        is_repeated = asked.closes and not asked.text and tag is None
        return _there(204 if is_repeated else 409, stream), state
    if asked.text and asked.kind != stream.kind:
        return Answer(409), state
    if tag is not None:
        last = -1 if there is None or tag[1] > there[0] else there[1]
        if tag[2] <= last:
            return replace(_there(204, stream), producer=_said(tag[1], last)), state
        if tag[2] > last + 1:
            if there is not None and tag[1] > there[0]:
                return Answer(400), state
            return Answer(409, producer=(f"producer-expected-seq={last + 1}", f"producer-received-seq={tag[2]}")), state
    if asked.seq and asked.seq <= stream.seq:
        return Answer(409, end=len(stream.texts), root=stream.root), state
    if tag is not None:
        known[tag[0]] = tag[1:]
    grown = replace(
        stream,
        texts=(*stream.texts, asked.text) if asked.text else stream.texts,
        is_closed=asked.closes,
        closed_by=tag if asked.closes else None,
        producers=tuple(sorted((name, epoch, seq) for name, (epoch, seq) in known.items())),
        seq=asked.seq or stream.seq,
    )
    answer = _there(200 if tag is not None and asked.text else 204, grown)
    return replace(answer, producer=() if tag is None else _said(tag[1], tag[2])), state.having(asked.path, grown)


def _said(epoch: int, seq: int) -> tuple[str, ...]:
    return (f"producer-epoch={epoch}", f"producer-seq={seq}")


# Histories


def answer_of(code: int, headers: Mapping[str, str], texts: tuple[str, ...] | None) -> Answer:
    """Give what was answered, as the model says it."""
    names = ("producer-epoch", "producer-seq", "producer-expected-seq", "producer-received-seq")
    producer = tuple(f"{name}={headers[name]}" for name in names if name in headers)
    position, _, lineage = headers.get("stream-next-offset", "").partition("_")
    end = int(position) if position else None
    return Answer(code, headers.get("stream-closed") == "true", producer, texts, end, lineage=lineage or None)


def _after(state: State, request: Request) -> Iterator[State]:
    """Give what may have become of the streams, if a request was done next."""
    for possible, after in outcomes(state, request.number, request.asked):
        seen = request.answer
        if seen is None:
            yield after
        elif possible == seen:
            if possible.root is None or seen.lineage is None:
                yield after
            elif (lineage := after.lineage(possible.root)) is None:
                yield replace(after, lineages=after.lineages | {(possible.root, seen.lineage)})
            elif lineage == seen.lineage:
                yield after


def why_impossible(history: Sequence[Request]) -> str | None:
    """Say after which requests no order of a history is possible; None: one is, or nobody knows, because there are too many."""
    every = (1 << len(history)) - 1
    known = sum(1 << index for index, request in enumerate(history) if request.answer is not None)
    begin: tuple[int, State] = (0, State())
    tried: set[tuple[int, State]] = {begin}
    stack: list[tuple[int, State]] = [begin]
    furthest = 0
    while stack:
        done, state = stack.pop()
        if done & known == known:
            return None
        if (done & known).bit_count() > (furthest & known).bit_count():
            furthest = done
        rest = [index for index in range(len(history)) if not done >> index & 1]
        first_answer = min(history[index].answered for index in rest)
        # What was answered first is tried first, and what was not answered at all, last.
        for index in sorted(rest, key=lambda index: -history[index].answered):
            if history[index].sent < first_answer:
                for after in _after(state, history[index]):
                    step = (done | 1 << index, after)
                    if step not in tried:
                        tried.add(step)
                        stack.append(step)
        if len(tried) > MAX_TRIED:
            return None
    stuck = [request for index, request in enumerate(history) if (every & ~furthest) >> index & 1]
    return "\n".join(f"{request.sent}-{request.answered}: {request.asked} -> {request.answer}" for request in stuck[:12])
