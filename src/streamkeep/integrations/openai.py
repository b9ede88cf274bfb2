"""`OpenAIResponses`: OpenAI's Responses API around any producer, for OpenAI's SDKs as they come. It needs none of them."""

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from .._input import StreamInput
from .._listing import StreamInfo
from ..errors import InvalidArgumentError, KeyInUseError, OffsetOutOfRangeError, StreamNotFoundError
from ..events import encode_json
from ..http.access import Action
from ..http.app import StreamsHTTP
from ..http.framing import parse_offset
from ..http.kept import ANSWER, ENDPOINTS_OWN
from ..http.place import query_of
from ..http.response import Receive, Scope, Send, disconnected, errors_answered, send_response
from ..http.sources import Source, producer_of
from ..http.wire import parse_object
from ._responses import Answer, Json, ResponsesFraming, Writer, error_json, new_response

if TYPE_CHECKING:
    from starlette.requests import Request

    from ..http.starlette import ASGIResponse

_PATH: Final = re.compile(r"(?P<base>.*?)/responses(?:/(?P<id>[^/]+)(?P<cancel>/cancel)?)?/?", re.DOTALL)
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
            there are no more chunks; but it has failed if its events said how it went on, and not how it ended.
    """

    def __init__(self, streams_http: StreamsHTTP, produce: Callable[[ResponseRequest], object]) -> None:
        self._http = streams_http
        self._produce = produce

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
        async with errors_answered(send, error_json):
            path = _PATH.fullmatch(scope["path"])
            if path is None:
                raise StreamNotFoundError("there is nothing here but /responses: this is OpenAI's Responses API alone")
            call = _Call(scope, receive, send, f"{path['base']}/responses", owner, context)
            match scope["method"], path["id"], path["cancel"]:
                case "POST", None, None:
                    await self._create(call)
                case "GET", str(stream), None:
                    await self._retrieve(call, stream)
                case "POST", str(stream), str():
                    info = await self._admit(call, "stop", stream)
                    await self._http.streams.cancel(info.id)
                    await self._send_snapshot(call, info.id, new_response(info.id))
                case "DELETE", str(stream), None:
                    info = await self._admit(call, "stop", stream)
                    await self._http.streams.delete(info.id)
                    await send_response(send, 200, encode_json({"id": info.id, "object": "response", "deleted": True}))
                case _:
                    allowed = "POST" if path["id"] is None or path["cancel"] else "GET, DELETE"
                    await send_response(send, 405, headers=[("allow", allowed)])

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

        kept = {"route": call.route, ANSWER: ENDPOINTS_OWN}
        try:
            await self._http.launch(call.scope, stream, produce, call.context, kept, owner=call.owner)
        except KeyInUseError as error:
            stream = error.stream
            response = new_response(stream, **_echoed(fields))
        if fields.get("stream"):
            await self._show(call, stream, response, None)
        elif fields.get("background"):
            await self._send_snapshot(call, stream, response)
        else:
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(_cancel_when_gone, call.receive, waiting.cancel_scope)
                await self._send_snapshot(call, stream, response, follow=True)
                waiting.cancel_scope.cancel()

    async def _retrieve(self, call: _Call, stream: str) -> None:
        info, query = await self._admit(call, "read", stream), query_of(call.scope)
        if (streams := query.get("stream", "false").lower()) not in {"true", "false"}:
            raise InvalidArgumentError("`stream` is true or false")
        response = new_response(stream, created_at=int(info.created_at))
        if streams == "false":
            await self._send_snapshot(call, stream, response)
            return
        after = parse_offset(query.get("starting_after"))
        if after is not None and after >= info.tail:
            raise OffsetOutOfRangeError(f"`starting_after` is beyond the response's last event, {info.tail - 1}")
        await self._show(call, stream, response, after)

    async def _show(self, call: _Call, stream: str, response: Json, after: int | None) -> None:
        framing = ResponsesFraming(response, after)
        await self._http.show(call.scope, call.receive, call.send, stream, framing=framing, headers=())

    async def _send_snapshot(self, call: _Call, stream: str, response: Json, *, follow: bool = False) -> None:
        answer = Answer(response)
        async with self._http.streams.subscribe(stream, follow=follow) as events:
            async for event in events:
                answer.see(event)
        await send_response(call.send, 200, encode_json(answer.response))

    async def _admit(self, call: _Call, action: Action, stream: str) -> StreamInfo:
        return await self._http.admit(action, call.scope, stream, call.route, call.context, call.owner)


async def _write(stream: StreamInput, stop: anyio.Event, source: Source, writer: Writer) -> Json:
    await stream.write(writer.begin())
    made = await producer_of(source, expand=writer.expand)(stream, stop)
    for event in () if made is None else writer.expand(made):
        await stream.write(event)
    for event in writer.end():
        await stream.write(event)
    return writer.response


def _parsed(body: bytes) -> Json:
    """Give a request's body. InvalidArgumentError: it is no object, or what means something here is not of its type."""
    fields = parse_object(body)
    for name, types in _TYPES.items():
        if (value := fields.get(name)) is not None and not isinstance(value, types):
            raise InvalidArgumentError(f"`{name}` is not of its type")
    metadata: Any = fields.get("metadata") or {}
    if len(metadata) > 16 or not all(
        isinstance(value, str) and len(name) <= 64 and len(value) <= 512 for name, value in metadata.items()
    ):
        raise InvalidArgumentError("`metadata` are up to 16 strings of up to 512 characters, under names of up to 64")
    return fields


def _echoed(fields: Json) -> Json:
    names = ("model", "background", "metadata", "previous_response_id")
    return {name: fields[name] for name in names if fields.get(name) is not None}


async def _cancel_when_gone(receive: Receive, waiting: anyio.CancelScope) -> None:
    await disconnected(receive)
    waiting.cancel()
