"""Streams over HTTP: frames (`wire`), producers that outlive requests (`runner`), answers and endpoints (`app`)."""

from .access import Access, Authorize
from .app import StreamsHTTP
from .bounds import Bounds
from .ended import Ended, OnEnd
from .middleware import DurableStreaming
from .response import Timeouts
from .runner import Producer, Runner
from .wire import Framing, GenkitFraming, SSEFraming

__all__ = [
    "Access",
    "Authorize",
    "Bounds",
    "DurableStreaming",
    "Ended",
    "Framing",
    "GenkitFraming",
    "OnEnd",
    "Producer",
    "Runner",
    "SSEFraming",
    "StreamsHTTP",
    "Timeouts",
]
