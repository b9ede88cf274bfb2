"""What both forms of the client, awaited and blocking, make of their arguments, and what they do with it."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final, TypeVar

import msgspec

from ..events import decoder_of, encode_json
from ..wire import ServerSentEvent
from ._flows import Flow, JSONAnswer, checked, flow_body
from ._network import Call, Network
from ._reading import Reading
from ._retry import Retry
from ._sse import EVENT_STREAM, STREAM_ID_HEADER, AnyEvents, OurEvents

T = TypeVar("T")

READ_TIMEOUT: Final = timedelta(seconds=45)
"""Three heartbeats of ours: a connection that brings nothing for so long is dead."""
_JSON: Final = "application/json"
NO_RETRY: Final = Retry(tries=0)


def events_dialect(
    url: str,
    after: str | None,
    until: Callable[[ServerSentEvent], bool] | None,
    method: str,
    json: object,
    headers: Mapping[str, str] | None,
    *,
    reconnects_at_end: bool,
) -> AnyEvents:
    """Give what `events` asks."""
    call = _streaming(url, method, json, headers)
    return AnyEvents(call, after, until, reconnects_at_end=reconnects_at_end)


def subscribe_dialect(
    url: str,
    after: int | str | None,
    last: int | None,
    chunk_type: type[Any] | None,
    output_type: type[Any] | None,
    method: str,
    json: object,
    headers: Mapping[str, str] | None,
    *,
    follow: bool,
) -> OurEvents[Any]:
    """Give what `subscribe` asks."""
    call = _streaming(url, method, json, headers)
    return OurEvents(call, after, last, _decoder(chunk_type), _decoder(output_type), follow=follow)


def flow_dialect(
    url: str,
    data: object,
    init: object,
    stream_id: str | None,
    seen: int,
    chunk_type: type[Any] | None,
    headers: Mapping[str, str] | None,
) -> Flow[Any]:
    """Give what `stream_flow` asks."""
    call = Call("POST", url, _headers(headers, EVENT_STREAM, _JSON), body=flow_body(data, init))
    return Flow(call, stream_id, seen, _decoder(chunk_type))


async def flow_output(
    network: Network, url: str, data: object, init: object, output_type: type[Any] | None, headers: Mapping[str, str] | None
) -> Any:
    """Run a flow once, and give its output."""
    call = Call("POST", url, _headers(headers, _JSON, _JSON), body=flow_body(data, init))
    answer = JSONAnswer(call, is_repeatable=False, takes_refusals=False)
    return _decoded(await _field(network, answer, "result", NO_RETRY), output_type)


def output_of(flow: Flow[Any], output_type: type[Any] | None) -> Any:
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


def _streaming(url: str, method: str, json: object, headers: Mapping[str, str] | None) -> Call:
    if json is None:
        return Call(method.upper(), url, _headers(headers, EVENT_STREAM))
    return Call(method.upper(), url, _headers(headers, EVENT_STREAM, _JSON), body=encode_json(json))


def _headers(given: Mapping[str, str] | None, accept: str, content_type: str | None = None) -> dict[str, str]:
    """Give the headers of a request; those of the user's own count."""
    own = {} if content_type is None else {"Content-Type": content_type}
    ours = {"Accept": accept, "Accept-Encoding": "identity", **own}
    theirs = dict(given or {})
    names = {name.lower() for name in theirs}
    return {**{name: value for name, value in ours.items() if name.lower() not in names}, **theirs}


def _decoder(type_: type[T] | None) -> Callable[[bytes], Any]:
    return msgspec.json.decode if type_ is None else decoder_of(type_)


def _decoded(data: bytes, type_: type[Any] | None) -> Any:
    return checked(_decoder(type_))(data)
