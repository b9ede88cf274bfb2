"""Streams of a server, for the commands: by their URLs, over the client."""

import os
from collections.abc import Iterable

from ..client import subscribe
from ..errors import StreamLostError
from ..events import StreamEventType
from ..wire import parse_cursor
from ._output import CommandError, Output


async def tail_url(
    output: Output, url: str, headers: Iterable[str], *, after: int | None, last: int | None, follow: bool
) -> bool:
    """Print the events of the stream at a URL to its end, and say whether that is an error.

    CommandError: a header that is none, or the connection was lost for good. RemoteError, InvalidArgumentError: as the client raises.
    """
    try:
        async with subscribe(url, after=after, last=last, follow=follow, headers=_headers(headers)) as events:
            async for event in events:
                output.event(event)
                if event.type is StreamEventType.ERROR:
                    return True
    except StreamLostError as error:
        cursor = parse_cursor(error.cursor)
        raise CommandError(f"{error}{f'; go on with --after {cursor.offset}' if cursor else ''}") from error
    return False


def _headers(given: Iterable[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for header in given:
        name, colon, value = header.partition(":")
        if not (colon and name.strip()):
            raise CommandError("a header is given as NAME:VALUE", 2)  # without it: it may be a secret
        headers[name.strip()] = value.strip()
    token = os.environ.get("STREAMKEEP_TOKEN")
    if token and "authorization" not in {name.lower() for name in headers}:
        headers["Authorization"] = f"Bearer {token}"
    return headers
