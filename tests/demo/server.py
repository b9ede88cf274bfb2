"""`streamkeep demo` as a process of its own, which can be killed and started again."""

import re
import select
import signal
import subprocess
import sys
from typing import IO, Self

from tests.engines.process import free_port

START_SECONDS = 30
STOP_SECONDS = 20


class Demo:
    """The server; its URL stays the same from start to start."""

    def __init__(self, storage: str, log: IO[str], *, tokens_per_second: float, drain: float = 0.2) -> None:
        self._log = log
        self._options = ["--storage", storage, "--tokens-per-second", str(tokens_per_second), "--drain", str(drain)]
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def start(self) -> None:
        port = self.url.rpartition(":")[2] or str(free_port())  # which is still free when it starts again
        command = [sys.executable, "-m", "streamkeep.cli", "demo", "--port", port, *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], START_SECONDS)[0], "the demo says nothing"
        found = re.search(r"http://\S+", self._process.stdout.readline())
        assert found, "the demo has not started"
        self.url = found[0]

    def kill(self) -> None:
        """End it as `kill -9` does, if it runs."""
        if self._process is not None:
            self._process.kill()
            self.wait()

    def stop(self) -> int:
        """Ask it to end, and give its exit code."""
        self._signal(signal.SIGTERM)
        return self.wait()

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._signal(signal.SIGINT)

    def wait(self) -> int:
        """Give its exit code when it has ended."""
        assert self._process is not None
        self._process.communicate(timeout=STOP_SECONDS)
        code = self._process.returncode
        self._process = None
        return code

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
