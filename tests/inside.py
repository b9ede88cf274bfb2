"""What a manager has in its hands, for tests of what is left behind."""

from collections.abc import Mapping

from streamkeep import StreamManager
from streamkeep._feed import Feed


def feeds_of(streams: StreamManager) -> Mapping[str, Feed]:
    """Give the feeds of the streams that are followed."""
    return {} if streams._running is None else streams._running.feeds._feeds
