"""`python -m tests.deploy [--seed N] [--rounds N]`: servers are told to stop at random moments, in random ways, under load.

Progress goes to stderr; the last line on stdout says what was counted, as JSON. The exit code is 1 if anything was wrong.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import anyio
from tests.deploy.rounds import faults_after, loaded
from tests.deploy.servers import (
    GRANIAN,
    GRANIAN_BOUNDED,
    GRANIAN_RELOAD_BOUNDED,
    GRANIAN_WORKERS,
    GRANIAN_WORKERS_BOUNDED,
    UVICORN,
    UVICORN_BOUNDED,
    UVICORN_RELOAD,
    UVICORN_WORKERS,
    UVICORN_WORKERS_BOUNDED,
    Kind,
    Server,
    running,
)

KINDS: Final = (
    UVICORN,
    UVICORN_BOUNDED,
    UVICORN_WORKERS,
    UVICORN_WORKERS_BOUNDED,
    UVICORN_RELOAD,
    GRANIAN,
    GRANIAN_BOUNDED,
    GRANIAN_WORKERS,
    GRANIAN_WORKERS_BOUNDED,
    GRANIAN_RELOAD_BOUNDED,
)
LATEST_SECONDS: Final = 1.5
ROUND_SECONDS: Final = 180


async def terminate(server: Server) -> None:
    """Stop it as process managers do."""
    server.signal(signal.SIGTERM)


async def interrupt(server: Server) -> None:
    """Press Ctrl-C."""
    server.interrupt()


async def reload(server: Server) -> None:
    """Edit the app, and stop the server while the reload may be under way."""
    server.module.write_text(server.module.read_text() + "edited = True\n")
    await anyio.sleep(0.5)
    server.signal(signal.SIGTERM)


async def kill_a_worker(server: Server) -> None:
    """Kill the process that answers, and stop the rest, if there is any."""
    os.kill(await server.answers(), signal.SIGKILL)
    if server.kind.workers > 1:
        server.signal(signal.SIGTERM)


Way = Callable[[Server], Awaitable[None]]


def ways_of(kind: Kind) -> tuple[Way, ...]:
    """Give the ways in which a kind of server can come to its end."""
    if "--reload" in kind.command:
        return (terminate, interrupt, reload)
    return (terminate, terminate, interrupt, kill_a_worker)


async def play(kind: Kind, way: Way, chance: random.Random, directory: Path) -> tuple[list[str], Counter[str]]:
    """Play one round; give what was wrong, and how many answers ended how."""
    async with running(kind, directory) as server:
        async with loaded(server, chance) as load, anyio.create_task_group() as arriving:
            arriving.start_soon(load.goes_on)
            if kind.is_bounded and chance.random() < 0.5:
                await load.stall()
            await anyio.sleep(chance.uniform(0, LATEST_SECONDS))
            await way(server)
            code = await server.exit_code()
            arriving.cancel_scope.cancel()
        endings = Counter(str(client.ending) for client in load.clients)
        # Granian's worker loses a signal that comes before it is up, and is killed in the end.
        is_killed = way is kill_a_worker or (way is reload and kind is GRANIAN_RELOAD_BOUNDED)
        faults = await faults_after(server, load.clients, is_clean=not is_killed)
        if way is not kill_a_worker and code not in (kind.interrupted if way is interrupt else [kind.terminated]):
            faults.append(f"it exited with {code}")
        return faults, endings


async def round_of(seed: str) -> tuple[str, list[str], Counter[str]]:
    """Play the round that a seed names, within bounds; say what it was as well."""
    chance = random.Random(seed)
    kind = chance.choice(KINDS)
    way = chance.choice(ways_of(kind))
    title = f"{kind.name}, {way.__name__}"
    with tempfile.TemporaryDirectory(prefix="deploy ") as directory:
        try:
            with anyio.fail_after(ROUND_SECONDS):
                faults, endings = await play(kind, way, chance, Path(directory))
        except (TimeoutError, subprocess.TimeoutExpired, AssertionError) as error:
            faults, endings = [f"{type(error).__name__}: {error}"], Counter[str]()
        except BaseExceptionGroup as errors:
            faults, endings = [repr(errors.exceptions)], Counter[str]()
    return title, faults, endings


async def campaign(seed: int, rounds: int) -> dict[str, object]:
    """Play so many rounds, one after the other."""
    began = time.monotonic()
    played: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    violations = 0
    for number in range(rounds):
        title, faults, ended = await round_of(f"{seed}-{number}")
        played[title] += 1
        endings += ended
        violations += len(faults)
        print(f"{number + 1}/{rounds} {title}: {dict(ended)}", *faults, sep="\n  ", file=sys.stderr, flush=True)
    return {
        "campaign": "deploy",
        "seed": seed,
        "rounds": rounds,
        "played": dict(sorted(played.items())),
        "answers": dict(sorted(endings.items())),
        "violations": violations,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    """Run the campaign that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="the same seed makes the same choices")
    parser.add_argument("--rounds", type=int, default=20, help="how many deployments")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its servers go with it
    found = anyio.run(campaign, arguments.seed, arguments.rounds)
    print(json.dumps(found))
    return int(found["violations"] != 0)


if __name__ == "__main__":
    sys.exit(main())
