"""The two lines that the log has of each run, when it starts and when it has ended. Nothing of a chunk is in them.

Their `extra` has the same for programs that read logs: `stream`, `route`, `owner`, `key`, `recovery` and `attempt` (how many of its writers
have died); at the end also `outcome`, `seconds`, `events` (how many the storage has) and `stored` (whether that is all, the end
among them: not so while the storage is away).
"""

import logging
import traceback
from collections.abc import Mapping
from typing import Any, Final

from .._input import StreamInput
from ..events import ErrorInfo, StreamEventType
from .logged import OneLine

logger: Final = logging.getLogger("streamkeep")


def log_start(stream: StreamInput) -> None:
    """Say that a run has started, or goes on here."""
    if logger.isEnabledFor(logging.INFO):
        known = _known(stream)
        what = "goes on here" if stream.tail else "has started"
        _log(known, "stream %s: its run %s%s", stream.id, what, _where(known))


def log_end(stream: StreamInput, seconds: float, end_as: ErrorInfo) -> None:
    """Say how a run has ended, as far as is known here: `end_as` is what ends it if nothing else has."""
    if logger.isEnabledFor(logging.INFO):
        outcome = _outcome(stream, end_as)
        stored = _is_stored(stream)
        known = {**_known(stream), "outcome": outcome, "seconds": round(seconds, 3), "events": stream.tail, "stored": stored}
        sentence = "stream %s: its run has ended%s: %s, after %.1f seconds and %d events%s"
        rest = "" if stored else "; not all of it is stored"
        _log(known, sentence, stream.id, _where(known), outcome, seconds, stream.tail, rest)


def _log(known: Mapping[str, Any], sentence: str, *values: object) -> None:
    try:
        _log_with_extra(known, sentence, *values)
    except Exception:  # of a handler, or a filter, of the app's: no run may end by that, nor keep its place
        if logging.raiseExceptions:  # as logging's own handlers do
            traceback.print_exc()


def _log_with_extra(known: Mapping[str, Any], sentence: str, *values: object) -> None:
    try:
        logger.info(sentence, *values, extra=known)
    except KeyError:  # the app's own record factory has given records one of these names already: that stays the app's
        there = vars(logger.makeRecord(logger.name, logging.INFO, "", 0, "", (), None))
        logger.info(sentence, *values, extra={name: value for name, value in known.items() if name not in there})


def _known(stream: StreamInput) -> dict[str, Any]:
    described = stream.metadata
    return {
        "stream": stream.id,
        "route": described.get("route", ""),
        "owner": described.get("owner", ""),
        "key": stream.key,
        "recovery": stream.recovery.name if stream.recovery else "",
        "attempt": stream.attempt,
    }


def _where(known: Mapping[str, Any]) -> str:
    named = ", ".join(str(OneLine(name)) for name in (known["route"], known["recovery"]) if name)
    return f" ({named})" if named else ""


def _is_stored(stream: StreamInput) -> bool:
    end = stream.end
    return stream.idle_since is not None and (end is None or end.offset < stream.tail)


def _outcome(stream: StreamInput, end_as: ErrorInfo) -> str:
    """Give `done`; the status of the error that ended it; `stopped`: by somebody else; or `handed over`, for another process."""
    end = stream.end
    if end is not None:
        if end.type is StreamEventType.DONE:
            return "done"
        # A writer that is too quick to be stopped from outside has ended the stream itself, as it was asked to.
        is_asked_to = stream.is_stopped and (end.error.status, end.error.message) != (end_as.status, end_as.message)
        return "stopped" if is_asked_to else end.error.status
    if stream.is_stopped:
        return "stopped"
    return "handed over" if stream.is_closed else end_as.status
