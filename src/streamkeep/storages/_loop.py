"""The event loop of storages whose drivers or threads need asyncio."""

import asyncio

from streamkeep.errors import StorageError


def asyncio_loop(storage: str) -> asyncio.AbstractEventLoop:
    """Give the running loop. StorageError, which names the storage: it is not asyncio's."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise StorageError(f"{storage} needs asyncio, and this is another event loop; MemoryStorage runs on any") from None
