"""Credentials in clear text: what is warned of, and what is not."""

import pytest

from streamkeep._credentials import is_loopback, warn_of_clear_text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "app.localhost", "127.0.0.1", "127.9.9.9", "[::1]", "::1"])
def test_this_machine_is_not_warned_of(host: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_clear_text("http", host)
    assert (is_loopback(host), caplog.messages) == (True, [])


@pytest.mark.parametrize("host", ["first.example", "localhost.example", "10.0.0.1", "[fe80::1]"])
def test_any_other_is_warned_of_once_and_not_over_https(host: str, caplog: pytest.LogCaptureFixture) -> None:
    for scheme in ("https", "http", "http"):
        warn_of_clear_text(scheme, host)
    (message,) = caplog.messages
    assert f"sent to {host} in clear text" in message
