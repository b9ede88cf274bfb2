"""`streamkeep inspect`: on this machine only, for whoever has the URL that it prints."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.inspector.command import InspectCommand

from streamkeep.sync import StreamManager

OURS = {"X-Streamkeep-Inspector": "1"}

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('storage') / 'streams.db'}"
    with StreamManager.connect(url) as streams, streams.open("answer") as stream:
        stream.write("hello")
        stream.error(RuntimeError("told to operators only"))
    return url


@pytest.fixture(scope="module")
def inspecting(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InspectCommand]:
    with (tmp_path_factory.mktemp("log") / "log").open("w") as log, InspectCommand(database, log) as command:
        yield command


@pytest.fixture
def http(inspecting: InspectCommand) -> Iterator[httpx.Client]:
    """Give a client that has the token."""
    headers = {**OURS, "Authorization": f"Bearer {inspecting.token}"}
    with httpx.Client(base_url=inspecting.url, headers=headers, timeout=20) as http:
        yield http


def test_whoever_has_the_token_sees_the_streams_and_the_whole_of_an_error(http: httpx.Client) -> None:
    assert [stream["id"] for stream in http.get("/api/streams").json()["streams"]] == ["answer"]
    assert "told to operators only" in http.get("/api/streams/answer/events/1").text


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer x", "Basic Og==", "Bearer t\xf8ken"])
def test_whoever_has_another_token_or_none_is_refused(http: httpx.Client, authorization: str) -> None:
    headers = {b"Authorization": authorization.encode("latin-1")}
    for path in ["/api/streams", "/api/streams/answer", "/api/streams/answer/live"]:
        assert http.get(path, headers=headers).status_code == 403
    assert http.delete("/api/streams/answer", headers=headers).status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "0.0.0.0"])
def test_a_name_of_somebody_elses_that_leads_here_is_answered_nothing(http: httpx.Client, host: str) -> None:
    for path in ["/", "/main.js", "/api/streams"]:
        assert http.get(path, headers={"Host": host}).status_code in {400, 421}


@pytest.mark.parametrize("host", ["localhost:9999", "127.0.0.1", "[::1]:8000"])
def test_a_tunnel_from_another_machine_may_have_another_port(http: httpx.Client, host: str) -> None:
    assert http.get("/api/streams", headers={"Host": host}).status_code == 200


def test_it_stops_when_it_is_asked_to_though_a_page_follows(database: str, tmp_path: Path) -> None:
    with StreamManager.connect(database) as streams, streams.open("open") as stream:
        stream.write(1)
        with (tmp_path / "log").open("w") as log, InspectCommand(database, log, "--read-only") as command:
            headers = {**OURS, "Authorization": f"Bearer {command.token}"}
            with httpx.stream("GET", f"{command.url}/api/streams/open/live", headers=headers, timeout=20) as live:
                lines = live.iter_lines()
                assert '"begin"' in next(lines)
                assert httpx.delete(f"{command.url}/api/streams/open", headers=headers).status_code == 403
                assert command.stop() == 0
        assert streams.info("open").status == "open"
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_it_answers_a_browser_that_is_waited_for(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    (browser := tmp_path / "browser").write_text(f'#!/bin/sh\nexec cat "{fifo}" >/dev/null 2>&1\n')
    browser.chmod(0o700)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    held = os.open(fifo, os.O_RDWR)
    try:
        with (tmp_path / "log").open("w") as log, InspectCommand(database, log, "--open") as command:
            assert httpx.get(f"{command.url}/", timeout=10).status_code == 200
            assert command.stop() == 0
    finally:
        os.close(held)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "which storage? give its URL"),
        (["memory://"], 1, "lives and dies inside one process"),
        (["sqlite:///nothing-here.db"], 1, "there is no database at nothing-here.db"),
        (["ftp://somewhere"], 2, "ftp"),
    ],
)
def test_what_cannot_be_inspected_is_said_in_a_sentence(
    arguments: list[str], code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STREAMKEEP_STORAGE", raising=False)
    command = [sys.executable, "-m", "streamkeep.cli", "inspect", *arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == code
    assert sentence in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr
