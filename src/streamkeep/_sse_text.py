"""Recognises server-sent events that are given as chunks: text in their format, and the objects that libraries make such text of."""

import re
from functools import lru_cache
from typing import Final

from .errors import InvalidArgumentError

_ADVICE: Final = (
    "Give the object itself, which is what is stored and framed for each reader; or have the response that is made of such text "
    "stored as it is, by the pass-through framing"
)

_LINE_END: Final = re.compile(r"\r\n|\r|\n")
_FIELDS: Final = ("data:", "event:", "id:", "retry:")
_BEGINNINGS: Final = (*_FIELDS, ":")
_PACKAGES: Final = frozenset({"fastapi", "httpx_sse", "litestar", "sse_starlette", "starlette"})
_NAMES: Final = frozenset({"EventSourceResponse", "ServerSentEvent", "ServerSentEventMessage"})


def is_sse_text(text: str) -> bool:
    """Say whether this is whole server-sent events and nothing else: every line is a field or a comment, and the last one is blank.

    A comment alone is none, because `:` and a blank line are a common token of models; nor is a field that has no value.
    """
    text = text.lstrip("\ufeff\r\n")
    if not text.startswith(_BEGINNINGS):  # nearly all text, at little cost
        return False
    lines = _LINE_END.split(text)
    written = [line for line in lines if line]
    return (
        lines[-2:] == ["", ""]
        and all(line.startswith(_BEGINNINGS) for line in written)
        and any(line.startswith(_FIELDS) and line.partition(":")[2].strip() for line in written)
    )


def check_no_sse_text(text: str) -> None:
    """Raise InvalidArgumentError if this is server-sent events."""
    if is_sse_text(text):
        raise InvalidArgumentError(f"the chunk is server-sent events already. {_ADVICE}")


def check_no_sse_object(type_: type) -> None:
    """Raise InvalidArgumentError if instances of this type are events, or responses of them, of a library that is known."""
    if _is_sse_object(type_):
        raise InvalidArgumentError(f"{type_.__qualname__} is a server-sent event already. {_ADVICE}")


@lru_cache(maxsize=1_024)
def _is_sse_object(type_: type) -> bool:
    return any(class_.__name__ in _NAMES and class_.__module__.partition(".")[0] in _PACKAGES for class_ in type_.__mro__)
