"""The campaign's command: `python -m tests.recovery`."""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import anyio
from tests.recovery.rounds import rounds

KILLS_A_ROUND: Final = 6


def main() -> int:
    """Kill until it is enough, and say what came of it: the last line on stdout is JSON, and the exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.recovery", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="which process is killed is chosen by it")
    parser.add_argument("--kills", type=int, default=200, help="end after so many kills")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recovery-") as directory:
        return anyio.run(run, arguments.seed, arguments.kills, Path(directory))


async def run(seed: int, kills: int, directory: Path) -> int:
    """Kill so many times, and give the exit code."""
    print(f"seed {seed}", file=sys.stderr)
    began = time.monotonic()
    async with rounds(directory, seed) as campaign:
        while campaign.kills < kills and not campaign.faults:
            await campaign.round(KILLS_A_ROUND)
            print(campaign.kills, campaign.stops, campaign.answers, campaign.recoveries, file=sys.stderr)
        generations = await campaign.generations()
    twice = [f"{question}: {count} generations" for question, count in generations.items() if count > 1]
    for fault in campaign.faults + twice:
        print(fault, file=sys.stderr)
    counts = {name: getattr(campaign, name) for name in ("kills", "stops", "answers", "recoveries")}
    violations = len(campaign.faults + twice)
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"campaign": "recovery", "seed": seed, **counts, "violations": violations, "seconds": seconds}))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
