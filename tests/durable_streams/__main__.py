"""The conformance suite over storages by name: `python -m tests.durable_streams --storage redis --storage postgres --storage nats`."""

import argparse
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

from tests.durable_streams.served import CONFORMANCE, SUITE_TESTS, Server, run_suite
from tests.engines.running import ENGINES
from tests.http.conftest import install_packages

STORAGES = ("memory", "sqlite", "redis", "postgres", "nats")


@contextmanager
def url_of(storage: str, directory: Path) -> Generator[str]:
    """Give the URL of an empty storage, whose engine runs while within."""
    match storage:
        case "memory":
            yield "memory://"
        case "sqlite":
            yield f"sqlite:///{directory / 'streams.db'}"
        case _:
            with ENGINES[storage]() as empty:
                yield empty().url


def main() -> int:
    """Run it, and say how many tests have passed; 1 if any has not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", action="append", choices=STORAGES, help="which; all, unless said otherwise")
    failed = False
    npm = which("npm")
    assert npm is not None, "npm is not on PATH"
    install_packages(npm, CONFORMANCE, optional=True)
    for storage in parser.parse_args().storage or STORAGES:
        with tempfile.TemporaryDirectory(prefix="streamkeep-conformance-", ignore_cleanup_errors=True) as name:
            directory = Path(name)
            with url_of(storage, directory) as url, Server(url, directory / "server") as server:
                began = time.monotonic()
                passed, said = run_suite(server)
                print(f"{storage}: {passed} of {SUITE_TESTS} in {time.monotonic() - began:.0f} s", flush=True)
                print(server.process.log, end="", file=sys.stderr)
                if passed != SUITE_TESTS:
                    failed = True
                    print(said, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
