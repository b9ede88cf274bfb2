"""Suites for those who write a storage of their own: pytest classes to subclass. Needs pytest, and anyio's plugin."""

from streamkeep._extras import needed_by

with needed_by(__name__, "testing"):
    from streamkeep.testing._storage_suite import StorageSuite
    from streamkeep.testing._streams_suite import StreamsSuite

__all__ = ["StorageSuite", "StreamsSuite"]
