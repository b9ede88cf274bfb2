"""What the commands send with each request to a URL: a token of the environment, and headers that are named."""

import os
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from ._output import CommandError

TOKEN_VARIABLE: Final = "STREAMKEEP_TOKEN"  # noqa: S105 - its name


def headers_for(url: str, given: Iterable[str]) -> dict[str, str]:
    """Give the headers that are given, and the token of the environment. CommandError: one is no header."""
    headers: dict[str, str] = {}
    for header in given:
        name, colon, value = header.partition(":")
        if not (colon and name.strip()):
            raise CommandError("a header is given as NAME:VALUE", 2)  # without it: it may be a secret
        headers[name.strip()] = value.strip()
    token = os.environ.get(TOKEN_VARIABLE)
    if token and "authorization" not in {name.lower() for name in headers} and "@" not in _authority(url):
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _authority(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return "@"  # to ask there raises the same, in words, and no token goes there
