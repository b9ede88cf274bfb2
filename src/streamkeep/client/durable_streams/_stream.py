"""One stream of a server, as both forms of the client ask about it: what is sent, and what is made of the answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec

from ...errors import UnexpectedAnswerError
from ...events import ReadAs, decoder_of
from .._network import Call, Network
from .._retry import Retry
from .._sse import EVENT_STREAM
from ._batches import Events, Mode, Pages, dialect_of, is_json
from ._writing import Reply, body_of, reply_to, seconds_text, time_text

JSON: Final = "application/json"
MAX_NUMBER_DIGITS: Final = 16


@dataclass(frozen=True, slots=True)
class StreamHead:
    """What a server knows of a stream.

    Attributes:
        offset: where it ends; reading goes on from there.
        content_type: of what type it is.
        is_closed: whether nothing will be appended any more.
        ttl: how long it lives from the last time that it was read or written; None: the server does not say.
        expires_at: when it expires, as the server has it; None: the server does not say.
    """

    offset: str
    content_type: str
    is_closed: bool
    ttl: timedelta | None
    expires_at: str | None


@dataclass(frozen=True, slots=True)
class Target:
    """Which stream, and how it is asked for.

    Attributes:
        url: the stream's.
        headers: more headers, such as `Authorization`.
        content_type: what is appended to it, and created as.
        retry: when to try again, and when to give up.
    """

    url: str
    headers: Mapping[str, str]
    content_type: str
    retry: Retry

    def call(self, method: str, headers: Mapping[str, str] | None = None, body: bytes | None = None) -> Call:
        """Give a request; its own headers win over the user's, or a user's could break the protocol."""
        own = {"Accept-Encoding": "identity", **(headers or {})}
        names = {name.lower() for name in own}
        theirs = {name: value for name, value in self.headers.items() if name.lower() not in names}
        return Call(method, self.url, {**theirs, **own}, body=body)

    def dialect(self, offset: str, mode: Mode, message_type: ReadAs[Any] | None) -> Pages[Any] | Events[Any]:
        """Give what reads it. See `DurableStream.read`."""
        accept = {"Accept": EVENT_STREAM} if mode == "sse" else {}
        decode: Callable[[bytes], Any] = msgspec.json.decode if message_type is None else decoder_of(message_type)
        return dialect_of(self.call("GET", accept), offset, mode, decode, is_json=is_json(self.content_type))

    async def reply(self, network: Network, call: Call, *, is_repeatable: bool) -> Reply:
        """Send a request, and give its answer, whatever it is."""
        return await reply_to(network, call, self.retry, is_repeatable=is_repeatable)

    async def done(self, network: Network, call: Call, *, is_repeatable: bool) -> Reply:
        """Send a request, and give its answer. RefusedError: it was not done."""
        reply = await self.reply(network, call, is_repeatable=is_repeatable)
        if not reply.is_ok:
            raise reply.refusal()
        return reply

    async def create(
        self,
        network: Network,
        messages: Sequence[object],
        ttl: timedelta | None,
        expires_at: datetime | None,
        *,
        is_closed: bool,
    ) -> bool:
        """Create it. See `DurableStream.create`."""
        headers = {"Content-Type": self.content_type}
        if ttl is not None:
            headers["Stream-TTL"] = seconds_text(ttl)
        if expires_at is not None:
            headers["Stream-Expires-At"] = time_text(expires_at)
        if is_closed:
            headers["Stream-Closed"] = "true"
        body = body_of(messages, self.content_type) if messages else b""
        reply = await self.done(network, self.call("PUT", headers, body), is_repeatable=True)
        offset_in(reply)
        return reply.code == 201

    async def append(self, network: Network, messages: Sequence[object], seq: str | None, *, closes: bool) -> str:
        """Append, close, or do both. See `DurableStream.append`."""
        headers = {} if seq is None else {"Stream-Seq": seq}
        if closes:
            headers["Stream-Closed"] = "true"
        body = body_of(messages, self.content_type) if messages else b""
        if messages:
            headers["Content-Type"] = self.content_type
        reply = await self.done(network, self.call("POST", headers, body), is_repeatable=closes and not messages)
        return offset_in(reply)

    async def head(self, network: Network) -> StreamHead:
        """Ask what the server knows of it."""
        reply = await self.done(network, self.call("HEAD"), is_repeatable=True)
        ttl = reply.headers.get("stream-ttl", "")
        has_ttl = ttl.isascii() and ttl.isdigit() and len(ttl) < MAX_NUMBER_DIGITS
        return StreamHead(
            offset_in(reply),
            reply.headers.get("content-type", ""),
            reply.is_closed,
            timedelta(seconds=min(int(ttl), int(timedelta.max.total_seconds()))) if has_ttl else None,
            reply.headers.get("stream-expires-at"),
        )

    async def delete(self, network: Network) -> None:
        """Delete it."""
        reply = await self.reply(network, self.call("DELETE"), is_repeatable=True)
        if not reply.is_ok and not (reply.is_doubtful and reply.code in {404, 410}):  # which an earlier try has seen to
            raise reply.refusal()
        if reply.is_ok and reply.code != 204:
            raise UnexpectedAnswerError(f"the server has answered a DELETE with {reply.code}; it may not speak this protocol")


def offset_in(reply: Reply) -> str:
    """Give where the stream ends. UnexpectedAnswerError: the answer does not say, so it is none of this protocol."""
    if not reply.offset:
        raise UnexpectedAnswerError("the server does not say where the stream ends; it may not speak this protocol")
    return reply.offset
