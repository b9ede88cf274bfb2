"""What each finding means for users, and how it is mended. `docs/how-to/check.md` has a section for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Level = Literal["failure", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Advice:
    """About one kind of finding.

    Attributes:
        title: its name for people.
        means: what it means for users.
        mend: how it is mended, one way each.
    """

    title: str
    means: str
    mend: Sequence[str]


ADVICE: Final[Mapping[str, Advice]] = {
    "another-storage": Advice(
        "instances with another storage",
        "Who reloads, comes back or presses Stop, and lands there, is told that the answer does not exist.",
        (
            "give all instances the same storage URL; a SQLite file is for the processes of one machine, memory:// for one process",
            "see whether the load balancer also sends to an old deployment, or to another environment",
        ),
    ),
    "request-headers": Advice(
        "headers of requests that are dropped",
        "Readers who come back do not go on where they were, and a start that is sent twice starts twice.",
        (
            "nginx: take away proxy_set_header lines that empty them, and proxy_pass_request_headers off",
            "CDN: forward these headers and the query to the origin",
        ),
    ),
    "buffered": Advice(
        "an answer that is held back",
        "Users see nothing, and then much at once; also heartbeats are held back, so that connections look idle.",
        (
            "nginx: proxy_buffering off; or do not ignore X-Accel-Buffering (proxy_ignore_headers)",
            "Caddy: no response_buffers in reverse_proxy; it passes a stream on at once unless it is told to wait",
            "Apache: SetEnv proxy-sendchunked 1, and flushpackets=on at ProxyPass",
            "CDN, or a scanner of content: pass text/event-stream through",
            "the app: a middleware that collects whole answers (BaseHTTPMiddleware of others, ETag, logging of bodies)",
        ),
    ),
    "compressed": Advice(
        "an answer that is compressed",
        "A compressor waits for enough to compress; browsers, which all ask for it, see chunks late.",
        (
            "nginx: take text/event-stream out of gzip_types and brotli_types, and do not use gzip_types *",
            "Caddy: encode with a matcher that leaves text/event-stream out",
            "the app: have GZipMiddleware leave text/event-stream out (Starlette 0.46 and newer do)",
        ),
    ),
    "idle-cut": Advice(
        "silent connections that are cut",
        "While a model thinks, its readers are cut; those that come back go on, others show an error.",
        (
            "nginx: proxy_read_timeout 1h; also send_timeout",
            "AWS: the idle timeout of the load balancer; HAProxy: timeout server and timeout tunnel; Envoy: stream_idle_timeout",
            "or have the app speak more often: StreamsHTTP(timeouts=Timeouts(heartbeat=timedelta(seconds=5)))",
        ),
    ),
    "heartbeats": Advice(
        "heartbeats that do not come through",
        "Something on the way holds small pieces back; connections look idle, and are cut some day.",
        ("mend what holds back, as for an answer that is held back (nginx: proxy_buffering off; Caddy: no response_buffers)",),
    ),
    "cut-short": Advice(
        "answers that are cut",
        "Long answers break, although they were not silent; those that come back go on, others show an error.",
        (
            "raise the longest time of a request: a gateway's or a CDN's response timeout, Envoy's route timeout (0s), Cloud Run's timeout",
            "or have the app end answers earlier by itself, which clients know: Timeouts(longest=…)",
        ),
    ),
    "refused": Advice(
        "requests that are refused",
        "Users get an error instead of an answer.",
        ("look up the answer's code in the logs of the proxy and of the app",),
    ),
    "hang": Advice(
        "answers without an end",
        "Users wait for ever.",
        ("look in the log of the app; see whether something on the way keeps connections open whose server has gone",),
    ),
    "lost": Advice(
        "events that are lost, repeated, disordered or altered",
        "Users see text that is not what was produced.",
        ("find what rewrites bodies on the way: filters, a cache, an injecting proxy (nginx: sub_filter)",),
    ),
    "resume": Advice(
        "answers that cannot be gone on with",
        "Who loses the connection loses the rest of the answer, or sees parts of it twice.",
        (
            "forward Last-Event-ID and the query as they are",
            "do not rewrite paths differently from one instance to another: a stream belongs to the path it was started through",
        ),
    ),
    "turned-away": Advice(
        "requests that are turned away",
        "Second tabs, and several users behind one address, get an error.",
        (
            "raise limits of connections: nginx limit_conn and limit_req, uvicorn --limit-concurrency, the balancer's",
            "or StreamsHTTP(max_producers=), where the answer says RESOURCE_EXHAUSTED",
        ),
    ),
    "other-checks": Advice(
        "other checks at the same time",
        "The app runs few streams of checks at a time, so this check has not seen all. Users are not concerned.",
        ("run one check of an instance at a time",),
    ),
    "idempotency": Advice(
        "starts that run twice",
        "A start that a browser or a proxy sends again is paid for twice.",
        ("forward Idempotency-Key as it is",),
    ),
    "cached": Advice(
        "answers from a cache",
        "Users are shown what was true some time ago, or what was somebody else's.",
        (
            "nginx: no proxy_cache for these paths, and no proxy_ignore_headers Cache-Control",
            "CDN: a rule that bypasses the cache for them",
        ),
    ),
    "stop": Advice(
        "Stop that does not stop",
        "Users press Stop, and tokens go on being paid for.",
        ("see why it is refused on the way; and that all instances have the same storage",),
    ),
    "delete": Advice(
        "DELETE that is refused",
        "Clients that stop by DELETE cannot.",
        ("allow the method on the way (nginx: limit_except; a firewall's rules), or stop by POST …/cancel",),
    ),
    "content-type": Advice(
        "an answer under another type",
        "An EventSource refuses it, and never comes back.",
        ("leave Content-Type as the app has sent it (nginx: proxy_hide_header, add_header, default_type)",),
    ),
    "answer-headers": Advice(
        "headers of answers that are dropped",
        "Genkit's clients, and pages that read the stream's id from there, cannot go on.",
        ("nginx: take away proxy_hide_header X-Genkit-Stream-Id; CDN: pass it through",),
    ),
    "retry-after": Advice(
        "Retry-After that is dropped",
        "Clients that are told to wait do not know how long.",
        ("pass it through",),
    ),
    "cors": Advice(
        "an origin that is not let in",
        "Pages of that origin cannot read answers at all.",
        (
            "the app: CORSMiddleware(allow_origins=[…]) outermost, around DurableStreaming too",
            "let either the app or the proxy say it, not both",
        ),
    ),
    "cors-methods": Advice(
        "methods that another origin may not use",
        "Pages of that origin cannot stop an answer.",
        ('the app: CORSMiddleware(allow_methods=["GET", "POST", "DELETE"])',),
    ),
    "cors-headers": Advice(
        "headers that another origin may not send",
        "The browser refuses to send requests that have them: pages cannot go on, or not say who they are.",
        ("the app: CORSMiddleware(allow_headers=[…]) with those that are named above",),
    ),
    "cors-exposed": Advice(
        "headers that another origin cannot read",
        "Pages that read the stream's id from its header, as Genkit's client does, cannot go on.",
        ('the app: CORSMiddleware(expose_headers=["X-Genkit-Stream-Id"]), or no expose_headers: streamkeep exposes it itself',),
    ),
    "cors-errors": Advice(
        "errors that another origin cannot read",
        "A page sees a failed fetch instead of why.",
        ("put CORSMiddleware outermost; nginx: add_header … always",),
    ),
    "http-1.0": Advice(
        "answers whose end looks like a cut",
        "A connection that breaks looks like the end of the answer to clients that know no better.",
        ("nginx: proxy_http_version 1.1; proxy_set_header Connection ''",),
    ),
    "hidden-cuts": Advice(
        "cuts that look like an end",
        "When an instance is lost, clients that do not look for the last event take half an answer for all of it.",
        (
            "Caddy: 2.11, or newer; 2.6 ends such an answer as if it were complete",
            "the app: take away middleware of BaseHTTPMiddleware, or write it as plain ASGI",
            "the server: Daphne, and HTTP/2 of hypercorn, cannot cut an answer; uvicorn, granian and gunicorn can",
            "or have clients look for the last event: done, finish, [DONE]",
        ),
    ),
    "errors-replaced": Advice(
        "errors that are replaced",
        "Clients cannot tell why they were refused, and may try for ever.",
        ("nginx: proxy_intercept_errors off for these paths; no page of its own for 404",),
    ),
    "body": Advice(
        "large requests that are refused",
        "Long conversations, which clients send whole, are refused from some length on.",
        ("nginx: client_max_body_size 4m; or have StreamsHTTP(max_body_bytes=…) say what is meant",),
    ),
    "clocks": Advice(
        "clocks that differ",
        "Ended streams are kept a little longer or shorter than said. Nothing else goes by these clocks.",
        ("run NTP on all machines",),
    ),
    "paths": Advice(
        "paths that differ",
        "A stream belongs to the path it was started through: who comes back through another may not find it.",
        ("rewrite paths in the same way on all ways to the app",),
    ),
    "slow-storage": Advice(
        "a slow storage",
        "Every chunk is stored before it is shown, so users wait for the storage each time.",
        ("put the storage near the app; see docs/explanation/performance.md",),
    ),
    "slow-network": Advice(
        "a network that is slow, here",
        "The check has not seen all of what it has asked for. Users on such a network wait, and lose nothing.",
        ("run the check from elsewhere, or with fewer --readers",),
    ),
    "keep-alive": Advice(
        "connections that are not used again",
        "Each request costs a new connection. Nothing is lost.",
        ("nginx: keepalive_timeout; the balancer's keep-alive",),
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong.

    Attributes:
        id: which of the known things it is; the section of the page on checks has its name.
        level: a failure: users lose something; a warning: they may, some day; a note: nothing is lost.
        seen: what was seen.
    """

    id: str
    level: Level
    seen: str

    @property
    def means(self) -> str:
        """What it means for users."""
        return ADVICE[self.id].means

    @property
    def mend(self) -> Sequence[str]:
        """How to mend it, one way each."""
        return ADVICE[self.id].mend
