"""`durable_flow`: a Genkit flow as a FastAPI router, with stream ids, resume and stop."""

from collections.abc import Callable
from typing import Annotated, Any

from .._extras import needed_by

with needed_by(__name__, "genkit"):
    from fastapi import APIRouter, Depends, Request, Response
    from genkit.plugin_api import Action

from .._manager import StreamManager
from ..http.app import Call, Provide, StreamsHTTP
from ..http.response import Receive, Scope, Send
from ..http.starlette import OURS, ASGIResponse, rest_of
from . import _openapi
from .genkit import ContextProviders, calls_of, provider_of, work_of

__all__ = ["durable_flow"]


def durable_flow(
    flow: Action[Any, Any, Any, Any],
    streams: StreamManager | StreamsHTTP | str,
    *,
    path: str | None = None,
    context: Callable[..., Any] | None = None,
    context_provider: ContextProviders | None = None,
) -> APIRouter:
    """Give a router that serves a Genkit flow, or an agent, durably: `app.include_router(durable_flow(my_flow, streams))`.

        POST   {path}   Genkit's exchange; with `X-Genkit-Stream-Id` it resumes that stream, from the start or after the
                        offset in `X-Genkit-Stream-Offset`, and never runs the flow
        DELETE {path}   with `X-Genkit-Stream-Id`: stop that stream's flow

    An agent that has a store also has, as Genkit's `serve_agent` serves them:

        POST {path}/getSnapshot   a session's state, by `{"snapshotId": …}` or `{"sessionId": …}`
        POST {path}/abort         end a detached turn, by `{"snapshotId": …}`

    The router's lifespan starts and stops what it needs, the manager included unless that is running. A run outlives its
    request; stopping it sets the flow's abort signal, and cancels it a second later. A detached turn of an agent is a stream as
    well: its id is the snapshot's.

    Args:
        flow: the flow, the agent, or any other Genkit action.
        streams: a manager, or its URL; or a `StreamsHTTP` over it, to say who is authorized, or how long things may take.
        path: `/<flow's name>` unless given.
        context: a FastAPI dependency whose value becomes the action's context, for every request: a resume, a stop and an agent's other
            calls as well. It rejects by raising (HTTPException, say).
        context_provider: one of Genkit's, or several, which are asked in order; plain or async. What they give is added to the context.
            They are asked for every request too, and reject by raising Genkit's `PublicError`. Where a stream is resumed or stopped, the
            `input` is what the client sends, which mostly is none.
    """
    streams_http = streams if isinstance(streams, StreamsHTTP) else StreamsHTTP(streams)
    owned = streams_http is not streams
    router = APIRouter(tags=[flow.name], lifespan=streams_http.lifespan if owned else None)
    work = work_of(flow)
    route = f"/{flow.name}" if path is None else path
    dependency = context or _no_context

    def provide(request: Request) -> Provide | None:
        return provider_of(context_provider, request, request.scope)

    @router.post(route, name=flow.name, status_code=200, response_class=ASGIResponse, openapi_extra=_openapi.running(flow))
    async def run(request: Request, response: Response, action_context: Annotated[Any, Depends(dependency)]) -> Response:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await streams_http.post(scope, rest_of(request, receive), send, work, action_context or {}, provide(request))

        return _with_headers_of(response, ASGIResponse(answer))

    @router.delete(
        route, name=f"stop {flow.name}", status_code=200, response_class=ASGIResponse, openapi_extra=_openapi.stopping()
    )
    async def stop(request: Request, response: Response, action_context: Annotated[Any, Depends(dependency)]) -> Response:
        async def answer(scope: Scope, _receive: Receive, send: Send) -> None:
            await streams_http.stop(scope, send, action_context or {}, provide(request))

        return _with_headers_of(response, ASGIResponse(answer))

    for name, call in calls_of(flow).items():
        _add_call(router, f"{route}/{name}", f"{name} of {flow.name}", streams_http, call, dependency, provide)
    return router


def _add_call(
    router: APIRouter,
    route: str,
    name: str,
    streams_http: StreamsHTTP,
    call: Call,
    dependency: Callable[..., Any],
    provide: Callable[[Request], Provide | None],
) -> None:
    @router.post(route, name=name, status_code=200, response_class=ASGIResponse, openapi_extra=_openapi.calling())
    async def answer_call(
        request: Request, response: Response, action_context: Annotated[Any, Depends(dependency)]
    ) -> Response:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await streams_http.call(scope, rest_of(request, receive), send, call, action_context or {}, provide(request))

        return _with_headers_of(response, ASGIResponse(answer))


def _with_headers_of(dependencies: Response, answer: ASGIResponse) -> ASGIResponse:
    """Give an answer the headers and cookies that dependencies have set: FastAPI drops them where an endpoint gives a response."""
    answer.raw_headers += [header for header in dependencies.raw_headers if header[0] not in OURS]
    return answer


def _no_context(_request: Request) -> dict[str, Any]:
    return {}
