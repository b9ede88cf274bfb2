"""What all tests of resources need."""

import logging
from collections.abc import Generator

import pytest


@pytest.fixture(autouse=True)
def no_log() -> Generator[None]:
    """Let nobody log: pytest keeps what is logged, with the exceptions in it, their frames, and all that is to be counted."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
