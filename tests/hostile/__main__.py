"""The fuzzers for longer than a test may take: `python -m tests.hostile [--seed N] [--requests N]`.

Progress goes to stderr; the last line of stdout is one JSON object. It exits with 1 if anything was violated.
"""

import argparse
import json
import logging
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from tempfile import TemporaryDirectory
from typing import Final

import anyio
from schemathesis import GenerationMode
from tests.hostile import fuzz_http, fuzz_openapi
from tests.hostile.fuzz_decoders import PROPERTIES, Property
from tests.hostile.servers import APPS, HASTY, House, command, house, store_known_at

Part = Callable[[int, int], int]
"""Given a seed and how many examples, tries them, and gives how many there were; raises what was violated."""

OPENAPI_COST: Final = 20
"""How many bare requests one of schemathesis's is worth."""


def parts() -> Iterator[tuple[str, Part]]:
    """Give all that can be tried, by name."""
    for name, found in PROPERTIES.items():
        yield f"decoders: {name}", partial(decode, found)
    for app in APPS:
        for server in ("httptools", "h11"):
            yield f"http: {app} on {server}", partial(attack, app, server)
    for mode in GenerationMode:
        yield f"openapi: flows, {mode.value}", partial(probe_flows, mode)
        yield f"openapi: reading, {mode.value}", partial(probe_reading, mode)


def decode(found: Property, seed: int, examples: int) -> int:
    """Try one property of a decoder."""
    return found.holds(seed=seed, examples=examples)


def attack(app: str, server: str, seed: int, examples: int) -> int:
    """Send random requests to one server."""
    with house(app, timeouts=HASTY, server=server) as target:
        found = Property(partial(fuzz_http.attack, target), {"data": fuzz_http.requests()})
        count = found.holds(seed=seed, examples=examples)
        expect_no_harm(target)
    return count


def probe_flows(mode: GenerationMode, seed: int, examples: int) -> int:
    """Send what the description of some flows allows, or does not."""
    with house("durable_flow", timeouts=HASTY) as target:
        count = sum(
            fuzz_openapi.probe(target, operation, mode=mode, examples=-(-examples // OPENAPI_COST), seed=seed)
            for operation in fuzz_openapi.operations_of_flows(target)
        )
        expect_no_harm(target)
    return count


def probe_reading(mode: GenerationMode, seed: int, examples: int) -> int:
    """Send what the description of the reading app allows, or does not, to `streamkeep serve`."""
    with TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/streams.db"
        anyio.run(store_known_at, url)
        with command(url) as target:
            count = sum(
                fuzz_openapi.probe(
                    target, operation, mode=mode, examples=-(-examples // OPENAPI_COST), seed=seed, below="/streams"
                )
                for operation in fuzz_openapi.operations_of_reading()
            )
            assert target.is_alive()
    return count


def expect_no_harm(target: House) -> None:
    """Raise AssertionError unless a server is as it was."""
    assert target.is_alive()
    assert target.comes_to_rest()


def main() -> int:
    """Try everything."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description="Fuzz servers and decoders.")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="the same seed makes the same choices")
    parser.add_argument("--requests", type=int, default=1_000, help="how many of each kind")
    chosen = parser.parse_args()
    logging.disable()  # what hostile requests are taken for fills it
    begun = time.monotonic()
    counts: dict[str, int] = {}
    violations = 0
    for name, part in parts():
        print(f"{name} (seed {chosen.seed}) ...", file=sys.stderr)
        try:
            counts[name] = part(chosen.seed, chosen.requests)
        except Exception:
            violations += 1
            traceback.print_exc()
    report = {
        "campaign": "hostile",
        "seed": chosen.seed,
        "requests": sum(counts.values()),
        "parts": counts,
        "violations": violations,
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(report))
    return min(violations, 1)


if __name__ == "__main__":
    sys.exit(main())
