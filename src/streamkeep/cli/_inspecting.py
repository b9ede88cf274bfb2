"""The inspector on this machine: only who has the token is let in, and only under a name of this machine."""

import hmac
import html
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

from ..http import Access
from ..http.response import ASGIApp, Receive, Scope, Send, headers_of, send_response

LOOPBACK: Final = frozenset(("127.0.0.1", "localhost", "::1"))


def tokens_bearer(token: str) -> Callable[[Access], bool]:
    """Give an `authorize` that lets in who sends the token; and everybody to the page's files, which the token opens in the browser."""
    expected = f"Bearer {token}".encode()

    def authorize(access: Access) -> bool:
        given = access.headers.get("authorization", "").encode("latin-1", "replace")
        return access.action == "page" or hmac.compare_digest(given, expected)

    return authorize


def serves_loopback_only(app: ASGIApp) -> ASGIApp:
    """Give an app that answers requests to a name of this machine only: a site may have its own name lead here (DNS rebinding)."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _host(headers_of(scope).get("host", "")) not in LOOPBACK:
            await send_response(send, 421)
        else:
            await app(scope, receive, send)

    return checked


def _host(authority: str) -> str | None:
    try:
        return urlsplit(f"//{authority}").hostname
    except ValueError:
        return None


@contextmanager
def opened_in_browser(url: str) -> Generator[None]:
    """Open a page in a browser; its URL, which is secret, goes through a file of this user's: all see what programs are called with."""
    with tempfile.NamedTemporaryFile("w", prefix="streamkeep-", suffix=".html") as file:
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(url)}">')
        file.flush()
        # Some browsers are waited for, and this one is to be answered meanwhile.
        threading.Thread(target=webbrowser.open, args=(f"file://{file.name}",), daemon=True).start()
        yield
