"""The rules on pages of another origin: what a browser would not let them send or read."""

from collections.abc import Iterator

from .advice import Finding
from .exchange import Exchange
from .seen import Preflight, Seen


def cors(seen: Seen) -> Iterator[Finding]:
    """Say what keeps pages of the origin from reading answers, and what they may not send."""
    origin = seen.options.origin
    lets_in = any(each.exchange.is_success or (each.bare is not None and each.bare.is_success) for each in seen.preflights)
    for preflight in seen.preflights:
        yield from _preflight(preflight, origin, lets_in=lets_in)
    start = seen.cors_start
    if start is not None and start.status == 200:
        if why := _not_allowed(start, origin):
            yield Finding("cors", "failure", f"the answer to a start {why}")
        exposed = _list(start.header("access-control-expose-headers"))
        if not exposed & {"x-genkit-stream-id", "*"}:
            yield Finding("cors-exposed", "failure", "X-Genkit-Stream-Id is not among Access-Control-Expose-Headers")
    missing = seen.cors_missing
    if (
        missing is not None
        and missing.status
        and not _not_allowed(start or missing, origin)
        and (why := _not_allowed(missing, origin))
    ):
        yield Finding("cors-errors", "warning", f"an error's answer ({missing.status}) {why}")


def _preflight(preflight: Preflight, origin: str, *, lets_in: bool) -> Iterator[Finding]:
    """Say what is wrong with what a preflight was answered. `lets_in`: whether another one was answered well."""
    exchange, method, bare = preflight.exchange, preflight.method, preflight.bare
    is_bare = not exchange.is_success and bare is not None
    if is_bare and bare is not None:
        exchange = bare
    if not exchange.is_success:
        if is_bare and lets_in and not _not_allowed(exchange, origin):
            yield Finding(
                "cors-methods", "failure", f"a page may not send {method}: its preflight is answered {exchange.status}"
            )
        else:
            code = preflight.exchange.status or preflight.exchange.why
            yield Finding("cors", "failure", f"the preflight of a {method} is answered {code}")
        return
    if why := _not_allowed(exchange, origin):
        yield Finding("cors", "failure", f"the preflight of a {method} {why}")
        return
    methods = {name.upper() for name in _list(exchange.header("access-control-allow-methods"))}
    if method not in {"GET", "POST"} and not methods & {method, "*"}:
        yield Finding("cors-methods", "failure", f"a page may not send {method}")
    allowed = _list(exchange.header("access-control-allow-headers"))
    if is_bare:
        lacking = [name for name, alone in zip(preflight.names, preflight.alone, strict=True) if not alone.is_success]
    else:
        lacking = [name for name in preflight.names if name not in allowed and ("*" not in allowed or name == "authorization")]
    if is_bare and not lacking:
        yield Finding("cors", "failure", f"the preflight of a {method} is answered {preflight.exchange.status}")
    if lacking:
        yield Finding("cors-headers", "failure", f"a page may not send {', '.join(lacking)}")


def _not_allowed(exchange: Exchange, origin: str) -> str:
    """Give why a page of an origin may not read an answer; empty if it may."""
    given = exchange.all_of("access-control-allow-origin")
    match given:
        case []:
            return f"has no Access-Control-Allow-Origin for {origin}"
        case [one] if one in {"*", origin}:
            return ""
        case [one] if "," not in one:
            return f"allows {one}, and not {origin}"
        case _:
            return f"has Access-Control-Allow-Origin more than once ({', '.join(given)}), which browsers refuse"


def _list(text: str) -> set[str]:
    return {part.strip().lower() for part in text.split(",") if part.strip()}
