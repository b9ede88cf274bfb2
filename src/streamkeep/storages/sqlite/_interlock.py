"""A lock between processes, and between several storages of one process.

It belongs to an open file, so the kernel frees it when its holder dies, however it dies.
"""

import random
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from streamkeep.storages import _before_fork

if sys.platform == "win32":
    import msvcrt
    import os

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


class Interlock:
    """One holder at a time among all that use these two files; who has just held it lets a waiting one go first.

    The kernel's locks know no order: a busy holder that comes back at once would win for ever. So there is a turnstile
    before the lock. Whoever waits for the lock stands in the turnstile, and the last holder cannot pass it.
    """

    def __init__(self, turnstile: int, lock: int) -> None:
        self._turnstile = turnstile
        self._lock = lock

    @contextmanager
    def held(self, deadline: float) -> Generator[None]:
        """Hold the lock in this block; raises TimeoutError when `deadline` (of `time.monotonic`) has passed.

        ForkUnderWayError: it has to wait, and some thread waits to fork meanwhile.
        """
        retry_until(deadline, lambda: _try_lock_unless_forking(self._turnstile))
        try:
            retry_until(deadline, lambda: _try_lock_unless_forking(self._lock))
        finally:
            _unlock(self._turnstile)
        try:
            yield
        finally:
            _unlock(self._lock)


def retry_until(deadline: float, attempt: Callable[[], bool]) -> None:
    """Try until it succeeds, at times that differ from anybody else's; raises TimeoutError after the deadline."""
    while not attempt():
        if time.monotonic() >= deadline:
            raise TimeoutError("timed out")
        time.sleep(random.uniform(0.000_2, 0.001))  # noqa: S311 (jitter, not cryptography)


def _try_lock_unless_forking(descriptor: int) -> bool:
    if _try_lock(descriptor):
        return True
    _before_fork.check()
    return False
