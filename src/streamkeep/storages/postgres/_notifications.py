"""How doorbells of PostgresStorage learn of what other processes commit: by LISTEN, or by looking.

Both ring at once for this process's own commits, and ring everybody when the connection was lost and is there again.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from hashlib import sha256
from typing import Final, Protocol
from zlib import crc32

from streamkeep.errors import StorageError, StorageUnavailableError, fresh
from streamkeep.storage import Doorbell
from streamkeep.storages._doorbells import Doorbells
from streamkeep.storages.postgres._link import SECONDS, Link, Place, connect
from streamkeep.storages.postgres._statements import Ring

logger: Final = logging.getLogger("streamkeep")

_PING_SECONDS: Final = 10
_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 2
_POLL_SECONDS: Final = 0.05
_LONGEST_POLL_SECONDS: Final = 0.25
_ANY_VERSION: Final = -1


class Notifications(Protocol):
    """Rings doorbells, for whoever commits."""

    def watch(self, id: bytes) -> AbstractAsyncContextManager[Doorbell]:
        """Do `Storage.watch`."""
        ...

    def ring_for(self, ids: Iterable[bytes]) -> Ring | None:
        """Say what a transaction that changes these streams has to notify others by."""
        ...

    def changed(self, ids: Iterable[bytes]) -> None:
        """Ring here: these streams were changed by this process."""

    def in_doubt(self, ids: Iterable[bytes]) -> None:
        """Ring here: whether these streams were changed, or will be, nobody knows."""

    async def run(self) -> None:
        """Learn of others' changes, until cancelled."""


class Listening:
    """One connection that listens; a notification has a mark of its sender, and the checksums of what has changed.

    The mark identifies this process's own notifications, for which it has rung when its commit was answered. It is changed whenever an
    answer was lost.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._channel = "streamkeep_" + sha256(place.schema.encode()).hexdigest()[:16]
        self._doorbells: Doorbells[int] = Doorbells()
        self._mark = secrets.token_hex(8)
        self._wanted = asyncio.Event()
        self._is_live = asyncio.Event()
        self._error: StorageError | None = None

    @asynccontextmanager
    async def watch(self, id: bytes) -> AsyncGenerator[Doorbell]:
        """Do `Storage.watch`."""
        async with self._doorbells.watch(crc32(id)) as doorbell:
            await self._live()
            yield doorbell

    def ring_for(self, ids: Iterable[bytes]) -> Ring | None:
        """Say what to notify by. Its length is bounded by how many streams a batch may have: eight thousand bytes are allowed."""
        return self._channel, self._mark + "".join(f"{crc32(id):08x}" for id in ids)

    def changed(self, ids: Iterable[bytes]) -> None:
        """Ring here."""
        self._doorbells.ring(map(crc32, ids))

    def in_doubt(self, ids: Iterable[bytes]) -> None:
        """Ring here, and once more if it comes by notification after all."""
        self._mark = secrets.token_hex(8)
        self.changed(ids)

    async def run(self) -> None:
        """Listen as soon as somebody watches, and again whenever the connection was lost."""
        await self._wanted.wait()
        pause = _PAUSE_SECONDS
        while True:
            try:
                await self._listen()
            except StorageError as error:
                self._error = error
            except Exception as error:
                logger.exception("%s: listening has failed; trying again", self._place)
                self._error = StorageError(f"{self._place}: listening has failed: {type(error).__name__}: {error}")
            if self._is_live.is_set():
                self._is_live.clear()
                pause = _PAUSE_SECONDS
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _live(self) -> None:
        self._wanted.set()
        try:
            async with asyncio.timeout(SECONDS):
                await self._is_live.wait()
        except TimeoutError:
            if self._error is not None:
                raise fresh(self._error) from None  # many may wait, and every raise makes a traceback longer
            raise StorageUnavailableError(f"{self._place}: the server did not answer in time") from None

    async def _listen(self) -> None:
        link = await connect(self._place)
        try:
            lost = asyncio.Event()
            link.db.add_termination_listener(lambda _: lost.set())
            async with link.bounded():
                await link.db.add_listener(self._channel, self._on_notification)
            self._error = None
            self._is_live.set()
            self._doorbells.ring_all()
            await self._wait_until_lost(link, lost)
        finally:
            await link.aclose()

    async def _wait_until_lost(self, link: Link, lost: asyncio.Event) -> None:
        # A connection can be lost without a sign, so it is tried now and then.
        while not lost.is_set():
            try:
                async with asyncio.timeout(_PING_SECONDS):
                    await lost.wait()
            except TimeoutError:
                async with link.bounded():
                    await link.db.execute("SELECT")

    def _on_notification(self, _db: object, _pid: int, _channel: str, payload: str) -> None:
        mark, sums = payload[:16], payload[16:]
        if mark == self._mark:
            return
        try:
            changed = [int(sums[i : i + 8], 16) for i in range(0, len(sums), 8)]
        except ValueError:
            self._doorbells.ring_all()  # somebody else's, or a newer streamkeep's
        else:
            self._doorbells.ring(changed)


class Polling:
    """Looks at the versions of all streams that are watched, with one query: every 50 ms while they change, every 250 ms when not."""

    def __init__(self, look: Callable[[Mapping[bytes, int | None]], Awaitable[Mapping[bytes, int | None]]]) -> None:
        self._look = look
        self._doorbells: Doorbells[bytes] = Doorbells()
        self._versions: dict[bytes, int | None] = {}
        self._wanted = asyncio.Event()

    @asynccontextmanager
    async def watch(self, id: bytes) -> AsyncGenerator[Doorbell]:
        """Do `Storage.watch`. What the first look finds rings; later ones compare with what was there before somebody watched."""
        async with self._doorbells.watch(id) as doorbell:
            self._versions.setdefault(id, _ANY_VERSION)
            self._wanted.set()
            yield doorbell

    def ring_for(self, ids: Iterable[bytes]) -> Ring | None:  # noqa: ARG002
        """Nobody is notified."""
        return None

    def changed(self, ids: Iterable[bytes]) -> None:
        """Ring here."""
        self._doorbells.ring(ids)

    def in_doubt(self, ids: Iterable[bytes]) -> None:
        """Ring here; what happens later is seen."""
        self._doorbells.ring(ids)

    async def run(self) -> None:
        """Look, as long as somebody watches."""
        pause = _POLL_SECONDS
        while True:
            if not self._doorbells:
                self._versions.clear()
                self._wanted.clear()
                await self._wanted.wait()
            try:
                has_changed = await self._poll()
            except StorageError:
                has_changed = False  # it will be found by a later look
            except Exception:
                logger.exception("Looking for changes has failed; looking again")
                has_changed = False
            pause = _POLL_SECONDS if has_changed else min(2 * pause, _LONGEST_POLL_SECONDS)
            await asyncio.sleep(pause)

    async def _poll(self) -> bool:
        watched = set(self._doorbells)
        self._versions = {id: version for id, version in self._versions.items() if id in watched}
        changed = await self._look(self._versions)
        self._versions.update(changed)
        self._doorbells.ring(changed)
        return bool(changed)
