"""A server of ours that has the storages of others: StorageHTTP over SQLite files, as an `Engine`."""

import sys
import uuid
from pathlib import Path
from typing import Final

from tests.engines.process import OfOneProcess, Process, answers, free_port

TOKEN: Final = "a-token-for-tests-only"

# Each path is a storage of its own, in a file of its own.
SERVER: Final = """
import sys
import anyio, uvicorn
from streamkeep.http import StorageHTTP

served = {}
lock = anyio.Lock()

async def app(scope, receive, send):
    name, _, rest = scope["path"].strip("/").partition("/")
    async with lock:
        if name not in served:
            served[name] = await StorageHTTP(f"sqlite:///{name}.db", trust=sys.argv[2]).__aenter__()
    await served[name]({**scope, "path": f"/{rest}"}, receive, send)

uvicorn.run(app, port=int(sys.argv[1]), lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=3)
"""


class Server(OfOneProcess):
    """A server; `url` is always the same storage in it."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.name = f"test-{uuid.uuid4().hex[:8]}"
        command = [sys.executable, "-c", SERVER, str(self.port), TOKEN]
        self.process = Process(command, directory, lambda: answers(self.port))

    @property
    def url(self) -> str:
        return self.through(self.port)

    def through(self, port: int) -> str:
        return f"http://{TOKEN}@127.0.0.1:{port}/{self.name}"
