"""Responses of OpenAI's API as they grow: what their events add up to.

Everything here is sans-I/O. A stream's chunks are the events without their `sequence_number`, which is their offset; its output is the
whole Response. What was stored is somebody else's in part, and may be of any shape: nothing here raises for it.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import PublicError
from ..events import MAX_OFFSET, ErrorInfo

Json = dict[str, Any]

ENDED: Final = frozenset({"completed", "failed", "incomplete", "cancelled"})
"""The statuses of a Response that has ended."""
LIMITED: Final = "rate_limit_exceeded"
"""OpenAI's code for a limit of the model's server."""
MAX_INDEX: Final = 65_535
"""The greatest index of an item or a part that another server may give."""


def new_response(stream: str, *, model: str = "", background: bool = False, **said: object) -> Json:
    """Give a Response that has not begun, with what its request has said."""
    return {
        "id": stream,
        "object": "response",
        "created_at": int(time.time()),
        "status": "queued" if background else "in_progress",
        "background": background,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": None,
        **said,
    }


def limited(message: str) -> PublicError:
    """Give the error that readers are told as a limit of the model's server. One of ours is none: asking again does not help."""
    return PublicError("RESOURCE_EXHAUSTED", message, {"code": LIMITED})


def failed(response: Json, error: ErrorInfo) -> Json:
    """Give what is left of a Response whose stream has ended in ERROR; `cancelled` if it was stopped."""
    items = settled(response["output"], "incomplete")
    if error.status == "CANCELLED":
        return {**response, "status": "cancelled", "output": items}
    code, message = "server_error", error.message
    if error.status == "RESOURCE_EXHAUSTED":
        if error.details == {"code": LIMITED}:
            code = LIMITED
        else:  # which limit of a stream it was is nobody's business outside
            message = "the response is too long to be stored"
    return {**response, "status": "failed", "error": {"code": code, "message": message}, "output": items}


def settled(items: Iterable[Json], status: str) -> list[Json]:
    """Give items of which none is in progress any more."""
    return [{**item, "status": status} if item.get("status") == "in_progress" else item for item in items]


def index_of(value: object, most: int = MAX_OFFSET) -> int | None:
    """Give an index of an item or a part; None: it cannot be one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most else None


def objects_in(value: object) -> list[Json]:
    """Give the objects of what should be a list of objects."""
    return [{**item} for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


@dataclass(frozen=True, slots=True)
class _Growth:
    """What `.delta` and `.done` of an event are about: a field of an item, or of a part in a list of the item's."""

    item: str
    field: str
    parts: str = ""
    number: str = ""
    part: str = ""


_GROWTHS: Final[Mapping[str, _Growth]] = {
    "response.output_text": _Growth("message", "text", "content", "content_index", "output_text"),
    "response.refusal": _Growth("message", "refusal", "content", "content_index", "refusal"),
    "response.reasoning_text": _Growth("reasoning", "text", "content", "content_index", "reasoning_text"),
    "response.reasoning_summary_text": _Growth("reasoning", "text", "summary", "summary_index", "summary_text"),
    "response.function_call_arguments": _Growth("function_call", "arguments"),
    "response.mcp_call_arguments": _Growth("mcp_call", "arguments"),
    "response.custom_tool_call_input": _Growth("custom_tool_call", "input"),
    "response.code_interpreter_call_code": _Growth("code_interpreter_call", "code"),
}
_NEW_ITEMS: Final[Mapping[str, Json]] = {
    "message": {"role": "assistant", "content": []},
    "reasoning": {"summary": []},
    "function_call": {"call_id": "", "name": "", "arguments": ""},
    "custom_tool_call": {"call_id": "", "name": "", "input": ""},
}
"""What an item has whose beginning was not seen."""


class _Item:
    """An item that grows."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields: Json = {**fields}
        self._parts = {
            name: dict(enumerate(objects_in(fields[name])))
            for name in ("content", "summary")
            if isinstance(fields.get(name), list | tuple)
        }
        self._texts: dict[tuple[str, int, str], list[str]] = {}
        """What has come since they were last joined: by list, number and field."""

    def put(self, parts: str, number: int, part: Mapping[str, Any]) -> None:
        self._parts.setdefault(parts, {})[number] = {**part}
        for place in [place for place in self._texts if place[:2] == (parts, number)]:
            del self._texts[place]

    def add(self, growth: _Growth, number: int, text: str) -> None:
        self._part(growth, number)
        self._texts.setdefault((growth.parts, number, growth.field), []).append(text)

    def set(self, growth: _Growth, number: int, text: str) -> None:
        self._texts.pop((growth.parts, number, growth.field), None)
        self._part(growth, number)[growth.field] = text

    def value(self) -> Json:
        for (parts, number, field), texts in self._texts.items():
            part = self._parts[parts][number] if parts else self._fields
            before = part.get(field)
            part[field] = (before if isinstance(before, str) else "") + "".join(texts)
        self._texts.clear()
        lists = {name: [{**parts[number]} for number in sorted(parts)] for name, parts in self._parts.items()}
        return {**self._fields, **lists}

    def _part(self, growth: _Growth, number: int) -> Json:
        if not growth.parts:
            return self._fields
        parts = self._parts.setdefault(growth.parts, {})
        if number not in parts:
            annotations: Json = {"annotations": []} if growth.part == "output_text" else {}
            parts[number] = {"type": growth.part, growth.field: "", **annotations}
        return parts[number]


class Answer:
    """A Response so far: what its events add up to. What was not seen to begin is begun by what is seen of it."""

    def __init__(self, response: Json) -> None:
        self._base = self._response = response
        self._items: dict[int, _Item] = {}

    def take(self, event: object) -> None:
        """Add an event. What cannot be one adds nothing."""
        if not isinstance(event, Mapping) or not isinstance(kind := event.get("type"), str):
            return
        if isinstance(event.get("response"), Mapping):
            self._take_response(event["response"])
        elif (index := index_of(event.get("output_index"))) is not None:
            self._take_in_item(kind, index, event)

    @property
    def response(self) -> Json:
        """The Response so far."""
        return {**self._response, "output": [*self.items.values()]}

    @property
    def items(self) -> Mapping[int, Json]:
        """Its items so far, by their indices."""
        return {index: self._items[index].value() for index in sorted(self._items)}

    def _take_response(self, response: Mapping[str, Any]) -> None:
        self._response = {**self._base, **response}
        if not self._items:
            self._items = {index: _Item(item) for index, item in enumerate(objects_in(response.get("output")))}

    def _take_in_item(self, kind: str, index: int, event: Mapping[str, Any]) -> None:
        item, part = event.get("item"), event.get("part")
        match kind:
            case "response.output_item.added" | "response.output_item.done" if isinstance(item, Mapping):
                self._items[index] = _Item(item)
            case "response.content_part.added" | "response.content_part.done" if isinstance(part, Mapping):
                kind = "reasoning" if part.get("type") == "reasoning_text" else "message"
                self._item(index, kind, event).put("content", index_of(event.get("content_index")) or 0, part)
            case "response.reasoning_summary_part.added" | "response.reasoning_summary_part.done" if isinstance(part, Mapping):
                self._item(index, "reasoning", event).put("summary", index_of(event.get("summary_index")) or 0, part)
            case _:
                self._grow(kind, index, event)

    def _grow(self, kind: str, index: int, event: Mapping[str, Any]) -> None:
        stem, _, end = kind.rpartition(".")
        growth = _GROWTHS.get(stem)
        if growth is None or end not in {"delta", "done"}:
            return
        text = event.get("delta" if end == "delta" else growth.field)
        if not isinstance(text, str):
            return
        item, number = self._item(index, growth.item, event), index_of(event.get(growth.number)) or 0
        if end == "delta":
            item.add(growth, number if growth.parts else 0, text)
        else:
            item.set(growth, number if growth.parts else 0, text)

    def _item(self, index: int, kind: str, event: Mapping[str, Any]) -> _Item:
        if index not in self._items:
            name = event.get("item_id")
            begun = {"id": name if isinstance(name, str) else "", "type": kind, "status": "in_progress"}
            self._items[index] = _Item({**begun, **_NEW_ITEMS.get(kind, {})})
        return self._items[index]
