"""Responses of OpenAI's API as they grow, event by event: how a producer's chunks become events, and how these travel.

Everything here is sans-I/O. A stream's chunks are the events without their `sequence_number`, which is their offset; its output is the
Response that the last event is about.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar, assert_never

import msgspec

from ..errors import HTTP_CODES, PublicError
from ..events import ErrorInfo, StreamEvent, StreamEventType, encode_json
from ..http.framing import one_line

T = TypeVar("T")
Json = dict[str, Any]

ENDED: Final = frozenset({"completed", "failed", "incomplete", "cancelled"})
"""The statuses of a Response that has ended."""


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


class Answer:
    """A Response so far: what its events add up to."""

    def __init__(self, response: Json) -> None:
        self._response = response
        self._items: dict[int, Json] = {}
        self._texts: dict[tuple[int, int], list[str]] = {}
        """Of parts that grow: by output and content index."""

    def see(self, event: StreamEvent[T]) -> Json:
        """Give an event of a stream as its readers have it."""
        match event.type:
            case StreamEventType.CHUNK:
                shown: Json = msgspec.json.decode(event.data)
                self.take(shown)
                return shown
            case StreamEventType.DONE:
                self._response = msgspec.json.decode(event.data)
            case StreamEventType.ERROR:
                self._response = self._failed(event.error)
            case _:
                assert_never(event.type)
        self._items.clear()
        self._texts.clear()
        # OpenAI's SDK for Python knows no `response.cancelled`, and would not make a Response of what is in one.
        status = "incomplete" if self._response["status"] == "cancelled" else self._response["status"]
        return {"type": f"response.{status}", "response": self._response}

    def take(self, event: Json) -> None:
        """Add an event. Raises whatever it raises if the event is none of OpenAI's shape."""
        match event["type"]:
            case "response.output_item.added" | "response.output_item.done":
                index, item = event["output_index"], event["item"]
                self._items[index] = {**item, "content": [*item["content"]]} if item.get("content") is not None else {**item}
                self._forget_texts(index)
            case "response.content_part.added" | "response.content_part.done":
                self._put_part(event["output_index"], event["content_index"], event["part"])
            case "response.output_text.delta":
                self._add_text(event["output_index"], event["content_index"], event["delta"])
            case _ if "response" in event:
                self._response = {**event["response"]}
            case _:
                pass

    @property
    def response(self) -> Json:
        """The Response so far."""
        for (index, number), texts in self._texts.items():
            texts[:] = ["".join(texts)]
            part = self._items[index]["content"][number]
            self._items[index]["content"][number] = {**part, "text": part["text"] + texts[0]}
        self._texts.clear()
        items = [self._items[index] for index in sorted(self._items)]
        return {**self._response, "output": items} if items else self._response

    def _failed(self, error: ErrorInfo) -> Json:
        response = self.response
        items = [
            {**item, "status": "incomplete"} if item.get("status") == "in_progress" else item for item in response["output"]
        ]
        if error.status == "CANCELLED":
            return {**response, "status": "cancelled", "output": items}
        code = "rate_limit_exceeded" if error.status == "RESOURCE_EXHAUSTED" else "server_error"
        return {**response, "status": "failed", "error": {"code": code, "message": error.message}, "output": items}

    def _add_text(self, index: int, number: int, text: str) -> None:
        if not isinstance(text, str) or not isinstance(self._items[index]["content"][number]["text"], str):
            raise TypeError("a delta of text is text, and so is what it is added to")
        self._texts.setdefault((index, number), []).append(text)

    def _put_part(self, index: int, number: int, part: Json) -> None:
        content = self._items[index]["content"]
        content[number : number + 1] = [part]
        self._texts.pop((index, number), None)

    def _forget_texts(self, index: int) -> None:
        self._texts = {place: texts for place, texts in self._texts.items() if place[0] != index}


class Writer:
    """Makes events of what a producer gives: of strings, which are text, and of events, which another server has made.

    Its own `response.created` comes first, so that the id is known before the model has begun; that of another server is left out. Whatever
    that calls its Response, the id is ours.
    """

    def __init__(self, response: Json) -> None:
        self._id: str = response["id"]
        self._answer = Answer(response)
        self._items = 0
        self._text: list[str] | None = None
        """Of the message that is open."""
        self._is_begun = False
        self._is_told = False
        """Whether the producer says itself how its Response goes on."""
        self._ended: Json | None = None

    def begin(self) -> Json:
        """Give the first event."""
        return {"type": "response.created", "response": self._answer.response}

    def expand(self, chunk: object) -> Iterator[Json]:
        """Give the events of a chunk. Raises TypeError, ValueError, KeyError: it is no event of OpenAI's; RuntimeError: it is an error."""
        if self._ended is not None:
            return
        for event in self._said(chunk) if isinstance(chunk, str) else self._passed_on(_event_of(chunk)):
            self._answer.take(event)
            yield event

    def end(self) -> Iterator[Json]:
        """Give what is left to say when the producer has ended. PublicError: it has ended too early."""
        if self._ended is None and self._is_told:
            raise PublicError("ABORTED", "the response ended without its last event")
        for event in [*self._progress(), *self._close_message()] if self._ended is None else []:
            self._answer.take(event)
            yield event

    @property
    def response(self) -> Json:
        """The Response that has ended."""
        return self._ended or {**self._answer.response, "status": "completed", "completed_at": int(time.time())}

    def _said(self, text: str) -> Iterator[Json]:
        if not text:
            return
        yield from self._progress()
        if self._text is None:
            self._text = []
            yield {"type": "response.output_item.added", "output_index": self._items, "item": self._message("in_progress", [])}
            yield self._in_message("response.content_part.added", part=_part(""))
        self._text.append(text)
        yield self._in_message("response.output_text.delta", delta=text, logprobs=[])

    def _passed_on(self, event: Json) -> Iterator[Json]:
        event.pop("sequence_number", None)
        kind = event["type"]
        if not isinstance(kind, str):
            raise TypeError("an event's type is text")
        if kind == "error":
            raise RuntimeError(f"the model's server has failed: {event}")
        if "response" in event:
            event["response"] = {**event["response"], "id": self._id}
            self._is_told = self._is_begun = True
        if kind == "response.created":
            return
        yield from [*self._progress(), *self._close_message()]
        if "response" in event and kind.removeprefix("response.") in ENDED:
            self._ended = {**event["response"], "status": kind.removeprefix("response.")}
            return
        if kind == "response.output_item.added":
            self._items = max(self._items, event["output_index"] + 1)
        yield event

    def _progress(self) -> Iterator[Json]:
        if not self._is_begun:
            self._is_begun = True
            yield {"type": "response.in_progress", "response": {**self._answer.response, "status": "in_progress"}}

    def _close_message(self) -> Iterator[Json]:
        if self._text is None:
            return
        text = "".join(self._text)
        yield self._in_message("response.output_text.done", text=text, logprobs=[])
        yield self._in_message("response.content_part.done", part=_part(text))
        item = self._message("completed", [_part(text)])
        yield {"type": "response.output_item.done", "output_index": self._items, "item": item}
        self._items += 1
        self._text = None

    def _in_message(self, kind: str, **more: object) -> Json:
        return {"type": kind, "item_id": self._item_id, "output_index": self._items, "content_index": 0, **more}

    def _message(self, status: str, content: Sequence[Json]) -> Json:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    @property
    def _item_id(self) -> str:
        return f"msg_{self._id.removeprefix('resp_')}_{self._items}"


class ResponsesFraming:
    """Events as OpenAI's API sends them, from behind an offset; it is shown the whole stream, for its last event is about all of it.

    Ids are not sent: once OpenAI's SDK for Python has read one, it takes every blank line for an event. A stream that fails ends with
    `response.failed`, one that is stopped with `response.incomplete`, whose Response is `cancelled`. A transport that fails is cut, for
    its clients take a clean end for success.
    """

    content_type = "text/event-stream"
    cut_when_broken = True
    cut_when_failed = False
    shows_done = True
    takes_no_content = False
    reads_all = True
    replays = False

    def __init__(self, response: Json, after: int | None = None) -> None:
        self._answer = Answer(response)
        self._after = -1 if after is None else after

    def head(self, stream: str, query: Mapping[str, str]) -> Sequence[tuple[str, str]]:  # noqa: ARG002 - it needs neither
        """Give none."""
        return ()

    def preamble(self) -> bytes:
        """Give nothing."""
        return b""

    def event(self, event: StreamEvent[T], cursor: str) -> bytes:  # noqa: ARG002 - its clients name the sequence number
        """Give an event, its offset as its sequence number; nothing for one that its reader has."""
        shown = self._answer.see(event)
        if event.offset <= self._after:
            return b""
        data = encode_json({"type": shown["type"], "sequence_number": event.offset, **shown})
        return b"event: %b\ndata: %b\n\n" % (one_line(shown["type"].encode()), one_line(data))

    def heartbeat(self) -> bytes:
        """Give a comment; without a blank line."""
        return b": \n"

    def error(self, error: ErrorInfo) -> bytes:
        """Give what its clients raise."""
        return b"event: error\ndata: %b\n\n" % one_line(error_json(error))


def error_json(error: ErrorInfo) -> bytes:
    """Give an error in OpenAI's shape."""
    code = HTTP_CODES[error.status]
    kind = _KINDS.get(code, "server_error" if code >= 500 else "invalid_request_error")
    return encode_json({"error": {"message": error.message, "type": kind, "param": None, "code": error.status.lower()}})


_KINDS: Final[Mapping[int, str]] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _event_of(chunk: object) -> Json:
    dump = getattr(chunk, "model_dump", None)
    event = dump(mode="json", exclude_unset=True) if callable(dump) else chunk
    if not isinstance(event, Mapping):
        raise TypeError(f"a Response is made of strings and of OpenAI's events, and not of a {type(chunk).__name__}")
    return {**event}
