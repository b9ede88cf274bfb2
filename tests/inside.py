"""What a manager has in its hands, for tests of what is left behind."""

import threading
from collections.abc import Mapping

from streamkeep import StreamManager
from streamkeep._feed import Feed
from streamkeep.storage import Storage


def feeds_of(streams: StreamManager) -> Mapping[str, Feed]:
    """Give the feeds of the streams that are followed."""
    return {} if streams._running is None else streams._running.feeds._feeds


def writers_of(streams: StreamManager) -> int:
    """Give how many writers it has."""
    return 0 if streams._running is None else sum(1 for _ in streams._running.core.outboxes())


def tasks_of(streams: StreamManager) -> int:
    """Give how many tasks it has in the background."""
    return 0 if streams._running is None else len(streams._running.background._tasks)


def storage_of(streams: StreamManager) -> Storage:
    """Give its storage."""
    return streams._storage.storage


def threads_of_ours() -> set[threading.Thread]:
    """Give the library's threads that run now. All others of a process come and go as pytest, its plugins and event loops like."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("streamkeep")}
