"""Cancellation: how the code of an app is cancelled that runs in a task of ours."""

import asyncio
from types import TracebackType

from anyio import CancelScope

from .._background import is_asyncio_here


class Cancellation:
    """Cancels from outside what a task does inside `with cancellation:`.

    On asyncio that comes once, so that what is done at its end (`finally: await save(partial)`) is not cancelled as well, as it would be
    by a scope, at each `await`. Elsewhere it is a scope's.

    Attributes:
        scope: cancels as scopes do.
        task: asyncio's task; None elsewhere, and before it has begun.
    """

    def __init__(self) -> None:
        self.scope = CancelScope()
        self.task: asyncio.Task[object] | None = None

    def __enter__(self) -> None:
        self.task = asyncio.current_task() if is_asyncio_here() else None
        self.scope.__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self.scope.__exit__(exc_type, exc, traceback)

    def cancel(self) -> None:
        """Cancel it; on asyncio once more each time that this is called."""
        if self.task is not None:
            self.task.cancel()
        else:
            self.scope.cancel()
