"""The rules of an idempotent producer: what an answer to one of its batches means. It sends nothing, and waits for nothing."""

import secrets
import time
from dataclasses import dataclass
from typing import Final

from ...errors import InvalidArgumentError, RefusedError, StreamkeepError, UnexpectedAnswerError
from .._network import is_header_value
from ._writing import Reply

ALREADY_STORED: Final = 204
MAX_CLAIMS: Final = 8
"""So often an epoch is taken that is another's when it arrives; a server that goes on saying so does not mean it."""
MAX_SAFE: Final = (1 << 53) - 1
LOT_BITS: Final = 11
"""How much of an epoch is drawn by lot; with the milliseconds before it, it is safe in JavaScript until 2109."""
CLAIM_BITS: Final = 21
"""By how much at most an epoch that is claimed is above the other one: what is about a second."""
_MAX_DIGITS: Final = 16


@dataclass(frozen=True, slots=True)
class Tag:
    """What a batch is known by, so that a server takes it once."""

    producer: str
    epoch: int
    seq: int

    def headers(self) -> dict[str, str]:
        """Give it as a request's headers."""
        return {"Producer-Id": self.producer, "Producer-Epoch": str(self.epoch), "Producer-Seq": str(self.seq)}


@dataclass(frozen=True, slots=True)
class Stored:
    """The batch is in the stream, which ends here now; by this try, or by an earlier one."""

    offset: str


@dataclass(frozen=True, slots=True)
class TooSoon:
    """A batch before it has not arrived yet: this one is to be sent again when it has."""

    expected: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Another producer has the id, in this epoch: it is to be sent in one above."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The batch is not in the stream, and will not be."""

    error: StreamkeepError


Meaning = Stored | TooSoon | Claim | Failed


def epoch_now() -> int:
    """Give an epoch that is greater than those of producers that began before, as far as clocks go forward, and is nobody else's.

    If two had the same, the first batch of one would be taken for that of the other; and if its first answer is lost, it would not know.
    """
    return time.time_ns() // 1_000_000 << LOT_BITS | secrets.randbits(LOT_BITS)


def epoch_above(other: int) -> int:
    """Give an epoch that is greater than another's, and that nobody else takes who wants one above that."""
    return min(other + 1 + secrets.randbits(CLAIM_BITS), MAX_SAFE)


def meaning(reply: Reply, tag: Tag, *, claims: bool) -> Meaning:
    """Say what the answer to a batch means. `claims`: whether the producer may take over, of which nothing is stored yet."""
    if reply.is_ok:
        if not (reply.offset or "producer-seq" in reply.headers):  # which of a repeated batch some servers say instead
            return Failed(
                UnexpectedAnswerError("the server does not say what became of a batch; it may not speak this protocol")
            )
        return _fenced(reply, tag, tag.epoch, claims=claims) if _is_anothers(reply, tag) else Stored(reply.offset)
    if reply.code == 403 and (current := _number(reply, "producer-epoch")) is not None:
        return _fenced(reply, tag, current, claims=claims)
    if reply.code == 409 and (expected := _number(reply, "producer-expected-seq")) is not None:
        if expected < tag.seq:
            return TooSoon(expected)
        return Failed(UnexpectedAnswerError(f"the server wants batch {expected}, and was sent {tag.seq}"))
    return Failed(reply.refusal())


def _is_anothers(reply: Reply, tag: Tag) -> bool:
    """Say whether a batch was taken for one that another producer has sent in the same epoch: it is not in the stream then."""
    if tag.seq or reply.code != ALREADY_STORED:
        return False
    return not reply.is_doubtful or (_number(reply, "producer-seq") or 0) > 0


def _fenced(reply: Reply, tag: Tag, current: int, *, claims: bool) -> Meaning:
    if claims and (not reply.is_doubtful or reply.is_ok) and tag.epoch <= current < MAX_SAFE:
        return Claim(current)
    error = RefusedError(
        f"another producer of this id has taken over{_doubt(reply)}",
        status="ABORTED",
        details={"epoch": current},
        http_status=403,
    )
    return Failed(error)


def _doubt(reply: Reply) -> str:
    return "; whether its last batch was stored is unknown" if reply.is_doubtful and not reply.is_ok else ""


def _number(reply: Reply, name: str) -> int | None:
    text = reply.headers.get(name, "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


def check_producer(producer: str, epoch: int) -> None:
    """InvalidArgumentError: there is no such producer."""
    if not (producer and producer.isprintable() and is_header_value(producer)):
        raise InvalidArgumentError("a producer's id is printable text that neither begins nor ends with a blank")
    if not 0 <= epoch <= MAX_SAFE:
        raise InvalidArgumentError("an epoch is a whole number from 0 to 2**53 - 1")
