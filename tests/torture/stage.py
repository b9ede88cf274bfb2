"""What all processes of a campaign share: where things lie, how long they last, and how a process of it begins and ends."""

import ctypes
import multiprocessing
import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskStatus

from streamkeep.storages.sqlite._database import Synchronous

LEASE: Final = timedelta(seconds=1)
GRACE: Final = timedelta(seconds=1)
TTL: Final = timedelta(minutes=5)
"""More than enough for everybody to read a stream after its end, however slow the machine."""
SLOTS: Final = 3
"""How many things a producer does at a time."""

_PR_SET_PDEATHSIG: Final = 1
_processes: Final = multiprocessing.get_context("forkserver")
# Imports take seconds, and are done once, those too that are otherwise left until they are needed. (Unless this process has used
# tests.http.servers before: then its one forkserver has imported that, and no more.)
_processes.set_forkserver_preload(
    [
        "anyio._backends._asyncio",
        "httpcore",
        "uvicorn.lifespan.on",
        "uvicorn.loops.auto",
        "uvicorn.protocols.http.auto",
        "uvicorn.protocols.websockets.auto",
        *(f"tests.torture.{part}" for part in ("producer", "reader", "server")),
    ]
)


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a campaign takes place."""

    directory: Path
    seed: int
    synchronous: Synchronous = "FULL"

    @property
    def database(self) -> Path:
        """The file that everybody shares."""
        return self.directory / "streams.db"

    @property
    def url(self) -> str:
        """The same as a URL."""
        return f"sqlite:///{self.database}?synchronous={self.synchronous}"

    @property
    def servers(self) -> Path:
        """Where the URLs of those servers are that were up a moment ago, one a line."""
        return self.directory / "servers"

    @property
    def calm(self) -> Path:
        """Exists when nothing new is to be begun."""
        return self.directory / "calm"

    @property
    def is_calm(self) -> bool:
        """Whether nothing new is to be begun."""
        return self.calm.exists()


@dataclass(frozen=True, slots=True)
class Part:
    """What a process is told when it starts: who it is, and where.

    Attributes:
        stage: where it plays.
        role: a producer's, a reader's or a server's name, such as `reader-1`.
        life: how often that one was started before.
        unfinished: of a reader: the readings that its last life was killed in, with stream and last offset.
    """

    stage: Stage
    role: str
    life: int = -1
    unfinished: Mapping[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])

    @property
    def name(self) -> str:
        """What this life calls itself; never used twice."""
        return f"{self.role}.{self.life}"

    @property
    def journal(self) -> Path:
        """Where this life notes what it does."""
        return self.stage.directory / f"{self.name}.journal"

    @property
    def stderr(self) -> Path:
        """Where it complains."""
        return self.stage.directory / f"{self.name}.stderr"

    def choices(self) -> random.Random:
        """Give what this life decides by: the same for the same seed."""
        return random.Random(f"{self.stage.seed} {self.name}")


def pipe() -> tuple[Connection, Connection]:
    """Give the reading and the writing end of a pipe that a process can be given."""
    return _processes.Pipe(duplex=False)


def process_of(part: Part, play: Callable[..., object], *args: object) -> ForkServerProcess:
    """Give a process, not started yet, that plays a part; it dies when the campaign does, even if it is stopped then."""
    return _processes.Process(target=_perform, args=(part, play, *args), name=part.name)


def _perform(part: Part, play: Callable[..., object], *args: object) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(part.stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    play(part, *args)


def play_until_terminated(part: Part, play: Callable[[Part], Awaitable[None]]) -> None:
    """Run an async part; SIGTERM cancels it, so that it leaves in good order."""
    anyio.run(_until_terminated, part, play)


async def _until_terminated(part: Part, play: Callable[[Part], Awaitable[None]]) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(_leave_at_sigterm, tasks.cancel_scope)
        await play(part)
        tasks.cancel_scope.cancel()


async def _leave_at_sigterm(scope: anyio.CancelScope, *, task_status: TaskStatus[None]) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()
