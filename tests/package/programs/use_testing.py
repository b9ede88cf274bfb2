"""A storage of one's own, here memory, with the suites of contract and promises: run, it has pytest on itself."""

import os
import subprocess
import sys

import pytest

from streamkeep.storages.memory import MemoryStorage
from streamkeep.testing import StorageSuite, StreamsSuite


class TestOwnStorage(StorageSuite):
    @pytest.fixture
    def open_storage(self):
        storage = MemoryStorage()
        return lambda: storage


class TestOwnStreams(StreamsSuite):
    @pytest.fixture
    def open_storage(self):
        storage = MemoryStorage()
        return lambda: storage


if __name__ == "__main__":
    # In a process of its own: pytest warns of modules that are imported before it can rewrite their assertions.
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        ".",
        "--noconftest",
        "-x",
        "-k",
        "order or ends or whole",
    ]
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", *options, __file__], check=False).returncode)
