"""Random bytes for the decoders, a fixed number of them: `python -m tests.hostile` tries more."""

import logging

import pytest
from tests.hostile.fuzz_decoders import PROPERTIES


@pytest.fixture(autouse=True)
def quietly(caplog: pytest.LogCaptureFixture) -> None:
    """What a malformed frame is taken for is in the log; nobody needs to read it here."""
    caplog.set_level(logging.CRITICAL + 1)


@pytest.mark.parametrize("name", PROPERTIES)
def test_of_whatever_bytes(name: str) -> None:
    assert PROPERTIES[name].holds(seed=1, examples=150) > 0
