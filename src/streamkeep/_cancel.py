"""Cancelling a stream, whoever writes it."""

from typing import Final

from . import _lifecycle
from ._core import Core, new_name
from ._lifecycle import Life
from .errors import StreamNotFoundError
from .events import error_record

ASK_EVERY: Final = 3
"""After so many changes that came too late, each time, its writer is asked to end a stream."""


async def read_life(core: Core, stream: str) -> Life:
    """Give a stream's head, read. Raises StreamNotFoundError, also if it has expired; StorageError."""
    page = await core.storage.read(stream)
    if page is None or _lifecycle.is_expired(life := _lifecycle.life_of(page.head), core.now()):
        raise StreamNotFoundError("stream not found")
    return life


def same_life(first: str | None, life: Life) -> str:
    """Give the life that was first found. StreamNotFoundError: it is another one by now, which nobody has asked to be changed."""
    if first not in {None, life.state.life}:
        raise StreamNotFoundError("the stream was deleted, and created anew, meanwhile")
    return life.state.life


async def cancel(core: Core, stream: str, first: str | None = None) -> bool:
    """End an open stream with CANCELLED; the one of the life `first`, and no other under the id. False: it had ended already.

    Raises StreamNotFoundError, StorageError.
    """
    record = error_record(_lifecycle.CANCELLED)
    lost = 0
    while True:
        try:
            life = await read_life(core, stream)
        except StreamNotFoundError:
            if lost < ASK_EVERY:
                raise
            return True  # its writer has ended it, as it was asked to, and it has expired already
        first = same_life(first, life)
        ended = _lifecycle.cancel(life, core.now(), new_name())
        if ended is None:
            return lost >= ASK_EVERY and life.state.error == _lifecycle.CANCELLED.status
        if await core.sweeper.commit(stream, life.head.version, ended.head, [record]):
            if core.telling is not None:
                core.telling.ended(stream, ended)
            await core.tell_writer(stream, life)
            return True
        lost += 1
        if lost % ASK_EVERY == 0:
            await core.ask_writer_to_cancel(stream, life)
