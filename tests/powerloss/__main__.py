"""The campaign's command: `python -m tests.powerloss`."""

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
from tests.powerloss.cuts import Findings, Plan, PowerCuts
from tests.powerloss.faults import KINDS, Refusals
from tests.powerloss.workload import Size

CHECKPOINT_PAGES = [2, 4, 8, 16, 64]


def main() -> int:
    """Run a campaign, and say what came of it: the last line on stdout is JSON, and the exit code 1 if a promise was broken."""
    arguments = _parser().parse_args()
    logging.getLogger("streamkeep").setLevel(logging.ERROR)  # it warns of each refusal in the background, as it should
    began = time.monotonic()
    findings = Findings()
    print(f"seed {arguments.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="powerloss-") as directory:
        anyio.run(_run, arguments, Path(directory), findings)
    for complaint in findings.complaints:
        print(complaint, file=sys.stderr)
    outcome = {
        "campaign": "powerloss",
        "seed": arguments.seed,
        "synchronous": arguments.synchronous,
        "workloads": arguments.workloads,
        **findings.counts,
        "violations": len(findings.complaints),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(outcome))
    return 1 if findings.complaints else 0


async def _run(arguments: argparse.Namespace, directory: Path, findings: Findings) -> None:
    for plan in _plans(arguments):
        await PowerCuts(plan, directory, findings).run()
        print(f"{plan}: {dict(findings.counts)}, {len(findings.complaints)} violations so far", file=sys.stderr)
        for kind in KINDS:
            await Refusals(plan, directory, findings).run(kind, arguments.refusals)
        print(f"{plan}: {dict(findings.counts)}, {len(findings.complaints)} violations so far", file=sys.stderr)


def _plans(arguments: argparse.Namespace) -> Iterator[Plan]:
    for seed in range(arguments.seed, arguments.seed + arguments.workloads):
        chance = random.Random(seed)
        size = Size(sessions=chance.randrange(1, 5), steps=chance.randrange(4, 25))
        pages = chance.choice(CHECKPOINT_PAGES)
        for synchronous in ("FULL", "NORMAL") if arguments.synchronous == "both" else (arguments.synchronous,):
            yield Plan(seed, synchronous, size, arguments.variants, arguments.recoveries, pages)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.powerloss", description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 32), help="that of the first workload; the next one has the next"
    )
    parser.add_argument("--workloads", type=int, default=4)
    parser.add_argument("--variants", type=int, default=3, help="how often chance decides what survives a cut")
    parser.add_argument(
        "--recoveries", type=int, default=4, help="how many cuts of a workload are recovered from under further cuts"
    )
    parser.add_argument(
        "--refusals", type=int, default=4, help="at how many operations of a workload the disk refuses, in each way"
    )
    parser.add_argument("--synchronous", choices=("FULL", "NORMAL", "both"), default="both")
    return parser


if __name__ == "__main__":
    sys.exit(main())
