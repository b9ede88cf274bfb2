"""The workshop that all tests of the package share."""

import pytest
from tests.package.environments import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Workshop:
    """Give the workshop; with pytest-xdist, that of all its processes."""
    base = tmp_path_factory.getbasetemp()
    directory = (base if worker_id == "master" else base.parent) / "package"
    directory.mkdir(exist_ok=True)
    return Workshop(directory)
