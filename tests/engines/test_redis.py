"""Streams in Redis, and what befalls them."""

from collections.abc import Generator

import pytest
from tests.engines.engine import Engine
from tests.engines.running import Empty, redis
from tests.engines.suite import EngineSuite, GenkitOverEngineSuite


@pytest.fixture(scope="module")
def empty() -> Generator[Empty]:
    with redis() as empty:
        yield empty


class TestRedis(EngineSuite):
    @pytest.fixture
    def engine(self, empty: Empty) -> Engine:
        return empty()


class TestGenkitClientOverRedis(GenkitOverEngineSuite):
    @pytest.fixture
    def storage_url(self, empty: Empty) -> str:
        return empty().url
