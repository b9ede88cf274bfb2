"""The service of examples/deploy as its files deploy it: instances, and a proxy before them, on ports that are free here."""

import os
import re
import shlex
import shutil
import sys
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import pytest
from tests.engines.process import Process, answers, free_port

EXAMPLE: Final = Path(__file__).parents[2] / "examples" / "deploy"
ProxyName = Literal["nginx", "caddy"]


@dataclass(frozen=True, slots=True)
class Deployed:
    """What runs.

    Attributes:
        url: the proxy's.
        instances: by the name that each has for itself.
    """

    url: str
    instances: Mapping[str, Process]

    def restart(self, name: str) -> None:
        """Stop an instance as its process manager does, start it anew, and return when it answers."""
        self.instances[name].stop()
        self.instances[name].start()


def command_of_unit(port: int) -> Sequence[str]:
    """Give the command of the systemd unit for an instance, run by this Python."""
    (line,) = re.findall(r"^ExecStart=(.*)$", (EXAMPLE / "answers@.service").read_text(), re.MULTILINE)
    program, *arguments = shlex.split(line.replace("%i", str(port)))
    return [sys.executable, "-m", Path(program).name, *arguments]


@contextmanager
def deployed(
    proxy: ProxyName,
    program: str,
    directory: Path,
    storage: str,
    *,
    words_per_second: float,
    heartbeat_seconds: float = 15,
    drain_seconds: float = 20,
    read_timeout_seconds: int = 60,
) -> Generator[Deployed]:
    """Run two instances, and the proxy before them with the example's own configuration."""
    environment = {
        "STREAMS_URL": storage,
        "WORDS_PER_SECOND": str(words_per_second),
        "HEARTBEAT_SECONDS": str(heartbeat_seconds),
        "DRAIN_SECONDS": str(drain_seconds),
    }
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        instances = {str(port): instance(directory / str(port), port, environment) for port in ports}
        for process in instances.values():
            stack.enter_context(process)
        listens = free_port()
        make = nginx if proxy == "nginx" else caddy
        stack.enter_context(make(program, directory / proxy, listens, ports, read_timeout_seconds))
        yield Deployed(f"http://127.0.0.1:{listens}", instances)


def instance(directory: Path, port: int, environment: Mapping[str, str]) -> Process:
    """Give an instance, in a directory that has the app and nothing else."""
    directory.mkdir(parents=True)
    shutil.copy(EXAMPLE / "app.py", directory)
    named = {**environment, "INSTANCE": str(port), "PYTHONDONTWRITEBYTECODE": "1"}
    return Process(command_of_unit(port), directory, lambda: is_ready(port), environment=named)


def is_ready(port: int) -> bool:
    """Ask `/readyz`, as process managers do."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def nginx(program: str, directory: Path, listens: int, ports: Sequence[int], read_timeout_seconds: int) -> Process:
    """Give nginx with the example's file, in which only the ports and the time-out are others."""
    directory.mkdir()
    site = replaced(
        (EXAMPLE / "nginx.conf").read_text(),
        {
            "listen 8080;": f"listen 127.0.0.1:{listens};",
            "127.0.0.1:8001": f"127.0.0.1:{ports[0]}",
            "127.0.0.1:8002": f"127.0.0.1:{ports[1]}",
            "proxy_read_timeout 60s;": f"proxy_read_timeout {read_timeout_seconds}s;",
        },
    )
    (directory / "site.conf").write_text(site)
    temporary = " ".join(
        f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"daemon off; pid {directory}/pid; error_log {directory}/errors; events {{}}\n"
        f"http {{ access_log off; {temporary} include {directory}/site.conf; }}\n"
    )
    command: list[str | Path] = [program, "-c", directory / "nginx.conf", "-p", directory, "-e", "stderr"]
    return Process(command, directory, lambda: answers(listens))


def caddy(program: str, directory: Path, listens: int, ports: Sequence[int], read_timeout_seconds: int) -> Process:
    """Give Caddy with the example's file; what is other is in the environment that the file asks, but for the port of its admin."""
    directory.mkdir()
    (directory / "Caddyfile").write_text(f'{{\n\tadmin off\n}}\nimport "{EXAMPLE}/Caddyfile"\n')
    environment = {
        "SITE": f"http://127.0.0.1:{listens}",
        "INSTANCES": " ".join(f"127.0.0.1:{port}" for port in ports),
        "READ_TIMEOUT": f"{read_timeout_seconds}s",
        "XDG_CONFIG_HOME": str(directory),
        "XDG_DATA_HOME": str(directory),
    }
    command: list[str | Path] = [program, "run", "--config", directory / "Caddyfile", "--adapter", "caddyfile"]
    return Process(command, directory, lambda: answers(listens), environment=environment)


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """Give a text with some of its words changed, each of which has to be there once."""
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def program_of(name: str) -> str:
    """Give where a program is; Debian has nginx where only root looks. Where it is missing the test is skipped, and fails with CI=true."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed")
    return path
