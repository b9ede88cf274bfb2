"""How deep JSON may be nested."""

import re
from array import array
from collections.abc import Iterable
from itertools import accumulate
from typing import Final

import msgspec

from .errors import InvalidArgumentError

MAX_DEPTH: Final = 256
"""How deep JSON may be nested. Python's own limit is met later, differs from version to version, and would be met by whoever reads it."""

MAX_SHALLOW: Final = 2 * MAX_DEPTH
"""So many bytes cannot be nested any deeper."""

TOO_DEEP: Final = f"the value is circular, or nested more than {MAX_DEPTH} levels deep"


def check_depth(data: bytes) -> None:
    """Raise InvalidArgumentError if JSON is nested more than MAX_DEPTH levels deep."""
    # What is short, or has few brackets, is not deep: only the rest is worth walking through.
    if len(data) > MAX_SHALLOW and data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_too_deep(data):
        raise InvalidArgumentError(TOO_DEEP)


def is_deep(value: object) -> bool:
    """Say whether decoded JSON is nested more than MAX_DEPTH levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for container in level for item in _items(container) if isinstance(item, dict | list)]
        if not level:
            return False
    return any(isinstance(container, dict | list) for container in level)


def _items(container: object) -> Iterable[object]:
    match container:
        case dict():
            return container.values()
        case list():
            return container
        case _:
            return ()


_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_OTHERS: Final = bytes(set(range(256)) - set(b"[]{}"))
_STEPS: Final = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")


def _is_too_deep(data: bytes) -> bool:
    # Brackets are counted, and no values made: walking through millions of them would hold up who else is served.
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except RecursionError:
        return True
    steps = array("b", _STRING.sub(b"", data).translate(_STEPS, _OTHERS))  # 1 and -1
    return max(accumulate(steps), default=0) > MAX_DEPTH
