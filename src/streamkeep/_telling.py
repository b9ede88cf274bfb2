"""Telling: hooks as the core calls them. Whatever one raises is logged, and harms nobody."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import Final, Protocol
from weakref import ref

from ._background import Background
from ._info import StreamInfo, info_of
from ._lifecycle import NOTHING, Life, outcome_of
from ._names import SURROGATE
from .errors import (
    InvalidArgumentError,
    StorageError,
    StreamCompletedError,
    StreamkeepError,
    StreamNotFoundError,
    StreamTakenOverError,
)
from .hooks import Commit, Delivery, Hooks, Outcome, Reader, Sample, StorageFailure

logger: Final = logging.getLogger("streamkeep")

REPORT_SECONDS: Final = 1.0
MAX_CARRIER: Final = 1_024
"""Characters of what hooks keep with a stream."""

_NAMES: Final = [name for name, function in vars(Hooks).items() if inspect.isfunction(function)]
_numbers: Final = count(1)


class Reading(Protocol):
    """What is known here of a subscription."""

    @property
    def lag(self) -> int:
        """How many events it has not given that are known here."""
        ...


def checked_hooks(hooks: Sequence[Hooks]) -> Sequence[Hooks]:
    """Give hooks. InvalidArgumentError: one is none, or awaits, or does nothing before somebody iterates."""
    those = (None,) if isinstance(hooks, Hooks) else tuple(hooks)
    if not all(isinstance(hook, Hooks) for hook in those):
        raise InvalidArgumentError("hooks are a list of objects of classes that are derived from `streamkeep.Hooks`")
    for hook in those:
        for name in _NAMES:
            if (kind := _other_kind(getattr(hook, name))) is not None:
                raise InvalidArgumentError(f"`{type(hook).__name__}.{name}` is {kind}, and hooks are plain functions")
    return [hook for hook in those if hook is not None]


class Telling:
    """Tells hooks what one manager does while it is open. What nobody has overridden is not told.

    Attributes:
        of_commits: whether anybody is told of commits.
        of_deliveries: whether anybody is told of deliveries.
        of_samples: whether anybody is told how the manager is doing, or of readers, which may be dropped silently.
    """

    def __init__(self, hooks: Sequence[Hooks], background: Background) -> None:
        self._background = background
        self._calls = {name: _overridden(hooks, name) for name in _NAMES}
        self._opening: set[str] = set()
        self._writers: set[str] = set()
        self._readers: dict[int, tuple[ref[Reading], Reader]] = {}
        self._reported: set[object] = set()
        self._reported_at = 0.0
        self.of_commits: Final = bool(self._calls["committed"])
        self.of_deliveries: Final = bool(self._calls["delivered"])
        self._of_readers: Final = self.of_deliveries or bool(self._calls["reader_entered"] or self._calls["reader_left"])
        self.of_samples: Final = self._of_readers or bool(self._calls["sampled"])

    # Writers

    def opening(self, stream: str, writer: str) -> Mapping[str, str]:
        """Tell of an attempt to open a stream; give what is to be kept with it."""
        self._opening.add(writer)
        carrier: dict[str, str] = {}
        for given in self._tell("opening", stream, writer):
            try:
                carrier.update(_checked_carrier(given))
            except BaseException as error:  # of a mapping of the hook's own
                self._report(type(given), error)
        if sum(len(name) + len(text) for name, text in carrier.items()) > MAX_CARRIER:
            logger.warning(
                "hooks have given more than %d characters to be kept with a stream, and nothing is kept", MAX_CARRIER
            )
            return NOTHING
        return carrier

    def tried(self, stream: str, writer: str) -> None:
        """Note that an attempt is over, and tell if it has failed."""
        if writer in self._opening:
            self._opening.discard(writer)
            self._tell("not_opened", stream, writer)

    def opened(self, stream: str, life: Life, before: Life | None) -> None:
        """Tell that an attempt has succeeded, with a stream that is new, or was there before."""
        info = info_of(stream, life)
        self._opening.discard(info.writer)
        self._writers.add(info.writer)
        if before is None:
            self._tell("started", info)
        else:
            self._tell("taken_over", info, info_of(stream, before))

    def producing(self, stream: str, life: Life) -> AbstractContextManager[None]:
        """Give what a producer of a stream is to run in."""
        return _Within(self, info_of(stream, life))

    def entered(self, stream: StreamInfo) -> Iterator[AbstractContextManager[object]]:
        """Enter what hooks want a producer to run in, and give it."""
        for given in self._tell("producing", stream):
            if isinstance(given, AbstractContextManager):
                try:
                    given.__enter__()
                except BaseException as error:
                    self._report(given.__enter__, error)
                else:
                    yield given

    def left(self, within: AbstractContextManager[object]) -> None:
        """Leave such a thing."""
        try:
            within.__exit__(None, None, None)
        except BaseException as error:
            self._report(within.__exit__, error)

    def committed(self, commit: Commit) -> None:
        """Tell of a commit."""
        self._tell("committed", commit)

    def ended(self, stream: str, life: Life) -> None:
        """Tell that this manager has ended a stream."""
        self._tell("ended", info_of(stream, life), outcome_of(life.state))

    def removed(self, stream: str, life: Life, outcome: Outcome) -> None:
        """Tell that this manager has removed a stream, if that was open: then this was its end."""
        if life.state.status == "open":
            self._tell("ended", info_of(stream, life), outcome)

    def finished(self, stream: str, life: Life) -> None:
        """Tell that a writer has ended or released its stream."""
        if life.state.status == "open":
            self._left(stream, life, "released")
        else:
            self.ended(stream, life)
            self._left(stream, life, outcome_of(life.state))

    def fenced(self, stream: str, life: Life, why: StreamkeepError | None) -> None:
        """Tell that a writer has its stream no more; None: nobody knows what has become of that."""
        self._left(stream, life, _lost_how(why))

    def _left(self, stream: str, life: Life, outcome: Outcome) -> None:
        """Tell so, if that was not told."""
        if life.state.writer in self._writers:
            self._writers.remove(life.state.writer)
            self._tell("writer_left", info_of(stream, life), outcome)

    # Readers

    def reader(self, reading: Reading, stream: str, life: Life, after: int | None) -> Reader | None:
        """Tell of a reader; give what is told of it."""
        if not self.of_samples:
            return None
        reader = Reader(next(_numbers), info_of(stream, life), after)
        self._readers[reader.number] = (ref(reading), reader)
        self._tell("reader_entered", reader)
        return reader

    def reader_left(self, reader: Reader) -> None:
        """Tell that a reader has left, if that was not told."""
        if self._readers.pop(reader.number, None) is not None:
            self._tell("reader_left", reader)

    def delivered(self, delivery: Delivery) -> None:
        """Tell what a reader was given."""
        self._tell("delivered", delivery)

    # The manager

    def readers(self) -> tuple[int, int]:
        """Give how many readers there are, and the lag of the slowest; having told of those that were dropped without being left."""
        lags: list[int] = []
        for reading, reader in list(self._readers.values()):
            if (there := reading()) is None:
                self.reader_left(reader)
            else:
                lags.append(there.lag)
        return len(lags), max(lags, default=0)

    def sampled(self, sample: Sample) -> None:
        """Tell how the manager is doing."""
        self._tell("sampled", sample)

    def closed(self, session: str) -> None:
        """Tell that the manager is closed: nobody reads here any more."""
        for _, reader in list(self._readers.values()):
            self.reader_left(reader)
        self._tell("sampled", Sample(session, 0, 0, 0, 0, None, None))

    def storage_failed(self, operation: str, error: StorageError) -> None:
        """Tell of an error of the storage's; from any thread."""
        self._tell_of_failure(StorageFailure(operation, type(error).__name__, is_retried=False))

    def storage_retried(self, operation: str, error: StorageError) -> None:
        """Tell that a storage is asked again; from any thread."""
        self._tell_of_failure(StorageFailure(operation, type(error).__name__, is_retried=True))

    def _tell_of_failure(self, failure: StorageFailure) -> None:
        if not self._calls["storage_failed"]:
            return
        if self._background.is_here:
            self._tell("storage_failed", failure)
        elif not self._background.is_forked:
            self._background.call(lambda: self._tell("storage_failed", failure))

    def _tell(self, name: str, *values: object) -> list[object]:
        """Call all hooks of a name; give what they have given."""
        given: list[object] = []
        for call in self._calls[name]:
            try:
                given.append(call(*values))
            except BaseException as error:  # also a cancellation: nobody has cancelled what does not await
                self._report(call, error)
        return given

    def _report(self, call: Callable[..., object], error: BaseException) -> None:
        """Log what a hook has raised, once a second of each kind; the end of the program is passed on."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        now = self._background.loop.time()
        if now - self._reported_at >= REPORT_SECONDS:
            self._reported.clear()
            self._reported_at = now
        name = getattr(call, "__qualname__", type(call).__qualname__)  # any callable may have been assigned
        if (kind := (name, type(error))) not in self._reported:
            self._reported.add(kind)
            logger.error("the hook `%s` failed", name, exc_info=error)


class _Within:
    """What hooks want a producer to run in. No generator: what is dropped is not left."""

    def __init__(self, telling: Telling, stream: StreamInfo) -> None:
        self._telling = telling
        self._stream = stream
        self._entered: list[AbstractContextManager[object]] = []

    def __enter__(self) -> None:
        self._entered.extend(self._telling.entered(self._stream))

    def __exit__(self, *exc_info: object) -> None:
        while self._entered:
            self._telling.left(self._entered.pop())


def _other_kind(hook: object) -> str | None:
    """Say what a hook is that is no plain function, nor anything else that does at a call what it does."""
    if not callable(hook):
        return "nothing that can be called"
    for function in (hook, getattr(type(hook), "__call__", None)):  # noqa: B004 - it is looked at, and not asked for
        if inspect.iscoroutinefunction(function):
            return "a coroutine function"
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            return "a generator function (a context manager is made of one by `contextlib.contextmanager`)"
    return None


def _overridden(hooks: Sequence[Hooks], name: str) -> Sequence[Callable[..., object]]:
    default: object = getattr(Hooks, name)
    return [getattr(hook, name) for hook in hooks if getattr(getattr(hook, name), "__func__", None) is not default]


def _checked_carrier(given: object) -> Mapping[str, str]:
    if isinstance(given, Mapping) and all(
        isinstance(text, str) and not SURROGATE.search(text) for item in given.items() for text in item
    ):
        return {str(name): str(text) for name, text in given.items()}
    logger.warning("hooks have given something to be kept with a stream that is no mapping of strings of Unicode")
    return NOTHING


def _lost_how(why: StreamkeepError | None) -> Outcome:
    match why:
        case None:
            return "unknown"
        case StreamTakenOverError():
            return "taken over"
        case StreamNotFoundError():
            return "deleted"
        case StreamCompletedError():
            return "stopped"
        case _:
            return "lost"
