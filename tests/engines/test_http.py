"""Streams where another server has them, and what befalls that."""

from collections.abc import Generator

import pytest
from tests.engines.engine import Engine
from tests.engines.running import Empty, http
from tests.engines.suite import EngineSuite


@pytest.fixture(scope="module")
def empty() -> Generator[Empty]:
    with http() as empty:
        yield empty


@pytest.mark.slow
class TestHTTP(EngineSuite):
    connections = 16
    """One for changes, eight for reads, and for doorbells the fewer the more of them are watched at once: ten for a thousand, at most."""

    @pytest.fixture
    def engine(self, empty: Empty) -> Engine:
        return empty()
