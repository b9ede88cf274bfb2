"""Streams over HTTP: frames (`wire`), producers that outlive requests (`runner`), answers and endpoints (`app`)."""

from .access import Access, Authorize
from .app import StreamsHTTP
from .middleware import DurableStreaming
from .response import Timeouts
from .runner import Producer, Runner
from .wire import Framing, GenkitFraming, SSEFraming

__all__ = [
    "Access",
    "Authorize",
    "DurableStreaming",
    "Framing",
    "GenkitFraming",
    "Producer",
    "Runner",
    "SSEFraming",
    "StreamsHTTP",
    "Timeouts",
]
