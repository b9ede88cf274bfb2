"""Recoverable: a function that makes a stream's chunks, and makes the rest of them when the process has died that was at it.

What the function is called with is kept with the stream, as JSON. So it is called alike the first time, and in whatever process goes on.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, TypedDict, Unpack, get_type_hints

import msgspec

from .._input import StreamInput
from .._recovery import Recovery, terms_of
from ..errors import InvalidArgumentError
from ..events import decoder_of, encode_json

_KEYWORDS: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class RecoverableCall:
    """A recoverable function with what it is to be called with: a source for `StreamsHTTP.respond`, and for nothing else.

    Attributes:
        recovery: what is kept with the stream.
        function: makes the chunks.
    """

    recovery: Recovery
    function: Callable[..., object]


class Recoverable:
    """A function that `StreamsHTTP.recoverable` has registered. Called, by keyword, it gives the source for `respond`.

    Raises (when called) TypeError: it does not take these arguments. InvalidArgumentError: they are not JSON, have more than 64 KiB, are
    not what its annotations say, or do not come back from JSON as they were, as what a model hides or leaves out.
    """

    def __init__(self, function: Callable[..., object], recovery: Recovery) -> None:
        terms_of(recovery)
        self.name = recovery.name
        self._function = function
        self._recovery = recovery
        self._signature = inspect.signature(function)
        self._stream, self._decoders = _parameters(function)

    def __call__(self, /, *by_position: object, **arguments: object) -> RecoverableCall:
        """Give the source of a stream whose chunks the function makes with these arguments, each given by keyword."""
        if by_position:
            raise TypeError(f"{self.name} is recoverable, and takes its arguments by keyword: they are kept by their names")
        self._check(arguments)
        kept = {name: msgspec.Raw(encode_json(value)) for name, value in arguments.items()}
        bound = self._bound(kept)
        changed = [name for name, value in bound.keywords.items() if _is_changed(arguments[name], value)]
        if changed:
            raise InvalidArgumentError(
                f"{self.name} would be called with another {' and '.join(changed)}: what is kept of it as JSON does not hold all of it"
            )
        return RecoverableCall(replace(self._recovery, input=kept), bound)

    def going_on(self, stream: StreamInput) -> Callable[..., object]:
        """Give what makes the rest of a stream. InvalidArgumentError: it does not take what was kept, as an older version of it did."""
        assert stream.recovery is not None
        return self._bound({name: msgspec.Raw(encode_json(value)) for name, value in (stream.recovery.input or {}).items()})

    def _check(self, arguments: Mapping[str, object]) -> None:
        """Raise TypeError if the function does not take these arguments, and the stream if it wants that, and needs no more."""
        self._signature.bind(*self._stream, **arguments)

    def _bound(self, kept: Mapping[str, msgspec.Raw]) -> partial[object]:
        try:
            arguments = {name: self._decoders.get(name, msgspec.json.decode)(bytes(data)) for name, data in kept.items()}
            self._check(arguments)
        except (ValueError, TypeError) as error:  # pydantic's and msgspec's are ValueErrors
            raise InvalidArgumentError(f"{self.name} does not take these arguments: {error}") from error
        return partial(self._function, **arguments)


def _is_changed(given: object, made: object) -> bool:
    """Say whether what was made of a value's JSON is another value; not of what is not compared, or has become of another type."""
    return type(given) is type(made) and type(given).__eq__ is not object.__eq__ and given != made


class Terms(TypedDict, total=False):
    """How a stream is gone on with; see `StreamsHTTP.recoverable`."""

    attempts: int
    backoff: timedelta
    within: timedelta


Register = Callable[[Callable[..., object]], Recoverable]


def registering(take: Callable[[Recoverable], object], name: str, **terms: Unpack[Terms]) -> Register:
    """Give what makes a function recoverable under a name, and has it taken."""

    def register(function: Callable[..., object]) -> Recoverable:
        made = Recoverable(function, Recovery(name, **terms))
        take(made)
        return made

    return register


def check_new(recoverable: Recoverable, known: Collection[str]) -> None:
    """Raise InvalidArgumentError if one of these names is its own."""
    if recoverable.name in known:
        raise InvalidArgumentError(f"a recoverable function named {recoverable.name!r} was registered already")


def _parameters(function: Callable[..., object]) -> tuple[Sequence[str], Mapping[str, Callable[[bytes], Any]]]:
    """Give the name of the parameter that is the stream, if there is one, and what makes of JSON what the annotations of the others say.

    TypeError: they are not all given by keyword, or the stream is not the first, or what an annotation names is not there.
    """
    parameters = list(inspect.signature(function).parameters.values())
    hints = _hints(function)
    first = [
        parameter.name
        for parameter in parameters[:1]
        if hints.get(parameter.name, StreamInput) is StreamInput and parameter.default is parameter.empty
    ]
    others = [parameter for parameter in parameters if parameter.name not in first]
    if any(parameter.kind not in _KEYWORDS for parameter in parameters) or any(
        hints.get(parameter.name) is StreamInput for parameter in others
    ):
        raise TypeError("a recoverable function takes its arguments by keyword; before them, if it wants it, the stream")
    return first, {parameter.name: decoder_of(hints[parameter.name]) for parameter in others if parameter.name in hints}


def _hints(function: Callable[..., object]) -> Mapping[str, Any]:
    """Give the annotations of a function's parameters. What it gives, and StreamInput, may be imported for type checkers only."""
    parameters = inspect.signature(function).parameters
    written = {
        name: parameter.annotation for name, parameter in parameters.items() if parameter.annotation is not parameter.empty
    }
    known = {StreamInput.__name__: StreamInput, **getattr(inspect.unwrap(function), "__globals__", {})}
    try:
        return get_type_hints(SimpleNamespace(__annotations__=written), known)
    except NameError as error:
        raise TypeError(f"what a recoverable function is called with is made as its annotations say, and {error}") from error
