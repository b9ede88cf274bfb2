"""The campaign's command: `python -m tests.network`."""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from typing import Final

import anyio
from tests.http.conftest import install_packages
from tests.network.campaign import campaign
from tests.network.restarts import read_through_restarts

READINGS_EACH: Final = 12


def main() -> int:
    """Run a campaign, and say what came of it: the last line on stdout is JSON, and the exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.network", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="what the network decides by")
    parser.add_argument("--cuts", type=int, default=500, help="end after so many cuts")
    parser.add_argument("--restarts", type=int, default=3, help="how often a server is killed and started again besides")
    arguments = parser.parse_args()
    programs = {program: shutil.which(program) for program in ("node", "npm", "chromium", "curl")}
    if missing := [program for program, path in programs.items() if path is None]:
        parser.error(f"not on PATH: {', '.join(missing)}")
    install_packages(str(programs["npm"]))
    return anyio.run(run, arguments.seed, arguments.cuts, arguments.restarts, str(programs["chromium"]))


async def run(seed: int, cuts: int, restarts: int, chromium: str) -> int:
    """Cut so many connections, then kill a server so many times, and give the exit code."""
    print(f"seed {seed}", file=sys.stderr)
    began = time.monotonic()
    async with campaign(seed, chromium) as cutting:
        while cutting.cuts < cuts and not cutting.tally.hangs:
            await cutting.round(READINGS_EACH)
            print(json.dumps(cutting.counts()), file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="network-") as directory:
        restarted = await read_through_restarts(seed, restarts, f"sqlite:///{directory}/streams.db", chromium)
    complaints = cutting.tally.complaints + restarted.complaints
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    outcome = {"campaign": "network", "seed": seed, **cutting.counts()}
    through = {"restarts": restarts, "streams_through_restarts": restarted.streams, "chunks_through_restarts": restarted.chunks}
    print(json.dumps({**outcome, **through, "violations": len(complaints), "seconds": round(time.monotonic() - began, 1)}))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
