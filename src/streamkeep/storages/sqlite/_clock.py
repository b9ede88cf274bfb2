"""The one clock that all who share a database have: the machine's time since it was booted, which nobody sets and no jump of the wall clock
touches, and an offset in the database that makes seconds since the epoch of it.

Whoever comes first after a boot makes the offset, from the wall clock. Where a system does not tell which boot it is, each process goes by
the wall clock as it was when it came, and counts on from there.
"""

import sqlite3
import time
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def steady() -> float:
    """Give the seconds since this machine was booted, its sleep included where the system tells."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def offset_of(db: sqlite3.Connection) -> float:
    """Give what is to be added to `steady`, and note it for others if it is the first time since the boot. The caller holds the lock."""
    wall = time.time() - steady()
    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        return wall
    row = db.execute("SELECT boot, offset, latest FROM clock").fetchone()
    if row is not None and row[0] == boot:
        return float(row[1])
    offset = wall if row is None else max(wall, row[2] - steady())  # a clock that was set back makes no time go back here
    db.execute("INSERT OR REPLACE INTO clock (id, boot, offset, latest) VALUES (1, ?, ?, ?)", (boot, offset, offset + steady()))
    return offset


def note(db: sqlite3.Connection, offset: float) -> None:
    """Note what time it is, for the first one after the next boot."""
    db.execute("UPDATE clock SET latest = max(latest, ?)", (offset + steady(),))
