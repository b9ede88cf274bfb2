"""`streamkeep.sync` in the workers of Celery and RQ, which fork."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from celery import Celery  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]
from redis import Redis
from rq import Queue
from tests.engines.redis import Server
from tests.sync.test_sync import until, values

from streamkeep import StreamNotFoundError
from streamkeep.sync import StreamManager

ROOT = Path(__file__).parents[2]
STREAMS = ("a", "b", "c")
CHUNKS = 5


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Give the URL of a Redis for tasks."""
    with Server(tmp_path_factory.mktemp("broker") / "server") as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/streams.db"


def worker(broker: str, url: str, *command: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TASKS_BROKER": broker, "TASKS_STREAMS": url, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment)


def assert_all_are_written(url: str) -> set[object]:
    """Wait for the tasks' streams; give which processes have written them."""
    with StreamManager.connect(url) as streams:
        until(lambda: all(is_there(streams, stream) for stream in STREAMS))
        found = [values(streams, stream) for stream in STREAMS]
    assert all(chunks[:-1] == [*range(CHUNKS)] for chunks in found)
    return {chunks[-1] for chunks in found}


def is_there(streams: StreamManager, stream: str) -> bool:
    try:
        streams.info(stream)
    except StreamNotFoundError:
        return False
    return True


def test_tasks_of_celery_write_streams(broker: str, url: str) -> None:
    tasks = Celery("tasks", broker=broker)
    for stream in STREAMS:
        tasks.send_task("tests.sync.worker_tasks.answer", [stream])
    options = ["--pool=prefork", "--concurrency=2", "--loglevel=warning", "--without-gossip", "--without-mingle"]
    celery = worker(broker, url, "celery", "-A", "tests.sync.worker_tasks", "worker", *options)
    try:
        assert celery.pid not in assert_all_are_written(url)
    finally:
        celery.terminate()
        assert celery.wait(30) == 0


def test_jobs_of_rq_write_streams(broker: str, url: str) -> None:
    with Redis.from_url(broker) as redis:
        queue = Queue(connection=redis)
        for stream in STREAMS:
            queue.enqueue("tests.sync.worker_tasks.answer", stream)
    rq = worker(broker, url, "rq.cli", "worker", "--burst", "--quiet", "--url", broker)
    try:
        processes = assert_all_are_written(url)
        assert rq.pid not in processes
        assert len(processes) == len(STREAMS)
    finally:
        assert rq.wait(30) == 0
