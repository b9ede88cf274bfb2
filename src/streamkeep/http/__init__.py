"""Streams over HTTP: frames (`wire`), producers that outlive requests (`runner`), answers and endpoints (`app`)."""

from .access import Access, Authorize
from .app import StreamsHTTP
from .middleware import DurableStreaming
from .response import Timeouts
from .runner import Producer, Runner

__all__ = ["Access", "Authorize", "DurableStreaming", "Producer", "Runner", "StreamsHTTP", "Timeouts"]
