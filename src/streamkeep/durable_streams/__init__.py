"""The Durable Streams protocol over every storage: `durable_streams(streams)` is an ASGI app that serves it.

`bridge(streams)` is another one, through which clients of the protocol read the streams that a manager writes.
"""

from ._answering import DurableStreamsLimits
from ._app import Access, Authorize, DurableStreams, durable_streams
from ._bridge import Bridge, bridge
from ._retention import Retention

__all__ = [
    "Access",
    "Authorize",
    "Bridge",
    "DurableStreams",
    "DurableStreamsLimits",
    "Retention",
    "bridge",
    "durable_streams",
]
