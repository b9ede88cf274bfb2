"""Genkit's client for the engines' tests too; and what is asserted in modules that are no tests themselves shows its values."""

import pytest

pytest.register_assert_rewrite("tests.engines.load", "tests.engines.suite", "tests.http.genkit_client_suite")

from tests.http.conftest import genkit_client, pytest_collection_modifyitems  # noqa: E402 - what it imports is not ours

__all__ = ["genkit_client", "pytest_collection_modifyitems"]
