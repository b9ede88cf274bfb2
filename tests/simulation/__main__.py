"""Many random histories: `python -m tests.simulation --histories 10000`."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.engines.running import ENGINES, in_namespace

from streamkeep.cli._output import shown_url
from streamkeep.storage import Storage
from streamkeep.storages import storage_for
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage

from .histories import Outcome, simulate

PROGRESS = 500


def main() -> int:
    """Live through them, and say what they came to."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    known = ", ".join(["memory", "sqlite", *ENGINES])
    parser.add_argument(
        "--storage", default="memory", help=f"{known}, or the URL of a server; each process has a namespace there"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many processes share the work")
    arguments = parser.parse_args()
    if arguments.storage not in {"memory", "sqlite", *ENGINES} and "://" not in arguments.storage:
        parser.error(f"--storage is {known}, or a URL")
    began = time.monotonic()
    reached, broken, steps = Counter[str](), 0, 0
    seeds = range(arguments.seed, arguments.seed + arguments.histories)
    with ExitStack() as stack:
        storage = arguments.storage
        if storage in ENGINES:
            storage = stack.enter_context(ENGINES[storage]())().url
        jobs = stack.enter_context(ProcessPoolExecutor(arguments.jobs))
        for number, outcome in enumerate(jobs.map(partial(live_through, storage), seeds, chunksize=10), 1):
            reached.update(outcome.reached)
            steps += outcome.trace.count(b"\n") + 1
            if outcome.violations:
                broken += 1
                print(f"seed {outcome.seed}:", *outcome.violations, sep="\n  ", file=sys.stderr)
            if number % PROGRESS == 0:
                print(f"{number} histories, {broken} broken", file=sys.stderr)
    summary = {
        "campaign": "simulation",
        "storage": shown_url(arguments.storage),
        "seed": arguments.seed,
        "histories": arguments.histories,
    }
    seconds = round(time.monotonic() - began)
    print(json.dumps({**summary, "steps": steps, **reached, "violations": broken, "seconds": seconds}))
    return int(broken > 0)


def live_through(storage: str, seed: int) -> Outcome:
    """Live through one history, over a storage that holds nothing."""
    if "://" in storage:
        # A history in which the promises held has left nothing behind; after another one this process begins elsewhere.
        outcome = simulate(seed, lambda: storage_for(in_namespace(storage, f"simulation_{os.getpid()}_{len(_broken)}")))
        _broken.extend(outcome.violations)
        return outcome
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "streams.db"
        storages: dict[str, Callable[[], Storage]] = {
            "memory": MemoryStorage,
            "sqlite": lambda: SQLiteStorage(path, synchronous="NORMAL"),
        }
        return simulate(seed, storages[storage])


_broken: list[str] = []


if __name__ == "__main__":
    sys.exit(main())
