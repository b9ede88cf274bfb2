"""A program of its own that opens a storage, forks, and goes on: `python -m tests.storages.forked URL inside|outside`.

`inside`: the child is forked in a coroutine, uses the inherited storage in an event loop of its own, collects it as garbage, and ends at
once, as those of multiprocessing do. `outside`: it is forked where no loop runs, and exits as a program does. Neither may take a
connection from the parent, which then commits, reads and is rung over those that it had.
"""

import asyncio
import gc
import os
import sys
import warnings
import weakref
from collections.abc import Callable

from streamkeep.errors import WrongEventLoopError
from streamkeep.storage import Head, Storage
from streamkeep.storages import storage_for
from streamkeep.storages.retrying import RetryingStorage

BOUND_SECONDS = 20


class Parent:
    """Keeps all references to the storage, so that the child can drop them."""

    def __init__(self, url: str, stream: str) -> None:
        retrying = storage_for(url)
        assert isinstance(retrying, RetryingStorage)
        self.storage: Storage | None = retrying.storage  # which hides no connection that was lost
        self.stream = stream
        self.version = 0

    async def enter(self) -> None:
        assert self.storage is not None
        await self.storage.__aenter__()
        await self.go_on()

    async def go_on(self) -> None:
        storage = self.storage
        assert storage is not None
        async with storage.watch(self.stream) as doorbell:
            for _ in range(20):
                self.version += 1
                head = Head(self.version, self.version, b"", 9e9)
                assert await storage.commit(self.stream, self.version - 1 or None, head, [b"%d" % self.version])
                await doorbell.wait()
                page = await storage.read(self.stream, self.version - 1, 1)
                assert page is not None
                assert list(page.records) == [b"%d" % self.version]

    async def leave(self) -> None:
        assert self.storage is not None
        await self.storage.__aexit__(None, None, None)

    async def be_a_child(self) -> None:
        await self.is_refused()
        await self.clones()
        collected = weakref.ref(self.storage)
        self.drop()
        assert collected() is None

    async def is_refused(self) -> None:
        storage = self.storage
        assert storage is not None
        assert not self.works(storage.time)
        for use in (storage.read("s"), storage.commit("s", 1, Head(2, 1, b"", 9e9)), storage.scan(), storage.__aexit__()):
            try:
                await use
            except WrongEventLoopError:
                continue
            raise AssertionError("it can be used")

    async def clones(self) -> None:
        assert self.storage is not None
        clone = self.storage.clone()
        assert clone is not None
        async with clone:
            assert await clone.read(self.stream) is not None

    def drop(self) -> None:
        del self.storage
        gc.collect()

    def works(self, use: Callable[[], object]) -> bool:
        try:
            use()
        except WrongEventLoopError:
            return False
        return True


async def inside(url: str) -> None:
    parent = Parent(url, "inside")
    async with asyncio.timeout(BOUND_SECONDS):
        await parent.enter()
        if (child := os.fork()) == 0:
            try:
                asyncio.run(parent.be_a_child())
            except BaseException as error:
                print("child:", repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0  # noqa: ASYNC222 - the loop need not run meanwhile
        await parent.go_on()
        await parent.leave()


def outside(url: str) -> None:
    parent, loop = Parent(url, "outside"), asyncio.new_event_loop()
    loop.run_until_complete(asyncio.wait_for(parent.enter(), BOUND_SECONDS))
    if (child := os.fork()) == 0:
        assert parent.storage is not None
        assert not parent.works(parent.storage.time)
        asyncio.run(parent.be_a_child())
        print("child: exits", flush=True)
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    loop.run_until_complete(asyncio.wait_for(parent.go_on(), BOUND_SECONDS))
    loop.run_until_complete(asyncio.wait_for(parent.leave(), BOUND_SECONDS))
    loop.close()


if __name__ == "__main__":
    warnings.simplefilter("ignore", ResourceWarning)  # a child closes nothing
    if sys.argv[2] == "inside":
        asyncio.run(inside(sys.argv[1]))
    else:
        outside(sys.argv[1])
    print("parent: goes on")
