"""Flask and Django under the servers that people run them with, each a process as people start it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import anyio
import httpx
import pytest
from tests.check.served import check
from tests.deploy.servers import Kind, Server, environment, running, until, uvicorn
from tests.engines.process import free_port
from tests.http.servers import Reading
from tests.web.words import CHECK_TOKEN

FLASK: Final = "from tests.web.flask_app import app\n"
DJANGO: Final = "from tests.web.django_app import app, asgi, manage\n\nif __name__ == '__main__':\n    manage()\n"
WITH_HOOK: Final = f"""{FLASK}
def post_worker_init(worker):
    from tests.web.flask_app import streams

    streams.start()
"""
ANSWERED: Final = b'event: chunk\ndata: {"word":'


@dataclass(frozen=True, slots=True)
class Served:
    """An app under a server.

    Attributes:
        kind: the server.
        source: the module that it serves.
        path: where the app's chats are.
        cuts: whether an answer that is not whole can be told from one that is.
        drains: whether SIGTERM lets runs end; else it kills them.
        waits: whether it lets answers end, too.
    """

    kind: Kind
    source: str
    path: str = "/chat"
    cuts: bool = True
    drains: bool = True
    waits: bool = True

    @property
    def name(self) -> str:
        framework = "django" if self.source is DJANGO else "flask"
        return f"{framework}{'' if self.path == '/chat' else self.path} under {self.kind.name}"


def gunicorn(*options: str, app: str = "served:app") -> Kind:
    bind = "--bind 127.0.0.1:{}"
    return Kind(" ".join(["gunicorn", *options]), ["gunicorn", app, *options], listens=bind)


def command(name: str, *words: str, listens: str, terminated: int = -signal.SIGTERM) -> Kind:
    return Kind(name, [*words], terminated, listens=listens)


SYNC: Final = gunicorn("--workers", "2")
ALONE: Final = gunicorn("--workers", "1")
THREADS: Final = gunicorn("--worker-class", "gthread", "--threads", "8")
MANY_THREADS: Final = gunicorn("--worker-class", "gthread", "--threads", "40", "--workers", "2")
PRELOADED: Final = gunicorn("--preload", "--workers", "2")
HOOKED: Final = gunicorn("--preload", "--worker-class", "gthread", "--threads", "8", "--config", "served.py")
UVICORN_WORKER: Final = gunicorn("--worker-class", "uvicorn.workers.UvicornWorker", app="served:asgi")
WAITRESS: Final = command("waitress", "waitress", listens="--listen 127.0.0.1:{} served:app")
FLASK_RUN: Final = command("flask run", "flask", "--app", "served", "run", listens="--port {}")
RUNSERVER: Final = command("runserver", "served", "runserver", listens="127.0.0.1:{}", terminated=0)
DAPHNE: Final = Kind("daphne", ["daphne", "served:asgi"], says="Listening on")
HYPERCORN: Final = Kind("hypercorn", ["hypercorn", "served:asgi"], says="Running on", listens="--bind 127.0.0.1:{}")
UVICORN: Final = replace(uvicorn(app="served:asgi", terminated=-signal.SIGTERM), name="uvicorn")

FLASK_SYNC: Final = Served(SYNC, FLASK)
FLASK_THREADS: Final = Served(THREADS, FLASK)
DJANGO_THREADS: Final = Served(THREADS, DJANGO)
DJANGO_ASGI: Final = Served(UVICORN, DJANGO, "/awaiting")
SERVERS: Final = [
    FLASK_SYNC,
    FLASK_THREADS,
    Served(PRELOADED, FLASK),
    Served(HOOKED, WITH_HOOK),
    Served(WAITRESS, FLASK, drains=False, waits=False),
    Served(FLASK_RUN, FLASK, drains=False, waits=False),
    Served(SYNC, DJANGO),
    Served(SYNC, DJANGO, "/awaiting"),
    DJANGO_THREADS,
    Served(PRELOADED, DJANGO),
    Served(RUNSERVER, DJANGO, cuts=False, drains=False, waits=False),
    Served(UVICORN, DJANGO),
    DJANGO_ASGI,
    Served(UVICORN_WORKER, DJANGO, "/awaiting"),
    Served(DAPHNE, DJANGO, "/awaiting", cuts=False, waits=False),
    Served(HYPERCORN, DJANGO, "/awaiting"),
]

pytestmark = [pytest.mark.timeout(180)]


def under(*quick: Served) -> pytest.MarkDecorator:
    """Have a test run under all servers; all but these are slow."""
    slow = [pytest.param(served, marks=pytest.mark.slow) for served in SERVERS if served not in quick]
    return pytest.mark.parametrize("served", [*quick, *slow], ids=name_of)


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


def cursor_in(reading: Reading, event: int = 0) -> str:
    ids: list[bytes] = re.findall(rb"^id: (.*)$", bytes(reading._came), re.MULTILINE)
    return ids[event].decode()


async def followed(http: httpx.AsyncClient, chat: str, seen: str) -> httpx.Response:
    return await http.get(f"/{chat}", headers={"Last-Event-ID": seen})


@under(FLASK_SYNC, DJANGO_ASGI)
async def test_a_stream_is_started_left_resumed_and_stopped_and_two_run_at_a_time(served: Served, tmp_path: Path) -> None:
    async with started(served, tmp_path) as (_, http):
        async with asking(http, "a", 5, 40) as a:
            await a.until(ANSWERED)
            async with asking(http, "b", 3, 40) as b:
                both = await a.whole(), await b.whole()
        async with asking(http, "left", 20, 50) as left:
            await left.until(b"\nid: 1\n")
        rest = await followed(http, "left", cursor_in(left, 1))
        again = await followed(http, "left", cursor_in(left, 1))
        nothing = await http.get("/b")
        async with asking(http, "c", 1000, 50) as c:
            await c.until(b"\nid: 0\n")
        stopped = await http.delete("/c")
        stop = await followed(http, "c", cursor_in(c))
    assert [chunks(body) for body in both] == [[*range(5)], [*range(3)]]
    assert [body.endswith(b"event: done\ndata: null\nid: %d\n\n" % n) for body, n in zip(both, (5, 3), strict=True)] == [
        True,
        True,
    ]
    assert chunks(rest.content) == chunks(again.content) == [*range(2, 20)]
    assert nothing.status_code == 204
    assert stopped.json() == {"stopped": True}
    assert b'"status":"CANCELLED"' in stop.content


@under(FLASK_THREADS)
async def test_sigterm_lets_what_runs_end_and_its_reader_have_it(served: Served, tmp_path: Path) -> None:
    async with started(served, tmp_path) as (server, http):
        async with asking(http, "a", 20, 50) as a:
            await a.until(b"\nid: 0\n")
            server.signal(signal.SIGTERM)
            if served.waits:
                assert chunks(await a.whole()) == [*range(20)]
            await server.exit_code()
        await server.is_gone()
        await server.start()
        rest = await followed(http, "a", cursor_in(a))
    if served.drains:
        assert chunks(rest.content) == [*range(1, 20)]
    else:
        assert b'"status":"ABORTED"' in rest.content


@pytest.mark.parametrize(
    "served", [Served(FLASK_RUN, FLASK), pytest.param(Served(WAITRESS, FLASK), marks=pytest.mark.slow)], ids=name_of
)
async def test_ctrl_c_lets_what_runs_end_and_its_reader_have_it(served: Served, tmp_path: Path) -> None:
    """Under servers that Ctrl-C ends by KeyboardInterrupt, the streams drain at the end of the program."""
    async with started(served, tmp_path) as (server, http):
        async with asking(http, "a", 20, 50) as a:
            await a.until(b"\nid: 0\n")
            server.signal(signal.SIGINT)
            assert chunks(await a.whole()) == [*range(20)]
            await server.exit_code()
        await server.is_gone()
        await server.start()
        rest = await followed(http, "a", cursor_in(a))
    assert chunks(rest.content) == [*range(1, 20)]


@under(DJANGO_THREADS)
async def test_a_worker_is_killed_and_another_one_shows_what_was_stored(served: Served, tmp_path: Path) -> None:
    async with started(served, tmp_path) as (server, http):
        async with asking(http, "a", 1000, 20) as a:
            await a.until(b"\nid: 5\n")
            os.killpg(server.pid, signal.SIGKILL)
        await until(lambda: server._process is not None and server._process.poll() is not None)
        await server.start()
        rest = await followed(http, "a", cursor_in(a, 2))
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


@under(FLASK_THREADS)
async def test_an_answer_that_is_not_whole_is_cut_or_says_so(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEB_LONGEST", "0.5")
    async with started(served, tmp_path) as (_, http), asking(http, "a", 100, 50) as a:
        body = await a.cut() if served.cuts else await a.whole()
    assert 0 < len(chunks(body)) < 100
    assert (b'"status":"DEADLINE_EXCEEDED"' in body) is not served.cuts


@pytest.mark.slow
async def test_a_run_goes_on_while_a_worker_that_does_one_thing_at_a_time_answers_others(tmp_path: Path) -> None:
    async with started(Served(ALONE, DJANGO), tmp_path) as (_, http):
        async with asking(http, "a", 20, 50) as a:
            await a.until(b"\nid: 0\n")
        for number in range(5):
            async with asking(http, f"other-{number}", 2) as other:
                assert chunks(await other.whole()) == [0, 1]
        rest = await followed(http, "a", cursor_in(a))
    assert chunks(rest.content) == [*range(1, 20)]


@pytest.mark.parametrize(
    "served",
    [
        Served(MANY_THREADS, FLASK),
        *(pytest.param(served, marks=pytest.mark.slow) for served in (Served(MANY_THREADS, DJANGO), DJANGO_ASGI)),
    ],
    ids=name_of,
)
async def test_a_deployment_is_checked(served: Served, tmp_path: Path) -> None:
    async with running(served.kind, tmp_path, served.source) as server:
        checked = await check(f"{server.url}/check", token=CHECK_TOKEN)
        assert (checked.code, checked.found) == (0, {}), checked
        refused = await check(f"{server.url}/check", token="another token of such a length")
        assert (refused.code, "STREAMKEEP_TOKEN" in refused.stderr) == (2, True), refused


@pytest.mark.slow
def test_gunicorns_gevent_worker_is_refused_in_words(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gunicorn", "--worker-class", "gevent", "--bind", f"127.0.0.1:{free_port()}"]
    environment_ = {**environment(), "DEPLOY_STORAGE": f"sqlite:///{tmp_path}/streams.db"}
    ran = subprocess.run(
        [*command, "tests.web.flask_app:app"], env=environment_, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode != 0
    assert "gunicorn's `--worker-class gthread`" in ran.stderr


@pytest.mark.slow
async def test_runserver_starts_anew_when_the_code_changes_and_what_was_stored_is_there(tmp_path: Path) -> None:
    async with started(Served(RUNSERVER, DJANGO), tmp_path) as (server, http):
        before = await server.answers()
        async with asking(http, "a", 5, 20) as a:
            await a.whole()
        server.module.write_text(server.module.read_text() + "\n# changed\n")
        with anyio.fail_after(60):
            while await server.answers() == before:  # noqa: ASYNC110 - nothing else tells
                await anyio.sleep(0.1)
        rest = await followed(http, "a", cursor_in(a))
    assert chunks(rest.content) == [*range(1, 5)]
