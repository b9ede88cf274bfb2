"""The kernel's limit on descriptors: to raise it, to run out of them within a block, and to say how many are left."""

import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

SPARE: Final = 500
"""What a process has open beside what it is to hold by the thousand."""


def room_for(descriptors: int) -> int:
    """Let this process open so many descriptors, and give how many it may, which is fewer where the hard limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = descriptors + SPARE
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed - SPARE


@contextmanager
def descriptors_left(number: int) -> Generator[None]:
    """Leave this process so many descriptors to open within the block, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(descriptor.name) for descriptor in Path("/proc/self/fd").iterdir())
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + number + 8, hard))
    try:
        taken += _take_all()
        for descriptor in taken[len(taken) - number :]:
            os.close(descriptor)
        del taken[len(taken) - number :]
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


def _take_all() -> list[int]:
    taken: list[int] = []
    while True:
        try:
            taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            return taken
