"""NATS servers that tests start: one, or a cluster of three."""

import json
import sys
import tempfile
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from tests.engines.process import OfOneProcess, Process, answers, free_port

BINARY: Final = Path(sys.executable).with_name("nats-server")


class NATSServer(OfOneProcess):
    """A `nats-server` with JetStream; its data survive it until the directory goes. Satisfies `Engine`.

    Args:
        directory: where it keeps its configuration, log and data.
        stream: the JetStream stream that `url` names.
        jetstream: what stands in `jetstream {}` beside the directory, or None for a server without.
        more: more of the configuration.
    """

    def __init__(
        self, directory: Path, *, stream: str = "streamkeep", jetstream: str | None = "", more: str = "", name: str = "n1"
    ) -> None:
        self.port: Final = free_port()
        self.monitor: Final = free_port()
        self.stream = stream
        config = f'server_name: {name}\nlisten: "127.0.0.1:{self.port}"\nhttp: "127.0.0.1:{self.monitor}"\n'
        if jetstream is not None:
            config += f'jetstream {{ store_dir: "{directory / "data"}"\n{jetstream}\n}}\n'
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "nats.conf").write_text(config + more)
        self.process = Process([BINARY, "-c", directory / "nats.conf"], directory, self._is_ready)

    @property
    def url(self) -> str:
        return self.through(self.port)

    def through(self, port: int) -> str:
        return f"nats://127.0.0.1:{port}?stream={self.stream}"

    def ask(self, path: str) -> Any:
        """Give what the monitoring port says."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.monitor}/{path}", timeout=2) as answer:
            return json.load(answer)

    def _is_ready(self) -> bool:
        return answers(self.port)  # it listens to clients last, when JetStream is up


class NATSCluster:
    """Three servers that know one another; the streams are kept by all."""

    def __init__(self, directory: Path, *, stream: str = "streamkeep") -> None:
        self.stream = stream
        routes = [free_port() for _ in range(3)]
        urls = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
        self.servers: Final[Sequence[NATSServer]] = [
            NATSServer(
                directory / f"n{number}",
                stream=stream,
                name=f"n{number}",
                more=f'cluster {{ name: test, listen: "127.0.0.1:{port}", routes: [{urls}] }}\n',
            )
            for number, port in enumerate(routes, 1)
        ]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        return f"nats://{hosts}?stream={self.stream}&replicas=3"

    def start(self) -> "NATSCluster":
        for server in self.servers:
            server.start()
        return self

    def leader(self) -> NATSServer:
        """Give the server that leads the stream, as those say that answer."""
        for server in self.servers:
            try:
                accounts = server.ask("jsz?streams=true&accounts=true")["account_details"]
            except OSError:
                continue
            for stream in (stream for account in accounts for stream in account.get("stream_detail", ())):
                if stream["name"] == self.stream and stream.get("cluster", {}).get("leader"):
                    name = stream["cluster"]["leader"]
                    return next(server for server in self.servers if self.name_of(server) == name)
        raise RuntimeError("the stream has no leader")

    def name_of(self, server: NATSServer) -> str:
        """Give a server's name."""
        return f"n{self.servers.index(server) + 1}"


@contextmanager
def running_server(**options: Any) -> Generator[NATSServer]:
    """Run a server in a directory of its own, and leave nothing."""
    with tempfile.TemporaryDirectory(prefix="streamkeep-nats-", ignore_cleanup_errors=True) as directory:
        server = NATSServer(Path(directory), **options)
        with ExitStack() as stack:
            stack.callback(server.process.stop)
            yield server.start()


@contextmanager
def running_cluster(**options: Any) -> Generator[NATSCluster]:
    """Run three servers in a directory of their own, and leave nothing."""
    with tempfile.TemporaryDirectory(prefix="streamkeep-nats-", ignore_cleanup_errors=True) as directory:
        cluster = NATSCluster(Path(directory), **options)
        with ExitStack() as stack:
            for server in cluster.servers:
                stack.callback(server.process.kill)
            yield cluster.start()
