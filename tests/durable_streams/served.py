"""A server of durable streams in a process of its own, and the conformance suite against it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.engines.process import OfOneProcess, Process, answers, free_port

CONFORMANCE: Final = Path(__file__).parent / "conformance"
SUITE_TESTS: Final = 338
ROOT: Final = Path(__file__).parents[2]

SERVER: Final = """
import asyncio, json, socket, sys
from datetime import timedelta

import uvicorn

from streamkeep.durable_streams import DurableStreamsLimits, durable_streams

url, port, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
limits = DurableStreamsLimits(
    **{name: timedelta(seconds=value) if name in ("body", "long_poll", "sse") else value for name, value in options.items()}
)
served = durable_streams(url, limits=limits, subscriptions="local")

async def app(scope, receive, send):
    assert scope["type"] == "http" and scope["path"].startswith("/v1/stream/")
    await served({**scope, "root_path": "/v1/stream"}, receive, send)

async def main():
    async with served:
        # On a busy machine the suite is silent for seconds, and then sends on a connection that it takes for open.
        config = uvicorn.Config(
            app, port=port, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=5, timeout_keep_alive=75
        )
        await uvicorn.Server(config).serve()

asyncio.run(main())
"""


class Server(OfOneProcess):
    """A server over a storage; it may be restarted, and killed."""

    def __init__(self, storage: str, directory: Path, options: str = '{"long_poll": 0.5}') -> None:
        self.port = free_port()
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        command = [sys.executable, "-W", "error::ResourceWarning", "-c", SERVER, storage, str(self.port), options]
        self.process = Process(command, directory, lambda: answers(self.port), environment={"PYTHONPATH": paths})

    @property
    def url(self) -> str:
        """The root of its streams."""
        return f"http://127.0.0.1:{self.port}/v1/stream"


def run_suite(server: Server) -> tuple[int, str]:
    """Run the conformance suite; give how many of its tests have passed, and what it has said."""
    environment = {**os.environ, "SERVER_URL": f"http://127.0.0.1:{server.port}", "NO_COLOR": "1", "CI": "true"}
    command = ["node", "node_modules/vitest/vitest.mjs", "run", "conformance.test.js", "--testTimeout=60000"]
    done = subprocess.run(
        command,
        cwd=CONFORMANCE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    said = done.stdout + done.stderr
    passed = re.search(r"Tests .*?(\d+) passed", said)
    return int(passed[1]) if passed and done.returncode == 0 else 0, said
