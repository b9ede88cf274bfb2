"""The rules: what is wrong with what was seen. Pure functions from answers to findings; whatever a busy machine explains is no finding."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Final

from ...errors import InvalidArgumentError
from ...events import ErrorInfo
from ...http.check import TOO_MANY
from ...wire import error_of
from .advice import Finding, Level
from .cors import cors
from .exchange import CLEANING_UP, MAX_EVENTS, Event, Exchange
from .seen import IDLE_SPARE_SECONDS, PROBED_HEADERS, PROBED_QUERY, Greeting, Options, Resumed, Seen

HELD_SECONDS: Final = 0.18
HELD_PAUSES: Final = 0.9
HELD_PIECES: Final = 0.3
"""An answer is held back where half of its chunks are later than that, and it comes in at most so many pieces for each chunk."""
HELD_FOR_SURE_SECONDS: Final = 2.0
HELD_MEANWHILE: Final = 4
"""How many pieces of another answer have to come while one is held back, where others are not."""
FLOWING_SECONDS: Final = 5.0
FLOWING_BYTES: Final = 2_000
"""An answer still flows if so much has come of it within so long: more than heartbeats are."""
SILENCE_SECONDS: Final = 1.0
"""From how long a silence on it may be what cut a connection."""
CLOCK_SECONDS: Final = 2.0
SLOW_STORAGE_SECONDS: Final = 1.0


def judge(seen: Seen) -> list[Finding]:
    """Give all that is wrong, the worst first, and each thing once."""
    found: dict[str, Finding] = {}
    for rule in RULES:
        for finding in rule(seen):
            found.setdefault(finding.id, finding)
    order: list[Level] = ["failure", "warning", "note"]
    return sorted(found.values(), key=lambda finding: order.index(finding.level))


# What an answer is


def is_shown(exchange: Exchange) -> bool:
    """Say whether an answer shows a stream of ours."""
    return exchange.request.path.startswith("/streams") and exchange.status == 200 and bool(exchange.stream)


def is_start(exchange: Exchange) -> bool:
    """Say whether a request starts a stream of its own, whatever came of it."""
    request = exchange.request
    return request.method == "POST" and "idempotency-key" in {name for name, _ in request.headers}


def delays(exchange: Exchange) -> list[float]:
    """Give how many seconds each chunk was on its way, beyond the quickest one; the time that storing it took is not counted."""
    came = [(event.came, event.made) for event in exchange.events if event.made is not None]
    took = [*(made.took for _, made in came[1:]), 0.0]  # nobody says it of the last one
    late = [at - made.at - stored for (at, made), stored in zip(came, took, strict=False)]
    return [each - min(late) for each in late] if late else []


def is_held(exchange: Exchange, options: Options) -> bool:
    """Say whether an answer at a steady pace comes in few pieces, long after they were made."""
    late = delays(exchange)
    if not late:  # it is compressed by what we cannot read, or nothing came: there are only the bytes
        return exchange.status == 200 and 0 < len(_bursts(exchange, options)) <= options.chunks // 3
    return median(late) > max(HELD_PAUSES * options.pause, HELD_SECONDS) and len(
        _bursts(exchange, options)
    ) <= HELD_PIECES * len(late)


def _bursts(exchange: Exchange, options: Options) -> list[float]:
    """Give when bytes came, those that came together counted once."""
    times: list[float] = []
    for at, _ in exchange.reads:
        if not times or at - times[-1] > options.pause / 2:
            times.append(at)
    return times


def flaws(events: Sequence[Event], *, first: int = 0) -> list[str]:
    """Give what is wrong with the order of events that were to begin with an offset: lost, repeated, out of order, altered."""
    offsets = [event.offset for event in events if event.offset is not None]
    counts, found = Counter(offsets), list[str]()
    end = min(max(offsets, default=first - 1), first + MAX_EVENTS)  # an offset may be any number
    if lost := [offset for offset in range(first, end + 1) if offset not in counts]:
        found.append(f"lost: {_numbers(lost)}")
    if repeated := sorted(offset for offset, count in counts.items() if count > 1 or offset < first):
        found.append(f"came twice: {_numbers(repeated)}")
    elif offsets != sorted(offsets):
        found.append("out of order")
    if altered := [event.offset for event in events if event.name == "chunk" and _is_altered(event)]:
        found.append(f"altered: {_numbers(altered)}")
    if count := sum(event.offset is None for event in events if event.name in {"chunk", "done"}):
        found.append(f"without an id: {count} events")
    return found


def _is_altered(event: Event) -> bool:
    return event.made is None or (event.offset is not None and event.made.n != event.offset)


def _numbers(numbers: Sequence[int | None]) -> str:
    shown = ", ".join(str(number) for number in numbers[:5])
    return f"{len(numbers)} events ({shown}{', …' if len(numbers) > 5 else ''})"


def strangers(seen: Seen) -> dict[str, tuple[int, int]]:
    """Give how often each instance knew a stream that was there, and how often not."""
    answers: dict[str, tuple[int, int]] = {}
    for exchange in [*seen.known, *_asked_of(seen)]:
        name = exchange.instance or "one that does not say its name"
        known, unknown = answers.get(name, (0, 0))
        if exchange.status == 200:
            answers[name] = known + 1, unknown
        elif exchange.status in {204, 404}:
            answers[name] = known, unknown + 1
    return answers


def _asked_of(seen: Seen) -> list[Exchange]:
    """Give what an app has answered, in the other steps, to who asked for a stream by its path: a balancer may go by that."""
    gone_on = [
        each.rest for each in seen.resumed if each.rest is not each.first and each.how != "POST" and not each.first.terminal
    ]
    return [exchange for exchange in [*seen.readers, *gone_on, *seen.stops] if exchange.instance]


def _is_split(seen: Seen) -> bool:
    return any(unknown for _, unknown in strangers(seen).values())


def _is_unknown(exchange: Exchange) -> bool:
    """Say whether an answer says that there is no such stream. Who comes back by a POST is told so in an event."""
    told = exchange.events[0] if exchange.events else None
    return exchange.status in {204, 404} or (told is not None and told.offset is None and "NOT_FOUND" in told.data)


def _is_ended_by_app(exchange: Exchange, seen: Seen) -> bool:
    """Say whether it has lasted as long as the app lets an answer last, or be silent, as `Timeouts(longest=…, idle=…)` says."""
    if exchange.told is not None and exchange.told.status == "DEADLINE_EXCEEDED":
        return True
    return exchange.end in {"cut", "whole"} and exchange.ended >= seen.first.hello.longest


def _not_whole(exchange: Exchange, what: str, seen: Seen) -> Iterator[Finding]:
    """Give why an answer has no end, if it has none."""
    code = exchange.status
    if exchange.terminal is not None or (_is_split(seen) and _is_unknown(exchange)):
        return
    if code == 200 and (_is_ended_by_app(exchange, seen) or _is_flowing(exchange)):
        return
    if code == 0:
        yield Finding("refused", "failure", f"{what} was not answered: {exchange.why or 'nothing came'}")
    elif code in {429, 503}:
        kind = _turned_away(exchange)
        yield Finding(kind, LEVELS[kind], f"{what} was answered {code}{_error_text(exchange)}, while others were read")
    elif code != 200:
        yield Finding("refused", "failure", f"{what} was answered {code}{_error_text(exchange)}")
    elif exchange.end == "late":
        yield Finding(
            "hang",
            "failure",
            f"{what} had no end within {exchange.ended:.0f} s; the last byte was {exchange.silence:.1f} s ago",
        )
    elif exchange.told is not None:
        yield _broken_off(exchange, what)
    elif exchange.end in {"cut", "whole"} and not _is_unread(exchange):
        how = "cut" if exchange.end == "cut" else "ended as if it were whole"
        if exchange.silence >= SILENCE_SECONDS:
            yield Finding("idle-cut", "failure", f"{what} was {how} after {exchange.silence:.1f} s of silence")
        else:
            yield Finding(
                "cut-short", "failure", f"{what} was {how} {exchange.ended:.1f} s after it was asked for, though bytes came"
            )


LEVELS: Final[Mapping[str, Level]] = {"turned-away": "failure", "other-checks": "warning"}


def _turned_away(exchange: Exchange) -> str:
    """Give what kind of finding it is that a request was turned away."""
    error = app_error(exchange)
    return "other-checks" if error is not None and error.message == TOO_MANY else "turned-away"


def _broken_off(exchange: Exchange, what: str) -> Finding:
    by = f" by {exchange.instance}" if exchange.instance else ""
    return Finding("refused", "failure", f"{what} was broken off{by}, which says why ({exchange.told})")


def _is_flowing(exchange: Exchange) -> bool:
    """Say whether much of an answer was still coming when we had waited for long: see `_slow`."""
    return (
        exchange.end == "late"
        and sum(size for at, size in exchange.reads if at >= exchange.ended - FLOWING_SECONDS) >= FLOWING_BYTES
    )


def _is_unread(exchange: Exchange) -> bool:
    """Say whether there is nothing that we can read in it."""
    readable = {"", "identity", "gzip", "x-gzip", "deflate"}
    kind = exchange.header("content-type").lower()
    return exchange.header("content-encoding").lower() not in readable or "event-stream" not in kind


def _error_text(exchange: Exchange) -> str:
    error = app_error(exchange)
    return f" ({error.status}: {error.message[:200]})" if error else ""


def app_error(exchange: Exchange) -> ErrorInfo | None:
    """Give the error that an answer is, if it is one of the app's."""
    try:
        return error_of(bytes(exchange.body))
    except InvalidArgumentError:
        return None


# The rules


def _headers(seen: Seen) -> Iterator[Finding]:
    probe = seen.probe
    if probe is None:
        yield Finding(
            "request-headers", "failure", "a request with the headers by which readers go on got no answer of the app"
        )
        return
    sent = [(name, text, probe.hello.headers.get(name)) for name, text in PROBED_HEADERS]
    sent += [(f"?{name}=", text, probe.hello.query.get(name)) for name, text in PROBED_QUERY]
    told = [
        *([f"what the app never gets: {', '.join(lost)}"] if (lost := [name for name, _, got in sent if got is None]) else []),
        *(f"{name} is {text!r}, and {got!r} when it arrives" for name, text, got in sent if got is not None and got != text),
    ]
    if told:
        yield Finding("request-headers", "failure", "; ".join(told))


def _answers_headers(seen: Seen) -> Iterator[Finding]:
    for exchange in seen.paces:
        if exchange.status != 200:
            continue
        kind = exchange.header("content-type")
        if not kind.lower().startswith("text/event-stream"):
            yield Finding("content-type", "failure", f"an answer comes as {kind or 'nothing'} instead of text/event-stream")
        if not exchange.header("x-genkit-stream-id"):
            yield Finding("answer-headers", "failure", "the answer to a start has no X-Genkit-Stream-Id any more")
    if not seen.first.exchange.header("retry-after"):
        yield Finding("retry-after", "warning", "Retry-After does not come through")


def _protocol(seen: Seen) -> Iterator[Finding]:
    if seen.first.hello.http_version == "1.0":
        yield Finding("http-1.0", "warning", "the proxy asks the app by HTTP/1.0")
    elif any(exchange.status == 200 and not exchange.is_delimited for exchange in seen.paces):
        version = seen.paces[0].version
        yield Finding("http-1.0", "warning", f"an answer ends where its connection does (HTTP/{version}, no chunks)")


def _hidden_cuts(seen: Seen) -> Iterator[Finding]:
    exchange = seen.broken
    if exchange is None or exchange.status != 200 or exchange.end != "whole" or seen.first.hello.http_version == "1.0":
        return
    if exchange.is_delimited:  # else `_protocol` says so
        yield Finding("hidden-cuts", "warning", "an answer that the app broke off came as if it were complete")


def _missing(seen: Seen) -> Iterator[Finding]:
    exchange = seen.missing
    if exchange is not None and not _is_unlucky(exchange):
        if exchange.status != 404:
            yield Finding(
                "errors-replaced", "warning", f"a stream that does not exist is answered {exchange.status} instead of 404"
            )
        elif (error := app_error(exchange)) is None or error.status != "NOT_FOUND":
            yield Finding("errors-replaced", "warning", "the body of a 404 is not the app's")


def _body(seen: Seen) -> Iterator[Finding]:
    exchange = seen.body
    if exchange is None or exchange.status == 200:
        return
    size = f"{len(exchange.request.body) / (1 << 20):.1f} MiB"
    if exchange.status == 408 and (error := app_error(exchange)) is not None:
        yield Finding("slow-network", "note", f"to send a body of {size} takes longer than the app waits: {error.message}")
        return
    said = exchange.status or exchange.why or f"nothing within {exchange.ended:.0f} s"
    yield Finding("body", "warning", f"a body of {size}, which the app takes, is answered {said}")


def _slow(seen: Seen) -> Iterator[Finding]:
    for exchange in seen.exchanges:
        if _is_flowing(exchange) and exchange.terminal is None:
            rate = exchange.bytes / 1000 / exchange.ended
            came = f"{len(exchange.chunks)} chunks of it, at {rate:.0f} kB a second"
            yield Finding("slow-network", "note", f"{exchange.request.about} still came after {exchange.ended:.0f} s, {came}")


def _compression(seen: Seen) -> Iterator[Finding]:
    exchange = seen.paces[0] if seen.paces else None
    if exchange is not None and (coding := exchange.header("content-encoding")) not in {"", "identity"}:
        if is_held(exchange, seen.options):
            yield Finding(
                "compressed", "failure", f"the answer is compressed ({coding}), and comes {_held(exchange, seen.options)}"
            )
        else:
            yield Finding("compressed", "warning", f"the answer is compressed ({coding}); it came in time")


def _buffering(seen: Seen) -> Iterator[Finding]:
    plain = [exchange for exchange in seen.paces if exchange.header("content-encoding") in {"", "identity"}]
    if not plain or not all(is_held(exchange, seen.options) for exchange in plain):
        return
    if len(seen.paces) == 1:
        return  # it was not tried again
    sentence = f"the answer comes {_held(plain[-1], seen.options)}"
    if seen.coarse is not None and seen.coarse.status == 200 and not is_held(seen.coarse, seen.options):
        sentence += "; chunks of 4 KiB come at once, so something waits until a few KiB are together"
    yield Finding("buffered", "failure", sentence)


def _buffering_by_some(seen: Seen) -> Iterator[Finding]:
    """Find what holds back on one of several ways: two answers are late, while another comes. No busy machine does that."""
    started = [
        exchange
        for exchange in seen.exchanges
        if exchange.request.method == "POST" and is_shown(exchange) and exchange.header("content-encoding") in {"", "identity"}
    ]
    held = [exchange for exchange in started if _is_held_for_sure(exchange, seen.options)]
    if len(held) > 1 and any(_came_meanwhile(other, exchange, seen.options) for exchange in held for other in started):
        told = f"{len(held)} of {len(started)} answers were held back, while others came as they were made"
        yield Finding("buffered", "failure", told)


def _is_held_for_sure(exchange: Exchange, options: Options) -> bool:
    late = delays(exchange)
    return bool(late) and max(late) > HELD_FOR_SURE_SECONDS and len(_bursts(exchange, options)) <= 2


def _came_meanwhile(other: Exchange, held: Exchange, options: Options) -> bool:
    """Say whether bytes of another answer came again and again while nothing came of this one."""
    until = held.began + held.reads[0][0]
    return sum(held.began < other.began + at < until for at in _bursts(other, options)) >= HELD_MEANWHILE


def _held(exchange: Exchange, options: Options) -> str:
    late, bursts = delays(exchange), len(_bursts(exchange, options))
    pieces = "all at once, when it has ended" if bursts == 1 else f"in {bursts} pieces"
    count = len(exchange.chunks) or options.chunks
    return f"{pieces}: {count} chunks over {options.seconds:.1f} s{f', up to {max(late):.1f} s late' if late else ''}"


def _integrity(seen: Seen) -> Iterator[Finding]:
    answers = [("an answer", exchange) for exchange in seen.paces if not _is_unread(exchange)]
    answers += [
        ("an answer that several read", exchange) for exchange in [*([seen.started] if seen.started else []), *seen.readers]
    ]
    for what, exchange in answers:
        if found := flaws(exchange.events):
            yield Finding("lost", "failure", f"{what}: {'; '.join(found)}")
    for resumed in seen.resumed:
        yield from _resumed(resumed, seen)


def _resumed(resumed: Resumed, seen: Seen) -> Iterator[Finding]:
    first, rest = resumed.first, resumed.rest
    if first is rest or first.terminal is not None:
        return  # it had not begun: see `_ends`; or all of it came before we could leave
    code = rest.status
    if _is_split(seen) and _is_unknown(rest):
        return
    if code != 200:
        by = f" by {rest.instance}" if rest.instance else ""
        yield Finding("resume", "failure", f"going on ({resumed.how}) was answered {code or rest.why}{by}{_error_text(rest)}")
        return
    events = rest.events if resumed.how == "reload" else [*first.events, *rest.events]
    if rest.events and rest.stream != first.stream:
        yield Finding("resume", "failure", f"going on ({resumed.how}) gave another stream")
    elif found := flaws(events):
        yield Finding("resume", "failure", f"going on ({resumed.how}): {'; '.join(found)}")


def _ends(seen: Seen) -> Iterator[Finding]:
    for exchange in seen.paces:
        yield from _not_whole(exchange, "an answer", seen)
    for resumed in seen.resumed:
        if resumed.first is resumed.rest:
            yield from _not_whole(resumed.first, "an answer", seen)
        elif resumed.rest.status == 200 and resumed.first.terminal is None:
            yield from _not_whole(resumed.rest, f"the rest of an answer ({resumed.how})", seen)
    for exchange in [*([seen.started] if seen.started else []), *seen.readers]:
        yield from _not_whole(exchange, f"{exchange.request.about} ({len(seen.readers)} at once)", seen)


def _others(seen: Seen) -> Iterator[Finding]:
    """Give what was not answered as it should be, of all that no other rule looks at: one of many requests may be the unlucky one."""
    asked: dict[str, list[Exchange]] = {}
    for exchange in seen.exchanges:
        asked.setdefault(exchange.request.about, []).append(exchange)
    judged = {id(exchange) for exchange in _judged_elsewhere(seen)}
    for about, exchanges in asked.items():
        of_how_many = f", {{}} of {len(exchanges)} times" if len(exchanges) > 1 else ""
        bad: dict[str, list[tuple[str, str]]] = {}
        for exchange in exchanges:
            if id(exchange) not in judged and (why := _why_not_answered(exchange, seen)):
                bad.setdefault(why[0], []).append(why)
        for kind, reasons in bad.items():
            yield Finding(kind, LEVELS.get(kind, "failure"), f"{about}: {reasons[0][1]}{of_how_many.format(len(reasons))}")


def _judged_elsewhere(seen: Seen) -> Iterator[Exchange | None]:
    yield from seen.paces
    yield from seen.readers
    yield from (stop for stop in seen.stops if not _is_unlucky(stop) or stop is seen.stops[-1])
    for resumed in seen.resumed:
        yield from (resumed.first, resumed.rest)
    for preflight in seen.preflights:
        yield from (preflight.exchange, preflight.bare, *preflight.alone)
    yield from (seen.started, seen.idle, seen.idle_rest, seen.body, seen.probe.exchange if seen.probe else None)
    yield from (each for each in (seen.missing, seen.cors_missing) if each is not None and not _is_unlucky(each))
    if seen.broken is not None and (seen.broken.end == "cut" or seen.broken.status == 404):  # 404: an older CheckHTTP
        yield seen.broken
    if seen.stops:
        yield seen.stopped


def _is_unlucky(exchange: Exchange) -> bool:
    """Say whether a request was not refused for what it is: who was to answer it was away, or had too much to do."""
    return exchange.status in {0, 429, 500, 502, 503, 504}


def _why_not_answered(exchange: Exchange, seen: Seen) -> tuple[str, str] | None:
    """Give what kind of finding it is that an answer is not what it should be, and what it is instead."""
    code, request = exchange.status, exchange.request
    why: tuple[str, str] | None = None
    is_unknown = (code == 404 and request.path.startswith("/streams/")) or (_is_split(seen) and _is_unknown(exchange))
    if request.about == CLEANING_UP or is_unknown:
        pass  # that is for `_instances`
    elif _is_flowing(exchange):
        pass  # that is for `_slow`
    elif exchange.end == "late":
        why = "hang", f"no answer, or no end of it, within {exchange.ended:.0f} s"
    elif code == 0:
        why = "refused", exchange.why or "nothing came"
    elif code != 200:
        why = _turned_away(exchange) if code in {429, 503} else "refused", f"answered {code}{_error_text(exchange)}"
    elif exchange.end == "whole" and exchange.why:
        why = "refused", f"answered 200, but {exchange.why}"
    elif exchange.told is not None and not _is_ended_by_app(exchange, seen):
        why = "refused", f"broken off by the app ({exchange.told})"
    elif exchange.end == "cut" and not exchange.terminal and not _is_ended_by_app(exchange, seen):
        why = "cut-short", f"cut {exchange.ended:.1f} s after it was asked for"
    return why


def _twice(seen: Seen) -> Iterator[Finding]:
    streams = {exchange.stream for exchange in seen.twice if exchange.status == 200 and exchange.stream}
    if len(streams) > 1 and not _is_split(seen):
        yield Finding("idempotency", "failure", "a start that was sent twice with one Idempotency-Key has started two streams")


def _caching(seen: Seen) -> Iterator[Finding]:
    marks = Counter(mark for exchange in seen.exchanges if (mark := exchange.header("x-streamkeep-answer")))
    if unmarked := [exchange for exchange in seen.paces if is_shown(exchange) and not exchange.header("x-streamkeep-answer")]:
        yield Finding(
            "answer-headers",
            "warning",
            f"{len(unmarked)} answers have no X-Streamkeep-Answer any more: whether they come from a cache, and by whom, cannot be seen",
        )
    if again := [mark for mark, count in marks.items() if count > 1]:
        what = next(exchange for exchange in seen.exchanges if exchange.header("x-streamkeep-answer") in again)
        yield Finding(
            "cached", "failure", f"an answer came from a cache: {what.request.method} {what.request.path.partition('?')[0]}"
        )


def _stopping(seen: Seen) -> Iterator[Finding]:
    if not seen.stops or (
        _is_split(seen) and all(exchange.status in {200, 404} for exchange in seen.stops) and seen.stopped_after is None
    ):
        return
    first, last = seen.stops[0], seen.stops[-1]
    if last.status != 200:
        yield Finding(
            "stop", "failure", f"stopping was answered {first.status or first.why}; by POST {last.status or last.why}"
        )
        return
    if first.status != 200 and not _is_unlucky(first) and not (_is_split(seen) and first.status == 404):
        yield Finding("delete", "warning", f"DELETE was answered {first.status or first.why}; POST …/cancel works")
    end = seen.stopped.terminal if seen.stopped else None
    if end is not None and end.name == "done" and b"true" not in last.body:  # {"stopped": false}
        yield Finding("buffered", "failure", "an answer was over before its head came, so that it could not be stopped")
        return
    if seen.stopped_after is None:
        yield Finding("stop", "failure", "a stream was stopped, and its reader was not told within 10 s")
    elif end is None and seen.stopped is not None and _is_ended_by_app(seen.stopped, seen):
        return
    elif end is None or end.name != "error" or "CANCELLED" not in end.data:
        yield Finding(
            "stop", "failure", f"a stream was stopped, and its reader got {end.name if end else 'no end'} instead of CANCELLED"
        )


def _idle(seen: Seen) -> Iterator[Finding]:
    idle = seen.idle
    if idle is None or (idle.terminal is None and _is_ended_by_app(idle, seen)):
        return
    heartbeat = seen.first.hello.heartbeat
    if idle.status == 200 and idle.terminal is None and idle.end in {"cut", "whole"} and idle.told is None:
        rest = _gone_on(seen.idle_rest)
        if idle.silence >= SILENCE_SECONDS:
            told = f"after {idle.silence:.1f} s without a byte; the app's heartbeat comes every {heartbeat:g} s"
            yield Finding("idle-cut", "failure", f"a silent answer was cut {told}; {rest}")
        else:
            yield Finding("cut-short", "failure", f"an answer was cut {idle.ended:.1f} s after it was asked for; {rest}")
        return
    yield from _not_whole(idle, "a silent answer", seen)
    quiet = seen.idle_seconds
    is_due = quiet >= heartbeat + min(0.4 * heartbeat + 1, IDLE_SPARE_SECONDS)
    if idle.terminal is not None and is_due and _longest_silence(idle) >= 0.9 * quiet and not _came_in_silence(idle):
        yield Finding(
            "heartbeats",
            "failure",
            f"nothing came in {quiet:.0f} s of silence, though the app sends a heartbeat every {heartbeat:g} s",
        )


def _gone_on(rest: Exchange | None) -> str:
    if rest is None or rest.status != 200:
        return "it could not be gone on with" + (f" ({rest.status or rest.why})" if rest else "")
    return "it could be gone on with" + ("" if rest.terminal else ", and was cut again")


def _came_in_silence(exchange: Exchange) -> bool:
    """Say whether anything came apart from events, between the two that are farthest apart."""
    times = [event.came for event in exchange.events]
    before, after = max(pairwise(times), key=lambda pair: pair[1] - pair[0], default=(0.0, 0.0))
    return any(before < at < after for at, _ in exchange.reads)


def _longest_silence(exchange: Exchange) -> float:
    times = [0.0, exchange.head, *[at for at, _ in exchange.reads]]
    return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


def _instances(seen: Seen) -> Iterator[Finding]:
    answers = strangers(seen)
    unknown = {name: counts for name, counts in answers.items() if counts[1]}
    if not unknown:
        return
    told = [
        f"{name} ({'never' if not known else f'{known} of {known + not_known} times'})"
        for name, (known, not_known) in unknown.items()
    ]
    knows = [name for name, (known, not_known) in answers.items() if known and not not_known]
    yield Finding(
        "another-storage",
        "failure",
        f"a stream that runs is not known to {', '.join(told)}" + (f"; it is to {', '.join(knows)}" if knows else ""),
    )


def _clocks(seen: Seen) -> Iterator[Finding]:
    ahead: dict[str, list[Greeting]] = {}
    for greeting in seen.greetings:
        ahead.setdefault(greeting.hello.instance, []).append(greeting)
    best = {name: min(said, key=lambda each: each.exchange.ended) for name, said in ahead.items()}
    if len(best) > 1:
        first, last = (choose(best.values(), key=lambda each: each.clock_ahead) for choose in (min, max))
        apart = last.clock_ahead - first.clock_ahead
        if apart > CLOCK_SECONDS + first.exchange.ended + last.exchange.ended:
            names = f"{last.hello.instance} is {apart:.1f} s ahead of {first.hello.instance}"
            yield Finding("clocks", "warning", f"the clocks of the instances differ: {names}")


def _paths(seen: Seen) -> Iterator[Finding]:
    paths = sorted({greeting.hello.path for greeting in seen.greetings})
    if len(paths) > 1:
        yield Finding("paths", "warning", f"the app sees the same request at {' and at '.join(paths)}")


def _storage(seen: Seen) -> Iterator[Finding]:
    took = [made.took for exchange in seen.paces for made in exchange.chunks[1:]]
    if took and median(took) > SLOW_STORAGE_SECONDS:
        yield Finding("slow-storage", "warning", f"storing a chunk takes {median(took):.1f} s")


def _keep_alive(seen: Seen) -> Iterator[Finding]:
    hellos = [greeting.exchange for greeting in seen.greetings]
    if all("close" in exchange.header("connection").lower() or exchange.version == "1.0" for exchange in hellos):
        yield Finding("keep-alive", "note", "each answer closes its connection")


RULES: Final[Sequence[Callable[[Seen], Iterator[Finding]]]] = (
    _instances,
    _headers,
    _buffering,
    _buffering_by_some,
    _compression,
    _idle,
    _ends,
    _integrity,
    _twice,
    _caching,
    _stopping,
    _answers_headers,
    cors,
    _protocol,
    _hidden_cuts,
    _missing,
    _body,
    _clocks,
    _paths,
    _storage,
    _keep_alive,
    _slow,
    _others,
)
