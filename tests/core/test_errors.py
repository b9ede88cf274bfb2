import pytest

import streamkeep
from streamkeep import StreamBusyError, StreamkeepError, errors


def every_error() -> list[type[StreamkeepError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, StreamkeepError)]


@pytest.mark.parametrize("error", every_error())
@pytest.mark.promise("P15")
def test_every_error_has_a_canonical_status_with_an_http_code(error: type[StreamkeepError]) -> None:
    assert errors.HTTP_CODES[error.status] == error.http_code.fget(error)  # type: ignore[attr-defined]  # the property's own function


@pytest.mark.parametrize("error", every_error())
def test_every_error_is_exported_and_drawn_in_the_tree(error: type[StreamkeepError]) -> None:
    assert getattr(streamkeep, error.__name__) is error
    assert error.__name__ in str(errors.__doc__)


def test_every_status_has_a_code() -> None:
    assert errors.STATUSES.keys() == errors.HTTP_CODES.keys()


def test_a_busy_stream_says_until_when() -> None:
    assert StreamBusyError("busy", lease_until=7.0).lease_until == 7.0
