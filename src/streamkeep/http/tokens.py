"""Signed tokens: who has one reads, or stops, one stream for a while, where nothing else can say who is asking.

A token says what it allows and until when, and is signed for one life of one stream. It never names that, nor anybody. This file makes and
checks them, and reads what requests bear; who is let in, `StreamsHTTP.admit` decides.
"""

import hashlib
import hmac
import json
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import ceil
from typing import Final, Literal, get_args
from urllib.parse import parse_qsl

from .._durations import check_durations
from ..errors import InvalidArgumentError
from ..wire import means_to_be_token
from .access import Action
from .response import NO_REFERRER, Message, RequestRefusedError, Scope, Send

TokenUse = Literal["read", "stop"]

MAX_EXPIRES_IN: Final = timedelta(days=7)
"""How long a token may be good for: one that has leaked can be revoked only with all others of its key, or with its stream."""
MIN_KEY_BYTES: Final = 32
_MIN_DIFFERENT_BYTES: Final = 8
"""Of 16 random bytes that are written as hex, fewer are in one case of ten million; of a word that is repeated they often are."""
_PURPOSE: Final = b"streamkeep: tokens of streams, version 1"
"""A secret may sign other things as well: those are no tokens, and tokens are none of those."""
_TOKEN: Final = re.compile(
    r"skt1\.(?P<can>read|stop)(?P<is_held>\.held)?\.(?P<expires_at>[1-9][0-9]{0,11})\.(?P<signature>[A-Za-z0-9_-]{43})"
)


@dataclass(frozen=True, slots=True)
class Token:
    """What a token says.

    Attributes:
        can: what it allows.
        expires_at: from when on it does not, in seconds since the epoch by the storage's clock.
        is_held: whether it allows that to its holder alone.
        signature: what shows that one of us has made it, and for what stream.
    """

    can: TokenUse
    expires_at: int
    is_held: bool
    signature: str = field(repr=False)

    def allows(self, action: Action) -> bool:
        """Say whether it is for an action: `read` is for whatever shows a stream, `stop` for nothing else."""
        return action == "stop" if self.can == "stop" else action in {"read", "resume"}


class TokenKeys:
    """What tokens are signed with: the first of the keys signs, all are believed.

    Args:
        keys: secrets of at least 32 bytes; text counts as UTF-8, without what is blank around it: a key is the same out of a file that
            ends with a line, and behind a comma and a space.

    Raises InvalidArgumentError: one is too short, or no secret. TypeError: they are no keys, or have no order, or can be read once only.
    """

    def __init__(self, keys: Sequence[str | bytes]) -> None:
        given: object = keys
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise TypeError("`token_keys` is a list of keys, the one that signs first")
        self._keys = tuple(map(_derived, keys))

    def __bool__(self) -> bool:
        return bool(self._keys)

    def sign(self, can: TokenUse, expires_at: int, stream: str, life: str, holder: str | None = None) -> str:
        """Give a token. IndexError: there is no key."""
        is_held = holder is not None
        signature = _signature(self._keys[0], _signed(can, expires_at, stream, life, holder, is_held=is_held))
        return f"skt1.{can}{'.held' if is_held else ''}.{expires_at}.{signature}"

    def has_signed(self, token: Token, stream: str, life: str, holder: str | None = None) -> bool:
        """Say whether this is a token of ours for this life of this stream; and for this holder, if it is for one alone."""
        who = holder if token.is_held else None
        signed = _signed(token.can, token.expires_at, stream, life, who, is_held=token.is_held)
        given = token.signature.encode()
        # All of them are tried, so that the time tells nothing of which one it was.
        return [hmac.compare_digest(_signature(key, signed).encode(), given) for key in self._keys].count(True) > 0


def tokens_in(scope: Scope) -> frozenset[str]:
    """Give what a request bears that means to be a token of ours, sound or not: as `?token=`, or as `Authorization: Bearer`.

    What others bear there, such as an app's own tokens, means nothing here.
    """
    borne = [text for name, text in _query(scope) if name == "token"]
    for name, value in scope["headers"]:
        if name.lower() == b"authorization":
            scheme, _, text = value.decode("latin-1").strip().partition(" ")
            if scheme.lower() == "bearer":
                borne.append(text.strip())
    return frozenset(text for text in borne if means_to_be_token(text))


def token_of(borne: Iterable[str]) -> Token | None:
    """Read the one token that a request bears. None: it bears several, or it is none that we could have made."""
    try:
        (text,) = borne
    except ValueError:
        return None
    read = _TOKEN.fullmatch(text)
    if read is None:
        return None
    can: TokenUse = "read" if read["can"] == "read" else "stop"
    return Token(can, int(read["expires_at"]), read["is_held"] is not None, read["signature"])


def check_use(can: str) -> None:
    """Raise InvalidArgumentError if there is no such use."""
    if can not in get_args(TokenUse):
        raise InvalidArgumentError("a token can read or stop")


def expiry(now: float, expires_in: timedelta) -> int:
    """Give when a token expires that is made now. InvalidArgumentError: it would be at once, or in more than a week."""
    check_durations(expires_in=expires_in)
    if not timedelta(0) < expires_in <= MAX_EXPIRES_IN:
        raise InvalidArgumentError(f"a token expires in more than no time, and in {MAX_EXPIRES_IN.days} days at most")
    return ceil(now + expires_in.total_seconds())


def check_expiry(token: Token, now: float) -> None:
    """Raise RequestRefusedError (401) if a token has expired: of all that is refused only that is told, to who has had it."""
    if now >= token.expires_at:
        sentence = "the token has expired"
        challenge = f'Bearer error="invalid_token", error_description="{sentence}"'  # RFC 6750, 3
        raise RequestRefusedError("UNAUTHENTICATED", 401, sentence, [("www-authenticate", challenge)])


def discreet(scope: Scope, send: Send) -> Send:
    """Give a `send` whose answers are kept nowhere, and do not say where they were asked for, if that URL has a token in it."""
    if not any(name == "token" and means_to_be_token(text) for name, text in _query(scope)):
        return send

    async def send_discreetly(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = {b"cache-control", NO_REFERRER[0]}
            rest = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in ours]
            told = [(b"cache-control", b"no-store, no-transform"), NO_REFERRER]
            message = {**message, "headers": [*rest, *told]}
        await send(message)

    return send_discreetly


def _query(scope: Scope) -> list[tuple[str, str]]:
    return parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)


def _derived(key: str | bytes) -> bytes:
    if not isinstance(key, str | bytes):
        raise TypeError(f"a key of tokens is str or bytes, not {type(key).__name__}")
    secret = key.strip().encode() if isinstance(key, str) else key
    if len(secret) < MIN_KEY_BYTES or len({*secret}) < _MIN_DIFFERENT_BYTES:
        raise InvalidArgumentError(
            f"a key of tokens is a secret of at least {MIN_KEY_BYTES} random bytes, such as `secrets.token_urlsafe(32)` gives;"
            f" this one has {len(secret)} bytes, {len({*secret})} of them different"
        )
    return hmac.digest(secret, _PURPOSE, hashlib.sha256)


def _signed(can: TokenUse, expires_at: int, stream: str, life: str, holder: str | None, *, is_held: bool) -> bytes:
    # Not msgspec's, which takes no text that cannot be UTF-8: a holder's may be anything.
    return json.dumps([can, is_held, expires_at, stream, life, holder]).encode()


def _signature(key: bytes, signed: bytes) -> str:
    return urlsafe_b64encode(hmac.digest(key, signed, hashlib.sha256)).rstrip(b"=").decode()
