"""Flask and Django under the servers that people run them with, each a process as people start it."""

import os
import re
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import anyio
import httpx
import pytest
from tests.deploy.servers import Kind, Server, running, until, uvicorn
from tests.http.servers import Reading

FLASK: Final = "from tests.web.flask_app import app\n"
DJANGO: Final = "from tests.web.django_app import app, asgi, manage\n\nif __name__ == '__main__':\n    manage()\n"
ANSWERED: Final = b'event: chunk\ndata: {"word":'


@dataclass(frozen=True, slots=True)
class Served:
    """An app under a server.

    Attributes:
        kind: the server.
        source: the module that it serves.
        cuts: whether an answer that is not whole can be told from one that is.
        drains: whether SIGTERM lets runs end; else it kills.
        path: where the app's chats are.
    """

    kind: Kind
    source: str
    cuts: bool = True
    drains: bool = True
    path: str = "/chat"

    @property
    def name(self) -> str:
        framework = "flask" if self.source is FLASK else "django"
        return f"{framework}{'' if self.path == '/chat' else self.path} under {self.kind.name}"


def gunicorn(*options: str, app: str = "served:app") -> Kind:
    bind = "--bind 127.0.0.1:{}"
    return Kind(" ".join(["gunicorn", *options]), ["gunicorn", app, *options], listens=bind)


def command(name: str, *words: str, listens: str, terminated: int = -signal.SIGTERM) -> Kind:
    return Kind(name, [*words], terminated, listens=listens)


SYNC: Final = gunicorn("--workers", "2")
ALONE: Final = gunicorn("--workers", "1")
THREADS: Final = gunicorn("--worker-class", "gthread", "--threads", "8")
PRELOADED: Final = gunicorn("--preload", "--workers", "2")
UVICORN_WORKER: Final = gunicorn("--worker-class", "uvicorn.workers.UvicornWorker", app="served:asgi")
WAITRESS: Final = command("waitress", "waitress", "--app", "served:app", listens="--listen 127.0.0.1:{}")
FLASK_RUN: Final = command("flask run", "flask", "--app", "served", "run", listens="--port {}")
RUNSERVER: Final = command("runserver", "served", "runserver", listens="127.0.0.1:{}", terminated=0)
DAPHNE: Final = Kind("daphne", ["daphne", "served:asgi"], says="Listening on")
HYPERCORN: Final = Kind("hypercorn", ["hypercorn", "served:asgi"], says="Running on", listens="--bind 127.0.0.1:{}")
UVICORN: Final = replace(uvicorn(app="served:asgi", terminated=-signal.SIGTERM), name="uvicorn")

QUICK: Final = [
    Served(SYNC, FLASK),
    Served(THREADS, FLASK),
    Served(THREADS, DJANGO),
    Served(UVICORN, DJANGO, path="/awaiting"),
]
MORE: Final = [
    Served(PRELOADED, FLASK),
    Served(WAITRESS, FLASK, drains=False),
    Served(FLASK_RUN, FLASK, drains=False),
    Served(SYNC, DJANGO),
    Served(SYNC, DJANGO, path="/awaiting"),
    Served(PRELOADED, DJANGO),
    Served(RUNSERVER, DJANGO, cuts=False),
    Served(UVICORN, DJANGO),
    Served(UVICORN_WORKER, DJANGO, path="/awaiting"),
    Served(DAPHNE, DJANGO, cuts=False, path="/awaiting"),
    Served(HYPERCORN, DJANGO, path="/awaiting"),
]
ALL: Final = [*QUICK, *(pytest.param(served, marks=pytest.mark.slow) for served in MORE)]

pytestmark = [pytest.mark.timeout(180)]


def name_of(served: Served) -> str:
    return served.name


@asynccontextmanager
async def started(served: Served, directory: Path) -> AsyncGenerator[tuple[Server, httpx.AsyncClient]]:
    async with (
        running(served.kind, directory, served.source) as server,
        httpx.AsyncClient(base_url=f"{server.url}{served.path}", timeout=40) as http,
    ):
        yield server, http


@asynccontextmanager
async def asking(http: httpx.AsyncClient, chat: str, n: int, ms: int = 0) -> AsyncGenerator[Reading]:
    async with http.stream("POST", f"/{chat}", params={"n": n, "ms": ms}) as answer:
        assert answer.status_code == 200
        yield Reading(answer)


def chunks(body: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb'^data: \{"word":(\d+)\}$', body, re.MULTILINE)]


async def followed(http: httpx.AsyncClient, chat: str, seen: str) -> httpx.Response:
    return await http.get(f"/{chat}", headers={"Last-Event-ID": seen})


@pytest.mark.parametrize("served", ALL, ids=name_of)
async def test_a_stream_is_started_left_resumed_and_stopped_and_two_run_at_a_time(served: Served, tmp_path: Path) -> None:
    async with started(served, tmp_path) as (_, http):
        async with asking(http, "a", 5, 40) as a:
            await a.until(ANSWERED)
            async with asking(http, "b", 3, 40) as b:
                both = await a.whole(), await b.whole()
        async with asking(http, "left", 20, 50) as left:
            await left.until(b"\nid: 1\n")
            cursor = re.findall(rb"^id: (.*)$", bytes(left._came), re.MULTILINE)[1].decode()
        rest = await followed(http, "left", cursor)
        again = await followed(http, "left", cursor)
        nothing = await http.get("/b")
        async with asking(http, "c", 1000, 50) as c:
            await c.until(ANSWERED)
            cursor = re.findall(rb"^id: (.*)$", bytes(c._came), re.MULTILINE)[0].decode()
        stopped = await http.delete("/c")
        stop = await followed(http, "c", cursor)
    assert [chunks(body) for body in both] == [[*range(5)], [*range(3)]]
    assert [body.endswith(b"event: done\ndata: null\nid: %d\n\n" % n) for body, n in zip(both, (5, 3), strict=True)] == [
        True,
        True,
    ]
    assert chunks(rest.content) == chunks(again.content) == [*range(2, 20)]
    assert nothing.status_code == 204
    assert stopped.json() == {"stopped": True}
    assert b'"status":"CANCELLED"' in stop.content


@pytest.mark.parametrize("served", ALL, ids=name_of)
async def test_sigterm_lets_what_runs_end_and_its_reader_have_it(served: Served, tmp_path: Path) -> None:
    async with started(served, tmp_path) as (server, http):
        async with asking(http, "a", 20, 50) as a:
            await a.until(ANSWERED)
            server.signal(signal.SIGTERM)
            if served.drains:
                body = await a.whole()
                assert chunks(body) == [*range(20)]
        await server.exit_code()
        await server.is_gone()
        await server.start()
        async with asking(http, "b", 1) as b:
            await b.whole()


@pytest.mark.parametrize("served", ALL, ids=name_of)
async def test_a_worker_is_killed_and_another_one_shows_what_was_stored(served: Served, tmp_path: Path) -> None:
    async with started(served, tmp_path) as (server, http):
        async with asking(http, "a", 1000, 20) as a:
            await a.until(b"\nid: 5\n")
            cursor = re.findall(rb"^id: (.*)$", bytes(a._came), re.MULTILINE)[2].decode()
            os.killpg(server.pid, signal.SIGKILL)
        await until(lambda: server._process is not None and server._process.poll() is not None)
        await server.start()
        rest = await followed(http, "a", cursor)
    assert chunks(rest.content)[:3] == [3, 4, 5]
    assert b'"status":"ABORTED"' in rest.content


async def test_the_only_worker_is_free_again_soon_when_its_client_has_left(tmp_path: Path) -> None:
    served = Served(ALONE, FLASK)
    async with started(served, tmp_path) as (_, http):
        async with asking(http, "a", 100, 100) as a:
            await a.until(ANSWERED)
        with anyio.fail_after(8):  # a heartbeat or two, and the run goes on for longer
            other = await http.delete("/a")
    assert other.json() == {"stopped": True}
