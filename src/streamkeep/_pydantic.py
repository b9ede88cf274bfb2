"""pydantic's models and dataclasses, as their own JSON mode writes them; pydantic is not imported.

pydantic also writes dataclass fields whose names begin with an underscore, which are nobody's but the library's that made them. Here they
are left out, by the `exclude` that pydantic itself takes.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from enum import Enum
from functools import lru_cache
from typing import Any

from ._depth import MAX_DEPTH, TOO_DEEP
from .errors import InvalidArgumentError


def dump_of(type_: type) -> Callable[..., object] | None:
    """Give what dumps instances of a type, if it is a pydantic dataclass, or has `model_dump` as a pydantic model has."""
    if is_dataclass(type_):  # a plain one may inherit from pydantic's; it has no serializer of its own
        return getattr(vars(type_).get("__pydantic_serializer__"), "to_python", None)
    return getattr(type_, "model_dump", None)


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
