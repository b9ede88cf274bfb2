"""The campaign's command: `python -m tests.torture`."""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import anyio
from tests.torture.campaign import Campaign, Options
from tests.torture.stage import Stage


def main() -> int:
    """Run a campaign, and say what came of it: the last line on stdout is JSON, and the exit code 1 if a promise was broken."""
    arguments = _parser().parse_args()
    if arguments.kills is None and arguments.seconds is None:
        arguments.kills = 100
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="torture-"))
    directory.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    campaign = Campaign(_options(arguments, directory))
    print(f"seed {arguments.seed}, in {directory}", file=sys.stderr)
    anyio.run(campaign.run)
    complaints = campaign.ledger.complaints
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if complaints:
        print(f"the evidence is in {directory}", file=sys.stderr)
    elif arguments.directory is None:
        shutil.rmtree(directory)
    outcome = {"campaign": "torture", "seed": arguments.seed, "synchronous": arguments.synchronous, **campaign.counts()}
    print(json.dumps({**outcome, "violations": len(complaints), "seconds": round(time.monotonic() - began, 1)}))
    return 1 if complaints else 0


def _options(arguments: argparse.Namespace, directory: Path) -> Options:
    return Options(
        Stage(directory, arguments.seed, arguments.synchronous),
        kills=arguments.kills,
        seconds=arguments.seconds,
        producers=arguments.producers,
        readers=arguments.readers,
        servers=arguments.servers,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="what the tormentor decides by")
    parser.add_argument("--kills", type=int, help="end after so many kills (100, unless --seconds is given)")
    parser.add_argument("--seconds", type=float, help="end after so long")
    parser.add_argument("--producers", type=int, default=3)
    parser.add_argument("--readers", type=int, default=3)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--synchronous", choices=("FULL", "NORMAL"), default="FULL")
    parser.add_argument("--directory", type=Path, help="where to work; kept (a temporary one is kept only after a violation)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
