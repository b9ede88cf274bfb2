"""What both forms of the client, awaited and blocking, make of their arguments, and what they do with it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec

from ..errors import InvalidArgumentError
from ..events import ReadAs, decoder_of, encode_json
from ..wire import ServerSentEvent, parse_cursor
from ._flows import Flow, JSONAnswer, checked, flow_body
from ._network import Call, Network
from ._reading import Reading
from ._retry import Retry
from ._sse import EVENT_STREAM, STREAM_ID_HEADER, AnyEvents, OurEvents

T = TypeVar("T")

READ_TIMEOUT: Final = timedelta(seconds=45)
"""Three heartbeats of ours: a connection that brings nothing for so long is dead."""
_MAX_DIGITS: Final = 15
_JSON: Final = "application/json"
_FORM: Final = "application/x-www-form-urlencoded"
NO_RETRY: Final = Retry(tries=0)


@dataclass(frozen=True, slots=True)
class Body:
    """What a request sends, and of what type that is, if we know."""

    content: bytes | None
    content_type: str | None


def events_dialect(
    url: str,
    after: str | None,
    until: Callable[[ServerSentEvent], bool] | None,
    method: str,
    body: Body,
    headers: Mapping[str, str] | None,
    *,
    reconnects_at_end: bool,
) -> AnyEvents:
    """Give what `events` asks."""
    call = _streaming(url, method, body, headers)
    return AnyEvents(call, after, until, reconnects_at_end=reconnects_at_end)


def subscribe_dialect(
    url: str,
    after: int | str | None,
    last: int | None,
    chunk_type: ReadAs[Any] | None,
    output_type: ReadAs[Any] | None,
    method: str,
    body: Body,
    headers: Mapping[str, str] | None,
    *,
    follow: bool,
) -> OurEvents[Any]:
    """Give what `subscribe` asks."""
    call = _streaming(url, method, body, headers)
    if call.method == "GET":
        after, last, follow = _with_query(url, after, last, follow=follow)
    return OurEvents(call, after, last, _decoder(chunk_type), _decoder(output_type), follow=follow)


def _with_query(
    url: str, after: int | str | None, last: int | None, *, follow: bool
) -> tuple[int | str | None, int | None, bool]:
    """Give where to begin, and whether to follow, as the arguments or the URL say it: who does not know that waits for what does not come.

    What a URL has under these names and is none of ours is its server's affair. InvalidArgumentError: they say different things.
    """
    try:
        query = dict(parse_qsl(urlsplit(url).query))
    except (ValueError, TypeError, AttributeError):
        return after, last, follow  # to send it raises the same, in words
    places = [each for each in map(_place, (query.get("lastEventId", ""), query.get("after", ""))) if each is not None]
    numbers = [int(each) for each in (query.get("last", ""),) if each.isascii() and each.isdigit() and len(each) <= _MAX_DIGITS]
    said = [*places, *numbers, *(each for each in (after, last) if each is not None)]
    if (places or numbers) and len(said) > 1:
        raise InvalidArgumentError(
            "the URL's query says where to begin, by `after`, `lastEventId` or `last`; say it once, there or by argument"
        )
    if not follow and query.get("follow") == "true":
        raise InvalidArgumentError("the URL has `follow=true`, and the argument says False")
    return (
        places[0] if places else after,
        numbers[0] if numbers else last,
        follow and query.get("follow") != "false",
    )


def _place(text: str) -> int | str | None:
    """Give the offset or the cursor that a text is, if it is one."""
    if parse_cursor(text) is not None:
        return text
    return int(text) if re.fullmatch(r"-1|[0-9]{1,15}", text) else None


def flow_dialect(
    url: str,
    data: object,
    init: object,
    stream_id: str | None,
    seen: int,
    chunk_type: ReadAs[Any] | None,
    headers: Mapping[str, str] | None,
) -> Flow[Any]:
    """Give what `stream_flow` asks."""
    call = Call("POST", url, _headers(headers, EVENT_STREAM, _JSON), body=flow_body(data, init))
    return Flow(call, stream_id, seen, _decoder(chunk_type))


async def flow_output(
    network: Network, url: str, data: object, init: object, output_type: ReadAs[Any] | None, headers: Mapping[str, str] | None
) -> Any:
    """Run a flow once, and give its output."""
    call = Call("POST", url, _headers(headers, _JSON, _JSON), body=flow_body(data, init))
    answer = JSONAnswer(call, is_repeatable=False, takes_refusals=False)
    return _decoded(await _field(network, answer, "result", NO_RETRY), output_type)


def output_of(flow: Flow[Any], output_type: ReadAs[Any] | None) -> Any:
    """Give the output of a run that has ended well. UnexpectedAnswerError: it is not of this type."""
    assert flow.output is not None
    return _decoded(flow.output, output_type)


async def stopped(
    network: Network, url: str, stream_id: str | None, method: str, headers: Mapping[str, str] | None, retry: Retry
) -> bool:
    """Stop a run."""
    named = {} if stream_id is None else {STREAM_ID_HEADER: stream_id}
    call = Call(method.upper(), url, {**_headers(headers, _JSON), **named})
    answer = JSONAnswer(call, is_repeatable=True, takes_refusals=True)  # to stop twice is to stop
    return bool(_decoded(await _field(network, answer, "stopped", retry), bool))


async def _field(network: Network, answer: JSONAnswer, name: str, retry: Retry) -> bytes:
    reading: Reading[Any] = Reading(network, answer, retry)
    try:
        await reading.finish()
        return answer.field(name)
    finally:
        await reading.leave()


def body_of(json: object, content: bytes | str | None, data: Mapping[str, str | Sequence[str]] | None) -> Body:
    """Give the body that was asked for. InvalidArgumentError: it is not JSON, or more than one was."""
    if sum(each is not None for each in (json, content, data)) > 1:
        raise InvalidArgumentError("`json`, `content` and `data` are each the whole body; give one of them")
    if json is not None:
        return Body(encode_json(json), _JSON)
    if data is not None:
        return Body(urlencode(data, doseq=True).encode(), _FORM)
    return Body(content.encode() if isinstance(content, str) else content, None)


def _streaming(url: str, method: str, body: Body, headers: Mapping[str, str] | None) -> Call:
    return Call(method.upper(), url, _headers(headers, EVENT_STREAM, body.content_type), body=body.content)


def _headers(given: Mapping[str, str] | None, accept: str, content_type: str | None = None) -> dict[str, str]:
    """Give the headers of a request; those of the user's own count."""
    own = {} if content_type is None else {"Content-Type": content_type}
    ours = {"Accept": accept, "Accept-Encoding": "identity", **own}
    theirs = dict(given or {})
    names = {name.lower() for name in theirs}
    return {**{name: value for name, value in ours.items() if name.lower() not in names}, **theirs}


def _decoder(type_: ReadAs[T] | None) -> Callable[[bytes], Any]:
    return msgspec.json.decode if type_ is None else decoder_of(type_)


def _decoded(data: bytes, type_: ReadAs[Any] | None) -> Any:
    return checked(_decoder(type_))(data)
