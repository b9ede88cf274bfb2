"""Trust: whether who asks is a part of the application, such as a worker or its operator; not one of its users."""

import hmac
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from ..errors import InvalidArgumentError, PublicError

Trust = Callable[[Mapping[str, str]], "bool | Awaitable[bool]"]
"""Says of a request's headers, names in lower case, whether who sent them is trusted. It may raise `PublicError` as well."""

MIN_TOKEN_CHARACTERS: Final = 16


def trust_of(trust: str | Trust) -> Trust:
    """Give what trusts those who send a token as `Authorization: Bearer`; a function is given as it is.

    InvalidArgumentError: the token is shorter than 16 characters.
    """
    return _bearer(trust) if isinstance(trust, str) else trust


async def check_trusted(trust: Trust, headers: Mapping[str, str]) -> None:
    """Raise PublicError with UNAUTHENTICATED if who sent these headers is not trusted."""
    trusted = trust(headers)
    if not (await trusted if inspect.isawaitable(trusted) else trusted):
        raise PublicError("UNAUTHENTICATED", "who asks is not trusted")


def _bearer(token: str) -> Trust:
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise InvalidArgumentError(f"a token has at least {MIN_TOKEN_CHARACTERS} characters")
    expected = token.encode()

    def trust(headers: Mapping[str, str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), expected)

    return trust
