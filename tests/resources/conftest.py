"""What all tests of resources need."""

import logging
from collections.abc import Generator

import pytest

from streamkeep import _feed


@pytest.fixture(autouse=True)
def no_log() -> Generator[None]:
    """Let nobody log: pytest keeps what is logged, with the exceptions in it, their frames, and all that is to be counted."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def kept_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what was read for a moment only: what is left over shall be known soon."""
    monkeypatch.setattr(_feed, "KEPT_SECONDS", 0.05)
