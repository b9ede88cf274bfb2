"""The page's files, and the headers under which they, and all answers of the inspector, are sent."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from ..http.response import Message, Send

_PAGE: Final = Path(__file__).with_name("page")
_TYPES: Final[Mapping[str, str]] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing but our own files and our own server; no page of somebody else's around ours, and nothing kept.
_HEADERS: Final[Mapping[bytes, bytes]] = {
    b"cache-control": b"no-store, no-transform",
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}


@cache
def files() -> Mapping[str, tuple[str, bytes]]:
    """Give the page's files by name, each with its media type: all that there are, so that no path leads anywhere else."""
    return {path.name: (_TYPES[path.suffix], path.read_bytes()) for path in _PAGE.iterdir() if path.suffix in _TYPES}


def secured(send: Send) -> Send:
    """Give a `send` that adds these headers to an answer, in the place of others of the same names."""

    async def send_secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [header for header in message.get("headers", ()) if header[0].lower() not in _HEADERS]
            message = {**message, "headers": [*kept, *_HEADERS.items()]}
        await send(message)

    return send_secured
