"""`streamkeep check`: a deployment, seen through its own proxy and storage.

`steps` asks, `exchange` carries it, `seen` keeps what came, `rules` say what is wrong with it, `report` prints that.
"""

import re
import ssl
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

from .._output import CommandError
from .advice import Finding
from .exchange import Asking, Target
from .report import as_json, lines
from .rules import judge
from .seen import Options, Seen
from .steps import observe

__all__ = ["Finding", "Options", "Seen", "as_json", "check", "checked_origin", "judge", "lines", "target_of"]

OURS: Final = frozenset(("connection", "content-length", "expect", "transfer-encoding", "upgrade"))
"""What says how a message travels."""
_VISIBLE: Final = re.compile(r"[!-~]+")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TEXT: Final = re.compile(r"[ -~]*")
_ORIGIN: Final = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(:[0-9]{1,5})?/?")
_USUAL_PORTS: Final = {"http": ":80", "https": ":443"}


async def check(target: Target, options: Options, say: Callable[[str], None]) -> Seen:
    """Take all steps of a check, and give what was seen. CommandError: there is nothing to be checked there."""
    return await observe(Asking(target), options, say)


def target_of(url: str, headers: Mapping[str, str]) -> Target:
    """Give where a check goes. CommandError: it is no URL of a `CheckHTTP`, or these are no headers."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise CommandError(f"this is no URL: {error}", 2) from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0 or not _VISIBLE.fullmatch(url):
        raise CommandError("give the URL where the app has mounted its CheckHTTP: https://HOST/check", 2)
    if parts.query or parts.fragment or parts.username is not None:
        raise CommandError(
            "the URL has no query, fragment or user; a token is in STREAMKEEP_TOKEN, other headers are given by --header", 2
        )
    if not all(_TOKEN.fullmatch(name) and _TEXT.fullmatch(text) for name, text in headers.items()):
        raise CommandError("a header is given as NAME:VALUE, in ASCII", 2)  # without it: it may be a secret
    if ours := OURS & {name.lower() for name in headers}:
        raise CommandError(f"a check sends its own {', '.join(sorted(ours))}", 2)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    return Target(url.rstrip("/"), [*headers.items()], tls)


def checked_origin(origin: str) -> str:
    """Give an origin as browsers name it. CommandError: it is none."""
    if not origin:
        return ""
    found = _ORIGIN.fullmatch(origin.lower())
    if found is None:
        raise CommandError("an origin is https://HOST, perhaps with a port, and nothing behind it", 2)
    scheme, host, port = found.groups("")
    return f"{scheme}://{host}{port if port != _USUAL_PORTS[scheme] else ''}"
