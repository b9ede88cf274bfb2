"""Session: how a manager shows that its writers are alive. How it sees whether those of others are is in `_observer`.

A session is a head of its own, which is committed anew every third of the lease, however many writers there are. Nobody compares
clocks. A session is dead when it has said that it is over; or when whoever wants to know has itself seen no renewal for lease and grace,
in reads that succeeded, and after a commit of its own to that head (a *challenge*), so that a storage that is slow for everybody makes
nobody look dead. (etcd and Chubby have sessions; that death is observed is how Kubernetes elects leaders.)

The renewal runs in a thread and over a connection of its own where the storage can be cloned, so that it goes on while the app
blocks its event loop; but only as long as that loop answers within a minute, because a loop that is dead for good must not keep readers
waiting.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Final, Protocol

import anyio

from . import _lifecycle
from ._background import Background, LastingExecutor, is_asyncio_here, is_programs_end, loop_here
from ._guard import GuardedStorage, commit_once
from ._lifecycle import Mail, Terms
from .errors import StorageError, fresh
from .storage import Head

logger: Final = logging.getLogger("streamkeep")

LOOP_SECONDS: Final = 60.0
"""How long an event loop may be blocked before its writers are taken for dead."""
OVER_SECONDS: Final = 5.0
"""How long leaving may take to say that the session is over."""
RETRY_SECONDS: Final = 1.0
RENEWALS_A_LEASE: Final = 3
TRIES: Final = 20


class Session:
    """A manager's own session. It begins with the first writer.

    Args:
        storage: the manager's, open.
        background: the manager's.
        terms: its lease and grace.
        take: called in the manager's event loop with the mail for its writers.
    """

    def __init__(self, storage: GuardedStorage, background: Background, terms: Terms, take: Callable[[Mail], None]) -> None:
        self.name: Final = uuid.uuid4().hex
        self._storage = storage
        self._background = background
        self._terms = terms
        self._take = take
        self._starting: _Start | None = None
        self._renewal: _Renewal | None = None
        self._thread: Thread | None = None

    async def start(self) -> None:
        """Return when the session is stored; it is begun once, whoever asks. Raises StorageError."""
        starting = self._starting
        if starting is None or (starting.is_over.is_set() and starting.error is not None):
            starting = self._starting = _Start()
            try:
                self._begin(starting)
            except Exception as error:  # no clone, or no thread, could be made
                starting.end(_as_storage_error(error))
        await starting.is_over.wait()
        if starting.error is not None:
            raise fresh(starting.error)

    def ages(self) -> tuple[float | None, float | None]:
        """Give how many seconds ago it began, and how many ago its last sign of life was begun; None: it has not begun."""
        renewal = self._renewal
        if renewal is None or not renewal.has_begun:
            return None, None
        now = anyio.current_time()  # also of another event loop in this process the time is the same
        return max(0.0, now - renewal.began_at), max(0.0, now - renewal.renewed_at)

    async def stop(self) -> None:
        """Say that the session is over, if that can be said in time, and return when nothing of it runs any more."""
        if self._starting is None or self._renewal is None:
            return
        self.give_up()
        with anyio.move_on_after(OVER_SECONDS + RETRY_SECONDS):
            await self._starting.has_ended.wait()
            if self._thread is not None:
                self._thread.join()

    def give_up(self) -> None:
        """Have it stop, without waiting for it."""
        if self._renewal is not None:
            self._renewal.stop()

    def _begin(self, starting: "_Start") -> None:
        clone = self._storage.clone() if is_asyncio_here() else None
        if clone is None:
            renewal = self._renewal = _Renewal(self._storage, self.name, self._terms, _Here(self._take, starting))
            self._background.start(partial(_run_here, renewal, starting), "the session", ended=lambda: starting.end(None))
        else:
            host = _Elsewhere(self._background, self._take, starting)
            renewal = self._renewal = _Renewal(clone, self.name, self._terms, host)
            run = partial(_run_thread, renewal, clone, host)
            thread = Thread(target=run, name="streamkeep-session", daemon=True)
            thread.start()
            self._thread = thread


class _Start:
    """The beginning of a session, for all who wait for it; in the manager's event loop."""

    def __init__(self) -> None:
        self.is_over = anyio.Event()
        self.has_ended = anyio.Event()
        self.error: StorageError | None = None

    def succeed(self) -> None:
        self.is_over.set()

    def end(self, error: StorageError | None) -> None:
        if not self.is_over.is_set():
            self.error = error or StorageError("the session ended before it had begun")
            self.is_over.set()
        self.has_ended.set()


class _Host(Protocol):
    """What a session's renewal needs of the manager."""

    def started(self) -> None:
        """Tell that the session is stored."""

    def take(self, mail: Mail, /) -> None:
        """Have writers do what the mail says."""

    def answers(self) -> bool:
        """Say whether the manager's event loop has answered within a minute."""
        ...

    @property
    def is_gone(self) -> bool:
        """Whether that loop has ended."""
        ...


class _Here:
    """The manager's event loop is the renewal's own."""

    def __init__(self, take: Callable[[Mail], None], starting: _Start) -> None:
        self._starting = starting
        self.take = take
        self.is_gone = False

    def started(self) -> None:
        self._starting.succeed()

    def answers(self) -> bool:
        return True


class _Elsewhere:
    """The manager's event loop is that of another thread."""

    def __init__(self, background: Background, take: Callable[[Mail], None], starting: _Start) -> None:
        self._background = background
        self._take = take
        self._starting = starting
        self._answered_at = time.monotonic()
        self.is_gone = False

    def started(self) -> None:
        self._call(self._starting.succeed)

    def ended(self, error: StorageError | None) -> None:
        self._call(lambda: self._starting.end(error))

    def take(self, mail: Mail) -> None:
        self._call(lambda: self._take(mail))

    def answers(self) -> bool:
        self._call(self._answer)
        return time.monotonic() - self._answered_at < LOOP_SECONDS

    def _answer(self) -> None:
        self._answered_at = time.monotonic()

    def _call(self, function: Callable[[], object]) -> None:
        self.is_gone = not self._background.call(function) or self.is_gone


async def _run_here(renewal: "_Renewal", starting: _Start) -> None:
    try:
        await renewal.run()
    except StorageError as failure:
        starting.end(failure)


def _run_thread(renewal: "_Renewal", clone: GuardedStorage, host: _Elsewhere) -> None:
    async def run() -> None:
        async with clone:
            await renewal.run()

    error: StorageError | None = None
    while not renewal.is_stopped and not host.is_gone:
        try:
            with asyncio.Runner() as runner:
                # First, so that there is no coroutine that nobody awaits if there can be no loop.
                runner.get_loop().set_default_executor(LastingExecutor())
                runner.run(run())
        except BaseException as failure:
            if renewal.has_begun and not is_programs_end(failure):
                logger.exception("the session ended by an error, and is begun again")
                time.sleep(RETRY_SECONDS)
                continue
            error = None if renewal.has_begun else _as_storage_error(failure)
        break
    host.ended(error)


def _as_storage_error(error: BaseException) -> StorageError:
    return error if isinstance(error, StorageError) else StorageError(f"the session could not be begun: {error!r}")


class _Renewal:
    """Renews a session until it is stopped, and says then that it is over."""

    def __init__(self, storage: GuardedStorage, name: str, terms: Terms, host: _Host) -> None:
        self._storage = storage
        self._name = name
        self._id = _lifecycle.session_id(name)
        self._mailbox = _lifecycle.mailbox_id(name)
        self._terms = terms
        self._host = host
        self._period = terms.lease / RENEWALS_A_LEASE
        self._beat = 0
        self.began_at = self.renewed_at = 0.0  # by an event loop's clock
        self._failure = ""
        self._mail: Head | None = None
        self._stop: Callable[[], object] | None = None
        self.is_stopped = False
        self.has_begun = False

    def stop(self) -> None:
        """Have it stop; from any thread."""
        self.is_stopped = True
        if self._stop is not None:
            with suppress(RuntimeError):  # its event loop has ended
                self._stop()

    async def run(self) -> None:
        """Begin, renew, and take mail, until it is stopped."""
        self._turn = anyio.Lock()
        await self._renew()
        self.began_at = self.renewed_at
        self.has_begun = True
        self._host.started()
        stopping, loop = anyio.Event(), loop_here()
        self._stop = lambda: loop.call(stopping.set)
        if not self.is_stopped:
            await self._keep(stopping)
        with anyio.move_on_after(OVER_SECONDS, shield=True):
            try:
                await self._renew(is_over=True)
            except StorageError as error:
                logger.warning("the session could not be ended; others will see that it is not renewed: %s", error)

    async def _keep(self, stopping: anyio.Event) -> None:
        async with anyio.create_task_group() as tasks:
            for run in (self._renew_on, self._take_mail, self._watch_over_renewal):
                tasks.start_soon(run)
            while not self._host.is_gone and not stopping.is_set():
                with anyio.move_on_after(self._period):
                    await stopping.wait()
            tasks.cancel_scope.cancel()

    async def _renew_on(self) -> None:
        told = -1.0
        while True:
            await anyio.sleep(max(0.0, self.renewed_at + self._period - anyio.current_time()))
            try:
                if self._host.answers():
                    await self._renew()
                    self._failure = ""
                    continue
            except StorageError as error:
                self._failure = str(error)
                if told != self.renewed_at:  # once for each time that it fails
                    told = self.renewed_at
                    logger.warning("the session could not be renewed: %s", error)
            await anyio.sleep(min(self._period, RETRY_SECONDS))

    async def _watch_over_renewal(self) -> None:
        """Say when a renewal is overdue: it may be under way, and is not begun anew for that."""
        told = -1.0
        while True:
            slept_at = anyio.current_time()
            await anyio.sleep(self._period)
            since = anyio.current_time() - self.renewed_at
            if since > self._terms.lease and told != self.renewed_at:
                told = self.renewed_at
                why = self._why_overdue(anyio.current_time() - slept_at - self._period)
                logger.warning("the session was not renewed for %.1f seconds: %s", since, why)

    def _why_overdue(self, late: float) -> str:
        if late > self._period:
            return f"for {late:.1f} of them nothing ran here; others may have ended its streams"  # stopped, or the interpreter was locked
        if not self._host.answers():
            return "the event loop is blocked"
        return self._failure or "the storage is slow"

    async def _take_mail(self) -> None:
        is_told = False
        while True:
            try:
                async with self._storage.watch(self._mailbox) as doorbell:
                    while True:
                        await self._look_for_mail()
                        is_told = False
                        await doorbell.wait()
            except StorageError as error:
                if not is_told:
                    is_told = True
                    logger.warning("streams that are cancelled elsewhere are noticed late: %s", error)
                await anyio.sleep(RETRY_SECONDS)

    async def _look_for_mail(self) -> None:
        page = await self._storage.read(self._mailbox)
        if page is not None:
            # Before it is taken out: to look twice does no harm, and what nobody has looked at must not be gone. If there is more by now,
            # the doorbell has rung.
            if page.head != self._mail:  # else it could not be taken out, and has been looked at
                self._mail = page.head
                self._host.take(_lifecycle.mail_of(page.head))
            if await self._storage.delete(self._mailbox, page.head.version):
                self._mail = None

    async def _renew(self, *, is_over: bool = False) -> None:
        """Give a sign of life."""
        async with self._turn:
            began_at = anyio.current_time()
            for _ in range(TRIES):
                if await self._try_to_renew(is_over=is_over):
                    self.renewed_at = began_at
                    return
        raise StorageError("the head of the session is changed by others all the time")

    async def _try_to_renew(self, *, is_over: bool) -> bool:
        page = await self._storage.read(self._id)
        seen = None if page is None else page.head  # whatever it says, also if that cannot be read
        now = self._storage.time()
        head = _lifecycle.renew(seen, self._beat + 1, now, self._name, self._terms, is_over=is_over)
        if not await commit_once(self._storage, self._id, None if seen is None else seen.version, head):
            return False
        self._beat += 1
        return True
