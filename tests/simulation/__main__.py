"""Many random histories: `python -m tests.simulation --histories 10000`."""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from streamkeep.storage import Storage
from streamkeep.storages.memory import MemoryStorage
from streamkeep.storages.sqlite import SQLiteStorage
from streamkeep.testing.simulation import Outcome, simulate

PROGRESS = 500


def main() -> int:
    """Live through them, and say what they came to."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--storage", choices=["memory", "sqlite"], default="memory")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes share the work")
    arguments = parser.parse_args()
    began = time.monotonic()
    reached, broken, steps = Counter[str](), 0, 0
    seeds = range(arguments.seed, arguments.seed + arguments.histories)
    with ProcessPoolExecutor(arguments.jobs) as jobs:
        for number, outcome in enumerate(jobs.map(partial(live_through, arguments.storage), seeds, chunksize=10), 1):
            reached.update(outcome.reached)
            steps += outcome.trace.count(b"\n") + 1
            if outcome.violations:
                broken += 1
                print(f"seed {outcome.seed}:", *outcome.violations, sep="\n  ", file=sys.stderr)
            if number % PROGRESS == 0:
                print(f"{number} histories, {broken} broken", file=sys.stderr)
    summary = {"campaign": "simulation", "storage": arguments.storage, "seed": arguments.seed, "histories": arguments.histories}
    seconds = round(time.monotonic() - began)
    print(json.dumps({**summary, "steps": steps, **reached, "violations": broken, "seconds": seconds}))
    return int(broken > 0)


def live_through(storage: str, seed: int) -> Outcome:
    """Live through one history, over a storage of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "streams.db"
        storages: dict[str, Callable[[], Storage]] = {
            "memory": MemoryStorage,
            "sqlite": lambda: SQLiteStorage(path, synchronous="NORMAL"),
        }
        return simulate(seed, storages[storage])


if __name__ == "__main__":
    sys.exit(main())
