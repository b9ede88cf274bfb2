"""An event loop for a machine that is not async: in a thread of its own, asked for one thing at a time."""

import tempfile
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final, TypeVar

from anyio.from_thread import start_blocking_portal

from .virtual_time import Backend, Workload, pass_time, still_time, until_quiet

T = TypeVar("T")

BOUND_SECONDS: Final = 30
"""How long one step may take; real time, which only a step that hangs will need."""


class Portal:
    """Runs coroutines on its event loop, and keeps async context managers open there, each in a task of its own."""

    def __init__(self, backend: Backend, *, stands_still: bool = False) -> None:
        self._resources = ExitStack()
        self._backend: Backend = backend
        scratch = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="streamkeep model "))
        self.directory: Final = Path(scratch) / "data"
        self._portal = self._resources.enter_context(
            start_blocking_portal(backend, still_time(backend) if stands_still else None)
        )

    def run(self, function: Callable[[], Awaitable[T]]) -> T:
        """Give what the coroutine of `function` returns, or raise what it raises; TimeoutError when it hangs."""
        future = self.start(function)
        try:
            return future.result(BOUND_SECONDS)
        finally:
            future.cancel()  # what hangs must not keep the loop from ending; anything else is over

    def start(self, function: Callable[[], Awaitable[T]]) -> Future[T]:
        """Give the future of what the coroutine of `function` returns; cancelling that cancels the coroutine."""
        return self._portal.start_task_soon(function)

    def pass_time(self, seconds: float) -> None:
        """Let it be so much later, if time stands still."""
        self._portal.call(pass_time, seconds)

    def settle(self, workload: Workload) -> None:
        """Return when nobody has anything to do before time passes."""
        self.run(lambda: until_quiet(workload))

    def keep(self, manager: AbstractAsyncContextManager[T]) -> tuple[T, AbstractContextManager[object]]:
        """Enter an async context manager; give what it gives, and what leaves it (`close`, too, leaves it if nobody else did)."""
        leaving = ExitStack()
        entered = leaving.enter_context(self._portal.wrap_async_context_manager(manager))
        self._resources.push(leaving)
        return entered, leaving

    def close(self) -> None:
        """Leave all that is open, in the reverse order, and end the loop and its thread."""
        self._resources.close()
