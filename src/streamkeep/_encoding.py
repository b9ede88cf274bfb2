"""JSONEncoding: how chunks and outputs become JSON.

msgspec encodes in one call what it knows, and models as they dump themselves. What it does not know, or would write in another way than is
promised here, is made plain first, one level at a time and without recursion.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import lru_cache, partial
from math import isfinite
from threading import get_ident
from typing import Any, Final, Literal, final

import msgspec

from ._depth import MAX_DEPTH, MAX_SHALLOW, TOO_DEEP, check_depth
from ._pydantic import dump_of, dumped, dumped_without, is_dataclass, private_fields, with_own_numbers
from ._sse_text import check_no_sse_object
from .errors import InvalidArgumentError

Encode = Callable[[object], bytes]
"""Gives the JSON of a value, or raises."""

_encode: Final = msgspec.json.Encoder().encode
_ERRORS: Final = (TypeError, ValueError, OverflowError)
_SCALARS: Final = frozenset({str, int, bool, type(None)})
_CONSTANTS: Final = frozenset({int, bool, type(None)})
_CONTAINERS: Final = (dict, list, msgspec.Struct)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_UNDERSCORE: Final = ord("_")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class JSONEncoding:
    """How chunks and outputs are encoded: `StreamManager.connect(url, encode=JSONEncoding(exclude_none=True))`.

    Called with a value, it gives its JSON in UTF-8. It takes what the standard library's `json.dumps` takes, subclasses included; enums;
    dataclasses, attrs classes and msgspec structs; pydantic models and dataclasses, by alias, as their own JSON mode writes them, and other
    dataclasses that have or inherit a serializer of pydantic's; and what msgspec documents, such as datetimes, UUIDs, decimals, sets, bytes
    (as base64) and `msgspec.Raw`, JSON that is ready (inside of another value it is taken as it is). Fields of dataclasses whose names
    begin with `_` never go out, but those of a dataclass that a model's own serializer has made.

    Raises InvalidArgumentError, when called: anything else; nesting that is circular or deeper than 256 levels; objects of known
    libraries that are server-sent events already.

    Args:
        exclude_none: leave out fields that are None, of models, dataclasses, attrs classes and structs. A null in a dict or a list is the
            user's own, and stays; so does one that stands for NaN.
        exclude_unset: leave out the fields of pydantic models that were not given, as pydantic's own `exclude_unset`.
        non_finite: `raise` refuses NaN and infinities, `null` writes null in their place, as JavaScript does. (Keys are text: `"nan"`;
            and so is what a model's `ser_json_inf_nan="strings"` writes.)
        surrogates: `raise` refuses lone surrogates, which are no text; `replace` writes U+FFFD in their place.
        default: is asked for what to encode in place of an object that nothing here takes, as by `json.dumps`. It is called in the thread
            that writes.
    """

    exclude_none: bool = False
    exclude_unset: bool = False
    non_finite: Literal["raise", "null"] = "raise"
    surrogates: Literal["raise", "replace"] = "raise"
    default: Callable[[object], object] | None = None
    _encode: Encode = field(init=False, repr=False, compare=False)
    _options: Mapping[str, bool] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.non_finite not in {"raise", "null"} or self.surrogates not in {"raise", "replace"}:
            raise InvalidArgumentError("non_finite is 'raise' or 'null', and surrogates is 'raise' or 'replace'")
        options = {"exclude_none": self.exclude_none, "exclude_unset": self.exclude_unset}
        object.__setattr__(self, "_options", {name: True for name, is_on in options.items() if is_on})
        object.__setattr__(self, "_encode", msgspec.json.Encoder(enc_hook=partial(_known, self._options)).encode)

    def __call__(self, value: object) -> bytes:
        """Give the value's JSON. InvalidArgumentError: it has none."""
        if type(value) is msgspec.Raw:
            return checked_json(bytes(value))
        try:
            data = self._encode(value)
        except BaseException as error:  # what is left there would be taken for what a model is the next time
            dumps = _taken_dumps()
            if isinstance(error, InvalidArgumentError) or not isinstance(error, (*_ERRORS, RecursionError)):
                raise
            data = self._encoded(value, dumps)
        else:
            dumps = _taken_dumps() if _dumps else {}
            # msgspec writes null for NaN, writes private fields, and takes pydantic's dataclasses for plain ones. Only where one of
            # that may be is the value worth walking. (One byte is found much faster than two.)
            if (
                b"null" in data or (_UNDERSCORE in data and b'"_' in data) or "pydantic.dataclasses" in sys.modules
            ) and not _is_plain(value):
                data = self._encoded(value, dumps)
        if len(data) > MAX_SHALLOW:
            check_depth(data)
        return data

    def _encoded(self, value: object, dumps: "_Dumps") -> bytes:
        try:
            plain = _Walk(self, self._options, dumps).plain(value)
        except InvalidArgumentError:
            raise
        except Exception as error:  # somebody else's code runs in there, and what it says may quote the value
            raise InvalidArgumentError(f"the value is not JSON: it cannot be read ({type(error).__qualname__})") from error
        try:
            return _encode(plain)
        except (*_ERRORS, RecursionError) as error:
            raise InvalidArgumentError(f"the value is not JSON: {error}") from error


_Dumps = dict[int, tuple[object, object]]
"""What models were dumped as, by their ids; to dump one again may give another: what iterators give they give once."""

_dumps: Final[dict[int, _Dumps]] = {}
"""By the thread that encodes. Empty but while a model is being encoded."""


def _taken_dumps() -> _Dumps:
    return _dumps.pop(get_ident(), {})


def _known(options: Mapping[str, bool], value: object) -> object:
    """Give what msgspec encodes in place of what it does not know: a model's dump, and what a subclass is derived from."""
    type_ = type(value)
    if dump := dump_of(type_):
        check_no_sse_object(type_)
        tree = dumped(value, dump, options)
        _dumps.setdefault(get_ident(), {}).setdefault(id(value), (value, tree))
        return tree
    if isinstance(value, bool):  # a key: as a value it is known
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return _base_of(value)
    raise TypeError


def _base_of(value: str | float) -> str | float:
    """Give what a subclass of these is derived from, whatever it says of itself, as the standard library does."""
    match value:
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case _:
            return float.__float__(value)


class _Walk:
    """Makes one value plain, by the rules of an encoding."""

    def __init__(self, rules: JSONEncoding, options: Mapping[str, bool], dumps: _Dumps) -> None:
        self._rules = rules
        self._options = options  # of pydantic's
        self._dumps = dumps

    def plain(self, value: object) -> object:
        """Give what msgspec encodes by the rules. InvalidArgumentError: there is nothing."""
        root = self._shallow(value)
        todo = [(root, 1)] if isinstance(root, _CONTAINERS) else []
        while todo:
            container, depth = todo.pop()
            if depth > MAX_DEPTH:
                raise InvalidArgumentError(TOO_DEEP)
            for place, item in _items(container):
                new = item if type(item) in _CONSTANTS else self._shallow(item)
                if isinstance(new, _CONTAINERS):
                    todo.append((new, depth + 1))
                if new is not item:
                    _put(container, place, new)
        return root

    def _shallow(self, value: object) -> object:
        """Give a scalar that msgspec encodes, or a new list, dict or struct, in which the items are as they were."""
        for _ in range(MAX_DEPTH):
            type_ = type(value)
            if type_ is bool or value is None or value is msgspec.UNSET:
                return value
            if _is_object(type_):  # type: ignore[arg-type]  # typeshed's `object` says that a type might have no hash
                is_plain, value = self._object(value)
                if is_plain:
                    return value
            elif isinstance(value, Enum):
                value = value.value
            else:
                return self._builtin(value)
        raise InvalidArgumentError(TOO_DEEP)

    def _builtin(self, value: object) -> object:
        # As the standard library does it, a subclass counts as what it is derived from, whatever it says of itself.
        match value:
            case str() | int() | float():
                return self._scalar(value)
            case dict():
                return {self._key(key): item for key, item in dict.items(value)}
            case list():
                return [*list.__iter__(value)]
            case tuple():
                return [*tuple.__iter__(value)]
            case msgspec.Struct():
                return self._struct(value)
            case _:
                assert isinstance(value, set | frozenset)
                return list(value)

    def _scalar(self, value: str | float) -> object:
        plain = _base_of(value)
        match plain:
            case str():
                return self._text(plain)
            case float():
                return self._number(plain)
            case _:
                return plain

    def _object(self, value: object) -> tuple[bool, object]:
        """Give what takes an object's place, and whether that is plain."""
        type_ = type(value)
        if dump := dump_of(type_):
            return self._dump(value, dump)
        if (names := _fields(type_)) is not None:
            items = ((name, getattr(value, name, msgspec.UNSET)) for name in names if not name.startswith("_"))
            return True, {name: item for name, item in items if not self._is_left_out(item)}
        if isinstance(value, msgspec.Raw):
            return True, msgspec.Raw(checked_json(bytes(value)))
        try:
            return True, msgspec.Raw(_encode(value))
        except _ERRORS:
            check_no_sse_object(type_)
            if self._rules.default is None:
                raise InvalidArgumentError(f"the value is not JSON: {type_.__qualname__} has no JSON form") from None
        return False, self._rules.default(value)

    def _dump(self, value: object, dump: Callable[..., object]) -> tuple[bool, object]:
        known = self._dumps.get(id(value))
        tree = known[1] if known else dumped(value, dump, self._options)
        try:
            data = _encode(tree)
        except (*_ERRORS, RecursionError):
            data = None
        options: Mapping[str, object] = self._options
        if (data is None or b'"_' in data) and (private := private_fields(value)):
            tree, data = dumped_without(private, value, dump, options), None
            options = {**options, "exclude": private}
        if data is not None and (b"null" not in data or _is_plain(tree)):
            return True, msgspec.Raw(data)
        return False, with_own_numbers(tree, value, options) if _holds_non_finite(tree) else tree

    def _struct(self, value: msgspec.Struct) -> msgspec.Struct:
        new = copy(value)
        if self._rules.exclude_none and not value.__struct_config__.array_like:
            for name in value.__struct_fields__:
                if getattr(value, name) is None:
                    msgspec.structs.force_setattr(new, name, msgspec.UNSET)
        return new

    def _is_left_out(self, item: object) -> bool:
        return item is msgspec.UNSET or (item is None and self._rules.exclude_none)

    def _key(self, key: object) -> object:
        """Give a dict's key as `json.dumps` would write it. What only msgspec knows is left to it."""
        while isinstance(key, Enum):
            key = key.value
        match key:
            case None:
                return "null"
            case bool():
                return "true" if key else "false"
            case str():
                return self._text(str.__str__(key))
            case int() | float():
                return _base_of(key)  # a key is text, whatever number it stands for
            case _:
                return key

    def _number(self, number: float) -> float | None:
        if isfinite(number):
            return number
        if self._rules.non_finite == "raise":
            raise InvalidArgumentError("the value is not JSON: it holds NaN or an infinity")
        return None

    def _text(self, text: str) -> str:
        if self._rules.surrogates == "raise" or not _SURROGATE.search(text):
            return text  # msgspec refuses what is no text
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def checked(encode: Encode) -> Encode:
    """Give what encodes as `encode` does, and raises InvalidArgumentError if that raises, or gives something else than JSON."""
    if isinstance(encode, JSONEncoding):
        return encode

    def encode_and_check(value: object) -> bytes:
        try:
            data = encode(value)
        except InvalidArgumentError:
            raise
        except Exception as error:  # what it says may quote the value, and our message is for everybody
            raise InvalidArgumentError(f"`encode` cannot encode {type(value).__qualname__}") from error
        if not isinstance(data, bytes):
            raise InvalidArgumentError(f"`encode` has to give JSON as bytes, and gave {type(data).__qualname__}")
        return checked_json(bytes(data).strip(b" \t\r\n"))

    return encode_and_check


def checked_json(data: bytes) -> bytes:
    """Give the bytes again. InvalidArgumentError: they are not one value of JSON in UTF-8, or it is nested too deep."""
    try:
        msgspec.json.decode(data)
    except RecursionError as error:
        raise InvalidArgumentError(TOO_DEEP) from error
    except ValueError as error:
        raise InvalidArgumentError("these bytes are not JSON in UTF-8") from error
    check_depth(data)
    return data


def _holds_non_finite(value: object) -> bool:
    """Say whether a dump has NaN or an infinity in it."""
    stack, seen = [value], set[int]()
    while stack:
        item = stack.pop()
        match item:
            case float():
                if not isfinite(item):
                    return True
            case dict() | list() | tuple() if id(item) not in seen:  # one that is circular is refused later
                seen.add(id(item))
                stack.extend(item.values() if isinstance(item, dict) else item)
            case _:
                pass
    return False


def _is_plain(value: object) -> bool:
    """Say whether this, which msgspec has encoded, is of JSON's own types only and finite."""
    stack = [value]
    while stack:
        item = stack.pop()
        type_ = type(item)
        if type_ in _SCALARS:
            continue
        match item:
            case dict() if type_ is dict and all(type(key) is str for key in item):
                stack.extend(item.values())
            case list() | tuple() if type_ is list or type_ is tuple:
                stack.extend(item)
            case float() if type_ is float and isfinite(item):
                pass
            case _:
                return False
    return True


@lru_cache(maxsize=1_024)
def _is_object(type_: type) -> bool:
    return not issubclass(type_, str | int | float | dict | list | tuple | set | frozenset | Enum | msgspec.Struct)


def _items(container: object) -> list[tuple[Any, object]]:
    match container:
        case dict():
            return list(container.items())
        case list():
            return list(enumerate(container))
        case _:
            assert isinstance(container, msgspec.Struct)
            return [(name, getattr(container, name)) for name in container.__struct_fields__]


def _put(container: Any, place: Any, item: object) -> None:  # noqa: ANN401
    if isinstance(container, msgspec.Struct):
        msgspec.structs.force_setattr(container, place, item)
    else:
        container[place] = item


def _fields(type_: type) -> Sequence[str] | None:
    """Give the names of a dataclass' fields, or of an attrs class'; None if it is neither."""
    if is_dataclass(type_):
        return [known.name for known in fields(type_)]
    if (attributes := getattr(type_, "__attrs_attrs__", None)) is not None:
        return [attribute.name for attribute in attributes]
    return None
