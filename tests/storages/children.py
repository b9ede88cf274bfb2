"""Forked children: started, waited for with a bound, and ended by the tests that started them."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

BOUND_SECONDS = 30


class Child:
    """A forked child that does one thing and exits, with status 0 if nothing was raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)

    def wait(self) -> int:
        """Give its exit status, or minus the signal that has killed it; it is killed when it takes too long."""
        deadline = time.monotonic() + BOUND_SECONDS
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.001)

    def kill(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)


class Pipe:
    """Tells another process to go on, or what it wants to know."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def send(self, line: str = "") -> None:
        """Send a line."""
        os.write(self._write, line.encode() + b"\n")

    def receive(self) -> str:
        """Wait for a line."""
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._read, 1)
            if not byte:
                raise EOFError
            line += byte
        return line.decode().strip()

    def close(self) -> None:
        """Close both of its ends here."""
        os.close(self._read)
        os.close(self._write)
