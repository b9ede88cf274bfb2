"""What tests know of an engine that they run: where it is, and how it is made to suffer."""

from signal import Signals
from typing import Protocol


class Engine(Protocol):
    """A server of an engine, running, with its data on a disk that survives it."""

    @property
    def url(self) -> str:
        """The URL of an empty storage in it, for `StreamManager.connect` in any process."""
        ...

    @property
    def port(self) -> int:
        """Where it listens on the loopback."""
        ...

    def through(self, port: int) -> str:
        """Give the same URL by way of another port, where a proxy listens."""
        ...

    def restart(self) -> None:
        """Stop it in good order, and start it again over its data, on the same port."""

    def kill(self) -> None:
        """End it as `kill -9` does."""

    def start(self) -> object:
        """Start it again after `kill`."""
        ...

    def signal(self, number: Signals) -> None:
        """Send it a signal: SIGSTOP and SIGCONT."""
