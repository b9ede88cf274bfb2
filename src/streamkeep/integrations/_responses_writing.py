"""How a producer's chunks become the events of a Response of OpenAI's API. Sans-I/O."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ..errors import PublicError
from ._responses import ENDED, LIMITED, MAX_INDEX, Answer, Json, index_of, limited, objects_in, settled

logger: Final = logging.getLogger("streamkeep")

MAX_NAME: Final = 256
"""How many characters a model's name has, at most."""

_NUMBER: Final = (int, float)
_TAKEN: Final[Mapping[str, type | tuple[type, ...]]] = {
    "completed_at": _NUMBER,
    "incomplete_details": Mapping,
    "max_output_tokens": int,
    "parallel_tool_calls": bool,
    "reasoning": Mapping,
    "service_tier": str,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "truncation": str,
    "usage": Mapping,
}
"""What is taken of another server's Response, if it is of its type. The rest is what the app has asked for, or what its client has."""


class Writer:
    """Makes events of what a producer gives: of strings, which are text, and of events, which another server has made.

    Its own `response.created` comes first, so that the id is known before the model has begun; that of another server is left out. Of what
    that calls its Response, how it went and what came of it is taken: what it was asked for is the app's to know. Its items keep their
    indices, unless texts of ours have those.
    """

    def __init__(self, response: Json) -> None:
        self._ours = response
        self._id: str = response["id"]
        self._answer = Answer(response)
        self._next = 0
        """The index of the next item."""
        self._own: set[int] = set()
        self._taken: set[int] = set()
        self._places: dict[int, int] = {}
        """Where the other server's items are here, by its own indices."""
        self._ids: dict[str, int] = {}
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
        """Give the events of a chunk: a text, an event, or a whole Response.

        TypeError: it is none of OpenAI's; PublicError, RuntimeError: it is an error.
        """
        if self._ended is not None:
            return
        if isinstance(chunk, str):
            events = self._said(chunk)
        else:
            event = _object_of(chunk)
            is_whole = "type" not in event and event.get("object") == "response"
            events = self._whole(event) if is_whole else self._passed_on(event)
        for event in events:
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
        if self._ended is not None:
            return self._ended
        response = self._answer.response
        items = settled(response["output"], "completed")
        return {**response, "status": "completed", "completed_at": int(time.time()), "output": items}

    # Texts

    def _said(self, text: str) -> Iterator[Json]:
        if not text:
            return
        yield from self._progress()
        if self._text is None:
            self._text = []
            self._own.add(self._next)
            self._taken.add(self._next)
            yield {"type": "response.output_item.added", "output_index": self._next, "item": self._message("in_progress", [])}
            yield self._in_message("response.content_part.added", part=_part(""))
        self._text.append(text)
        yield self._in_message("response.output_text.delta", delta=text, logprobs=[])

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
        yield {"type": "response.output_item.done", "output_index": self._next, "item": item}
        self._next += 1
        self._text = None

    def _in_message(self, kind: str, **more: object) -> Json:
        return {"type": kind, "item_id": self._item_id, "output_index": self._next, "content_index": 0, **more}

    def _message(self, status: str, content: Sequence[Json]) -> Json:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    @property
    def _item_id(self) -> str:
        return f"msg_{self._id.removeprefix('resp_')}_{self._next}"

    # Another server's events

    def _passed_on(self, event: Json) -> Iterator[Json]:
        event.pop("sequence_number", None)
        kind = event.get("type")
        if not isinstance(kind, str):
            raise TypeError("an event of OpenAI's is an object with a `type`, which is text")
        if kind == "error":
            raise error_of(event)
        yield from self._close_message_before(kind)
        status = kind.removeprefix("response.")
        if status in ENDED and kind != status:
            self._ended = self._response_of(event.get("response") or {}, status)
            return
        if "response" in event:
            self._is_told = self._is_begun = True
            if kind == "response.created":
                return
            response = self._response_of(event["response"], "queued" if status == "queued" else "in_progress")
            yield {**event, "response": response}
            return
        yield from self._progress()
        yield self._placed(event)

    def _close_message_before(self, kind: str) -> Iterator[Json]:
        if kind != "response.created":
            yield from self._close_message()

    def _response_of(self, theirs: object, status: str) -> Json:
        if not isinstance(theirs, Mapping):
            raise TypeError("an event's `response` is an object")
        taken = {name: theirs[name] for name, types in _TAKEN.items() if isinstance(theirs.get(name), types)}
        if isinstance(model := theirs.get("model"), str) and 0 < len(model) <= MAX_NAME:
            taken["model"] = model
        if status == "incomplete" and theirs.get("status") == "cancelled":
            status = "cancelled"  # as we say it ourselves
        output = self._output_of(objects_in(theirs.get("output")), status)
        return {**self._ours, **taken, "status": status, "output": output, "error": _failure_of(theirs, status)}

    def _output_of(self, theirs: list[Json], status: str) -> list[Json]:
        if theirs and not self._own:
            return theirs
        so_far = self._answer.items
        if not theirs:
            items = [*so_far.values()]
            return settled(items, "completed" if status == "completed" else "incomplete") if status in ENDED else items
        merged = {index: so_far[index] for index in self._own}
        for index, item in enumerate(theirs):
            merged[self._place_of(index)] = item
        return [merged[index] for index in sorted(merged)]

    def _placed(self, event: Json) -> Json:
        """Give an event with indices that are some, and no other item's."""
        item = event.get("item")
        name = item.get("id") if isinstance(item, Mapping) else event.get("item_id")
        name = name if isinstance(name, str) else ""
        placed: Json = {}
        if "output_index" in event or name:
            theirs = index_of(event.get("output_index"), MAX_INDEX)
            if theirs is not None:
                place = self._place_of(theirs)
            elif isinstance(item, Mapping):
                place = self._ids.get(name, self._next)
            else:
                place = self._ids.get(name, max(self._next - 1, 0))
            self._next = max(self._next, place + 1)
            self._taken.add(place)
            if name:
                self._ids[name] = place
            placed["output_index"] = place
        for number in ("content_index", "summary_index"):
            if number in event and index_of(event[number], MAX_INDEX) is None:
                placed[number] = 0
        return {**event, **placed}

    def _place_of(self, theirs: int) -> int:
        if theirs not in self._places:
            free = (place for place in (theirs, theirs + len(self._own)) if place not in self._taken)
            place = self._places[theirs] = next(free, self._next)
            self._taken.add(place)
            self._next = max(self._next, place + 1)
        return self._places[theirs]

    # A whole Response

    def _whole(self, response: Json) -> Iterator[Json]:
        status = response.get("status")
        if status not in ENDED:
            raise TypeError(f"a Response has to have ended, and this one is {status}: ask for it with stream=True")
        for index, item in enumerate(objects_in(response.get("output"))):
            place = {"output_index": index, "item_id": item.get("id")}
            begun = {**item, "status": "in_progress", "content": []} if item.get("type") == "message" else item
            yield from self._passed_on({"type": "response.output_item.added", "output_index": index, "item": begun})
            parts = objects_in(item.get("content")) if begun is not item else []
            for number, part in enumerate(parts):
                where = {**place, "content_index": number}
                text = part.get("text")
                empty = {**part, "text": ""} if isinstance(text, str) else part
                yield from self._passed_on({"type": "response.content_part.added", **where, "part": empty})
                if isinstance(text, str):
                    yield from self._passed_on({"type": "response.output_text.delta", **where, "delta": text, "logprobs": []})
                    yield from self._passed_on({"type": "response.output_text.done", **where, "text": text, "logprobs": []})
                yield from self._passed_on({"type": "response.content_part.done", **where, "part": part})
            yield from self._passed_on({"type": "response.output_item.done", "output_index": index, "item": item})
        yield from self._passed_on({"type": f"response.{status}", "response": response})


def error_of(event: Json) -> Exception:
    """Give what is to be raised for an event that says that a Response has failed."""
    about = event.get("error")
    code = event.get("code") or (about.get("code") if isinstance(about, Mapping) else None)
    if code == LIMITED:
        logger.warning("the model's server has refused a response: %s", event)
        return limited("the model's server is asked too much")
    return RuntimeError(f"the model's server has failed: {event}")


def _failure_of(response: Mapping[str, Any], status: str) -> Json | None:
    if status != "failed":
        return None
    error = response.get("error")
    # What it says may name hosts and accounts of the app's.
    logger.warning("a response has failed at the model's server: %s", error)
    code = error.get("code") if isinstance(error, Mapping) else None
    return {"code": code if isinstance(code, str) and len(code) <= MAX_NAME else "server_error", "message": "internal"}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _object_of(chunk: object) -> Json:
    dump = getattr(chunk, "model_dump", None)
    event = dump(mode="json", exclude_unset=True) if callable(dump) else chunk
    if not isinstance(event, Mapping):
        raise TypeError(f"a Response is made of strings and of OpenAI's events, and not of a {type(chunk).__name__}")
    return {**event}
