"""What the AI SDK takes for a part of a UI message: its types, with the fields that each must have, and of which kinds fields may be."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

REQUIRED: Final[Mapping[str, Sequence[str]]] = {
    "abort": (),
    "custom": ("kind",),
    "error": ("error_text",),
    "file": ("url", "media_type"),
    "finish": (),
    "finish-step": (),
    "message-metadata": ("message_metadata",),
    "reasoning-delta": ("id", "delta"),
    "reasoning-end": ("id",),
    "reasoning-file": ("url", "media_type"),
    "reasoning-start": ("id",),
    "reset-step": (),
    "source-document": ("source_id", "media_type", "title"),
    "source-url": ("source_id", "url"),
    "start": (),
    "start-step": (),
    "steering-message": ("id", "parts"),
    "text-delta": ("id", "delta"),
    "text-end": ("id",),
    "text-start": ("id",),
    "tool-approval-request": ("approval_id", "tool_call_id"),
    "tool-approval-response": ("approval_id", "approved"),
    "tool-input-available": ("tool_call_id", "tool_name", "input"),
    "tool-input-delta": ("tool_call_id", "input_text_delta"),
    "tool-input-error": ("tool_call_id", "tool_name", "input", "error_text"),
    "tool-input-start": ("tool_call_id", "tool_name"),
    "tool-output-available": ("tool_call_id", "output"),
    "tool-output-denied": ("tool_call_id",),
    "tool-output-error": ("tool_call_id", "error_text"),
}
"""The types that `ai` 7 knows beside `data-…`. Any other is fatal to it, and so is one without these fields."""


class _Type(msgspec.Struct):
    type: str = ""


class _Data(msgspec.Struct):
    data: msgspec.Raw
    id: str | None = None
    transient: bool | None = None


class _Part(msgspec.Struct, rename="camel"):
    approval_id: str | None = None
    approved: bool | None = None
    citations: list[dict[str, Any]] | None = None
    delta: str | None = None
    dynamic: bool | None = None
    error_text: str | None = None
    filename: str | None = None
    finish_reason: Literal["stop", "length", "content-filter", "tool-calls", "error", "interrupted", "other"] | None = None
    id: str | None = None
    input: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    input_encoding: Literal["json", "text"] | None = None
    input_text_delta: str | None = None
    is_automatic: bool | None = None
    kind: str | None = None
    media_type: str | None = None
    message_id: str | None = None
    message_metadata: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    output: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parts: list[dict[str, Any]] | None = None
    preliminary: bool | None = None
    provider_executed: bool | None = None
    provider_metadata: dict[str, dict[str, Any]] | None = None
    reason: str | None = None
    signature: str | None = None
    source_id: str | None = None
    title: str | None = None
    tool_call_id: str | None = None
    tool_metadata: dict[str, Any] | None = None
    tool_name: str | None = None
    url: str | None = None


def type_of(data: bytes) -> str:
    """Give what an object of JSON says that its type is; an empty text for anything else."""
    try:
        return msgspec.json.decode(data, type=_Type).type
    except msgspec.MsgspecError:
        return ""


def is_part(data: bytes, kind: str) -> bool:
    """Say whether an object of this type is a part. A null counts as a field that is not there, but where any value will do."""
    try:
        if kind.startswith("data-"):
            msgspec.json.decode(data, type=_Data)
            return True
        if kind not in REQUIRED:
            return False
        part = msgspec.json.decode(data, type=_Part)
    except msgspec.MsgspecError:
        return False
    return all(getattr(part, name) not in (None, msgspec.UNSET) for name in REQUIRED[kind])
