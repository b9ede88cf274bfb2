"""The page about the Durable Streams protocol: its worker and its webhook do what its server wakes them for."""

import re
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
import pytest
from tests.client.forms import free_port
from tests.test_docs import ROOT

PAGE: Final = (ROOT / "docs/how-to/durable-streams.md").read_text()
PROGRAMS: Final = dict(re.findall(r"^```(?:python|py)\n# (\w+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
ASKED: Final = re.findall(r"^  -d '(\{.*\})'$", PAGE, re.MULTILINE)
OURS: Final = {"authorization": "Bearer secret"}
BOUND_SECONDS: Final = 50


@contextmanager
def running(directory: Path, *arguments: str) -> Generator["subprocess.Popen[str]"]:
    command = [sys.executable, "-u", "-W", "error", *arguments]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@dataclass
class Page:
    """The page's server and webhook, while they run; its programs are in a directory of their own."""

    streams: httpx2.Client
    hook: "subprocess.Popen[str]"
    ports: dict[str, str]

    def here(self, text: str) -> str:
        return here(text, self.ports)


def here(text: str, ports: dict[str, str]) -> str:
    return re.sub("(?<=127.0.0.1:)800[01]", lambda shown: ports[shown[0]], text)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    ports = {"8000": str(free_port()), "8001": str(free_port())}
    for name, program in PROGRAMS.items():
        with_subscriptions = program.replace("authorize=allow)", 'authorize=allow, subscriptions="local")')
        (tmp_path / name).write_text(here(with_subscriptions, ports))
    with (
        running(tmp_path, "-m", "uvicorn", "app:app", "--port", ports["8000"], "--log-level", "error"),
        running(tmp_path, "-m", "uvicorn", "hook:app", "--port", ports["8001"], "--log-level", "error") as hook,
        httpx2.Client(
            base_url=here("http://127.0.0.1:8000/v1/stream/", ports),
            headers=OURS,
            transport=httpx2.HTTPTransport(retries=8),
            timeout=BOUND_SECONDS,
        ) as client,
        httpx2.Client(transport=httpx2.HTTPTransport(retries=8), timeout=BOUND_SECONDS) as anybody,
    ):
        assert client.get("none").status_code == 404
        assert anybody.post(here("http://127.0.0.1:8001/hook", ports), content=b"{}").status_code == 401
        yield Page(client, hook, ports)


def test_a_webhook_and_a_worker_are_given_each_order(page: Page, tmp_path: Path) -> None:
    (asked,) = ASKED
    assert page.streams.put("__ds/subscriptions/hook", content=page.here(asked)).status_code == 201
    with running(tmp_path, "worker.py") as worker:
        while page.streams.get("__ds/subscriptions/mailer").status_code == 404:
            assert worker.poll() is None
        for number in range(3):
            assert page.streams.put("orders/1", json=[]).status_code in {200, 201}
            assert page.streams.post("orders/1", json={"number": number}).status_code == 204
        wanted = [f"orders/1 {{'number': {number}}}\n" for number in range(3)]
        assert lines(worker, 3) == wanted
        assert lines(page.hook, 3) == wanted
        assert worker.poll() is None


def lines(process: "subprocess.Popen[str]", count: int) -> list[str]:
    """Give the first different lines that a process prints."""
    assert process.stdout is not None
    too_late = threading.Timer(BOUND_SECONDS, process.kill)
    too_late.start()
    found: list[str] = []
    while len(found) < count and (line := process.stdout.readline()):
        if line not in found:  # an order may be given twice
            found.append(line)
    too_late.cancel()
    return found
