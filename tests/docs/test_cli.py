"""The command line: every command that the page shows prints what the page says, but for times, ids and ports."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from datetime import timedelta
from pathlib import Path
from typing import Final

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from tests.test_docs import ROOT

from streamkeep import PublicError, StreamManager
from streamkeep.cli._commands import app

PAGE: Final = (ROOT / "docs/how-to/cli.md").read_text()
STORAGE: Final = "sqlite:///streams.db"
COMMAND: Final = [sys.executable, "-m", "streamkeep.cli"]
CONSOLES: Final = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLES: Final = [
    (command, printed)
    for block in CONSOLES
    for command, printed in re.findall(r"^\$ streamkeep (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
]
SERVERS: Final = [example for example in EXAMPLES if example[0].startswith(("serve", "demo", "inspect"))]
ENVIRONMENT: Final = {
    **os.environ,
    "STREAMKEEP_STORAGE": STORAGE,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # where `streamkeep` is
    "PYTHONUNBUFFERED": "1",
}


def general(printed: str) -> list[list[str]]:
    """Give words of lines, with what differs from run to run made the same."""
    for differs in (
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d",
        r"\b\d+ (s|min)\b",
        r"\b[0-9a-f]{32}\b",
        r"\b\d{10}\.\d+\b",
        r"(?<=127\.0\.0\.1:)\d+",
        r"(?<=#token=)\S+",
        r"(?<=kill -9 )\d+",
    ):
        printed = re.sub(differs, "N", printed)
    return [line.split() for line in printed.splitlines()]


@pytest.fixture
async def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Path]:
    """Give a directory with the storage that the page's examples are over; the open stream's writer lives in this process."""
    monkeypatch.chdir(tmp_path)
    async with StreamManager.connect(STORAGE, ttl=timedelta(hours=1)) as streams:
        async with streams.open("answer-1", owner="ann", key="chat-42", metadata={"model": "alice"}) as stream:
            for word in ("Nothing", "is", "lost"):
                await stream.write({"text": word})
            await stream.done({"text": "Nothing is lost"})
        async with streams.open("answer-2", owner="bob", key="chat-7") as stream:
            await stream.write({"text": "Well"})
            await stream.error(PublicError("RESOURCE_EXHAUSTED", "the budget is used up"))
        async with streams.open("answer-3") as stream:
            await stream.write({"text": "So"})
            yield tmp_path


def test_the_page_shows_every_command() -> None:
    commands = {name for name in app if not name.startswith("-")}
    assert {command.split()[0] for command, _ in EXAMPLES} == commands
    assert [heading for heading in re.findall(r"^## (\w+)$", PAGE, re.MULTILINE) if heading in commands] != []
    assert commands <= set(re.findall(r"^## (\w+)$", PAGE, re.MULTILINE))


@pytest.mark.timeout(120)
async def test_every_command_prints_what_the_page_says(directory: Path) -> None:
    for command, printed in EXAMPLES:
        if (command, printed) not in SERVERS:
            ran = await anyio.run_process(
                [*COMMAND, *shlex.split(command)], stderr=subprocess.STDOUT, check=False, cwd=directory, env=ENVIRONMENT
            )
            said, shown = general(ran.stdout.decode()), general(printed)
            is_in_any_order = command.startswith("copy")
            assert (sorted(said) if is_in_any_order else said) == (sorted(shown) if is_in_any_order else shown), command
            assert ran.returncode == int(printed.startswith("streamkeep: ")), command


@pytest.mark.parametrize(("command", "printed"), SERVERS)
async def test_a_server_says_what_the_page_says(directory: Path, command: str, printed: str) -> None:
    free = command.replace("8000", "0")
    with anyio.fail_after(40):
        async with await anyio.open_process([*COMMAND, *shlex.split(free)], cwd=directory, env=ENVIRONMENT) as process:
            assert process.stdout is not None
            said = await BufferedByteReceiveStream(process.stdout).receive_until(b"Ctrl-C stops.\n", 10_000)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
    assert general(said.decode() + "Ctrl-C stops.") == general(printed)


async def said_by(command: str, directory: Path, **environment: str) -> tuple[int, str, str]:
    """Give a command's exit code, and what it says on stdout and on stderr."""
    ran = await anyio.run_process([*COMMAND, *shlex.split(command)], check=False, cwd=directory, env=environment)
    return ran.returncode, ran.stdout.decode(), ran.stderr.decode()


@pytest.mark.parametrize("command", ["list", "info answer-1", "serve"])
async def test_a_command_without_a_storage_says_how_to_name_one(tmp_path: Path, command: str) -> None:
    nowhere = {name: value for name, value in ENVIRONMENT.items() if name != "STREAMKEEP_STORAGE"}
    code, out, err = await said_by(command, tmp_path, **nowhere)
    assert (code, out) == (2, "")
    assert err == "streamkeep: which storage? give its URL by --storage, or in STREAMKEEP_STORAGE\n"


async def test_a_wrong_call_is_one_sentence(tmp_path: Path) -> None:
    code, out, err = await said_by("list --status odd", tmp_path, **ENVIRONMENT)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("streamkeep: ")
    assert all(f'"{status}"' in err for status in ("open", "done", "error", "unreadable"))


async def test_a_key_prefix_that_finds_nothing_hints_at_the_owner(directory: Path) -> None:
    hint = "streamkeep: no such keys without an owner; --owner says whose keys\n"
    nothing = await said_by("list --key-prefix chat-", directory, **ENVIRONMENT)
    as_json = await said_by("list --key-prefix chat- --json", directory, **ENVIRONMENT)
    found = await said_by("list --key-prefix chat- --owner ann", directory, **ENVIRONMENT)
    nobodys = await said_by("list --key-prefix chat- --owner ''", directory, **ENVIRONMENT)
    assert nothing == (0, "no streams\n", hint)
    assert as_json == (0, "", hint)
    assert (found[2], nobodys[1:]) == ("", ("no streams\n", ""))
