"""Servers as people start them, each in a process group of its own that is gone at the end of the block, whatever happens."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import anyio
import anyio.to_thread
import httpx
from tests.engines.process import free_port

ROOT: Final = Path(__file__).parents[2]
WAIT_SECONDS: Final = 60
MODULE: Final = "served"


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to start a server.

    Attributes:
        name: the command, for people.
        command: what comes after `python -m`.
        terminated: its exit code after SIGTERM.
        interrupted: its exit codes after Ctrl-C.
        answers: a path that answers as soon as it serves.
        says: what each of its workers says when it is up.
        listens: the option that says at which port.
    """

    name: str
    command: Sequence[str]
    terminated: int = 0
    interrupted: Sequence[int] = (0,)
    answers: str = "/process"
    says: str = ""
    listens: str = "--port {}"

    @property
    def is_bounded(self) -> bool:
        """Whether it gives up on responses that do not end."""
        return any(option in self.command for option in ("--timeout-graceful-shutdown", "--workers-kill-timeout"))

    @property
    def workers(self) -> int:
        """How many workers it has."""
        return int(self.command[self.command.index("--workers") + 1]) if "--workers" in self.command else 1


def uvicorn(*options: str, app: str = f"{MODULE}:app", terminated: int = 0) -> Kind:
    """Give `uvicorn module:app ...`."""
    return Kind(" ".join(["uvicorn", *options]), ["uvicorn", app, *options], terminated, says="startup complete")


def granian(*options: str, app: str = f"{MODULE}:app") -> Kind:
    """Give `granian --interface asgi module:app ...`."""
    command = ["granian", "--interface", "asgi", app, *options]
    # Ctrl-C reaches its workers too, and one that has ended before it is asked to is a failure.
    return Kind(" ".join(["granian", *options]), command, interrupted=(0, 1), says="Started worker")


def hypercorn(*options: str) -> Kind:
    """Give `hypercorn module:app ...`."""
    command = ["hypercorn", f"{MODULE}:app", *options]
    return Kind(" ".join(["hypercorn", *options]), command, says="Running on", listens="--bind 127.0.0.1:{}")


UVICORN: Final = uvicorn(terminated=-signal.SIGTERM)  # alone, it raises the signal again when all is done
UVICORN_BOUNDED: Final = uvicorn("--timeout-graceful-shutdown", "5", terminated=-signal.SIGTERM)
UVICORN_WORKERS: Final = uvicorn("--workers", "2")
UVICORN_WORKERS_BOUNDED: Final = uvicorn("--workers", "2", "--timeout-graceful-shutdown", "5")
UVICORN_RELOAD: Final = uvicorn("--reload")
GRANIAN: Final = granian()
GRANIAN_WORKERS: Final = granian("--workers", "2")
GRANIAN_BOUNDED: Final = granian("--workers-kill-timeout", "5")
GRANIAN_WORKERS_BOUNDED: Final = granian("--workers", "2", "--workers-kill-timeout", "5")
GRANIAN_RELOAD: Final = granian("--reload")
GRANIAN_RELOAD_BOUNDED: Final = granian("--reload", "--workers-kill-timeout", "5")
HYPERCORN: Final = hypercorn()
HYPERCORN_ALONE: Final = hypercorn("--workers", "0")  # without a parent
DAPHNE: Final = Kind("daphne", ["daphne", f"{MODULE}:app"], says="Listening on")
SERVE: Final = Kind("streamkeep serve", ["streamkeep.cli", "serve"], answers="/healthz")
DEMO: Final = Kind(
    "streamkeep demo", ["streamkeep.cli", "demo", "--tokens-per-second", "50", "--drain", "0.4"], answers="/server"
)


class Server:
    """A server that runs, or has run: `start` starts it again on the same port and the same file."""

    def __init__(self, kind: Kind, directory: Path, database: Path) -> None:
        self.kind = kind
        self.app_directory = directory / "app"
        self.database = database
        self._log = directory / "log"
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    @property
    def storage(self) -> str:
        """The storage's URL."""
        return f"sqlite:///{self.database}"

    @property
    def log(self) -> str:
        """What it has said so far, from its first start on."""
        return self._log.read_text(errors="replace")

    @property
    def module(self) -> Path:
        """The file that `--reload` watches."""
        return self.app_directory / f"{MODULE}.py"

    def write_app(self, source: str) -> None:
        """Make the directory as a project has it: the code is apart from the data."""
        self.app_directory.mkdir(parents=True, exist_ok=True)
        self.module.write_text(source)
        self.database.parent.mkdir(parents=True, exist_ok=True)
        self.database.touch()  # `streamkeep serve` makes none

    async def start(self) -> Self:
        """Start it, and return when it answers."""
        self._log.touch()
        said = len(self.log)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it takes no time
                [sys.executable, "-m", *self.kind.command, *self.kind.listens.format(self._port).split()],
                cwd=self.app_directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**environment(), "DEPLOY_STORAGE": self.storage, "STREAMKEEP_STORAGE": self.storage},
            )
        await self.answers()
        # Granian's workers lose a signal that comes before they are up.
        await until(lambda: self.log.count(self.kind.says, said) >= self.kind.workers)
        return self

    async def answers(self) -> int:
        """Return when it answers a new connection: which process does."""
        assert self._process is not None
        with anyio.fail_after(WAIT_SECONDS):
            while True:
                with suppress(httpx.TransportError):
                    async with httpx.AsyncClient(base_url=self.url, timeout=WAIT_SECONDS, verify=False) as http:
                        response = await http.get(self.kind.answers)
                        return int(response.text) if self.kind.answers == "/process" else 0
                assert self._process.poll() is None, f"{self.kind.name} does not run:\n{self.log}"
                await anyio.sleep(0.05)

    async def workers(self) -> list[int]:
        """Give the processes that answer, the one with most connections first."""
        found = {await self.answers() for _ in range(20)}
        return sorted(found, key=lambda pid: -len([*Path(f"/proc/{pid}/fd").iterdir()]))

    @property
    def pid(self) -> int:
        """The process that was started: the server, or the parent of its workers."""
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process that was started."""
        os.kill(self.pid, number)

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal sends SIGINT to all processes of the group."""
        os.killpg(self.pid, signal.SIGINT)

    async def exit_code(self) -> int:
        """Wait for its end, and give its exit code; TimeoutExpired if there is none."""
        assert self._process is not None
        return await anyio.to_thread.run_sync(self._process.wait, WAIT_SECONDS)

    async def says(self, text: str) -> None:
        """Return when a text is in its log."""
        await until(lambda: text in self.log)

    async def is_gone(self) -> None:
        """Return when no process of its group is left; TimeoutError if one stays."""
        await self.is_rid_of(processes_of(self.pid))
        assert processes_of(self.pid) == []

    async def is_rid_of(self, pids: Sequence[int]) -> None:
        """Return when none of these processes of its group lives; TimeoutError if one stays."""
        await until(lambda: set(processes_of(self.pid)).isdisjoint(pids))

    def kill(self) -> None:
        """End whatever is left of it."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait(WAIT_SECONDS)


@asynccontextmanager
async def running(
    kind: Kind, directory: Path, source: str = "from tests.deploy.app import app\n", *, database: Path | None = None
) -> AsyncGenerator[Server]:
    """Run a server below a directory, over a storage of its own unless another's is named."""
    server = Server(kind, directory, database or directory / "data" / "streams.db")
    server.write_app(source)
    try:
        yield await server.start()
    finally:
        server.kill()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what no event tells; TimeoutError if it never comes."""
    with anyio.fail_after(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110 - see above
            await anyio.sleep(0.02)


def processes_of(group: int) -> list[int]:
    """Give the living processes of a process group."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and _lives_in(entry, group)]


def _lives_in(process: Path, group: int) -> bool:
    try:
        # The name in parentheses may hold anything.
        state, _parent, of_group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(of_group) == group and state not in "ZX"


def environment() -> dict[str, str]:
    """Give the environment of processes that import these tests."""
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": str(ROOT) if before is None else f"{before}{os.pathsep}{ROOT}"}
