"""Engines that tests start: each a process on a free port of the loopback, which ends with whoever started it, however that ends."""

import ctypes
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGTERM, Signals
from typing import Final, Self

WAIT_SECONDS: Final = 30
_PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None, use_errno=True)
# To the kernel a process's parent is the thread that started it; a server must not die with a worker thread that has nothing to do.
_starter: Final = ThreadPoolExecutor(1, "starts-servers")


class Process:
    """A server that runs, or has run: `start` starts it again as it was.

    Args:
        command: how it is started, in the foreground.
        directory: where it runs, and keeps its `log`; made if it is missing.
        is_ready: says whether it answers; asked until it does.
        environment: what its environment has beside this one's.
        user: run it as another user, if this one is root.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        directory: Path,
        is_ready: Callable[[], bool],
        *,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        self._command = [str(word) for word in command]
        self._directory = directory
        self._is_ready = is_ready
        self._environment = {**os.environ, **(environment or {})}
        self._user = user if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self._directory / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        """Start it, and return when it answers. RuntimeError, with its log, if it does not."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / "log").open("ab") as log:
            self._process = _starter.submit(
                subprocess.Popen[bytes],
                self._command,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                user=self._user,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            ).result()
        give_up_at = time.monotonic() + WAIT_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.kill()
                raise RuntimeError(f"{self._command[0]} does not run:\n{self.log}")
            time.sleep(0.02)
        return self

    def signal(self, number: Signals) -> None:
        """Send it a signal: SIGSTOP and SIGCONT, for instance."""
        os.kill(self.pid, number)

    def stop(self, number: Signals = SIGTERM) -> None:
        """Ask it to end, and wait until it has; kill it if it does not in time."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(SIGCONT)
        self._process.send_signal(number)
        try:
            self._process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once, as `kill -9` does, and whatever it has started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, SIGKILL)
            self._process.wait(WAIT_SECONDS)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)


class OfOneProcess:
    """What an engine is made to suffer that is one process, which `process` is."""

    process: Process

    def restart(self) -> None:
        """Stop it in good order, and start it again."""
        self.process.stop()
        self.process.start()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()

    def start(self) -> Self:
        """Start it."""
        self.process.start()
        return self

    def signal(self, number: Signals) -> None:
        """Send it a signal."""
        self.process.signal(number)

    def __enter__(self) -> Self:
        self.process.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.__exit__(*exc_info)


def free_port() -> int:
    """Give a port on which nobody listens, and which nobody gets who asks for any port, as whoever connects does."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(first_ephemeral, 20_000))
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def answers(port: int) -> bool:
    """Say whether somebody listens on a port."""
    with socket.socket() as connection:
        connection.settimeout(1)
        return connection.connect_ex(("127.0.0.1", port)) == 0


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, SIGKILL)
