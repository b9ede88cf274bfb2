"""Observer: whether the sessions of other managers are alive, as this process has itself seen it. See `_sessions`."""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final

import anyio

from . import _lifecycle
from ._background import Background
from ._guard import GuardedStorage, commit_once
from ._lifecycle import Mail, SessionState, Terms
from .errors import StorageCorruptError, StorageError, StorageFullError
from .storage import Head

logger: Final = logging.getLogger("streamkeep")

READS_A_LEASE: Final = 5
TRIES: Final = 20
RETRY_SECONDS: Final = 1.0
TELL_SECONDS: Final = 300.0
"""How long it is tried to tell a session of a stream that is no longer its own; by then its writer looks by itself."""
WANTED_SECONDS: Final = 150.0
"""How long a session is observed at least for who asked once: until the next sweep, which asks again."""
CHALLENGES: Final = 10
"""How many times as long as the observer's own challenge took, a session has for its answer: it may have a renewal under way that the
challenge overtook, and has then to begin another one."""


@dataclass(slots=True)
class Observed:
    """What was seen of another manager's session. Pure: it is told what reads have shown, and how long after one another they were."""

    terms: Terms
    silent: float = 0.0
    beat: int = _lifecycle.ABSENT
    challenged_at: float | None = None
    challenge_took: float | None = None

    def see(self, state: SessionState, after: float) -> None:
        """Take in what a read has shown, `after` seconds of waiting since the last one."""
        if state.beat != _lifecycle.ABSENT:  # else these are the terms of whoever has asked
            self.terms = Terms(0.0, state.lease, state.grace)
        if state.is_over:
            self.silent = inf
        elif state.beat == self.beat:
            self.silent += after
        else:
            self.beat, self.silent, self.challenged_at, self.challenge_took = state.beat, 0.0, None, None
        if self.challenged_at is None:
            if state.is_challenged:
                self.challenged_at = self.silent
            else:
                self.challenge_took = None  # its storage has lost the challenge, if there was one

    def see_unreadable(self, head: Head, after: float) -> None:
        """Take in that its head cannot be read: that it changes is a sign of life, and it cannot be asked for one."""
        self.see(SessionState(head.version, self.terms.lease, self.terms.grace), after)
        if self.is_to_be_challenged:
            self.challenged_at, self.challenge_took = self.silent, 0.0

    @property
    def absent(self) -> SessionState:
        """What stands for a session that is not there."""
        return SessionState(_lifecycle.ABSENT, self.terms.lease, self.terms.grace)

    @property
    def is_to_be_challenged(self) -> bool:
        """Whether it is time to ask for a sign of life; also if others have: only one's own commit shows how slow commits are."""
        return self.challenge_took is None and self.terms.lease * (1 - 2 / READS_A_LEASE) <= self.silent < inf

    @property
    def proven(self) -> float:
        """For how long the session is known to be silent: less than its lease, unless it has left a challenge unanswered."""
        lease = self.terms.lease
        if self.silent < lease or self.silent == inf:
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
        self.is_told = False
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
        observation.wanted_until = anyio.current_time() + max(WANTED_SECONDS, 2 * (terms.lease + terms.grace))
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
        except StorageError as error:
            if not observation.is_told:
                observation.is_told = True
                logger.warning("a session cannot be observed: %s", error)
            return
        observation.is_told = False
        if observed.is_dead and not was_dead:
            for call in tuple(observation.calls.values()):
                call()

    async def _see(self, session: str, observed: Observed, pause: float) -> None:
        id = _lifecycle.session_id(session)
        page = await self._storage.read(id)
        seen = None if page is None else page.head
        try:
            state = observed.absent if seen is None else _lifecycle.session_of(seen)
        except StorageCorruptError:
            assert seen is not None
            observed.see_unreadable(seen, pause)
            return
        observed.see(state, pause)
        if observed.is_to_be_challenged:
            head = _lifecycle.challenge(seen, state, self._storage.time(), self._own)
            began_at = anyio.current_time()
            try:
                await self._storage.commit(id, None if seen is None else seen.version, head)
            except StorageFullError:
                if seen is not None:
                    raise
                observed.challenged_at = observed.silent  # else what it has left in a full storage could never be removed
            observed.challenge_took = anyio.current_time() - began_at

    async def tell(self, session: str, stream: str, *, cancel: str = "") -> None:
        """Have a session look at a stream that is no longer its own; or, if the `life` of one is given, cancel it.

        Returns when that is posted; or has failed, and is tried again in the background. There is one post at a time, for all who have
        something to tell: thousands of streams that are cancelled at once are a few commits.
        """
        if (tried := self.tell_soon(session, stream, cancel=cancel)) is not None:
            await tried.wait()

    def tell_soon(self, session: str, stream: str, *, cancel: str = "") -> anyio.Event | None:
        """Do the same in the background; give the event that `tell` waits for, or None if it is too late for that."""
        if self._background.is_stopping:
            return None
        outgoing = self._outgoing.get(session)
        if outgoing is None:
            outgoing = self._outgoing[session] = _Outgoing()
            ended = partial(self._posted, session, outgoing)  # asyncio may cancel it before it begins
            self._background.start(partial(self._post_all, session, outgoing), "the mail to a session", ended=ended)
        outgoing.add(stream, cancel)
        return outgoing.tried

    async def finish(self) -> None:
        """Return when it was tried to post all mail."""
        for outgoing in tuple(self._outgoing.values()):
            await outgoing.tried.wait()

    async def _post_all(self, session: str, outgoing: "_Outgoing") -> None:
        failed_at: float | None = None
        try:
            while not outgoing.is_empty:
                mail, tried = outgoing.take()
                try:
                    await self._post(session, mail)
                    failed_at = None
                except StorageError as error:
                    if failed_at is None:
                        failed_at = anyio.current_time()
                        logger.warning(
                            "a session could not be told of streams that may be no longer its own, and will be: %s", error
                        )
                    elif anyio.current_time() - failed_at > TELL_SECONDS:
                        return  # by now they have looked by themselves
                    outgoing.put_back(mail)
                    tried.set()
                    await anyio.sleep(RETRY_SECONDS)
                finally:
                    tried.set()
        finally:
            self._posted(session, outgoing)

    def _posted(self, session: str, outgoing: "_Outgoing") -> None:
        if self._outgoing.get(session) is outgoing:
            del self._outgoing[session]
        outgoing.tried.set()

    async def _post(self, session: str, mail: Mail) -> None:
        if await self._is_over(session):
            return
        mailbox = _lifecycle.mailbox_id(session)
        for _ in range(TRIES):
            page = await self._storage.read(mailbox)
            seen = None if page is None else page.head
            head = _lifecycle.post(seen, mail, self._storage.time(), self._own)
            if await commit_once(self._storage, mailbox, None if seen is None else seen.version, head):
                return
        raise StorageError("the mailbox of a session is changed by others all the time")

    async def _is_over(self, session: str) -> bool:
        page = await self._storage.read(_lifecycle.session_id(session))
        try:
            # One that is not there may be alive all the same: its storage has lost it, or a clock jumped.
            return page is not None and _lifecycle.session_of(page.head).is_over
        except StorageCorruptError:
            return False


class _Outgoing:
    """What a session is still to be told."""

    def __init__(self) -> None:
        self._streams: dict[str, None] = {}  # a set that keeps the order
        self._cancel: dict[str, str] = {}
        self.tried = anyio.Event()
        """That it was tried to post these."""

    @property
    def is_empty(self) -> bool:
        return not (self._streams or self._cancel)

    def add(self, stream: str, cancel: str) -> None:
        if cancel:
            self._cancel[stream] = cancel
        else:
            self._streams[stream] = None

    def take(self) -> tuple[Mail, anyio.Event]:
        mail, tried = Mail(tuple(self._streams), self._cancel), self.tried
        self._streams, self._cancel, self.tried = {}, {}, anyio.Event()
        return mail, tried

    def put_back(self, mail: Mail) -> None:
        self._streams = {**dict.fromkeys(mail.streams), **self._streams}
        self._cancel = {**mail.cancel, **self._cancel}
