"""Streams of a server, for the commands: by their URLs, over the client."""

import logging
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Final

from ..client import stop, subscribe
from ..errors import RefusedError, StreamLostError
from ..events import StreamEventType
from ..wire import parse_cursor
from ._headers import TOKEN_VARIABLE, headers_for
from ._output import CommandError, Output, complain

_WHO_ASKS: Final = f"the server wants to know who asks: give a token in {TOKEN_VARIABLE}, or a header by --header"
_HINTS: Final = {
    401: _WHO_ASKS,
    403: _WHO_ASKS,
    404: "a stream's URL is https://HOST/streams/ID, wherever the server has its streams; one may also be kept from who asks",
}


async def tail_url(
    output: Output, url: str, headers: Iterable[str], *, after: int | None, last: int | None, follow: bool
) -> bool:
    """Print the events of the stream at a URL to its end, and say whether that is an error.

    CommandError: a header that is none, the server refuses it, or the connection was lost for good. RemoteError, InvalidArgumentError: as
    the client raises.
    """
    with _telling():
        try:
            async with subscribe(url, after=after, last=last, follow=follow, headers=headers_for(url, headers)) as events:
                async for event in events:
                    output.event(event)
                    if event.type is StreamEventType.ERROR:
                        return True
        except StreamLostError as error:
            cursor = parse_cursor(error.cursor)
            raise CommandError(f"{error}{f'; go on with --after {cursor.offset}' if cursor else ''}") from error
    return False


async def cancel_url(url: str, headers: Iterable[str]) -> bool:
    """Stop the stream at a URL, and say whether it ran. Raises as `tail_url` does."""
    with _telling():
        return await stop(url, headers=headers_for(url, headers))


@contextmanager
def _telling() -> Generator[None]:
    """Show what the client says while it is at work, and what helps against a refusal."""
    logger, handler = logging.getLogger("streamkeep"), _Complaining()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except RefusedError as error:
        hint = _HINTS.get(error.http_status or 0)
        if hint is None:
            raise
        raise CommandError(f"{error}; {hint}") from error
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class _Complaining(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())
