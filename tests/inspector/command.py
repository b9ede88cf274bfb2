"""`streamkeep inspect` as a process of its own."""

import re
import select
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Self

START_SECONDS = 30
STOP_SECONDS = 20


class InspectCommand:
    """The command over a storage, and the URL that it prints; leaving kills it."""

    def __init__(self, storage: str, log: IO[str], *options: str) -> None:
        command = [sys.executable, "-m", "streamkeep.cli", "inspect", storage, *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], START_SECONDS)[0], "it says nothing"
        found = re.search(r"(http://\S+)/#token=(\S+)", self._process.stdout.readline())
        assert found, "it has not started"
        self.url, self.token = found.groups()
        self.page = f"{self.url}/#token={self.token}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=STOP_SECONDS)

    @contextmanager
    def stalled(self) -> Generator[None]:
        """Have it do nothing for a while, and say nothing on connections that it has."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """Ask it to end, and give its exit code."""
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=STOP_SECONDS)
        return self._process.returncode
