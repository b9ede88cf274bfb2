"""Paths of streams, and the ids under which storages keep them. A path has one id, and an id one path."""

from hashlib import sha256
from typing import Final

from .._lifecycle import PROTOCOL_PREFIX

PREFIX: Final = PROTOCOL_PREFIX
"""All ids of this package begin so. No stream of a manager does, so neither shows up, or is swept, among the other's."""
STREAM: Final = PREFIX + "s."
LINK: Final = PREFIX + "f."
SUBSCRIPTION: Final = PREFIX + "u."
CURSOR: Final = PREFIX + "c."
SIGNING_KEY: Final = PREFIX + "key"
REGISTRY: Final = PREFIX + "subscriptions"
"""Changes when subscriptions do, for who has them all."""
CONTROL: Final = "__ds"
"""The first segment of what is no stream, but about them (6)."""
MAX_PATH: Final = 1_024
_MAX_ID: Final = 255
_HASH: Final = 32


def why_refused(path: str) -> str | None:
    """Say why a path, without its leading slash, names no stream; None: it may name one."""
    if not path or len(path) > MAX_PATH:
        return f"a stream's path has 1 to {MAX_PATH} characters"
    if not path.isprintable() or "\ufffd" in path or "\\" in path:
        return "a stream's path is printable text in UTF-8, without backslashes"
    segments = path.split("/")
    if any(segment in {"", ".", ".."} for segment in segments):
        return "a stream's path has no empty segments, and none that is . or .."
    return None


def stream_id(path: str) -> str:
    """Give the id under which a stream is stored: the path as it is, or, if that is too long, its beginning and its hash."""
    id = STREAM + path
    return id if len(id) <= _MAX_ID and "~~" not in path else f"{id[: _MAX_ID - _HASH - 2]}~~{_digest(path)}"


def links_of(source: str, life: str) -> str:
    """Give what the ids of all links to forks of one life of a stream begin with."""
    return f"{LINK}{_digest(source + chr(0) + life)}."


def link_id(source: str, life: str, fork: str) -> str:
    """Give the id of the link from a stream to a fork."""
    return links_of(source, life) + _digest(fork)


def subscription_id(name: str) -> str:
    """Give the id under which a subscription is stored."""
    return SUBSCRIPTION + _digest(name)


def cursors_of(subscription: str, life: str) -> str:
    """Give what the ids of all cursors begin with that one life of a subscription, by its id, has outside of its head."""
    return f"{CURSOR}{subscription.removeprefix(SUBSCRIPTION)}.{life}."


def cursor_id(subscription: str, life: str, path: str) -> str:
    """Give the id of the cursor that a subscription has of a stream outside of its head."""
    return cursors_of(subscription, life) + _digest(path)


def owner_of(cursor: str) -> tuple[str, str]:
    """Give the id and the life of the subscription that a cursor is of, by the cursor's id."""
    name, life, _ = cursor.removeprefix(CURSOR).split(".")
    return SUBSCRIPTION + name, life


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:_HASH]
