"""The campaign's command: `python -m tests.engines --engine redis --rounds 500`."""

import argparse
import json
import logging
import random
import sys
import time

import anyio
from tests.engines.campaign import Campaign
from tests.engines.running import ENGINES


def main() -> int:
    """Run a campaign, and say what came of it: the last line on stdout is JSON, and the exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=__doc__)
    parser.add_argument("--engine", choices=[*ENGINES], required=True)
    parser.add_argument("--rounds", type=int, default=100, help="how often something is done to the server, or to connections")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="what is done, and by whom")
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--readers", type=int, default=4)
    arguments = parser.parse_args()
    logging.getLogger("streamkeep").setLevel(logging.ERROR)  # what is done to them, they say
    print(f"seed {arguments.seed}", file=sys.stderr)
    began = time.monotonic()
    with ENGINES[arguments.engine]() as empty:
        campaign = Campaign(empty(), arguments.rounds, arguments.seed, arguments.writers, arguments.readers)
        anyio.run(campaign.run)
    for violation in campaign.violations:
        print(violation, file=sys.stderr)
    outcome = {"campaign": "engines", "engine": arguments.engine, "seed": arguments.seed, **campaign.counts}
    print(json.dumps({**outcome, "violations": len(campaign.violations), "seconds": round(time.monotonic() - began, 1)}))
    return 1 if campaign.violations else 0


if __name__ == "__main__":
    sys.exit(main())
