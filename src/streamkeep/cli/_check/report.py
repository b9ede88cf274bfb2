"""What a check prints: for people a line for each step, then what is wrong, then the verdict; for machines all that was seen."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from .._output import printable, shown_url
from .advice import ADVICE, Finding
from .exchange import Exchange
from .rules import delays, strangers
from .seen import Seen

PAGE: Final = "docs/how-to/check.md"
MAX_READS: Final = 500
MAX_HEADERS: Final = 100
SECRET_HEADERS: Final = frozenset(("authorization", "cookie", "proxy-authorization", "set-cookie"))


def verdict(findings: Sequence[Finding]) -> str:
    """Give the sum of it, in a line."""
    counts = Counter(finding.level for finding in findings)
    told = [f"{counts[level]} {level}{'' if counts[level] == 1 else 's'}" for level in ("failure", "warning") if counts[level]]
    return f"{'not sound' if counts['failure'] else 'sound'}: {', '.join(told) or 'nothing found'}"


def lines(seen: Seen, findings: Sequence[Finding]) -> Iterator[str]:
    """Give what people read."""
    for name, text in _steps(seen):
        yield f"  {name:<10} {printable(' '.join(text.split()))}"
    for finding in findings:
        yield ""
        yield f"{finding.level}: {ADVICE[finding.id].title}"
        yield f"  seen   {printable(' '.join(finding.seen.split()))}"
        yield f"  means  {finding.means}"
        for number, way in enumerate(finding.mend):
            yield f"  {'mend' if not number else '':<6} {way}"
        yield f"  more   {PAGE}#{finding.id.replace('.', '')}"
    yield ""
    yield verdict(findings)


def as_json(url: str, seen: Seen, findings: Sequence[Finding]) -> Mapping[str, object]:
    """Give what machines read. No header of a request that may be a secret is in it."""
    return {
        "url": shown_url(url),
        "isSound": all(finding.level != "failure" for finding in findings),
        "verdict": verdict(findings),
        "findings": [
            {"id": finding.id, "level": finding.level, "seen": finding.seen, "means": finding.means, "mend": finding.mend}
            for finding in findings
        ],
        "instances": {
            greeting.hello.instance: {"clockAhead": round(greeting.clock_ahead, 3)} for greeting in reversed(seen.greetings)
        },
        "steps": [{"step": name, "seen": text} for name, text in _steps(seen)],
        "history": [_shown(exchange) for exchange in seen.exchanges],
    }


def _shown(exchange: Exchange) -> Mapping[str, object]:
    request = exchange.request
    return {
        "about": request.about,
        "began": round(exchange.began, 3),
        "method": request.method,
        "path": request.path,
        "status": exchange.status,
        "version": exchange.version,
        "headers": [list(header) for header in exchange.headers[:MAX_HEADERS] if header[0] not in SECRET_HEADERS],
        "instance": exchange.instance,
        "head": round(exchange.head, 3),
        "reads": [[round(at, 3), size] for at, size in exchange.reads[:MAX_READS]],
        "bytes": exchange.bytes,
        "offsets": [event.offset for event in exchange.events if event.offset is not None],
        "came": [round(event.came, 3) for event in exchange.events if event.offset is not None],
        "terminal": exchange.terminal.name if exchange.terminal else None,
        "end": exchange.end,
        "ended": round(exchange.ended, 3),
        "why": exchange.why,
    }


def _steps(seen: Seen) -> Iterator[tuple[str, str]]:
    hellos = [greeting.exchange for greeting in seen.greetings]
    names = sorted({greeting.hello.instance for greeting in seen.greetings} | set(strangers(seen)))
    quickest = min(exchange.ended for exchange in hellos)
    yield "reached", f"{', '.join(names)}; HTTP/{hellos[0].version}, {1000 * quickest:.0f} ms away"
    if seen.paces:
        yield "answer", _answer(seen.paces[-1])
    for resumed in seen.resumed:
        where = f"by {resumed.rest.instance}" if resumed.rest.instance else ""
        rest = f"{len(resumed.rest.chunks)} chunks {where}" if resumed.rest.status == 200 else f"{resumed.rest.status} {where}"
        yield ("reload" if resumed.how == "reload" else "resume"), f"{resumed.how}: {rest}"
    if seen.readers:
        whole = sum(exchange.terminal is not None for exchange in seen.readers)
        yield "readers", f"{whole} of {len(seen.readers)} at once had all of it, one of them slow"
    if seen.stops:
        told = (
            "its reader was not told" if seen.stopped_after is None else f"its reader was told after {seen.stopped_after:.2f} s"
        )
        yield "stop", f"{seen.stops[-1].request.method}: {seen.stops[-1].status}; {told}"
    if seen.idle is not None:
        how = "and came to its end" if seen.idle.terminal else f"and ended after {seen.idle.ended:.1f} s"
        yield "idle", f"an answer was silent for {seen.idle_seconds:g} s, {how}"
    if seen.known:
        known = sum(exchange.status == 200 for exchange in seen.known)
        yield "instances", f"{known} of {len(seen.known)} questions were answered by who knows the stream"
    if seen.body is not None:
        yield "body", f"{len(seen.body.request.body) / (1 << 20):.1f} MiB: {seen.body.status or seen.body.why}"
    if seen.options.origin:
        yield (
            "origin",
            f"{seen.options.origin}: {', '.join(f'{each.method} {each.exchange.status}' for each in seen.preflights)}",
        )


def _answer(exchange: Exchange) -> str:
    late = delays(exchange)
    if not late:
        return f"{exchange.status or exchange.why}, {exchange.bytes} bytes"
    first = next(event.came for event in exchange.events if event.made is not None)
    within, most = 1000 * first, 1000 * max(late)
    return f"{len(late)} chunks in {exchange.ended:.1f} s; the first after {within:.0f} ms, none more than {most:.0f} ms late"
