"""Streams over HTTP: endpoints (`StreamsHTTP`), middleware (`DurableStreaming`), framings, access, bounds and time-outs."""

from .access import Access, Authorize
from .agui import AGUIFraming
from .app import Answer, StreamsHTTP
from .bounds import Bounds
from .check import CheckHTTP
from .ended import Ended, OnEnd
from .framing import Framing, GenkitFraming, NDJSONFraming, PassThroughFraming, SSEFraming, TextFraming
from .langgraph import LangGraphFraming
from .middleware import DurableStreaming
from .recovery import Recoverable
from .response import Timeouts
from .runner import Producer, Runner
from .storage import StorageHTTP
from .ui_messages import UIMessagesFraming

__all__ = [
    "AGUIFraming",
    "Access",
    "Answer",
    "Authorize",
    "Bounds",
    "CheckHTTP",
    "DurableStreaming",
    "Ended",
    "Framing",
    "GenkitFraming",
    "LangGraphFraming",
    "NDJSONFraming",
    "OnEnd",
    "PassThroughFraming",
    "Producer",
    "Recoverable",
    "Runner",
    "SSEFraming",
    "StorageHTTP",
    "StreamsHTTP",
    "TextFraming",
    "Timeouts",
    "UIMessagesFraming",
]
