"""What has to be put away before this process forks, and what a forked child must not keep.

A child inherits descriptors, with the locks that belong to them, and the memory of libraries that believe that they hold locks; but no
thread. So whoever owns such things registers here, lets go of them before the fork, and gets them anew afterwards, in the parent.

`os.fork` and all that is built on it in Python calls this: multiprocessing, servers that load an app before they fork. A fork in C
calls at most `in_child`; `subprocess` without a `preexec_fn` calls nothing, and needs nothing, because descriptors are closed on exec.
"""

import os
import threading
import time
from collections.abc import Sequence
from itertools import count
from typing import Final, Protocol
from weakref import WeakValueDictionary

FORK_SECONDS: Final = 30
"""So long may a fork wait for what is under way."""

_serial: Final = count()


class ForkUnderWayError(TimeoutError):
    """Somebody wants to fork and waits for this thread: it should let go of what it has, and try again when that is over."""


class Forkable(Protocol):
    """What a fork concerns. None of these may raise or wait beyond the deadline (of `time.monotonic`)."""

    def before_fork(self, deadline: float) -> None:
        """Finish what is under way, let go of locks and descriptors, and begin nothing more."""

    def after_fork(self) -> None:
        """Go on, in the parent."""

    def in_child(self) -> None:
        """Forget everything, in the child, whether or not `before_fork` was called or could do its work."""


class _Forks:
    def __init__(self) -> None:
        # Weak: nothing lives longer because it is registered.
        self._registered: WeakValueDictionary[int, Forkable] = WeakValueDictionary()
        self._renew_locks()

    def _renew_locks(self) -> None:
        self._changing = threading.RLock()  # a signal may come while it is held, whose handler forks
        self._forking = threading.Lock()
        self._forking_thread: int | None = None
        self._idle = threading.Event()
        self._idle.set()

    def register(self, forkable: Forkable) -> int:
        with self._changing:
            number = next(_serial)
            self._registered[number] = forkable
            return number

    def unregister(self, number: int) -> None:
        with self._changing:
            self._registered.pop(number, None)

    def check(self) -> None:
        if not self._idle.is_set():
            raise ForkUnderWayError

    def wait(self) -> None:
        self._idle.wait(2 * FORK_SECONDS)

    def before_fork(self) -> None:
        deadline = time.monotonic() + FORK_SECONDS
        if not self._forking.acquire(timeout=FORK_SECONDS):
            return  # another thread forks, and takes too long; our child finds out what it has inherited
        self._forking_thread = threading.get_ident()
        self._idle.clear()
        # What was registered last goes first: it may rely on what was there before.
        for forkable in reversed(self._all()):
            forkable.before_fork(deadline)

    def after_fork(self) -> None:
        if self._forking_thread != threading.get_ident():
            return
        for forkable in self._all():
            forkable.after_fork()
        self._forking_thread = None
        self._idle.set()
        self._forking.release()

    def in_child(self) -> None:
        registered = list(self._registered.values())  # no other thread is left that could change it
        self._registered = WeakValueDictionary()
        self._renew_locks()
        for forkable in registered:
            forkable.in_child()

    def _all(self) -> Sequence[Forkable]:
        with self._changing:
            return [forkable for _, forkable in sorted(self._registered.items())]


_forks: Final = _Forks()
register: Final = _forks.register
"""Have a fork take care of this, until it is unregistered by the number that this gives, or nobody has it any more."""
unregister: Final = _forks.unregister
check: Final = _forks.check
"""Raise ForkUnderWayError if somebody waits to fork; for whoever waits for something else meanwhile."""
wait: Final = _forks.wait
"""Let a fork that is under way go first: a thread that is always busy would else win each time."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forks.before_fork, after_in_parent=_forks.after_fork, after_in_child=_forks.in_child)
