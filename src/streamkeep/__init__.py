"""Durable streaming: streams that survive reloads, lost connections and dead processes.

    async with StreamManager.connect("sqlite:///streams.db") as streams:
        async with streams.open("answer-42") as stream:
            await stream.write({"text": "Hello"})
            await stream.done({"text": "Hello"})

        async with streams.subscribe("answer-42") as events:
            async for event in events:
                print(event)

`StreamManager` is where to begin.
"""

from ._core import Limits
from ._encoding import JSONEncoding
from ._info import StreamInfo
from ._input import StreamInput
from ._listing import StreamPage
from ._manager import InMemoryStreamManager, RemoteStreamManager, StreamManager
from ._presence import Presence
from ._recoveries import Recoveries
from ._recovery import Recovery
from ._subscription import Subscription
from .errors import (
    GoneError,
    InvalidArgumentError,
    KeyInUseError,
    LimitExceededError,
    OffsetOutOfRangeError,
    PublicError,
    RefusedError,
    RemoteError,
    StorageCorruptError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
    StreamAlreadyExistsError,
    StreamBusyError,
    StreamCompletedError,
    StreamInputClosedError,
    StreamkeepError,
    StreamLostError,
    StreamManagerClosedError,
    StreamNotFoundError,
    StreamTakenOverError,
    StreamTimeoutError,
    UnexpectedAnswerError,
    WrongEventLoopError,
)
from .events import ErrorInfo, StreamEvent, StreamEventType
from .hooks import Hooks

__all__ = [
    "ErrorInfo",
    "GoneError",
    "Hooks",
    "InMemoryStreamManager",
    "InvalidArgumentError",
    "JSONEncoding",
    "KeyInUseError",
    "LimitExceededError",
    "Limits",
    "OffsetOutOfRangeError",
    "Presence",
    "PublicError",
    "Recoveries",
    "Recovery",
    "RefusedError",
    "RemoteError",
    "RemoteStreamManager",
    "StorageCorruptError",
    "StorageError",
    "StorageFullError",
    "StorageUnavailableError",
    "StreamAlreadyExistsError",
    "StreamBusyError",
    "StreamCompletedError",
    "StreamEvent",
    "StreamEventType",
    "StreamInfo",
    "StreamInput",
    "StreamInputClosedError",
    "StreamLostError",
    "StreamManager",
    "StreamManagerClosedError",
    "StreamNotFoundError",
    "StreamPage",
    "StreamTakenOverError",
    "StreamTimeoutError",
    "StreamkeepError",
    "Subscription",
    "UnexpectedAnswerError",
    "WrongEventLoopError",
]
