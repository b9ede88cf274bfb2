"""Genkit's official JavaScript client against our servers, over memory and, where servers are processes, over SQLite."""

import pytest
from tests.http.genkit_client_suite import GenkitClientSuite, GenkitProcessesSuite


class TestOverMemory(GenkitClientSuite):
    @pytest.fixture
    def storage_url(self) -> str:
        return "memory://"


class TestOverSQLite(GenkitProcessesSuite):
    @pytest.fixture
    def storage_url(self, sqlite_url: str) -> str:
        return sqlite_url
