"""The command, as whoever installs it finds it: its version, its help, what a storage has, and a server that answers and stops."""

import asyncio
import importlib.metadata
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from streamkeep import StreamManager

COMMAND = Path(sys.executable).with_name("streamkeep")
URL = "sqlite:///streams.db"


def said(*arguments: str) -> str:
    return subprocess.run([COMMAND, *arguments], check=True, capture_output=True, text=True, timeout=60).stdout


async def write() -> None:
    async with StreamManager.connect(URL) as streams, streams.open("answer") as stream:
        await stream.write("Nothing is lost")
        await stream.done()


assert said("--version").strip() == importlib.metadata.version("streamkeep")
assert "serve" in said("--help")
asyncio.run(write())
assert "answer" in said("list", "--storage", URL)
assert "Nothing is lost" in said("tail", "answer", "--storage", URL)

port = sys.argv[1]
with subprocess.Popen([COMMAND, "serve", "--storage", URL, "--port", port], stdout=subprocess.PIPE, text=True) as server:
    assert server.stdout is not None
    try:
        while f":{port}" not in (line := server.stdout.readline()):
            assert line, "it has ended"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/streams/answer", timeout=30) as answer:
            assert "Nothing is lost" in answer.read().decode()
    finally:
        server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
