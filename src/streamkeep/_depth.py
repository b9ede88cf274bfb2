"""How deep JSON may be nested."""

import re
from array import array
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
    if is_deep(data):
        raise InvalidArgumentError(TOO_DEEP)


def is_deep(data: bytes) -> bool:
    """Say whether JSON is nested more than MAX_DEPTH levels deep."""
    # What is short, or has few brackets, is not deep: only the rest is worth walking through.
    return len(data) > MAX_SHALLOW and data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deep(data)


_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_OTHERS: Final = bytes(set(range(256)) - set(b"[]{}"))
_STEPS: Final = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")


def _is_deep(data: bytes) -> bool:
    # Brackets are counted, and no values made: walking through millions of them would hold up who else is served.
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except RecursionError:
        return True
    steps = array("b", _STRING.sub(b"", data).translate(_STEPS, _OTHERS))  # 1 and -1
    return max(accumulate(steps), default=0) > MAX_DEPTH
