"""One who takes part in a campaign, in one life after the other: started, sent signals, and buried. It decides nothing."""

import os
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

import anyio
from tests.torture.ledger import Ledger
from tests.torture.producer import produce
from tests.torture.reader import read
from tests.torture.server import serve
from tests.torture.stage import Part, pipe, play_until_terminated, process_of


class Actor:
    """One who takes part, in one life after the other.

    Attributes:
        role: its name.
        is_tormented: whether somebody is at it.
        is_up: of a server: whether it has been up in this life.
        last_words: what its last life has written to stderr.
    """

    def __init__(self, part: Part, ledger: Ledger) -> None:
        self.role = part.role
        self.is_tormented = False
        self.is_up = False
        self.last_words = ""
        self._part = part
        self._ledger = ledger
        self._process: ForkServerProcess | None = None

    @property
    def is_alive(self) -> bool:
        """Whether its process runs, or is stopped."""
        return self._process is not None and self._process.is_alive()

    @property
    def is_buried(self) -> bool:
        """Whether it has no process, not even a dead one."""
        return self._process is None

    @property
    def has_begun(self) -> bool:
        """Whether this life has done anything yet."""
        return self.is_up or self._ledger.has_entries(self.role)

    def start(self) -> Connection:
        """Begin a new life, and give where it says its URL if it is a server; otherwise nothing comes from there."""
        unfinished = self._ledger.unfinished(self.role)
        self._part = part = replace(self._part, life=self._part.life + 1, unfinished=unfinished)
        self._ledger.open(self.role, part.journal)
        self.is_up = False
        ours, theirs = pipe()
        with theirs:
            self._process = self._process_of(part, theirs)
            self._process.start()  # not in a thread, where it would look after the other processes at the same time as we do
        return ours

    def send(self, signal_: signal.Signals) -> bool:
        """Send a signal, if it is alive; whether it was."""
        if self._process is None or self._process.pid is None or not self._process.is_alive():
            return False
        os.kill(self._process.pid, signal_)
        return True

    async def ended(self) -> int | None:
        """Wait for its death, take in what it has left, and give its exit code."""
        assert self._process is not None
        await anyio.wait_readable(self._process.sentinel)
        return self.bury()

    def bury(self) -> int | None:
        """Take in what a dead process has left, and give its exit code."""
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode
        self._process.close()
        self._process = None
        self._ledger.close(self.role)
        self.last_words = self._part.stderr.read_text() if self._part.stderr.exists() else ""
        self._part.stderr.unlink(missing_ok=True)
        return code

    def _process_of(self, part: Part, url: Connection) -> ForkServerProcess:
        if self.role.startswith("producer"):
            return process_of(part, play_until_terminated, produce)
        if self.role.startswith("reader"):
            return process_of(part, play_until_terminated, read)
        return process_of(part, serve, url)
