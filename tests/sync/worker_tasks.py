"""What workers of Celery and RQ do in their tests. The streams are used before the workers fork."""

import os
from typing import Final

from celery import Celery  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]

from streamkeep.sync import StreamManager

CHUNKS: Final = 5

celery: Final = Celery("tasks", broker=os.environ["TASKS_BROKER"])
streams: Final = StreamManager.connect(os.environ["TASKS_STREAMS"])
streams.list()


def answer(stream: str) -> None:
    """Write a stream."""
    with streams.open(stream) as writer:
        for number in range(CHUNKS):
            writer.write(number)
        writer.done(os.getpid())


answer_by_celery: Final = celery.task(answer)
