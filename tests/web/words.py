"""What the apps under test stream: words, at a pace."""

import os
import time
from collections.abc import Generator, Mapping
from datetime import timedelta
from typing import Final

from streamkeep import StreamManager
from streamkeep.http import Timeouts
from streamkeep.http.threads import ServingOptions

SECOND: Final = timedelta(seconds=1)
OPTIONS: Final[ServingOptions] = {
    "timeouts": Timeouts(
        heartbeat=timedelta(milliseconds=200), longest=timedelta(seconds=float(os.environ.get("WEB_LONGEST", "3600")))
    ),
    "drain": timedelta(seconds=float(os.environ.get("WEB_DRAIN", "5"))),
}
"""Quick, for tests."""
CHECK_TOKEN: Final = "a token for checks only"


def connected() -> StreamManager:
    """Give a manager over the storage that the environment names."""
    return StreamManager.connect(os.environ["DEPLOY_STORAGE"], lease=SECOND, grace=SECOND)


def words(query: Mapping[str, str]) -> Generator[dict[str, int]]:
    """Give `n` words, and pause between them for so many `ms`."""
    for number in range(int(query.get("n", "3"))):
        yield {"word": number}
        time.sleep(int(query.get("ms", "0")) / 1000)
