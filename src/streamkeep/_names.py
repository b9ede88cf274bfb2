"""The rules of names: what an app calls a conversation (its *key*), what a client calls a start of it (its *run*), and whose a stream is.

A name is a small head of its own, whose state says which stream it names, and which life of that stream: one that was deleted, or has
expired, is named no more, whoever lives under its id by then. Names of an owner lie side by side and in order, so that a scan finds
them and nobody else's. Like `_lifecycle`, this is pure: values to values.
"""

import re
from enum import Enum
from hashlib import sha256
from typing import Final

import msgspec

from ._lifecycle import FORGET_OPEN_SECONDS, Life, State, is_expired, life_of, version_after
from .errors import InvalidArgumentError, StorageCorruptError
from .storage import Head

MAX_ID: Final = 255
MAX_OWNER: Final = 1_024
SURROGATE: Final = re.compile("[\ud800-\udfff]")


class Kind(Enum):
    """What is named; the values are the prefixes of their ids."""

    KEY = ".key."
    OWN = ".own."
    RUN = ".run."


class Name(msgspec.Struct, frozen=True, array_like=True):
    """What the head of a name says."""

    stream: str
    life: str
    ttl: float
    """The stream's, which its name must outlive."""


# Ids. Text is written in ASCII so that it keeps its order and its prefixes, and comes before all that it is a prefix of.

END: Final = "!"
_PLAIN: Final = re.compile(r"[0-9A-Za-z-]")
_MARKS: Final = (("+", 0x2C), (".", 0x2F), ("=", 0x40), ("_", 0x60))
"""Where each escaped character up to this one belongs, between those that stand for themselves."""
_REST: Final = "~"
_REST_DIGITS: Final = 4
_ESCAPED: Final = re.compile(r"[+.=_]([0-9A-F]{2})|~([0-9A-Z]{4})")
_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_HASH_DIGITS: Final = 32
MAX_TEXT: Final = MAX_ID - len(Kind.KEY.value) - _HASH_DIGITS - len(".") - len(END)
"""How long what is named may be, as it is written in an id."""


def names_of(owner: str, kind: Kind, prefix: str = "") -> str:
    """Give what the ids of all of an owner's names that begin with `prefix` begin with; a scan after this finds them."""
    text = prefix if kind is Kind.OWN else escaped(prefix)
    return f"{kind.value}{_digest(owner)}.{text}"


def name_id(owner: str, kind: Kind, text: str) -> str:
    """Give the id under which a name has its head."""
    begin, end = names_of(owner, kind), text if kind is Kind.OWN else escaped(text)
    if len(end) > MAX_TEXT:  # the id of a stream, as long as one may be: its end is not kept, nor is order needed there
        end = end[: MAX_TEXT - _HASH_DIGITS] + _digest(end)
    return begin + end + END


def text_in(name: str) -> str:
    """Give what the id of a name was made of: what `name_id` makes the same id of."""
    text = name.removesuffix(END)[len(names_of("", Kind.KEY)) :]
    return text if name.startswith(Kind.OWN.value) else _ESCAPED.sub(_unescaped, text)


def is_name(stream: str) -> bool:
    """Say whether this is the id of a name."""
    return stream.startswith(tuple(kind.value for kind in Kind))


def names_for(stream: str, state: State) -> list[str]:
    """Give the ids of the names that a stream was given when it was opened; others may have them by now."""
    return [
        name_id(state.owner, kind, text)
        for kind, text in ((Kind.RUN, state.run), (Kind.KEY, state.key), (Kind.OWN, stream if state.owner else ""))
        if text
    ]


def checked_owner(owner: str) -> str:
    """Give the owner, as a plain str: of its subclasses msgspec knows none. InvalidArgumentError: this cannot be one."""
    if not isinstance(owner, str) or SURROGATE.search(owner) or len(owner) > MAX_OWNER:
        raise InvalidArgumentError(f"an owner is Unicode text, without lone surrogates, of at most {MAX_OWNER} characters")
    return str.__str__(owner)


def checked_text(what: str, text: str, *, may_be_empty: bool = False) -> str:
    """Give the key or the run, as a plain str. InvalidArgumentError: this cannot be one."""
    if not isinstance(text, str) or SURROGATE.search(text) or not (text or may_be_empty):
        raise InvalidArgumentError(f"a {what} is Unicode text, without lone surrogates, and not empty")
    if len(escaped(text)) > MAX_TEXT:
        raise InvalidArgumentError(
            f"this {what} is too long: it may have {MAX_TEXT} letters, digits and dashes; other characters of ASCII count as three, "
            "and all others as five"
        )
    return str.__str__(text)


def escaped(text: str) -> str:
    """Write text in letters, digits and a few signs, in the order of its code points."""
    return "".join(char if _PLAIN.fullmatch(char) else _escape(ord(char)) for char in text)


def _escape(code: int) -> str:
    for mark, last in _MARKS:
        if code <= last:
            return f"{mark}{code:02X}"
    digits = ""
    for _ in range(_REST_DIGITS):
        code, digit = divmod(code, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return _REST + digits


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found[1], 16) if found[1] else int(found[2], len(_DIGITS)))


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:_HASH_DIGITS]


# Heads.


def name_of(head: Head) -> Name:
    """Read the head of a name. StorageCorruptError: it is none."""
    try:
        return _decoder.decode(head.state)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageCorruptError("the head of a name is damaged, or was written by a newer version of streamkeep") from error


def naming(head: Head | None, stream: str, life: Life, now: float) -> Head:
    """Give the next head of a name, which names this stream; None: it is the first one."""
    return _keep(0 if head is None else head.version, Name(stream, life.state.life, life.state.ttl), now)


def keep(head: Head, now: float) -> Head:
    """Put off the day on which a name is forgotten."""
    return _keep(head.version, name_of(head), now)


def named_by(name: Name, head: Head | None, now: float) -> Life | None:
    """Give the stream that is named, if `head`, which is there under its id now, is its own. StorageCorruptError: nobody can tell."""
    if head is None:
        return None
    life = life_of(head)
    return None if life.state.life != name.life or is_expired(life, now) else life


def _keep(seen: int, name: Name, now: float) -> Head:
    # A stream that is written is extended twice a day, one that has no writer any more ends within the day after, and then has its ttl.
    expires_at = now + 2 * FORGET_OPEN_SECONDS + name.ttl
    return Head(version_after(seen, now, name.life), 0, msgspec.json.encode(name), expires_at)


_decoder: Final = msgspec.json.Decoder(Name)
