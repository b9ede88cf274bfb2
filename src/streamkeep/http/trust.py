"""Trust: whether who asks is a part of the application, such as a worker or its operator; not one of its users."""

import hmac
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from ..errors import InvalidArgumentError, PublicError

Trust = Callable[[Mapping[str, str]], "bool | Awaitable[bool]"]
"""Says of a request's headers, names in lower case, whether who sent them is trusted. It may raise `PublicError` as well."""

MIN_TOKEN_CHARACTERS: Final = 16
_SENDABLE: Final = re.compile(r"[!-~]([ -~]*[!-~])?")


def trust_of(trust: str | Trust) -> Trust:
    """Give what trusts those who send a token as `Authorization: Bearer`; a function is given as it is.

    InvalidArgumentError: the token is shorter than 16 characters, or no header can have it, such as one with the end of a line.
    TypeError: it is neither a token nor a function, such as None.
    """
    if isinstance(trust, str):
        return _bearer(trust)
    if not callable(trust):
        raise TypeError(f"`trust` is a token, or a function of a request's headers, not {type(trust).__name__}")
    return trust


async def check_trusted(trust: Trust, headers: Mapping[str, str]) -> None:
    """Raise PublicError with UNAUTHENTICATED if who sent these headers is not trusted.

    TypeError: whatever else than True counts as true trusts nobody. It may be a coroutine that somebody has forgotten to await.
    """
    trusted: object = trust(headers)
    trusted = await trusted if inspect.isawaitable(trusted) else trusted
    if trusted is True:
        return
    if trusted:
        raise TypeError(f"`trust` gives True or False, not {type(trusted).__name__}")
    raise PublicError("UNAUTHENTICATED", "who asks is not trusted")


def _bearer(token: str) -> Trust:
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise InvalidArgumentError(f"a token has at least {MIN_TOKEN_CHARACTERS} characters")
    if not _SENDABLE.fullmatch(token):
        raise InvalidArgumentError(
            "a token is of ASCII, without control characters, and without a blank or an end of a line around it"
        )
    expected = token.encode()

    def trust(headers: Mapping[str, str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), expected)

    return trust
