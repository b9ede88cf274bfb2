"""The Durable Streams protocol over every storage: `durable_streams(streams)` is an ASGI app that serves it."""

from ._answering import DurableStreamsLimits
from ._app import Access, Authorize, DurableStreams, durable_streams

__all__ = ["Access", "Authorize", "DurableStreams", "DurableStreamsLimits", "durable_streams"]
