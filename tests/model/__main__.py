"""The models and the injection at length: python -m tests.model [--seed N] [--examples N] [--parts storages streams injection]."""

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

from .histories import Machine, run_histories
from .injection import RECOVERIES, WAYS, strike_everywhere
from .kinds import KINDS, Kind
from .scenarios import SCENARIOS
from .storage_machine import StorageMachine
from .stream_machine import StreamMachine

Count = Callable[[], Counter[str]]


class Campaign:
    """Runs one thing after the other whatever becomes of them, and counts."""

    def __init__(self) -> None:
        self.violations = 0
        self.counted: Final[dict[str, Counter[str]]] = {}

    def run(self, part: str, name: str, count: Count) -> None:
        """Add to the part what is counted; an exception is told, and is a violation."""
        try:
            counted = count()
        except Exception:
            self.violations += 1
            traceback.print_exc()
            counted = Counter()
        self.counted.setdefault(part, Counter()).update(counted)
        _tell(f"{part}: {name}: {dict(counted)}")


def histories(campaign: Campaign, part: str, machine: Machine, arguments: argparse.Namespace) -> None:
    """Run a machine over all kinds of storages."""
    for kind in KINDS:

        def count(kind: Kind = kind) -> Counter[str]:
            return run_histories(machine, kind, examples=arguments.examples, seed_number=arguments.seed)

        campaign.run(part, kind.name, count)


def injection(campaign: Campaign) -> None:
    """Strike all scenarios at all points in all ways, and recover from each in all ways."""
    for kind in KINDS:
        for scenario in SCENARIOS:
            for way in WAYS:
                if kind.backend in way.backends:

                    def count() -> Counter[str]:
                        return Counter(asdict(strike_everywhere(kind, scenario, way, lambda _: RECOVERIES)))  # noqa: B023

                    campaign.run("injection", f"{kind.name}, {scenario.__name__}, {way.name}", count)


def main() -> int:
    """Run the campaign; 1 if a promise was broken or a model contradicted."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=200, help="histories of each machine over each storage")
    parser.add_argument("--parts", nargs="+", default=["storages", "streams", "injection"])
    arguments = parser.parse_args()
    campaign, began = Campaign(), time.monotonic()
    if "storages" in arguments.parts:
        histories(campaign, "storages", StorageMachine, arguments)
    if "streams" in arguments.parts:
        histories(campaign, "streams", StreamMachine, arguments)
    if "injection" in arguments.parts:
        injection(campaign)
    print(
        json.dumps(
            {
                "campaign": "model",
                "seed": arguments.seed,
                "examples": arguments.examples,
                **campaign.counted,
                "violations": campaign.violations,
                "seconds": round(time.monotonic() - began),
            }
        )
    )
    return 1 if campaign.violations else 0


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
