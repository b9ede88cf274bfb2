"""The one loop of the client: ask, read, and when the connection is lost, wait and ask again from where it was.

What is asked, and what the answers mean, is a `Dialect`, which does no I/O. Whether awaited or not is the `Network`'s affair.
"""

import email.utils
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from ..errors import (
    GoneError,
    InvalidArgumentError,
    LimitExceededError,
    RefusedError,
    RemoteError,
    Status,
    StreamLostError,
    UnexpectedAnswerError,
)
from ..wire import MAX_FRAME_BYTES, error_of
from ._network import Answer, Call, LostError, Network
from ._retry import Budget, Retry

logger: Final = logging.getLogger("streamkeep")

E = TypeVar("E")
E_co = TypeVar("E_co", covariant=True)

MAX_SILENT_BYTES: Final = 2 * MAX_FRAME_BYTES
"""So much may come without anything in it that a dialect knows; heartbeats need months for that."""
TOLD_SECONDS: Final = 1.0
"""So long a pause is told at once; else the second one in a row, for a connection that is lost once is everyday."""
SPARED_SECONDS: Final = 1.0
"""Between two requests, if the first one has brought nothing new."""
MAX_IDLE: Final = 8
"""So many answers in a row may give no event and yet lead somewhere else, before they count as nothing new."""
MAX_ERROR_BYTES: Final = 64 * 1024
MAX_ERROR_PIECES: Final = 64
ERROR_SECONDS: Final = 3.0
"""So long an error's body is read, and each piece of it waited for; what is told by then, or its code alone, has to do."""
REFUSED_FOR_NOW: Final = frozenset({408, 425, 429, 503, 507})
"""Nothing was done, and later it may be."""
_MAX_DIGITS: Final = 9
FAILED: Final = frozenset({500, 502, 504})
"""It may have been done, or not."""
_STATUSES: Final[Mapping[int, Status]] = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "FAILED_PRECONDITION",
    410: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
}
MAX_WORDS: Final = 200


class Dialect(Protocol[E_co]):
    """What is asked for, and what the answers mean."""

    @property
    def media_types(self) -> frozenset[str] | None:
        """What an answer may be; an empty one: it does not say. None: anything."""
        ...

    @property
    def stream(self) -> str | None:
        """The stream's id, once it is known."""
        ...

    @property
    def position(self) -> str | None:
        """Behind what the next request asks to go on; None: at the beginning."""
        ...

    @property
    def frames(self) -> int:
        """How many have been understood, whatever they meant."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether all has come."""
        ...

    @property
    def can_go_on(self) -> bool:
        """Whether another request gives what follows, and nothing twice."""
        ...

    @property
    def is_repeatable(self) -> bool:
        """Whether a request may be sent again that the server may have obeyed."""
        ...

    @property
    def takes_refusals(self) -> bool:
        """Whether a server that refuses for now is asked again."""
        ...

    @property
    def retry_seconds(self) -> float | None:
        """What the server has said by `retry:`."""
        ...

    @property
    def oldest(self) -> str | None:
        """Where what is still kept begins, if what is behind `position` is not; None: that is not known."""
        ...

    def request(self) -> Call:
        """Give the next request."""
        ...

    def begin(self, answer: Answer) -> None:
        """Take the head of an answer. RemoteError: it is none for this request."""
        ...

    def no_content(self, answer: Answer) -> None:
        """Take a 204. Unless it was the end, the next request follows. RemoteError: there should be something."""
        ...

    def feed(self, data: bytes) -> Iterator[tuple[E_co, str | None]]:
        """Give the events that these bytes complete, each with the position behind it, which is then `position`.

        RemoteError, InvalidArgumentError, LimitExceededError: that is how it ends. LostError: this answer ends, and nothing else does.
        """
        ...

    def end(self, *, has_end: bool) -> Iterator[tuple[E_co, str | None]]:
        """Take the end of an answer's body, and give the events that it completes. Unless it was the end, the next request follows.

        LostError: that was not all.
        """
        ...


class Reading(Generic[E]):
    """A stream that is read, from whatever connection serves.

    All it gives is given once. What it raises knows how far it came, and so does it: another call after a cancelled one, or after a
    StreamLostError, goes on there.

    Args:
        network: what it is read through.
        dialect: what is asked, and what answers mean.
        retry: when to come back, and when to give up.
        events: how many were given before.
    """

    def __init__(self, network: Network, dialect: Dialect[E], retry: Retry, events: int = 0) -> None:
        self.dialect = dialect
        self.events = events
        """How many have been given."""
        self._network = network
        self._budget = Budget(retry)
        self._answer: Answer | None = None
        self._ready: deque[tuple[E, str | None]] = deque()
        self._position = dialect.position
        self._may_run = False  # what a request sets off that may have been obeyed
        self._pending: Exception | None = None  # what came behind events that are to be given first
        self._is_read = False
        self._is_left = False
        self._is_told = False  # that it waits, since something new has come
        self._asked_at = 0.0
        self._asked_from: str | None = None
        self._idle = 0  # answers in a row that gave no event

    @property
    def position(self) -> str | None:
        """Where to go on behind what was given."""
        return self._position if self._ready else self.dialect.position

    async def enter(self) -> None:
        """Return when the server has answered, or has said that there is nothing. Raises as `next` does."""
        try:
            await self._alone(fills=False)
        except BaseException:
            await self.leave()
            raise

    async def next(self) -> E:
        """Give the next event; StopAsyncIteration behind the last one. Raises RemoteError, InvalidArgumentError."""
        self._check_is_in()
        if not self._ready:
            await self._alone(fills=True)
            if not self._ready:
                raise StopAsyncIteration
        event, self._position = self._ready.popleft()
        self.events += 1
        return event

    async def finish(self) -> None:
        """Read to the end; what comes on the way is let go. Raises as `next` does."""
        while True:
            self.events += len(self._ready)
            self._ready.clear()
            await self._alone(fills=True)
            if not self._ready:
                return

    async def leave(self) -> None:
        """Close the connection; whoever reads is woken, and told by a RuntimeError. It can be called again, and from anywhere."""
        self._is_left = True
        if self._is_read:
            await self._network.interrupt()  # who reads is in the midst of what is to be closed, and closes it
        else:
            await self._close()

    def _check_is_in(self) -> None:
        if self._is_left:
            raise RuntimeError("this has been left; it can only be read inside of its block")

    async def _alone(self, *, fills: bool) -> None:
        self._check_is_in()
        if self._is_read:
            raise RuntimeError("another task reads this; one at a time may")
        self._is_read = True
        try:
            with self._network.interruptible():
                await self._read(fills=fills)
            self._check_is_in()
        except RemoteError as error:
            self._check_is_in()  # it was lost because it was left
            error.stream, error.events = self.dialect.stream, self.events
            error.cursor = self.dialect.oldest if isinstance(error, GoneError) else self.position
            await self._drop()
            raise
        except BaseException:
            # Cancelled in mid-read, an answer would seem to have come to its end.
            await self._drop()
            raise
        finally:
            self._is_read = False
            if self._is_left:
                await self._close()

    async def _read(self, *, fills: bool) -> None:
        """Have an answer, or with `fills` events of it, or be over, or left."""
        while not (self._ready or self.dialect.is_over or self._is_left):
            try:
                if self._pending is not None:
                    error, self._pending = self._pending, None
                    raise error
                if self._answer is None:
                    self._answer = await self._begun()
                    self._budget.connected()
                elif not fills:
                    return
                else:
                    await self._fill(self._answer)
            except LostError as lost:
                self._may_run = self._may_run and lost.is_sent
                await self._drop()
                await self._pause(lost)
        if self.dialect.is_over:
            await self._drop()

    async def _begun(self) -> Answer | None:
        """Ask, and give the answer whose body is to be read; None: there is nothing."""
        dialect = self.dialect
        if not dialect.can_go_on or (self._may_run and not dialect.is_repeatable):
            raise LostError  # by whoever was told so before, or has cancelled, and asks again
        self._may_run = True
        self._asked_at, self._asked_from = time.monotonic(), dialect.position
        answer = await self._network.send(dialect.request())
        try:
            if answer.status == 204:
                self.dialect.no_content(answer)
            elif 200 <= answer.status < 300:
                self._check_is_readable(answer)
                self.dialect.begin(answer)
                return answer
            else:
                await self._refuse(answer)
        except BaseException:
            await answer.close()
            raise
        await answer.close()
        self._budget.progress()
        await self._spare()
        return None

    async def _spare(self) -> None:
        """Wait, where an answer has brought nothing new at once: to ask again at once would be to ask for ever."""
        self._idle += 1
        if not self.dialect.is_over and (self.dialect.position == self._asked_from or self._idle > MAX_IDLE):
            await self._network.sleep(max(0.0, self._asked_at + SPARED_SECONDS - time.monotonic()))

    def _check_is_readable(self, answer: Answer) -> None:
        media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        media_types = self.dialect.media_types
        if media_types is not None and media_type not in media_types:
            raise UnexpectedAnswerError(
                f"the server's answer is {media_type or 'of no type'!r}, not {min(filter(None, media_types))}"
            )
        if (coding := answer.headers.get("content-encoding", "identity").strip().lower()) != "identity":
            raise UnexpectedAnswerError(f"the server's answer is compressed ({coding}), though it was not asked to be")

    async def _refuse(self, answer: Answer) -> None:
        body = await beginning(answer)
        error = refused(answer.status, answer.headers, body)
        asked = asked_seconds(answer.headers)
        if answer.status in REFUSED_FOR_NOW and self.dialect.takes_refusals:
            raise LostError(is_sent=False, asked_seconds=asked) from error
        if answer.status in FAILED and self.dialect.is_repeatable and self.dialect.takes_refusals:
            raise LostError(asked_seconds=asked) from error
        raise refused(answer.status, answer.headers, body, self.dialect.request())

    async def _fill(self, answer: Answer) -> None:
        frames, position, silent_bytes = self.dialect.frames, self.dialect.position, 0
        while not (self._ready or self.dialect.is_over or self._is_left):
            data = await answer.read()
            if not data:
                self._collect(self.dialect.end(has_end=answer.has_end))
                await self._drop()
                self._budget.progress()
                await self._spare()
                return
            self._budget.heard()
            silent_bytes += len(data)
            self._collect(self.dialect.feed(data))
            if frames != self.dialect.frames:
                frames, silent_bytes = self.dialect.frames, 0
            if silent_bytes > MAX_SILENT_BYTES:
                raise UnexpectedAnswerError(f"the server has sent {silent_bytes} bytes without anything in them")
            if position != self.dialect.position:
                self._budget.progress()

    def _collect(self, events: Iterator[tuple[E, str | None]]) -> None:
        try:
            for event in events:
                self._ready.append(event)  # one by one, for what comes then may raise
                self._idle = 0
        except (InvalidArgumentError, LimitExceededError) as error:
            unexpected = UnexpectedAnswerError(str(error))
            unexpected.__cause__ = error
            self._raise_behind_events(unexpected)
        except Exception as error:  # of a condition of the user's, too
            self._raise_behind_events(error)

    def _raise_behind_events(self, error: Exception) -> None:
        if not self._ready:
            raise error
        self._pending = error

    async def _pause(self, lost: LostError) -> None:
        """Wait before the next try. StreamLostError: there is none, or it would not help."""
        dialect, cause = self.dialect, lost.__cause__
        if not dialect.can_go_on:
            raise _lost("the connection was lost, and this server has said nothing to go on from", lost)
        if lost.is_sent and not dialect.is_repeatable:
            raise _lost("the connection was lost, and what the request has set off may run: it is not sent twice", lost)
        tries = self._budget.failures
        pause = None if lost.is_final else self._budget.next_pause(dialect.retry_seconds, lost.asked_seconds)
        host = urlsplit(dialect.request().url).netloc.rpartition("@")[2]
        if pause is None:
            why = f"given up after {tries} tries to go on with {host}" if tries else f"{host} cannot be read"
            error = _lost(f"{why}: {_words(cause or lost)}", lost)
            error.retry_after = lost.asked_seconds or None
            self._budget.progress()  # whoever calls again has all of it again
            raise error
        self._is_told = self._is_told and tries > 0
        if not self._is_told and (tries > 0 or pause >= TOLD_SECONDS):
            self._is_told = True
            asked = f" for {lost.asked_seconds:.0f} seconds, as it asks" if lost.asked_seconds else ""
            logger.info("waiting for %s%s: %s", host, asked, _words(cause or lost))
        await self._network.sleep(pause)

    async def _drop(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            await answer.close()

    async def _close(self) -> None:
        try:
            await self._drop()
        finally:
            await self._network.close()


def _lost(message: str, lost: LostError) -> StreamLostError:
    error = StreamLostError(message)
    error.__cause__ = lost.__cause__ or lost
    return error


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def refused(code: int, headers: Mapping[str, str], body: bytes, call: Call | None = None) -> RefusedError:
    """Give the error that an answer tells, in Genkit's form or as text if that is its body; a GoneError for what is not kept any more."""
    status: Status = _STATUSES.get(code, "UNAVAILABLE" if code >= 500 else "UNKNOWN")
    words, details = "", None
    try:
        told = error_of(body)
    except InvalidArgumentError:
        if headers.get("content-type", "").partition(";")[0].strip().lower() == "text/plain":
            words = "".join(
                letter if letter.isprintable() else " " for letter in body[:MAX_WORDS].decode(errors="replace")
            ).strip()
    else:
        words, details = told.message, told.details
        status = status if told.status == "UNKNOWN" else told.status
    kind = GoneError if code == 410 else RefusedError
    place = "" if call is None else _place_of(call)
    return kind(words or f"HTTP {code}", status=status, details=details, http_status=code, place=place)


def _place_of(call: Call) -> str:
    """Say what was asked, without what may be secret in its URL."""
    url = urlsplit(call.url)
    return f"{call.method} {url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"[:MAX_WORDS]


async def beginning(answer: Answer) -> bytes:
    """Give what comes of a body soon, which is small if it tells an error; whatever becomes of it, the head has told what was done."""
    answer.hasten(ERROR_SECONDS)
    body, begun_at = b"", time.monotonic()
    try:
        for _ in range(MAX_ERROR_PIECES):
            data = await answer.read()
            body += data
            if not data or len(body) > MAX_ERROR_BYTES or time.monotonic() - begun_at > ERROR_SECONDS:
                break
    except LostError:
        logger.debug("an answer was cut behind its head")
    return body


def asked_seconds(headers: Mapping[str, str]) -> float:
    """Give how long the server wants to be left alone: `Retry-After`, in seconds or as a date (RFC 9110, 10.2.3)."""
    asked = headers.get("retry-after", "").strip()
    if asked.isascii() and asked.isdigit():
        return float(asked[:_MAX_DIGITS])
    until, now = _date(asked), _date(headers.get("date", ""))
    return 0.0 if until is None else max(0.0, until - (time.time() if now is None else now))


def _date(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
