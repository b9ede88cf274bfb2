"""Genkit's official client, for what a page says of it."""

from tests.http.conftest import genkit_client, pytest_collection_modifyitems

__all__ = ["genkit_client", "pytest_collection_modifyitems"]
