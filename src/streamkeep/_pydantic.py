"""pydantic's models and dataclasses, as their own JSON mode writes them; pydantic is not imported, but by what is written.

pydantic also writes dataclass fields whose names begin with an underscore, which are nobody's but the library's that made them. Here they
are left out, by the `exclude` that pydantic itself takes.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from enum import Enum
from functools import lru_cache
from math import isfinite
from typing import Any

from ._depth import MAX_DEPTH, TOO_DEEP
from .errors import InvalidArgumentError


def dump_of(type_: type) -> Callable[..., object] | None:
    """Give what dumps instances of a type, if it is a dataclass with a serializer, or has `model_dump` as a pydantic model has.

    A dataclass has a serializer if pydantic, which meets one where it expects anything, would write it by that and not by its fields: it is
    pydantic's, or is derived from one, or has a descriptor that gives each class its own.
    """
    if is_dataclass(type_):
        return getattr(_serializer_of(type_), "to_python", None)
    return getattr(type_, "model_dump", None)


def _serializer_of(type_: type) -> object | None:
    for base in type_.__mro__:
        serializer: object | None = vars(base).get("__pydantic_serializer__")
        if serializer is None:
            continue
        if base is type_ or hasattr(type(serializer), "__get__"):
            own: object = getattr(type_, "__pydantic_serializer__")  # noqa: B009 - type checkers know no such attribute
            return own
        return _made_serializer(type_)
    return None


@lru_cache(maxsize=1_024)
def _made_serializer(type_: type) -> object:
    """Give the serializer of a plain dataclass that is derived from one of pydantic's, whose own one knows nothing of more fields."""
    adapter: Callable[[type], Any] = sys.modules["pydantic"].TypeAdapter
    try:
        return adapter(type_).serializer
    except Exception as error:
        raise InvalidArgumentError(f"the value is not JSON: pydantic has no serializer for {type_.__qualname__}") from error


def with_own_numbers(tree: object, value: object, options: Mapping[str, object]) -> object:
    """Give a dump with what the JSON of a value's own type has in place of NaN and infinities, if that is text (`ser_json_inf_nan`)."""
    type_: type = type(value)
    if is_dataclass(type_):
        write: Callable[..., Any] | None = getattr(_serializer_of(type_), "to_json", None)
    else:
        write = getattr(type_, "model_dump_json", None)
    if write is None:
        return tree
    try:
        own = json.loads(write(value, by_alias=True, **options))
    except Exception:  # what is no JSON there is refused, or replaced, in the dump
        return tree
    return _merged(tree, own)


def _merged(tree: object, own: object, depth: int = 0) -> object:
    """Give a tree with the texts that another one of its shape has in place of numbers that are not finite."""
    if depth > MAX_DEPTH:
        raise InvalidArgumentError(TOO_DEEP)
    match tree, own:
        case float(), str() if not isfinite(tree):
            return own
        case dict(), dict():
            return {key: _merged(item, own.get(key), depth + 1) for key, item in tree.items()}
        case list() | tuple(), list() if len(tree) == len(own):
            return [_merged(item, its, depth + 1) for item, its in zip(tree, own, strict=True)]
        case _:
            return tree


@lru_cache(maxsize=1_024)  # to look for what a model's class has not is slow: pydantic looks, too
def is_dataclass(type_: type) -> bool:
    """Say whether this is a dataclass, pydantic's included."""
    return hasattr(type_, "__dataclass_fields__")


def dumped(value: object, dump: Callable[..., object], options: Mapping[str, object]) -> object:
    """Give what `dump` makes of a value in JSON mode. InvalidArgumentError: it raised."""
    try:
        return dump(value, mode="json", by_alias=True, **options)
    except Exception as error:
        # What a serializer of somebody else's says may quote the value, and our message is for everybody.
        raise InvalidArgumentError(f"the value is not JSON: {type(value).__qualname__} cannot be written as JSON") from error


def dumped_without(
    private: Mapping[Any, Any], value: object, dump: Callable[..., object], options: Mapping[str, object]
) -> object:
    """Give what `dump` makes of a value without private fields. InvalidArgumentError: a serializer writes them all the same."""
    tree = dumped(value, dump, {**options, "exclude": private})
    written = json.dumps(tree, default=str)
    if any(f"{json.dumps(name)}: " in written for name in _names_in(private)):
        raise InvalidArgumentError(
            f"the value is not JSON: a serializer of {type(value).__qualname__} writes private fields of dataclasses"
        )
    return tree


def _names_in(private: Mapping[Any, Any]) -> Iterator[str]:
    for name, inner in private.items():
        if inner is True:
            yield name
        else:
            yield from _names_in(inner)


def private_fields(value: object, depth: int = 0) -> dict[Any, Any]:
    """Give what pydantic has to `exclude` so that no private field of a dataclass goes out; empty if there is none.

    InvalidArgumentError: there is one where pydantic can exclude nothing.
    """
    if depth > MAX_DEPTH:
        raise InvalidArgumentError(TOO_DEEP)
    if isinstance(value, set | frozenset | deque):
        if any(private_fields(item, depth + 1) for item in value):
            raise InvalidArgumentError(
                "the value is not JSON: a set in a model holds dataclasses with private fields, which pydantic cannot leave out"
            )
        return {}
    if isinstance(value, Iterator):
        raise InvalidArgumentError(
            "the value is not JSON: an iterator in a model, such as a generator, may hold dataclasses with private fields; give a list"
        )
    type_: type = type(value)
    if isinstance(value, Enum):
        return private_fields(value.value, depth + 1)  # no level either
    if getattr(type_, "__pydantic_root_model__", False):
        return private_fields(vars(value).get("root"), depth + 1)  # a level that pydantic does not count
    found: dict[Any, Any] = {}
    for name, item in _parts(value):
        if is_dataclass(type_) and name.startswith("_"):
            found[name] = True
        elif fields := private_fields(item, depth + 1):
            found[name] = fields
    return found


def _parts(value: object) -> Iterable[tuple[Any, object]]:
    match value:
        case dict():
            return value.items()
        case list() | tuple():
            return enumerate(value)
        case _:
            return [(name, getattr(value, name)) for name in _names(type(value), value) if hasattr(value, name)]


def _names(type_: type, value: object) -> Iterable[str]:
    if is_dataclass(type_):
        return [field.name for field in fields(type_)]
    if hasattr(type_, "__pydantic_fields__"):
        extra: Iterable[str] | None = getattr(value, "__pydantic_extra__", None)
        computed: Iterable[str] = getattr(type_, "__pydantic_computed_fields__", ())
        return [*vars(value), *(extra or ()), *computed]
    return ()
