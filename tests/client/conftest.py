"""Both forms of the client: what is tested of one is tested of the other."""

import pytest
from tests.client.forms import Form


@pytest.fixture(params=["awaited", "blocking"])
def form(request: pytest.FixtureRequest) -> Form:
    """Give what calls the client in one form, and then in the other."""
    return Form(is_blocking=request.param == "blocking")
