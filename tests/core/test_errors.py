import pytest

import streamkeep
from streamkeep import GoneError, KeyInUseError, PublicError, RefusedError, StreamBusyError, StreamkeepError, errors


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


def test_a_refusal_says_what_was_asked_if_that_is_known() -> None:
    refused = RefusedError("not here", status="NOT_FOUND", place="GET http://server/s")
    assert (str(refused), refused.message) == ("NOT_FOUND: not here (GET http://server/s)", "not here")
    assert str(GoneError("not here")) == "UNKNOWN: not here"


def test_a_busy_stream_says_when_to_try_again() -> None:
    assert StreamBusyError("busy", retry_after=7.0).retry_after == 7.0


def examples() -> list[StreamkeepError]:
    plain = [error for error in every_error() if error not in {KeyInUseError, StreamBusyError, PublicError}]
    return [
        *(error("the sentence") for error in plain),
        KeyInUseError("the sentence", stream="s"),
        StreamBusyError("the sentence", retry_after=7.0),
        PublicError("ABORTED", "the sentence", {"a": 1}),
    ]


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
@pytest.mark.promise("P18")
def test_a_fresh_error_is_equal_and_was_never_raised(error: StreamkeepError) -> None:
    try:
        raise error
    except StreamkeepError:
        copy = errors.fresh(error)

    assert copy is not error
    assert type(copy) is type(error)
    assert (str(copy), copy.args, vars(copy), copy.status) == (str(error), error.args, vars(error), error.status)
    assert copy.__traceback__ is None
