"""Linux's inotify, as far as one file is concerned: a descriptor that becomes readable when the file was written to."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_IN_MODIFY = 0x2


def open_inotify(path: Path) -> int | None:
    """Give a descriptor that is readable from each write to the file until `drain`; None where this cannot be had.

    That is so on other systems, and where the user has used up `fs.inotify.max_user_instances`. The caller closes it.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        init, add_watch = libc.inotify_init1, libc.inotify_add_watch
    except (AttributeError, OSError, TypeError):
        return None
    descriptor = int(init(os.O_NONBLOCK | os.O_CLOEXEC))
    if descriptor < 0:
        return None
    if add_watch(descriptor, os.fsencode(path), _IN_MODIFY) < 0:
        os.close(descriptor)
        return None
    return descriptor


def drain(descriptor: int) -> None:
    """Forget the writes so far. (Equal events merge in the kernel, so one read takes them all.)"""
    with suppress(BlockingIOError):
        os.read(descriptor, 4096)
