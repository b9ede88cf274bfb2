"""Genkit flows as the work of a durable stream. Of Genkit it uses only `Action.run`, which its releases have left alone."""

import asyncio
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import anyio
from genkit.plugin_api import Action, is_dev_environment
from pydantic import BaseModel

from ..errors import InvalidArgumentError, PublicError, StreamkeepError
from ..events import error_info
from ..http.app import Work
from ..http.sources import Setting
from ..wire import GenkitRequest


class FlowWork:
    """One flow, run for one request. In Genkit's development mode (`GENKIT_ENV=dev`) clients are shown errors in full."""

    def __init__(self, flow: Action[Any, Any, Any, Any]) -> None:
        self._flow = flow

    def check(self, request: GenkitRequest) -> None:
        """See `Work.check`: an `init` for a flow that takes none is refused, as in Genkit for Go."""
        if request.has_init and "initSchema" not in self._flow.metadata:
            raise InvalidArgumentError(f"the action {self._flow.name} takes no init")

    async def run(
        self, request: GenkitRequest, context: Mapping[str, Any], send_chunk: Callable[[object], object], stop: anyio.Event
    ) -> object:
        """See `Work.run`."""

        def on_chunk(chunk: object) -> None:
            send_chunk(plain(chunk))

        abort_signal = asyncio.Event()
        forwarding = asyncio.create_task(_forward(stop, abort_signal))
        try:
            response = await self._flow.run(
                request.data,
                on_chunk=on_chunk,
                context=dict(context),
                abort_signal=abort_signal,
                init=request.init,
            )
        except Exception as error:
            raised = _raised(error)
            if is_dev_environment():
                raise _in_full(raised) from error
            if raised is error:
                raise  # `from` itself would hide what it comes from
            raise raised from error
        finally:
            forwarding.cancel()
        return plain(response.response)


def plain(value: object) -> object:
    """Give a pydantic model in the form in which Genkit sends it: by alias, without what is None."""
    return value.model_dump(mode="json", by_alias=True, exclude_none=True) if isinstance(value, BaseModel) else value


async def _forward(stop: anyio.Event, abort_signal: asyncio.Event) -> None:
    await stop.wait()
    abort_signal.set()


def _raised(error: Exception) -> Exception:
    """Give what the flow raised. Genkit wraps it in an INTERNAL of its own, unless it is Genkit's; ours may be public."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, StreamkeepError) else error


def _in_full(error: Exception) -> PublicError:
    stack = "".join(traceback.format_exception(error))
    return PublicError(error_info(error).status, str(error), {"stack": stack})


class WorkIn:
    """Work that runs in a setting of an app's."""

    def __init__(self, work: Work, setting: Setting) -> None:
        self.check = work.check
        self._work = work
        self._setting = setting

    async def run(
        self, request: GenkitRequest, context: Mapping[str, Any], send_chunk: Callable[[object], object], stop: anyio.Event
    ) -> object:
        """See `Work.run`."""
        async with self._setting.in_task():
            return await self._work.run(request, context, send_chunk, stop)
