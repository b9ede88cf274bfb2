"""All campaigns at full length, one after another, and their counts as a table: `./dev prove`, or `./dev prove PART …` for some.

Each part is a module of its own, `python -m tests.PART`, whose last line on stdout is a JSON object. This knows how long a campaign is
worth running, and nothing of what it does. docs/explanation/evidence.md is what it once printed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
CAMPAIGNS: Final[dict[str, list[list[str]]]] = {
    "simulation": [
        ["--histories", "10000"],
        *(["--histories", "1000", "--storage", name] for name in ("sqlite", "redis", "postgres", "nats")),
    ],
    "model": [["--examples", "2000"]],
    "torture": [["--kills", "1000", "--synchronous", "FULL"], ["--kills", "500", "--synchronous", "NORMAL"]],
    "recovery": [["--kills", "200"]],
    "powerloss": [["--workloads", "3", "--variants", "2", "--recoveries", "3", "--refusals", "3"]],
    "resources": [["--connections", "5000", "--streams", "10000"]],
    "deploy": [["--rounds", "30"]],
    "hostile": [["--requests", "500"]],
    "network": [["--cuts", "500"]],
    "engines": [["--engine", engine, "--rounds", "500"] for engine in ("redis", "postgres", "nats")],
}
FRAME: Final = ("campaign", "seed", "seconds", "violations")


def main() -> int:
    """Run what was asked for; 1 if a promise was broken or a campaign could not tell."""
    parser = argparse.ArgumentParser(prog="./dev prove", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*CAMPAIGNS, []], help="all, if none is named")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = [
        run(part, [*options, "--seed", str(arguments.seed)])
        for part in arguments.parts or CAMPAIGNS
        for options in CAMPAIGNS[part]
    ]
    print("| command | counts | violations | minutes |\n|---|---|---|---|")
    print("\n".join(row for row, _ in rows))
    return int(not all(held for _, held in rows))


def run(part: str, options: list[str]) -> tuple[str, bool]:
    """Run one campaign; give its row of the table, and whether the promises held."""
    command = ["-m", f"tests.{part}", *options]
    print("prove: python", *command, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    name = " ".join(["python", *command])
    lines = done.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        return f"| `{name}` | it ended with exit code {done.returncode} | ? | |", False
    summary: dict[str, object] = json.loads(lines[-1])
    counts = ", ".join(f"{count} {what}" for what, count in summary.items() if what not in FRAME and isinstance(count, int))
    minutes = float(str(summary["seconds"])) / 60
    return f"| `{name}` | {counts} | {summary['violations']} | {minutes:.1f} |", done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
