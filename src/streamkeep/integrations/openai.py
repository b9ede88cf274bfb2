"""`OpenAIResponses`: OpenAI's Responses API around any producer, for OpenAI's SDKs as they come. It needs none of them."""

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import anyio

from .._info import StreamInfo
from .._input import StreamInput
from .._manager import MAX_METADATA
from ..errors import (
    InvalidArgumentError,
    KeyInUseError,
    LimitExceededError,
    OffsetOutOfRangeError,
    StorageError,
    StreamNotFoundError,
)
from ..events import ErrorInfo, encode_json, hidden_error, shown_info
from ..http.access import Action
from ..http.app import StreamsHTTP, path_below
from ..http.framing import parse_offset
from ..http.kept import ANSWER, ENDPOINTS_OWN
from ..http.place import START, Place, in_life, query_of
from ..http.response import Receive, Scope, Send, disconnected, errors_answered, send_response
from ..http.runner import ChunkWriter
from ..http.sources import Source, producer_of
from ..http.tokens import discreet
from ..wire import parse_object
from ._responses import Json, limited, new_response
from ._responses_reading import SAID, Responses, ResponsesFraming, error_json
from ._responses_writing import MAX_NAME, Writer

if TYPE_CHECKING:
    from starlette.requests import Request

    from ..http.starlette import ASGIResponse

__all__ = ["OpenAIResponses", "ResponseRequest"]

_PATH: Final = re.compile(r"(?P<base>(?:/(?!responses/)[^/]*)*)/responses(?:/(?P<id>[^/]+)(?P<cancel>/cancel)?)?/?")
_ECHOED: Final = ("model", "background", "metadata", "previous_response_id")
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "model": (str,),
    "input": (str, list),
    "stream": (bool,),
    "background": (bool,),
    "metadata": (dict,),
    "previous_response_id": (str,),
}


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """What a client asks for.

    Attributes:
        id: the Response's id, which is its stream's.
        body: the request's body, as the client has sent it: `input`, `instructions`, `tools`, … Only `model`, `input`, `stream`,
            `background`, `metadata` and `previous_response_id` have been checked, to be of their types where they are given.
        owner: who asks; empty if nobody in particular.
    """

    id: str
    body: Mapping[str, Any]
    owner: str


@dataclass(frozen=True, slots=True)
class _Call:
    """A request, and who makes it, if the endpoint says so."""

    scope: Scope
    receive: Receive
    send: Send
    route: str
    owner: object
    context: Mapping[str, Any]


class OpenAIResponses:
    """Answers OpenAI's SDKs as its Responses API does: they stream, are cut, go on with `starting_after`, look at, and cancel any answer.

        app.mount("/v1", OpenAIResponses(streams_http, answer))

    As an ASGI app, mounted where a client's `base_url` is; or by `respond` on a route of the app's own:

        POST   /responses               start one, with `stream`, `background`, both or neither; one `Idempotency-Key` starts one
        GET    /responses/{id}          the Response so far; with `?stream=true` its events, behind `starting_after` if that is given
        POST   /responses/{id}/cancel   stop it, and give it
        DELETE /responses/{id}          forget it

    A Response is a stream, and an event's `sequence_number` its offset. It runs on without its client, whatever it was asked for by.
    What goes wrong is answered in OpenAI's shape. Who may do what, the `authorize` of the `StreamsHTTP` says, or the `owner` of `respond`;
    what is somebody else's is a 404, as what is not there.

    Args:
        streams_http: what runs the producers; it has to be entered.
        produce: gives the chunks of a Response: a function as `StreamsHTTP.respond` takes one, but called with the `ResponseRequest`.
            A string is text. Anything else is an event of OpenAI's, as its SDKs or other servers give them: a mapping, or a Pydantic
            model. It is passed on under our id and number, and the last one ends the Response. Without one a Response is completed when
            there are no more chunks; but it has failed if its events said how it went on, and not how it ended. Of another server's
            Response, clients see what came of it, and not what it was asked. A list of chunks, and a whole Response, are taken too.
    """

    def __init__(self, streams_http: StreamsHTTP, produce: Callable[[ResponseRequest], object]) -> None:
        self._http = streams_http
        self._produce = produce
        self._responses = Responses(streams_http.streams)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection (ASGI)."""
        match scope["type"]:
            case "http":
                await self._answer(scope, receive, send, None, {})
            case "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})  # before it is accepted: servers answer 403
            case _:
                raise RuntimeError("OpenAIResponses takes HTTP only; give the lifespan of its StreamsHTTP to the outermost app")

    def respond(self, request: "Request", *, owner: object = None, context: Mapping[str, Any] | None = None) -> "ASGIResponse":
        """Give the Starlette or FastAPI response to a request on a route of the app's own.

            @app.api_route("/v1/responses{rest:path}", methods=["GET", "POST", "DELETE"])
            async def responses(request: Request, user: CurrentUser):
                return openai_responses.respond(request, owner=user.id)

        Args:
            request: the request; its path tells what it is about.
            owner: who is asking, as text; unless given, who `authorize` says.
            context: what `authorize` gets.
        """
        from ..http.starlette import ASGIResponse, rest_of  # only who has Starlette asks for one

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await self._answer(scope, rest_of(request, receive), send, owner, context or {})

        return ASGIResponse(answer)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, owner: object, context: Mapping[str, Any]) -> None:
        send = discreet(scope, send)
        async with errors_answered(send, error_json):
            root, path = _path_of(scope)
            call = _Call(scope, receive, send, f"{root}{path['base']}/responses", owner, context)
            match scope["method"], path["id"], path["cancel"]:
                case "POST", None, None:
                    await self._create(call)
                case "GET", str(stream), None:
                    await self._retrieve(call, stream)
                case "POST", str(stream), str():
                    info = await self._admit(call, "stop", stream)
                    await self._http.streams.cancel(info.id, life=info.life)
                    await self._send_snapshot(call, info.id)
                case "DELETE", str(stream), None:
                    info = await self._admit(call, "stop", stream)
                    await self._http.streams.delete(info.id, life=info.life)
                    await send_response(send, 200, encode_json({"id": info.id, "object": "response", "deleted": True}))
                case _:
                    allowed = "POST" if path["id"] is None or path["cancel"] else "GET, DELETE"
                    refusal = error_json(ErrorInfo("INVALID_ARGUMENT", f"{scope['method']} is not answered here; {allowed} is"))
                    await send_response(send, 405, refusal, [("allow", allowed)])

    async def _create(self, call: _Call) -> None:
        body = await self._http.read_body(call.scope, call.receive)
        if body is None:
            return
        fields = _parsed(body)
        stream = f"resp_{uuid.uuid4().hex}"
        response = new_response(stream, **_echoed(fields))

        async def produce(stream_input: StreamInput, stop: anyio.Event) -> Json:
            request = ResponseRequest(stream, fields, stream_input.metadata.get("owner", ""))
            return await _write(stream_input, stop, partial(self._produce, request), Writer(response))

        kept = _kept({"route": call.route, ANSWER: ENDPOINTS_OWN}, response)
        try:
            await self._http.launch(call.scope, stream, produce, call.context, kept, owner=call.owner)
        except KeyInUseError as error:
            stream = error.stream
        if fields.get("stream"):
            await self._show(call, stream, START)
            return
        is_waited_for = not fields.get("background")
        if (is_waited_for or SAID not in kept) and not await self._waited(call, stream, whole=is_waited_for):
            return
        await self._send_snapshot(call, stream)

    async def _waited(self, call: _Call, stream: str, *, whole: bool) -> bool:
        """Return when a response has ended, or unless it is waited for as a `whole`, has begun; False: its client has gone."""
        failure: Exception | None = None
        is_over = False
        async with anyio.create_task_group() as waiting:
            waiting.start_soon(_cancel_when_gone, call.receive, waiting.cancel_scope)
            try:
                async with self._http.streams.subscribe(stream, last=0 if whole else None) as events:
                    while await events.batch() and whole:
                        pass
                is_over = True
            except Exception as error:  # raised in here, it would come out in a group
                failure = error
            waiting.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return is_over

    async def _retrieve(self, call: _Call, stream: str) -> None:
        info, query = await self._admit(call, "read", stream), query_of(call.scope)
        if (streams := query.get("stream", "false").lower()) not in {"true", "false"}:
            raise InvalidArgumentError("`stream` is true or false")
        if streams == "false":
            await send_response(call.send, 200, await self._responses.as_it_is(info))
            return
        after = parse_offset(query.get("starting_after"))
        if after is not None and after >= info.tail:
            raise OffsetOutOfRangeError(f"`starting_after` is beyond the response's last event, {info.tail - 1}")
        await self._show(call, stream, in_life(Place(after), info))

    async def _show(self, call: _Call, stream: str, place: Place) -> None:
        framing = ResponsesFraming(stream)

        async def before_error() -> None:
            framing.before = await self._responses.before_its_end(stream)

        await self._http.show(
            call.scope,
            call.receive,
            call.send,
            stream,
            place,
            framing=framing,
            headers=(),
            before_error=before_error,
        )

    async def _send_snapshot(self, call: _Call, stream: str) -> None:
        await send_response(call.send, 200, await self._responses.as_it_is(await self._http.streams.info(stream)))

    async def _admit(self, call: _Call, action: Action, stream: str) -> StreamInfo:
        # A token that stops shows and deletes nothing, and a stop here is answered with the response.
        takes_tokens = action == "read"
        return await self._http.admit(
            action, call.scope, stream, call.route, call.context, call.owner, takes_tokens=takes_tokens
        )


async def _write(stream: StreamInput, stop: anyio.Event, source: Source, writer: Writer) -> Json:
    storing = ChunkWriter(stream)
    await storing.write(writer.begin())
    try:
        made = await producer_of(source, expand=writer.expand)(stream, stop)
        chunks = made if isinstance(made, list | tuple) else () if made is None else (made,)
        for event in chain(chain.from_iterable(map(writer.expand, chunks)), writer.end()):
            await storing.write(event)
    except Exception as error:
        if _is_upstream_limit(error):
            info = shown_info(error)
            is_hidden = info == hidden_error("RESOURCE_EXHAUSTED", "")
            raise limited("the model's server is asked too much" if is_hidden else info.message) from error
        raise
    return writer.response


def _path_of(scope: Scope) -> tuple[str, re.Match[str]]:
    """Give what is left out of a request's path, and what it says without that. StreamNotFoundError: it is none of ours."""
    full: str = scope["path"]
    below = path_below(scope)
    if (path := _PATH.fullmatch(below)) is not None:
        return full.removesuffix(below), path
    if (path := _PATH.fullmatch(full)) is not None:  # where it is mounted says `responses` already
        return "", path
    raise StreamNotFoundError("of OpenAI's API, only /responses, /responses/{id} and /responses/{id}/cancel are here")


def _kept(kept: Mapping[str, str], response: Json) -> Mapping[str, str]:
    """Give what is kept with a stream; and with it what its client has said, if there is room."""
    said = encode_json({name: response[name] for name in ("created_at", *_ECHOED)}).decode()
    room = MAX_METADATA - sum(len(text) for item in kept.items() for text in item) - len(SAID)
    return {**kept, SAID: said} if len(said) <= room else kept


def _is_upstream_limit(error: Exception) -> bool:
    """Say whether it is a limit of a model's server: as a producer says so, or as OpenAI's SDK does. Those of a stream are ours."""
    if isinstance(error, LimitExceededError | StorageError):
        return False
    return getattr(error, "status", None) == "RESOURCE_EXHAUSTED" or getattr(error, "status_code", None) == 429


def _parsed(body: bytes) -> Json:
    """Give a request's body. InvalidArgumentError: it is no object, or what means something here is not of its type."""
    fields = parse_object(body)
    for name, types in _TYPES.items():
        if (value := fields.get(name)) is not None and not isinstance(value, types):
            raise InvalidArgumentError(f"`{name}` is not of its type")
    for name in ("model", "previous_response_id"):
        if isinstance(text := fields.get(name), str) and len(text) > MAX_NAME:
            raise InvalidArgumentError(f"`{name}` has more than {MAX_NAME} characters")
    metadata: Any = fields.get("metadata") or {}
    if len(metadata) > 16 or not all(
        isinstance(value, str) and len(name) <= 64 and len(value) <= 512 for name, value in metadata.items()
    ):
        raise InvalidArgumentError("`metadata` are up to 16 strings of up to 512 characters, under names of up to 64")
    return fields


def _echoed(fields: Json) -> Json:
    return {name: fields[name] for name in _ECHOED if fields.get(name) is not None}


async def _cancel_when_gone(receive: Receive, waiting: anyio.CancelScope) -> None:
    await disconnected(receive)
    waiting.cancel()
