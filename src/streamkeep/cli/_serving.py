"""A web server that shuts down well: streams in flight are ended first, while their readers are still connected."""

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import uvicorn

from ..events import ErrorInfo
from ..http import StreamsHTTP
from ..http.response import ASGIApp, Receive, Scope, Send, send_error, send_response, shown_error
from ._output import CommandError

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
PROTOCOL_ROOT: Final = "/v1/stream"
"""Where clients of the Durable Streams protocol expect streams."""
LAST_RESPONSES_SECONDS: Final = 4
"""How long to wait for responses when the producers have ended. All but those that nobody reads are over sooner."""


def bind(host: str, port: int, *, allow_remote: bool) -> socket.socket:
    """Give a listening socket. CommandError: the port is taken, the address is not ours, or others would reach it unasked."""
    if not allow_remote and not _is_loopback(host):
        raise CommandError(
            f"{host!r} lets other machines in, and nobody is asked who they are; --allow-remote if that is meant", 2
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise CommandError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    # Connections inherit it. asyncio sees to it only where a socket names its protocol, and else each answer waits 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    """Give the URL under which a browser reaches the socket."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reading_app(streams_http: StreamsHTTP, protocol: ASGIApp | None = None) -> ASGIApp:
    """Give the app of `streamkeep serve`: a storage's streams under /streams, and /healthz; `protocol`: what is under PROTOCOL_ROOT."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if protocol is not None and path.startswith(PROTOCOL_ROOT + "/"):
            await protocol({**scope, "root_path": scope.get("root_path", "") + PROTOCOL_ROOT}, receive, send)
        elif path.startswith("/streams/") or scope["type"] == "websocket":
            await streams_http({**scope, "root_path": scope.get("root_path", "") + "/streams"}, receive, send)
        elif path == "/healthz":
            await _health(streams_http, send)
        else:
            await send_error(send, ErrorInfo("NOT_FOUND", "not found"))

    return app


async def _health(streams_http: StreamsHTTP, send: Send) -> None:
    try:
        await streams_http.streams.list(limit=1)
        await send_response(send, 200, b'{"status":"ok"}')
    except Exception as error:
        await send_error(send, shown_error(error))


async def serve_app(
    app: ASGIApp, listener: socket.socket, drain: Callable[[], Awaitable[None]], announce: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; then drain, while responses go on, and return when the last response has ended.

    A second SIGINT exits at once, and leaves the streams in flight to be ended with ABORTED by their readers.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = uvicorn.Config(
        app,
        http="h11",  # httptools, uvicorn's choice, takes headers of any length
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_RESPONSES_SECONDS,
    )
    await _Server(config, drain, lambda: announce(url_of(listener))).serve([listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]], announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._drain()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        # uvicorn's own raises them again afterwards, into the clean-up of whoever called; being asked to stop is no failure.
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (of uvicorn)
        # os.write, because a signal may come in the middle of a print.
        if not self.should_exit:
            os.write(2, b"streamkeep: stopping; streams in flight are ended first (Ctrl-C again: at once)\n")
        elif sig == signal.SIGINT:
            os.write(2, b"streamkeep: not waiting any longer\n")
            os._exit(128 + sig)
        self.should_exit = True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
