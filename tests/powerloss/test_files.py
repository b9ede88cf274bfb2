"""What happens to the files of a database behind streamkeep's back."""

# ruff: noqa: ASYNC240 (these tests handle files, and nobody else is on their loop)

from pathlib import Path

import anyio
import pytest

from streamkeep import StorageError, StreamManager
from streamkeep.storages.sqlite import SQLiteStorage

BOUND_SECONDS = 20

# The counts of what was begun and what was published, as no process leaves them.
ODD_NOTIFY_FILES = {
    "all ones": b"\xff" * 16_400,
    "one byte": b"\xff",
    "published more than was begun": (1).to_bytes(8, "little") + (1 << 40).to_bytes(8, "little"),
    "about to overflow": ((1 << 64) - 1).to_bytes(8, "little") * 2,
    "published only": bytes(8) + (1 << 40).to_bytes(8, "little"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "streams.db"


@pytest.mark.parametrize("content", ODD_NOTIFY_FILES.values(), ids=ODD_NOTIFY_FILES)
async def test_whatever_a_power_failure_has_left_in_the_notify_file_commits_and_rings_are_as_ever(
    content: bytes, path: Path
) -> None:
    """Nobody syncs it, so anything may be in it."""
    async with SQLiteStorage(path) as storage, StreamManager(storage) as streams, streams.open("answer"):
        pass
    path.with_name("streams.db-notify").write_bytes(content)
    async with (
        SQLiteStorage(path) as here,
        SQLiteStorage(path) as there,
        here.watch("answer") as doorbell,
        StreamManager(there) as streams,
        streams.open("answer", resume=True) as stream,
    ):
        for offset in range(3):
            with anyio.fail_after(BOUND_SECONDS):
                await doorbell.wait()  # the first time for the opening
            assert await stream.write("stored") == offset


@pytest.mark.parametrize("is_replaced", [False, True], ids=["removed", "replaced"])
@pytest.mark.promise("P16")
async def test_a_database_that_is_removed_or_replaced_while_it_is_open_takes_nothing_more(
    path: Path, is_replaced: bool
) -> None:
    """Else it would be acknowledged, and be in a file that nobody can open."""
    async with SQLiteStorage(path) as storage, StreamManager(storage) as streams:
        stream = await streams.open("answer")
        await stream.write("stored")
        path.rename(path.with_name("moved.db"))
        if is_replaced:
            path.touch()
        with pytest.raises(StorageError, match="removed or replaced"):
            await stream.write("lost")
        path.with_name("moved.db").replace(path)
        await stream.flush()
        assert stream.tail == 2


async def test_a_change_of_the_working_directory_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    async with SQLiteStorage(path.name) as storage, StreamManager(storage) as streams, streams.open("answer") as stream:
        monkeypatch.chdir("/")
        assert await stream.write("stored") == 0
