"""A lock between processes, and between several storages of one process.

It belongs to an open file, so the kernel frees it when its holder dies, however it dies. A forked child has the file open as well; so
it closes the files of the locks that its parent held.
"""

import os
import random
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

from streamkeep.storages._batch_thread import ForkPendingError

if sys.platform == "win32":
    import msvcrt

    # Windows locks bytes against reading too, so the byte that is locked is one that nobody reads.
    _FAR = 1 << 30

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


_held: Final[set[int]] = set()
"""The descriptors that this process may hold a lock of."""


def _drop_in_child() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        for descriptor in _held:
            os.dup2(nowhere, descriptor, inheritable=False)  # not closed: its number must not become another file's
    finally:
        os.close(nowhere)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)


class Interlock:
    """One holder at a time among all that use these two files; who has just held it lets a waiting one go first.

    The kernel's locks know no order: a busy holder that comes back at once would win for ever. So there is a turnstile
    before the lock. Whoever waits for the lock stands in the turnstile, and the last holder cannot pass it.

    Args:
        turnstile: a descriptor of the one file.
        lock: a descriptor of the other.
        is_fork_pending: see `BatchThread`.
    """

    def __init__(self, turnstile: int, lock: int, is_fork_pending: Callable[[], bool]) -> None:
        self._turnstile = turnstile
        self._lock = lock
        self._is_fork_pending = is_fork_pending

    @contextmanager
    def held(self, deadline: float) -> Generator[None]:
        """Hold the lock in this block.

        TimeoutError: `deadline` (of `time.monotonic`) has passed. ForkPendingError: somebody else holds the lock, and a fork waits.
        """
        self._acquire(self._turnstile, deadline)
        try:
            self._acquire(self._lock, deadline)
        finally:
            self._release(self._turnstile)
        try:
            yield
        finally:
            self._release(self._lock)

    def _acquire(self, descriptor: int, deadline: float) -> None:
        _held.add(descriptor)  # before it is: a fork may come at any time
        try:
            retry_until(lambda: self._attempt(descriptor), deadline)
        except BaseException:
            _held.discard(descriptor)
            raise

    def _attempt(self, descriptor: int) -> bool:
        if _try_lock(descriptor):
            return True
        if self._is_fork_pending():
            raise ForkPendingError
        return False

    def _release(self, descriptor: int) -> None:
        _unlock(descriptor)
        _held.discard(descriptor)


def retry_until(attempt: Callable[[], bool], deadline: float) -> None:
    """Try until it succeeds, at times that differ from anybody else's; raises TimeoutError after the deadline."""
    while not attempt():
        if time.monotonic() >= deadline:
            raise TimeoutError
        time.sleep(random.uniform(0.000_2, 0.001))  # noqa: S311 (jitter, not cryptography)
