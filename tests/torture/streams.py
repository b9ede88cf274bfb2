"""The streams of a campaign: what kinds there are, and how to find one that something goes on with."""

import random
import time
from collections.abc import Sequence
from typing import Final

from streamkeep import StreamInfo, StreamManager

LASTING: Final = "lasting"
"""Is kept until all have read it."""
BRIEF: Final = "brief"
"""Is kept for BRIEF_SECONDS after its writer has ended it, or somebody has cancelled it."""
DOOMED: Final = "doomed"
"""May be deleted at any time."""
FLOW: Final = "flow"
"""Is opened by a server, under an id of the server's own."""

BRIEF_SECONDS: Final = 2.0
RECENT_SECONDS: Final = 20
"""Most streams that are open were opened in so many seconds."""


def new_id(kind: str, name: str) -> str:
    """Give an id of this kind, in the order of time."""
    return f"{kind}-{time.time():.0f}-{name}"


def kind_of(stream: str) -> str:
    """Give the kind of a stream."""
    kind = stream.partition("-")[0]
    return kind if kind in (LASTING, BRIEF, DOOMED) else FLOW


async def recent_streams(streams: StreamManager, kind: str, choices: random.Random) -> Sequence[StreamInfo]:
    """Give streams of a kind that were opened lately; servers' streams of any age, for their ids do not tell."""
    after = f"{choices.randrange(256):02x}" if kind == FLOW else f"{kind}-{time.time() - RECENT_SECONDS:.0f}"
    return [info for info in await streams.list(after, limit=100) if kind_of(info.id) == kind]
