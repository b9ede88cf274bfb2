"""What the tests of every SDK ask."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import pytest
from tests.sdks.provider import Provider, running_provider

SLOW: Final = {
    *("test_anthropic.py", "test_google_genai.py", "test_langgraph.py", "test_litellm.py"),
    *("test_openai_agents.py", "test_page.py", "test_pydantic_ai.py"),
}


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Provider]:
    """Run a provider, which is where every SDK asks unless it is told otherwise."""
    async with running_provider() as provider:
        for name, value in provider.environment().items():
            monkeypatch.setenv(name, value)
        yield provider


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files of slow tests where none are asked for: to import what they test takes seconds, in each process."""
    is_left_out = config.option.markexpr == "not slow" and collection_path.name in SLOW
    return True if is_left_out else None
