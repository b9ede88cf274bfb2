"""The protocol's own conformance suite, all of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.durable_streams.served import CONFORMANCE, SUITE_TESTS, Server, run_suite
from tests.http.conftest import install_packages


@pytest.fixture
def suite(requires: Callable[[str], str]) -> None:
    """Install the suite where it is missing."""
    requires("node")
    install_packages(requires("npm"), CONFORMANCE, optional=True)


@pytest.mark.promise("P27")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("suite")
@pytest.mark.parametrize("storage", ["memory://", "sqlite:///streams.db"])
def test_the_conformance_suite_passes_as_a_whole(storage: str, tmp_path: Path) -> None:
    with Server(storage, tmp_path / "server") as server:
        passed, said = run_suite(server)
        log = server.process.log

    assert passed == SUITE_TESTS, said[-8_000:]
    assert log == ""
