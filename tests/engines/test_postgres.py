"""Streams in Postgres, and what befalls them."""

from collections.abc import Generator

import pytest
from tests.engines.engine import Engine
from tests.engines.running import Empty, postgres
from tests.engines.suite import EngineSuite, GenkitOverEngineSuite


@pytest.fixture(scope="module")
def empty() -> Generator[Empty]:
    with postgres() as empty:
        yield empty


class TestPostgres(EngineSuite):
    @pytest.fixture
    def engine(self, empty: Empty) -> Engine:
        return empty()


@pytest.mark.slow
class TestGenkitClientOverPostgres(GenkitOverEngineSuite):
    @pytest.fixture
    def storage_url(self, empty: Empty) -> str:
        return empty().url
