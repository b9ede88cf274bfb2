"""What the tests of every SDK ask."""

from collections.abc import AsyncGenerator

import pytest
from tests.sdks.provider import Provider, running_provider


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Provider]:
    """Run a provider, which is where every SDK asks unless it is told otherwise."""
    async with running_provider() as provider:
        for name, value in provider.environment().items():
            monkeypatch.setenv(name, value)
        yield provider
