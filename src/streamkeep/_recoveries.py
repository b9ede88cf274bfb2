"""Recoveries: finds streams whose writers are gone, takes them over, and gives them to who goes on with them.

It walks over the entries (see `_recovery`) session by session, and looks at those of sessions that are dead: when somebody has left a
stream, when a session dies that has some, and once a lease. Of many who find the same stream one takes it over, as any stream.
"""

import logging
import random
from collections import deque
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Final, Self

import anyio

from ._background import Task
from ._core import Core, new_name
from ._encoding import Encode
from ._input import StreamInput
from ._lifecycle import Life, committed_at, life_of, pause_before
from ._recovering import Found, add_entry, find_entries, forget_entries
from ._recovery import BELL, PREFIX, Entry, after_session, entries_of, entry_of, session_in
from ._running import Running
from .errors import KeyInUseError, StorageCorruptError, StorageError, StreamBusyError

logger: Final = logging.getLogger("streamkeep")

SCAN_ENTRIES: Final = 100
RETRY_SECONDS: Final = 1.0
ABSENT_SECONDS: Final = 600.0
"""How old the entry of a stream that is not there must be to be forgotten."""


class Recoveries:
    """Streams to be gone on with here, as `StreamManager.recoveries` gives them.

    Enter it with `async with`, and iterate. Each is a StreamInput: the stream had another writer, which is gone, and is this manager's
    now. The next one is taken over when it is asked for. One task at a time may iterate. It goes on until the manager is closed, which
    raises StreamManagerClosedError; a storage that fails is asked again.
    """

    def __init__(self, check_running: Callable[[], Running], names: Collection[str], encode: Encode) -> None:
        self._check_running = check_running
        self._names = names
        self._encode = encode
        self._found: deque[str] = deque()
        self._is_due = anyio.Event()
        self._again_at = 0.0
        self._others = ExitStack()
        self._listening = Task()
        self._is_told = False

    async def __aenter__(self) -> Self:
        running = self._check_running()
        self._listening = running.background.start(self._listen, "waiting for streams to go on with", ended=self._wake)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._listening.cancel()
        self._others.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamInput:
        while True:
            running = self._check_running()
            lease = running.core.terms.lease
            try:
                if not self._found:
                    # What wakes it from now on is not known to what is found now; what has done so before is.
                    self._is_due = anyio.Event()
                    self._again_at = anyio.current_time() + lease * random.uniform(0.8, 1.0)  # noqa: S311 - jitter
                    await self._find(running.core)
                if (stream := await self._next(running)) is not None:
                    return stream
                self._is_told = False
            except StorageError as error:
                if not self._is_told:
                    self._is_told = True
                    logger.warning("it cannot be seen now which streams are to be gone on with: %s", error)
                self._wake()  # this one is found again behind the others
                await anyio.sleep(RETRY_SECONDS)
            with anyio.move_on_after(self._again_at - anyio.current_time()):
                await self._is_due.wait()

    async def _listen(self) -> None:
        storage = self._check_running().core.storage
        while True:
            try:
                async with storage.watch(BELL) as doorbell:
                    while True:
                        self._wake()  # also now: it may have rung before
                        await doorbell.wait()
            except StorageError:  # what is looked for once a lease is found all the same
                await anyio.sleep(RETRY_SECONDS)

    def _wake(self) -> None:
        self._is_due.set()

    async def _next(self, running: Running) -> StreamInput | None:
        while self._found:
            id = self._found.popleft()
            try:
                if (stream := await self._go_on(running, id)) is not None:
                    return stream
            except StorageCorruptError as error:
                logger.warning("a stream cannot be gone on with: %s", error)
        return None

    async def _find(self, core: Core) -> None:
        """Find the entries of sessions that are dead, and have this called again when one dies that is alive."""
        with ExitStack() as alive:
            after = PREFIX
            while (page := await core.storage.scan(after, 1)) and page[0][0].startswith(PREFIX):
                session = session_in(page[0][0])
                silent, terms = core.observer.silence_of(session)
                if session and silent < terms.lease + terms.grace:
                    alive.enter_context(core.observer.calling_when_dead(session, self._wake))
                else:
                    await self._find_of(core, session)
                after = after_session(session)
            random.shuffle(self._found)  # others do the same at this moment
            self._others.close()
            self._others = alive.pop_all()

    async def _find_of(self, core: Core, session: str) -> None:
        """Find the entries of a session; not what they say, which may be much."""
        after = entries_of(session)
        while own := [id for id, _ in await core.storage.scan(after, SCAN_ENTRIES) if id.startswith(entries_of(session))]:
            self._found.extend(own)
            after = own[-1]

    async def _go_on(self, running: Running, id: str) -> StreamInput | None:
        """Take over the stream of an entry; None if that cannot be, or cannot be yet."""
        core = running.core
        page = await core.storage.read(id)
        if page is None:  # others were quicker
            return None
        entry = entry_of(page.head)
        life = await self._left(core, entry, session_in(id))
        if life is None or life.state.status != "open" or life.state.session not in {session_in(id), ""}:
            # Of a stream that is not there, the creation may still be under way: what is slow is not dead.
            if life is not None or core.now() > committed_at(page.head) + ABSENT_SECONDS:
                await self._forget(core, Found(id, page.head), entry, life)
            return None
        if life.state.session or entry.name not in self._names:
            return None
        if (pause := pause_before(life, core.now())) > 0:
            self._look_again_in(pause)
            return None
        await core.session.start()
        writer = new_name()
        with core.opening(entry.stream, writer) as carrier:
            try:
                return await running.take_over(entry.stream, life.head, writer, self._encode, carrier)
            except KeyInUseError as error:  # its own start had died before the key was its own
                logger.info("stream %s is not gone on with: %s", entry.stream, error)
            except StreamBusyError as error:  # the storage's clock went back
                self._look_again_in(error.retry_after)
        return None

    async def _forget(self, core: Core, found: Found, entry: Entry, life: Life | None) -> None:
        """Forget an entry that is not the right one; having seen to it that a stream that is written has one among its session's."""
        if life is not None and life.state.status == "open":
            session = life.state.session
            if not await find_entries(core.storage, [session], entry.life):
                await add_entry(core.storage, session, entry, core.sweeper.commit)
        await forget_entries(core.storage, [found])

    def _look_again_in(self, seconds: float) -> None:
        self._again_at = min(self._again_at, anyio.current_time() + seconds)

    async def _left(self, core: Core, entry: Entry, session: str) -> Life | None:
        """Give the stream of an entry, having noted that a session has left it if that is so; None: it is not there."""
        while True:
            page = await core.storage.read(entry.stream)
            if page is None or (life := life_of(page.head)).state.life != entry.life:
                return None
            is_left = life.state.status == "open" and life.state.session in {session, ""}
            if not is_left or not await core.end_if_abandoned(entry.stream, life):
                return life
