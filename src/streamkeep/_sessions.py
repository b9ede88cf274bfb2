"""Sessions: how a manager shows that its writers are alive, and how it sees whether those of others are.

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
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from threading import Thread
from typing import Final, Protocol

import anyio

from . import _lifecycle
from ._background import Background, is_asyncio_here, loop_here
from ._guard import GuardedStorage, commit_once
from ._lifecycle import SessionState, Terms
from .errors import StorageCorruptError, StorageError, fresh
from .storage import Head

logger: Final = logging.getLogger("streamkeep")

LOOP_SECONDS: Final = 60.0
"""How long an event loop may be blocked before its writers are taken for dead."""
OVER_SECONDS: Final = 5.0
"""How long leaving may take to say that the session is over."""
RETRY_SECONDS: Final = 1.0
RENEWALS_A_LEASE: Final = 3
READS_A_LEASE: Final = 5
TRIES: Final = 20
TELL_SECONDS: Final = 300.0
"""How long it is tried to tell a session of a stream that is no longer its own; by then its writer looks by itself."""
CHALLENGES: Final = 10
"""How many times as long as the observer's own challenge took, a session has for its answer: it may have a renewal under way that the
challenge overtook, and has then to begin another one."""


class Session:
    """A manager's own session. It begins with the first writer.

    Args:
        storage: the manager's, open.
        background: the manager's.
        terms: its lease and grace.
        look: called in the manager's event loop with the ids of streams that may have become somebody else's; LOOK_AT_ALL for all.
    """

    def __init__(
        self, storage: GuardedStorage, background: Background, terms: Terms, look: Callable[[Iterable[str]], None]
    ) -> None:
        self.name: Final = uuid.uuid4().hex
        self._storage = storage
        self._background = background
        self._terms = terms
        self._look = look
        self._starting: _Start | None = None
        self._keeper: _Keeper | None = None
        self._thread: Thread | None = None

    async def start(self) -> None:
        """Return when the session is stored; it is begun once, whoever asks. Raises StorageError."""
        starting = self._starting
        if starting is None or (starting.is_over.is_set() and starting.error is not None):
            starting = self._starting = _Start()
            self._begin(starting)
        await starting.is_over.wait()
        if starting.error is not None:
            raise fresh(starting.error)

    async def stop(self) -> None:
        """Say that the session is over, if that can be said in time, and return when nothing of it runs any more."""
        if self._starting is None or self._keeper is None:
            return
        self.give_up()
        with anyio.move_on_after(OVER_SECONDS + RETRY_SECONDS):
            await self._starting.has_ended.wait()
            if self._thread is not None:
                self._thread.join()

    def give_up(self) -> None:
        """Have it stop, without waiting for it."""
        if self._keeper is not None:
            self._keeper.stop()

    def _begin(self, starting: "_Start") -> None:
        clone = self._storage.clone() if is_asyncio_here() else None
        if clone is None:
            keeper = self._keeper = _Keeper(self._storage, self.name, self._terms, _Here(self._look, starting))
            self._background.start(partial(_run_here, keeper, starting), "the session")
        else:
            host = _Elsewhere(self._background, self._look, starting)
            keeper = self._keeper = _Keeper(clone, self.name, self._terms, host)
            run = partial(_run_thread, keeper, clone, host)
            self._thread = Thread(target=run, name="streamkeep-session", daemon=True)
            self._thread.start()


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
    """What a session's keeper needs of the manager."""

    def started(self) -> None:
        """Tell that the session is stored."""

    def look(self, streams: Iterable[str]) -> None:
        """Have writers look whether these streams are still theirs."""

    def answers(self) -> bool:
        """Say whether the manager's event loop has answered within a minute."""
        ...

    @property
    def is_gone(self) -> bool:
        """Whether that loop has ended."""
        ...


class _Here:
    """The manager's event loop is the keeper's own."""

    is_gone: Final = False

    def __init__(self, look: Callable[[Iterable[str]], None], starting: _Start) -> None:
        self._starting = starting
        self.look = look

    def started(self) -> None:
        self._starting.succeed()

    def answers(self) -> bool:
        return True


class _Elsewhere:
    """The manager's event loop is that of another thread."""

    def __init__(self, background: Background, look: Callable[[Iterable[str]], None], starting: _Start) -> None:
        self._background = background
        self._look = look
        self._starting = starting
        self._answered_at = time.monotonic()
        self.is_gone = False

    def started(self) -> None:
        self._call(self._starting.succeed)

    def ended(self, error: StorageError | None) -> None:
        self._call(lambda: self._starting.end(error))

    def look(self, streams: Iterable[str]) -> None:
        self._call(lambda: self._look(streams))

    def answers(self) -> bool:
        self._call(self._answer)
        return time.monotonic() - self._answered_at < LOOP_SECONDS

    def _answer(self) -> None:
        self._answered_at = time.monotonic()

    def _call(self, function: Callable[[], object]) -> None:
        self.is_gone = not self._background.call(function) or self.is_gone


async def _run_here(keeper: "_Keeper", starting: _Start) -> None:
    error: StorageError | None = None
    try:
        await keeper.run()
    except StorageError as failure:
        error = failure
    finally:
        starting.end(error)


def _run_thread(keeper: "_Keeper", clone: GuardedStorage, host: _Elsewhere) -> None:
    async def run() -> None:
        async with clone:
            await keeper.run()

    error: StorageError | None = None
    while not keeper.is_stopped and not host.is_gone:
        try:
            asyncio.run(run())
            break
        except BaseException as failure:
            if not keeper.has_begun:
                error = _as_storage_error(failure)
                break
            logger.exception("the session ended by an error, and is begun again")
            time.sleep(RETRY_SECONDS)
    host.ended(error)


def _as_storage_error(error: BaseException) -> StorageError:
    return error if isinstance(error, StorageError) else StorageError(f"the session could not be begun: {error!r}")


class _Keeper:
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
        self._renewed_at = 0.0
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
            await anyio.sleep(max(0.0, self._renewed_at + self._period - anyio.current_time()))
            try:
                if self._host.answers():
                    await self._renew()
                    continue
            except StorageError as error:
                if told != self._renewed_at:  # once for each time that it fails
                    told = self._renewed_at
                    logger.warning("the session could not be renewed: %s", error)
            await anyio.sleep(min(self._period, RETRY_SECONDS))

    async def _watch_over_renewal(self) -> None:
        """Say when a renewal is overdue: it may be under way, and is not begun anew for that."""
        told = -1.0
        while True:
            await anyio.sleep(self._period)
            since = anyio.current_time() - self._renewed_at
            if since > self._terms.lease and told != self._renewed_at:
                told = self._renewed_at
                why = "the storage is slow, or away" if self._host.answers() else "the event loop is blocked"
                logger.warning("the session was not renewed for %.1f seconds: %s", since, why)

    async def _take_mail(self) -> None:
        while True:
            try:
                async with self._storage.watch(self._mailbox) as doorbell:
                    while True:
                        await self._look_for_mail()
                        await doorbell.wait()
            except StorageError as error:
                logger.warning("cannot hear of streams that are cancelled elsewhere: %s", error)
                await anyio.sleep(RETRY_SECONDS)

    async def _look_for_mail(self) -> None:
        for _ in range(TRIES):
            page = await self._storage.read(self._mailbox)
            if page is None:
                return
            # Before it is taken out: to look twice does no harm, and what nobody has looked at must not be gone.
            self._host.look(_lifecycle.mail_of(page.head))
            await self._storage.delete(self._mailbox, page.head.version)

    async def _renew(self, *, is_over: bool = False) -> None:
        """Give a sign of life."""
        async with self._turn:
            began_at = anyio.current_time()
            for _ in range(TRIES):
                if await self._try_to_renew(is_over=is_over):
                    self._renewed_at = began_at
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


@dataclass(slots=True)
class Observed:
    """What was seen of another manager's session. Pure: it is told what reads have shown, and how long after one another they were."""

    terms: Terms
    silent: float = 0.0
    beat: int | None = None
    challenged_at: float | None = None
    challenge_took: float | None = None

    def see(self, state: SessionState | None, after: float) -> None:
        """Take in what a read has shown, `after` seconds of waiting since the last one. None: the session is not there."""
        if state is None:
            beat = None
        else:
            beat = state.beat
            self.terms = Terms(0.0, state.lease, state.grace)
        if state is not None and state.is_over:
            self.silent = inf
        elif beat == self.beat:
            self.silent += after
        else:
            self.beat, self.silent, self.challenged_at, self.challenge_took = beat, 0.0, None, None
        if state is not None and state.is_challenged and self.challenged_at is None:
            self.challenged_at = self.silent

    def see_unreadable(self, head: Head, after: float) -> None:
        """Take in that the session's head is there and cannot be read: that it changes is a sign of life, and it cannot be asked for one."""
        self.see(SessionState(head.version, self.terms.lease, self.terms.grace), after)
        if self.is_to_be_challenged:
            self.challenged_at, self.challenge_took = self.silent, 0.0

    @property
    def is_to_be_challenged(self) -> bool:
        """Whether it is time to ask for a sign of life; also if others have: only one's own commit shows how slow commits are."""
        return self.challenge_took is None and self.terms.lease * (1 - 2 / READS_A_LEASE) <= self.silent < inf

    @property
    def proven(self) -> float:
        """For how long the session is known to be silent: less than its lease, unless it has left a challenge unanswered."""
        lease = self.terms.lease
        if self.silent < lease or self.silent == inf or self.beat is None:
            return self.silent
        if self.challenged_at is None or self.challenge_took is None:
            return lease * (1 - 1 / READS_A_LEASE)
        is_unanswered = self.silent >= self.challenged_at + max(lease / READS_A_LEASE, CHALLENGES * self.challenge_took)
        return self.silent if is_unanswered else lease * (1 - 1 / READS_A_LEASE)

    @property
    def is_dead(self) -> bool:
        """Whether streams of this session may be ended by anybody."""
        return self.proven >= self.terms.lease + self.terms.grace


class _Observation:
    """A session that is observed, and who wants to know."""

    def __init__(self, terms: Terms) -> None:
        self.observed = Observed(terms)
        self.wanted_until = -inf
        self.is_failing = False
        self.calls: dict[object, Callable[[], object]] = {}

    @property
    def is_wanted(self) -> bool:
        return bool(self.calls) or anyio.current_time() < self.wanted_until


class Observer:
    """Sees whether the sessions of other managers are alive; reads a session only while somebody wants to know."""

    def __init__(self, storage: GuardedStorage, background: Background, terms: Terms, own: str) -> None:
        self._storage = storage
        self._background = background
        self._terms = terms
        self._own = own
        self._observations: dict[str, _Observation] = {}
        self._outgoing: dict[str, _Outgoing] = {}

    def silence_of(self, session: str) -> tuple[float, Terms]:
        """Give for how many seconds a session is known to be silent, inf if it is over, and its terms; and observe it for a while."""
        if session in {self._own, ""}:  # a manager never judges its own writers
            return 0.0, self._terms
        observation = self._observe(session)
        terms = observation.observed.terms
        observation.wanted_until = anyio.current_time() + 2 * (terms.lease + terms.grace)
        return observation.observed.proven, terms

    @contextmanager
    def calling_when_dead(self, session: str, call: Callable[[], object]) -> Generator[None]:
        """While in this block, have `call` called when the session has been silent for its lease and grace."""
        if session in {self._own, ""}:
            yield
            return
        observation, key = self._observe(session), object()
        observation.calls[key] = call
        if observation.observed.is_dead:
            self._background.call(call)
        try:
            yield
        finally:
            del observation.calls[key]

    def _observe(self, session: str) -> _Observation:
        observation = self._observations.get(session)
        if observation is None:
            observation = self._observations[session] = _Observation(self._terms)
            self._background.start(partial(self._watch, session, observation), "the observation of a session")
        return observation

    async def _watch(self, session: str, observation: _Observation) -> None:
        pause = 0.0
        try:
            while observation.is_wanted:
                await anyio.sleep(pause)
                await self._look(session, observation, pause)
                pause = observation.observed.terms.lease / READS_A_LEASE
        finally:
            del self._observations[session]

    async def _look(self, session: str, observation: _Observation, pause: float) -> None:
        observed = observation.observed
        was_dead = observed.is_dead
        try:
            await self._see(session, observed, pause)
            observation.is_failing = False
        except StorageError as error:
            if not observation.is_failing:
                observation.is_failing = True
                logger.warning("a session cannot be observed: %s", error)
            return
        if observed.is_dead and not was_dead:
            for call in tuple(observation.calls.values()):
                call()

    async def _see(self, session: str, observed: Observed, pause: float) -> None:
        id = _lifecycle.session_id(session)
        page = await self._storage.read(id)
        if page is None:
            observed.see(None, pause)
            return
        try:
            state = _lifecycle.session_of(page.head)
        except StorageCorruptError:
            observed.see_unreadable(page.head, pause)
            return
        observed.see(state, pause)
        if observed.is_to_be_challenged:
            head = _lifecycle.challenge(page.head, state, self._storage.time(), self._own)
            began_at = anyio.current_time()
            await self._storage.commit(id, page.head.version, head)
            observed.challenge_took = anyio.current_time() - began_at

    async def tell(self, session: str, stream: str) -> None:
        """Have a session look at a stream that is no longer its own.

        Returns when that is posted; or has failed, and is tried again in the background. There is one post at a time, for all who have
        something to tell: thousands of streams that are cancelled at once are a few commits.
        """
        if self._background.is_stopping:
            return
        outgoing = self._outgoing.get(session)
        if outgoing is None:
            outgoing = self._outgoing[session] = _Outgoing()
            self._background.start(partial(self._post_all, session, outgoing), "the mail to a session")
        await outgoing.put(stream)

    async def _post_all(self, session: str, outgoing: "_Outgoing") -> None:
        failed_at: float | None = None
        try:
            while outgoing.streams:
                streams, tried = outgoing.take()
                try:
                    await self._post(session, streams)
                    failed_at = None
                except StorageError as error:
                    if failed_at is None:
                        failed_at = anyio.current_time()
                        logger.warning("writers cannot be told yet that their streams have ended: %s", error)
                    elif anyio.current_time() - failed_at > TELL_SECONDS:
                        return  # by now they have looked by themselves
                    outgoing.put_back(streams)
                    tried.set()
                    await anyio.sleep(RETRY_SECONDS)
                finally:
                    tried.set()
        finally:
            del self._outgoing[session]
            outgoing.tried.set()

    async def _post(self, session: str, streams: Iterable[str]) -> None:
        if await self._is_over(session):
            return
        mailbox = _lifecycle.mailbox_id(session)
        for _ in range(TRIES):
            page = await self._storage.read(mailbox)
            seen = None if page is None else page.head
            head = _lifecycle.post(seen, streams, self._storage.time(), self._own)
            if await commit_once(self._storage, mailbox, None if seen is None else seen.version, head):
                return
        raise StorageError("the mailbox of a session is changed by others all the time")

    async def _is_over(self, session: str) -> bool:
        page = await self._storage.read(_lifecycle.session_id(session))
        try:
            return page is None or _lifecycle.session_of(page.head).is_over
        except StorageCorruptError:
            return False


class _Outgoing:
    """What a session is still to be told."""

    def __init__(self) -> None:
        self.streams: dict[str, None] = {}  # a set that keeps the order
        self.tried = anyio.Event()

    async def put(self, stream: str) -> None:
        """Return when it was tried to post this."""
        self.streams[stream] = None
        await self.tried.wait()

    def take(self) -> tuple[list[str], anyio.Event]:
        streams, tried = list(self.streams), self.tried
        self.streams, self.tried = {}, anyio.Event()
        return streams, tried

    def put_back(self, streams: list[str]) -> None:
        self.streams = {**dict.fromkeys(streams), **self.streams}
