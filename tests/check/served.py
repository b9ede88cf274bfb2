"""Deployments to be checked: apps by uvicorn, and the nginx before them, set up well or badly."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from tests.deploy.servers import environment
from tests.engines.process import free_port

TOKEN: Final = "a token of our own"
ORIGIN: Final = "https://front.example"
RUN_SECONDS: Final = 55
SOURCE: Final = f"""
import os
from contextlib import asynccontextmanager
from datetime import timedelta

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.middleware.base import BaseHTTPMiddleware

from streamkeep import StreamManager
from streamkeep.http import CheckHTTP, DurableStreaming, StreamsHTTP, Timeouts

streams = StreamManager.connect(os.environ["DEPLOY_STORAGE"])
short = StreamsHTTP(streams, timeouts=Timeouts(longest=timedelta(seconds=3)))
often = StreamsHTTP(streams, timeouts=Timeouts(heartbeat=timedelta(milliseconds=500)))
brief = StreamsHTTP(streams, timeouts=Timeouts(heartbeat=timedelta(milliseconds=500), idle=timedelta(seconds=1)))
rarely = StreamsHTTP(streams, timeouts=Timeouts(heartbeat=timedelta(seconds=30)))


@asynccontextmanager
async def lifespan(_app):
    async with often, rarely, short, brief:
        yield


app = FastAPI(lifespan=lifespan)
cors = FastAPI()
cors.add_middleware(
    CORSMiddleware,
    allow_origins=["{ORIGIN}"],
    allow_methods=["GET", "POST", "DELETE"],
    allow_headers=["X-Genkit-Stream-Id", "Last-Event-ID", "Idempotency-Key", "Authorization"],
    expose_headers=["X-Genkit-Stream-Id"],
)
cors.mount("/check", CheckHTTP(often, trust="{TOKEN}"))
few = FastAPI()
few.add_middleware(CORSMiddleware, allow_origins=["{ORIGIN}"], allow_methods=["GET", "POST"], allow_headers=["Authorization"])
few.mount("/check", CheckHTTP(often, trust="{TOKEN}"))


@app.get("/process")
def process() -> int:
    return os.getpid()


app.mount("/check", CheckHTTP(often, trust="{TOKEN}"))
app.mount("/rare/check", CheckHTTP(rarely, trust="{TOKEN}"))
app.mount("/short/check", CheckHTTP(short, trust="{TOKEN}"))
app.mount("/brief/check", CheckHTTP(brief, trust="{TOKEN}"))
app.mount("/cors", cors)
ended = FastAPI()  # its middleware ends what the app has broken off
ended.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, go_on: go_on(request))
ended.mount("/check", CheckHTTP(often, trust="{TOKEN}"))
app.mount("/ended", ended)
app.mount("/few", few)
durable = DurableStreaming(app, often)
"""
HTTP_1_0: Final = "proxy_set_header Host $host; client_max_body_size 4m;"
USUAL: Final = f"proxy_http_version 1.1; proxy_set_header Connection ''; {HTTP_1_0}"


@dataclass(frozen=True, slots=True)
class Checked:
    """What the command came to."""

    code: int
    report: Mapping[str, Any]
    stderr: str

    @property
    def found(self) -> Mapping[str, str]:
        """What was found, and its level."""
        return {finding["id"]: finding["level"] for finding in self.report["findings"]}

    def seen(self, id: str) -> str:
        """What was seen of it."""
        return next(str(finding["seen"]) for finding in self.report["findings"] if finding["id"] == id)


def command(url: str, *options: str, idle: float = 2, seconds: float = 1.5) -> list[str]:
    """Give the command, with quick answers unless told otherwise."""
    return [
        sys.executable,
        "-m",
        "streamkeep.cli",
        "check",
        url,
        "--json",
        "--seconds",
        str(seconds),
        "--idle",
        str(idle),
        *options,
    ]


def environment_with(token: str) -> dict[str, str]:
    """Give what it runs in."""
    return {**environment(), "STREAMKEEP_TOKEN": token}


async def check(
    url: str, *options: str, token: str = TOKEN, idle: float = 2, seconds: float = 1.5, **environment: str
) -> Checked:
    """Run the command, with quick answers unless told otherwise."""
    with anyio.fail_after(RUN_SECONDS):
        ran = await anyio.run_process(
            command(url, *options, idle=idle, seconds=seconds), env={**environment_with(token), **environment}, check=False
        )
    return Checked(ran.returncode, json.loads(ran.stdout or b"{}"), ran.stderr.decode())


@asynccontextmanager
async def nginx_before(
    directory: Path, urls: Sequence[str], settings: str = USUAL, *, outside: str = "", balanced: str = ""
) -> AsyncGenerator[str]:
    """Give the URL of an nginx before some servers."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        assert not os.environ.get("CI"), "nginx is not installed"
        pytest.skip("nginx is not installed")
    await anyio.Path(directory).mkdir(exist_ok=True)
    port, configuration = free_port(), directory / "nginx.conf"
    servers = " ".join(f"server {url.removeprefix('http://')};" for url in urls)
    configuration.write_text(
        f"{'user root;' if os.geteuid() == 0 else ''} daemon off; pid {directory}/nginx.pid; error_log {directory}/nginx.log;\n"
        "events {}\n"
        f"http {{ access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;\n"
        f"fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s; {outside}\n"
        f"upstream app {{ {balanced} {servers} }}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://app; {settings} }} }} }}\n"
    )
    nginx = subprocess.Popen([program, "-c", configuration, "-p", directory, "-e", "stderr"])  # noqa: ASYNC220
    try:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            await until_served(http)
        yield url
    finally:
        nginx.terminate()
        nginx.wait()


async def until_served(http: httpx.AsyncClient) -> None:
    with anyio.fail_after(30):
        while True:
            try:
                await http.get("/process")
            except httpx.TransportError:
                await anyio.sleep(0.05)
            else:
                return
