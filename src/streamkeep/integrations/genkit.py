"""Genkit's flows and agents as the work of a durable stream.

Of Genkit this uses `Action.run`, which its releases have left alone; what agents need beside it is in `_genkit_agents`.
"""

import asyncio
import inspect
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import anyio

from .._extras import needed_by

with needed_by(__name__, "genkit"):
    from genkit.plugin_api import Action, RequestData, is_dev_environment
    from pydantic import BaseModel

from .._input import StreamInput
from ..errors import InvalidArgumentError, PublicError, StreamkeepError
from ..events import error_info
from ..http.app import Admits, Call, Detached, Output, Provide, Work
from ..http.response import Scope, headers_of
from ..http.sources import Setting
from ..wire import GenkitRequest

TRACE_ID: Final = "x-genkit-trace-id"
LEAVE_SECONDS: Final = 5.0
"""How long leaving a setting may take."""
AGENT: Final = "agent"
SPAN_ID: Final = "x-genkit-span-id"

ContextProvider = Callable[[Any], "Mapping[str, Any] | Awaitable[Mapping[str, Any]]"]
"""What Genkit calls so: gives more of the action's context, by a `RequestData` with `method`, `headers` and `input`."""
ContextProviders = ContextProvider | Sequence[ContextProvider]


class Answered(Protocol):
    """What is used of Genkit's `ActionResponse`."""

    response: Any
    trace_id: str
    span_id: str


class FlowWork:
    """One flow, run for one request. In Genkit's development mode (`GENKIT_ENV=dev`) clients are shown errors in full."""

    def __init__(self, flow: Action[Any, Any, Any, Any]) -> None:
        self._flow = flow

    def check(self, request: GenkitRequest) -> None:
        """See `Work.check`: an `init` for a flow that takes none is refused, as in Genkit for Go."""
        if request.has_init and "initSchema" not in self._flow.metadata:
            raise InvalidArgumentError(f"the action {self._flow.name} takes no init")

    def detaches(self, request: GenkitRequest) -> bool:  # noqa: ARG002 - agents do
        """See `Work.detaches`."""
        return False

    async def detach(self, request: GenkitRequest, context: Mapping[str, Any], admits: Admits) -> Detached | Output:
        """See `Work.detach`."""
        raise NotImplementedError

    async def run(
        self,
        request: GenkitRequest,
        context: Mapping[str, Any],
        admits: Admits,  # noqa: ARG002 - agents ask it
        send_chunk: Callable[[object], object],
        stop: anyio.Event,
    ) -> Output:
        """See `Work.run`."""

        def on_chunk(chunk: object) -> None:
            send_chunk(plain(chunk))

        abort_signal = asyncio.Event()
        forwarding = asyncio.create_task(forward(stop, abort_signal))
        try:
            response = await run_action(self._flow, request, context, on_chunk=on_chunk, abort_signal=abort_signal)
        finally:
            forwarding.cancel()
        return output_of(response)


async def run_action(
    action: Action[Any, Any, Any, Any],
    request: GenkitRequest,
    context: Mapping[str, Any],
    *,
    on_chunk: Callable[[Any], None] | None = None,
    abort_signal: asyncio.Event | None = None,
) -> Answered:
    """Run an action, and raise what it has raised; in development mode in full."""
    try:
        return await action.run(
            request.data, on_chunk=on_chunk, context=dict(context), abort_signal=abort_signal, init=request.init
        )
    except Exception as error:
        raised = told(_raised(error))
        if raised is error:
            raise  # `from` itself would hide what it comes from
        raise raised from error


def told(raised: Exception) -> Exception:
    """Give what is raised to clients for what an action has raised; in development mode that says all of it."""
    if not is_dev_environment():
        return raised
    stack = "".join(traceback.format_exception(raised))
    return PublicError(error_info(raised).status, str(raised), {"stack": stack})


def output_of(response: Answered) -> Output:
    """Give an action's output, and the headers by which Genkit's servers name its trace where they do not stream."""
    return Output(plain(response.response), trace_of(response))


def trace_of(response: Answered) -> list[tuple[str, str]]:
    """Give the headers that name an action's trace; none where nothing is traced."""
    ids = ((TRACE_ID, response.trace_id), (SPAN_ID, response.span_id))
    return [(name, text) for name, text in ids if text.strip("0")]


def plain(value: object) -> object:
    """Give a pydantic model in the form in which Genkit sends it: by alias, without what is None."""
    return value.model_dump(mode="json", by_alias=True, exclude_none=True) if isinstance(value, BaseModel) else value


async def forward(stop: anyio.Event, abort_signal: asyncio.Event) -> None:
    """Set the one when the other is set."""
    await stop.wait()
    abort_signal.set()


def _raised(error: Exception) -> Exception:
    """Give what the flow raised. Genkit wraps it in an INTERNAL of its own, unless it is Genkit's; ours may be public."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, StreamkeepError) else error


# Agents


def work_of(flow: Action[Any, Any, Any, Any]) -> Work:
    """Give the work that a flow is, or an agent."""
    if flow.kind != AGENT:
        return FlowWork(flow)
    from ._genkit_agents import AgentWork, is_agent  # which imports what is experimental in Genkit

    return AgentWork(flow) if is_agent(flow) else FlowWork(flow)


def calls_of(flow: Action[Any, Any, Any, Any]) -> Mapping[str, Call]:
    """Give what an agent with a store answers beside its turns, by its name."""
    if flow.kind != AGENT:
        return {}
    from ._genkit_agents import AbortCall, SnapshotCall, is_agent  # as above

    return {"getSnapshot": SnapshotCall(flow), "abort": AbortCall(flow)} if is_agent(flow) and flow.store is not None else {}


# Context providers


class ProvidedRequest(RequestData[Any]):
    """What a context provider is given, as Genkit's servers give it.

    Attributes:
        request: the framework's own.
        method: such as POST; DELETE where a stream is to be stopped.
        headers: names in lower case, repeated ones as one list.
        input: what is under "data" in the body; None if there is none, as where a stream is resumed or stopped.
    """

    def __init__(self, request: object, method: str, headers: Mapping[str, str], data: object) -> None:
        super().__init__(request=request)
        self.method = method
        self.headers = dict(headers)
        self.input = data


Ask = Callable[[ContextProvider, ProvidedRequest], Awaitable[object]]
"""Calls a context provider, and gives what it gives."""


def provider_of(providers: ContextProviders | None, request: object, scope: Scope, ask: Ask | None = None) -> Provide | None:
    """Give what asks context providers, one after the other, about a request; what a later one gives counts before an earlier one's."""
    if providers is None:
        return None
    each = [providers] if callable(providers) else [*providers]

    async def provide(data: object) -> Mapping[str, Any]:
        provided: dict[str, Any] = {}
        for provider in each:
            about = ProvidedRequest(request, scope["method"], headers_of(scope), data)
            given = await (ask or _asked)(provider, about)
            if isinstance(given, Mapping):  # anything else is no context, as Genkit has it
                provided.update(given)
        return provided

    return provide


async def _asked(provider: ContextProvider, about: ProvidedRequest) -> object:
    given = provider(about)
    return await given if inspect.isawaitable(given) else given


# Settings


class WorkIn:
    """Work that runs in a setting of an app's."""

    def __init__(self, work: Work, setting: Setting) -> None:
        self.check = work.check
        self.detaches = work.detaches
        self._work = work
        self._setting = setting

    async def run(
        self,
        request: GenkitRequest,
        context: Mapping[str, Any],
        admits: Admits,
        send_chunk: Callable[[object], object],
        stop: anyio.Event,
    ) -> Output:
        """See `Work.run`."""
        async with self._setting.in_task():
            return await self._work.run(request, context, admits, send_chunk, stop)

    async def detach(self, request: GenkitRequest, context: Mapping[str, Any], admits: Admits) -> Detached | Output:
        """See `Work.detach`. The setting is left, by the task that has entered it, when what was detached is over."""
        begun, over = asyncio.get_running_loop().create_future(), anyio.Event()

        async def within() -> None:
            async with self._setting.in_task():
                detached = await self._work.detach(request, context, admits)
                begun.set_result(detached)
                try:
                    await over.wait()
                except asyncio.CancelledError:  # nobody has it
                    if isinstance(detached, Detached):
                        await detached.abandon()
                    raise

        task = asyncio.create_task(within())
        try:
            await asyncio.wait({begun, task}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task}, timeout=LEAVE_SECONDS)
            raise
        if not begun.done():
            await task  # which raises
        detached: Detached | Output = begun.result()

        async def leave() -> None:
            over.set()
            with anyio.move_on_after(LEAVE_SECONDS, shield=True):
                await task

        if isinstance(detached, Output):
            await leave()
            return detached
        inner = detached

        async def produce(stream: StreamInput, stop: anyio.Event) -> object:
            try:
                return await inner.produce(stream, stop)
            finally:
                await leave()

        async def abandon() -> None:
            try:
                await inner.abandon()
            finally:
                await leave()

        return replace(inner, produce=produce, abandon=abandon)
