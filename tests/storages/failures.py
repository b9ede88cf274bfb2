"""What tests of storages in servers say of failures that many wait for, and of forks."""

import asyncio
import sys
from collections.abc import Sequence
from traceback import walk_tb

from streamkeep.errors import StorageError

BOUND_SECONDS = 60
_MOST_FRAMES = 20


def assert_each_has_its_own(failures: Sequence[object]) -> None:
    """Say that each who waited was told by a StorageError of its own, and that none has grown by the others' raising it."""
    errors = [failure for failure in failures if isinstance(failure, StorageError)]
    assert len(errors) == len(failures)
    assert len(set(map(id, errors))) == len(errors)
    for error in errors:
        raised: BaseException | None = error
        while raised is not None:
            assert sum(1 for _ in walk_tb(raised.__traceback__)) < _MOST_FRAMES
            raised = raised.__cause__


async def forked(url: str, where: str) -> int:
    """Run `tests.storages.forked`, and give its exit status."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.storages.forked", url, where)
    try:
        async with asyncio.timeout(BOUND_SECONDS):
            return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
