"""The clock of a SQLite database: one for all processes of the machine, which no setting of the system's clock moves.

It is the time since the machine was booted, which all processes read alike, plus an offset. Whoever opens the database first after a
boot makes the offset from the system's clock, and stores it.
"""

import sqlite3
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SAVE_SECONDS: Final = 60
"""How often the time is stored, so that it does not go back when the next boot has an earlier one."""

TABLE: Final = "CREATE TABLE clock (boot TEXT NOT NULL, offset REAL NOT NULL, latest REAL NOT NULL)"
"""Holds one row. `latest` is a time that has been."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Gives the seconds since the epoch, about; from one boot to the next it does not go back, and within one it does not jump."""

    offset: float

    def time(self) -> float:
        """Give the time."""
        return _since_boot() + self.offset


def open_clock(db: sqlite3.Connection) -> Clock:
    """Give the clock of this boot; made, if this is the first to ask. To be called by one process at a time."""
    boot = _boot_id()
    row = db.execute("SELECT boot, offset, latest FROM clock").fetchone()
    if row is not None and boot is not None and row[0] == boot:
        return Clock(row[1])
    now = time.time() if row is None else max(time.time(), row[2])
    clock = Clock(now - _since_boot())
    if row is None or boot is not None:
        _store(db, boot or "", clock, now)
    return clock


def save(db: sqlite3.Connection, now: float) -> None:
    """Note, in a transaction, that it has been this time."""
    db.execute("UPDATE clock SET latest = max(latest, ?)", (now,))


def _store(db: sqlite3.Connection, boot: str, clock: Clock, now: float) -> None:
    try:
        db.execute("BEGIN IMMEDIATE")
        db.execute("DELETE FROM clock")
        db.execute("INSERT INTO clock VALUES (?, ?, ?)", (boot, clock.offset, now))
        db.execute("COMMIT")
    except sqlite3.OperationalError as error:
        with suppress(sqlite3.OperationalError):
            db.execute("ROLLBACK")
        # On a full disk one can still read. The next one stores what it finds then.
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_FULL:
            raise


if sys.platform == "linux":

    def _since_boot() -> float:
        # It goes on while the machine is suspended.
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def _boot_id() -> str | None:
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        except OSError:
            return None

else:

    def _since_boot() -> float:
        return time.monotonic()

    def _boot_id() -> None:
        """Give none: so each process has a clock of its own, which begins with the system's and does not jump either."""
