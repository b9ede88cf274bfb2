"""The programs that read over the bad network."""

from collections.abc import Callable

import pytest
from tests.http.conftest import install_packages


@pytest.fixture(scope="session")
def genkit(requires: Callable[[str], str]) -> None:
    """Have Node with Genkit's official client."""
    requires("node")
    install_packages(requires("npm"))


@pytest.fixture(scope="session")
def chromium(requires: Callable[[str], str]) -> str:
    """Give Chromium's path."""
    return requires("chromium")


@pytest.fixture(scope="session")
def curl(requires: Callable[[str], str]) -> None:
    """Have curl."""
    requires("curl")
