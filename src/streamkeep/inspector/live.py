"""Live: one page that follows a stream. It is told at most ten times a second, and of a burst it is given the newest rows only.

What it is not given it asks for when it is to be shown. So a stream of a million events costs a page, and this process, no more than a
short one, and the times that are noted are those of the arrival here, however slow the page's connection is.
"""

import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Final

import anyio

from .._subscription import Subscription
from ..errors import StorageError, StreamkeepError, StreamManagerClosedError, StreamNotFoundError
from ..events import StreamEvent
from ..http.response import shown_error
from .messages import Row, row
from .sightings import Run, Sightings

ROWS: Final = 200
"""How many rows a page is given at once."""
RUNS: Final = 500
PAUSE_SECONDS: Final = 0.1
MAX_PAUSE_SECONDS: Final = 10.0
STATE_SECONDS: Final = 2.0
"""How often a page is told how a stream stands when nothing happens; it takes a connection on which nothing comes for dead."""

logger: Final = logging.getLogger("streamkeep")

Message = Mapping[str, object]

CLOSED: Final[Message] = {"kind": "end", "why": "closed"}
"""That the page is to come back: this process, or this response, ends."""


class Following:
    """Takes in a subscription's events, and gives what a page is to be told of them: once in so many seconds."""

    def __init__(
        self,
        events: Subscription[Any],
        sightings: Sightings,
        now: Callable[[], float],
        shown: Callable[[StreamEvent[Any]], bytes],
        pause: float = PAUSE_SECONDS,
    ) -> None:
        self._events = events
        self._sightings = sightings
        self._now = now
        self._shown = shown
        self._pause = pause
        self._tail = events.first_offset
        self._count = self._bytes = 0
        self._rows: deque[Row] = deque(maxlen=ROWS)
        self._runs: deque[Run] = deque(maxlen=RUNS)
        self._changed = anyio.Event()
        self._end: Message | None = None

    async def run(self) -> None:
        """Take in all events until the last one; returns also when no more can be read, and says why."""
        try:
            while batch := await self._events.batch():
                self._take(batch)
            self._end = {"kind": "end", "why": None}
        except StreamNotFoundError:
            self._end = {"kind": "end", "why": "gone"}
        except StreamManagerClosedError:
            self._end = CLOSED
        except StorageError as error:
            self._end = {"kind": "end", "why": shown_error(error).message}
        except StreamkeepError as error:
            self._end = {"kind": "end", "why": str(error)}
        except Exception:  # of this page only
            logger.exception("stream %s cannot be followed", self._events.id)
            self._end = {"kind": "end", "why": "it cannot be followed"}
        self._changed.set()

    def close(self) -> None:
        """Have the messages end, soon, with CLOSED."""
        self._end = CLOSED
        self._changed.set()

    def _take(self, batch: list[StreamEvent[Any]]) -> None:
        at = self._now()
        self._tail = batch[-1].offset + 1
        self._count += len(batch)
        self._bytes += sum(len(event.data) for event in batch)
        self._runs.extend(self._sightings.see(batch[0].offset, len(batch), at, at - self._events.updated_at))
        newest = batch[-ROWS:]
        times = self._sightings.times(newest[0].offset, len(newest))
        self._rows.extend(row(event, self._shown(event), at) for event, at in zip(newest, times, strict=True))
        self._changed.set()

    async def messages(self, state: Callable[[], Awaitable[Message]]) -> AsyncGenerator[Message]:
        """Give what a page is to be told, as it happens, until the stream has ended; `state` says how it stands, or raises."""
        due, told_at = anyio.current_time() + STATE_SECONDS, -self._pause
        while True:
            with anyio.move_on_after(due - anyio.current_time()):
                await self._changed.wait()
            self._changed = anyio.Event()
            if self._count and (self._end is not None or anyio.current_time() >= told_at + self._pause):
                yield self._news()
                told_at = anyio.current_time()
            if self._end is not None:
                yield self._end
                return
            if anyio.current_time() >= due:
                yield await state()
                due = anyio.current_time() + STATE_SECONDS
            await anyio.sleep(PAUSE_SECONDS)
            if self._count:
                self._changed.set()  # it is told in its time

    def _news(self) -> Message:
        news = {
            "kind": "events",
            "now": self._now(),
            "tail": self._tail,
            "count": self._count,
            "bytes": self._bytes,
            "rows": list(self._rows),
            "runs": list(self._runs),
        }
        self._count = self._bytes = 0
        self._rows.clear()
        self._runs.clear()
        return news
