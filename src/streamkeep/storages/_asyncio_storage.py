"""How a storage is entered and left whose driver, or threads, need asyncio."""

import asyncio
import os
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from typing import Final, Generic, Self, TypeVar

import anyio

from streamkeep.errors import StorageError, WrongEventLoopError

_running_loop: Final = asyncio._get_running_loop  # noqa: SLF001 - documented, and quicker than raising

E = TypeVar("E")
"""What a storage has while it is open."""


class AsyncioStorage(ABC, Generic[E]):
    """Is entered once at a time, and left whole, even when that is cancelled.

    Args:
        name: what errors call it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._entered: E | None = None
        self._is_entering = False

    async def __aenter__(self) -> Self:
        if self._entered is not None or self._is_entering:
            self._check_loop()
            raise StorageError(f"{self._name} is open already: enter a storage once, or make another one")
        loop = _running_loop()
        if loop is None:
            storage = type(self).__name__
            raise StorageError(f"{storage} needs asyncio, and this is trio; MemoryStorage (memory://) runs on both")
        self._loop, self._process = loop, os.getpid()
        self._is_entering = True
        try:
            async with AsyncExitStack() as stack:
                self._entered = await self._enter(stack)
                self._exit_stack = stack.pop_all()
        finally:
            self._is_entering = False
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._check_loop()  # a forked child must not close its parent's connections
        self._entered = None
        with anyio.CancelScope(shield=True):  # each step of it ends in time
            await self._exit_stack.aclose()

    @abstractmethod
    async def _enter(self, stack: AsyncExitStack) -> E:
        """Give what the storage has while it is open; `stack` is left when the storage is, or when this fails."""

    @property
    def _open(self) -> E:
        if self._entered is None:
            raise StorageError(f"{self._name} is not open: use the storage inside 'async with'")
        self._check_loop()
        return self._entered

    def _check_loop(self) -> None:
        # The process too, because a forked child may run the very loop that it has inherited.
        if _running_loop() is not self._loop or os.getpid() != self._process:
            where = "event loop" if os.getpid() == self._process else "process"
            raise WrongEventLoopError(f"{self._name} was opened in another {where}; open a storage of your own in this one")
