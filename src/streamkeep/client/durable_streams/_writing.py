"""What is sent to a server of the Durable Streams protocol that changes a stream: one request, until it is answered."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from ..._durations import check_durations
from ...errors import InvalidArgumentError, RefusedError, Status, StreamLostError
from ...events import encode_json
from ...wire import error_of
from .._network import Answer, Call, LostError, Network
from .._reading import ERROR_SECONDS, MAX_ERROR_BYTES, asked_seconds
from .._retry import Budget, Retry
from ._batches import is_json, is_true

logger: Final = logging.getLogger("streamkeep")

MAX_ERROR_PIECES: Final = 64
REFUSED_FOR_NOW: Final = frozenset({408, 425, 429, 507})
"""Nothing was done, and later it may be."""
FAILED: Final = frozenset({500, 502, 503, 504})
"""It may have been done, or not. A server whose storage was lost in the midst of it says 503."""
_STATUSES: Final[Mapping[int, Status]] = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "FAILED_PRECONDITION",
    410: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, as a whole.

    Attributes:
        code: its HTTP status.
        headers: names in any case.
        body: what it says, or the beginning of that.
        is_doubtful: whether an earlier try may have been obeyed, whose answer is not known.
    """

    code: int
    headers: Mapping[str, str]
    body: bytes
    is_doubtful: bool

    @property
    def is_ok(self) -> bool:
        """Whether it was done."""
        return 200 <= self.code < 300

    @property
    def offset(self) -> str:
        """Where the stream ends now."""
        return self.headers.get("stream-next-offset", "")

    @property
    def is_closed(self) -> bool:
        """Whether the stream is closed."""
        return is_true(self.headers, "stream-closed")

    def refusal(self) -> RefusedError:
        """Give the error that it is."""
        status: Status = _STATUSES.get(self.code, "UNAVAILABLE" if self.code >= 500 else "UNKNOWN")
        try:
            told = error_of(self.body)
        except InvalidArgumentError:
            return RefusedError(f"HTTP {self.code}", status=status, http_status=self.code)
        return RefusedError(told.message or f"HTTP {self.code}", status=status, details=told.details, http_status=self.code)


async def reply_to(network: Network, call: Call, retry: Retry, *, is_repeatable: bool) -> Reply:
    """Send a request, and again as long as it is not answered, and give the answer, be it a refusal.

    One that is not repeatable is sent again only if it was certainly not obeyed. StreamLostError: what became of it is unknown, or it was
    given up. UnexpectedAnswerError, InvalidArgumentError: as for `Network.send`.
    """
    budget = Budget(retry)
    is_doubtful = False
    while True:
        lost: LostError
        try:
            reply = await _once(network, call, is_doubtful=is_doubtful)
            if reply.code in REFUSED_FOR_NOW:
                lost = LostError(is_sent=False, asked_seconds=_asked(reply))
            elif reply.code in FAILED:
                lost = LostError(asked_seconds=_asked(reply))
            else:
                return reply
            lost.__cause__ = reply.refusal()
        except LostError as error:
            lost = error
        is_doubtful = is_doubtful or lost.is_sent
        if lost.is_sent and not is_repeatable:
            raise _lost(f"whether it was done is unknown, so it is not sent twice: {lost.__cause__ or lost}", lost)
        pause = None if lost.is_final else budget.next_pause(None, lost.asked_seconds)
        if pause is None:
            given_up = _lost(f"given up after {budget.failures} tries: {lost.__cause__ or lost}", lost)
            given_up.retry_after = lost.asked_seconds or None
            raise given_up
        await network.sleep(pause)


async def _once(network: Network, call: Call, *, is_doubtful: bool) -> Reply:
    answer = await network.send(call)
    try:
        body = b"" if call.method == "HEAD" else await _beginning(answer)
        return Reply(answer.status, dict(answer.headers), body, is_doubtful)
    finally:
        await answer.close()


async def _beginning(answer: Answer) -> bytes:
    """Read what an answer says; its head has told what was done, so that this may fail."""
    answer.hasten(ERROR_SECONDS)
    body = b""
    try:
        for _ in range(MAX_ERROR_PIECES):
            data = await answer.read()
            body += data
            if not data or len(body) > MAX_ERROR_BYTES:
                break
    except LostError:
        logger.debug("an answer was cut behind its head")
    return body


def _asked(reply: Reply) -> float:
    return asked_seconds(reply.headers)


def _lost(message: str, lost: LostError) -> StreamLostError:
    error = StreamLostError(message)
    error.__cause__ = lost.__cause__ or lost
    return error


# Bodies and headers


def batchable(messages: Sequence[object], content_type: str) -> list[bytes]:
    """Give messages as bytes, of which batches are made, without those that are nothing: no server takes an empty body.

    InvalidArgumentError: one is none.
    """
    return [message for message in (encoded(message, content_type) for message in messages) if message]


def body_of(messages: Sequence[object], content_type: str) -> bytes:
    """Give the body that holds messages: one array of JSON, or all bytes one behind the other. InvalidArgumentError: they are not such."""
    return joined([encoded(message, content_type) for message in messages], content_type)


def encoded(message: object, content_type: str) -> bytes:
    """Give one message as bytes. InvalidArgumentError: it is none."""
    if is_json(content_type):
        return encode_json(message)
    match message:
        case str():
            return message.encode()
        case bytes() | bytearray() | memoryview():
            return bytes(message)
        case _:
            raise InvalidArgumentError(f"what is appended to a stream of {content_type} is bytes or text")


def joined(messages: Sequence[bytes], content_type: str) -> bytes:
    """Give encoded messages as a body."""
    # In an array, for the protocol takes the elements of an array as messages, and a message may be one.
    return b"[" + b",".join(messages) + b"]" if is_json(content_type) else b"".join(messages)


def seconds_text(ttl: timedelta) -> str:
    """Give a span as the protocol has it. InvalidArgumentError: it is no number of whole seconds, or negative."""
    check_durations(ttl=ttl)
    seconds = ttl.total_seconds()
    if seconds < 0 or seconds != int(seconds):
        raise InvalidArgumentError("a TTL is a number of whole seconds")
    return str(int(seconds))


def time_text(time: datetime) -> str:
    """Give a time as RFC 3339 has it. InvalidArgumentError: it has no offset from UTC."""
    if time.tzinfo is None:
        raise InvalidArgumentError("a time of expiry has a time zone")
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")
