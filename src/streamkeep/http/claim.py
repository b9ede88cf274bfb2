"""Claim: of all requests that are sent with one `Idempotency-Key` one is in the app at a time, across processes.

It is a small stream of its own, opened under a run of its own, and open while that request is in the app. Who finds it there waits for its
end, which comes also when its writer's process is dead, for then its readers end it. It never decides what is answered.
"""

import logging
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final, TypeVar

import anyio

from .._info import StreamInfo
from .._input import StreamInput
from .._manager import StreamManager
from ..errors import KeyInUseError, StorageError, StreamkeepError, StreamNotFoundError
from ..events import ErrorInfo
from .kept import ANSWER, ENDPOINTS_OWN
from .logged import OneLine
from .place import run_of
from .response import Scope

T = TypeVar("T")

logger: Final = logging.getLogger("streamkeep")

STORAGE_SECONDS: Final = 5.0
"""How long the storage may take for each thing that it is asked here. After that the app is called without a claim."""
HELD: Final = "streamkeep.claim"
"""In a request's scope: it has a claim, so that who wraps an app twice does not wait for himself."""
OVER: Final = ErrorInfo("CANCELLED", "the request is not waited for any more")


class Claim:
    """The claim of one request; to be ended, whatever becomes of the request.

    Args:
        streams: where it is opened.
        scope: the request.
        owner: who is asking, as `authorize` says; None: there is nothing to be claimed.
    """

    def __init__(self, streams: StreamManager, scope: Scope, owner: str | None) -> None:
        self._streams = streams
        self._scope = scope
        self._owner = owner or ""
        self._run = None if owner is None or HELD in scope else run_of(scope, owner)
        self._held: StreamInput | None = None

    async def take(self, client_gone: Callable[[], Awaitable[None]]) -> str | None:
        """Return None when the app is to be called; or give the stream that this very request has started when it was sent before.

        It waits as long as a request like this is in the app. BrokenPipeError: `client_gone` has returned meanwhile. Where the storage
        fails, or is slow, the app is called without a claim.
        """
        if self._run is None:
            return None
        try:
            while (started := await _in_time(self._started(self._run))) is None and self._held is None:
                if (other := await _in_time(self._open(self._run))) is not None:
                    await self._wait(other, client_gone)
        except StreamkeepError as error:
            logger.warning(
                "POST %s: whether it was sent before cannot be told, and it may run twice: %s",
                OneLine(self._scope["path"]),
                error,
            )
            return None
        return None if started is None or is_endpoints_own(started) else started.id

    def end(self) -> None:
        """Let the next one go on. It is stored in the background; does nothing if there is no claim any more."""
        if self._held is not None:
            self._held.end_soon(OVER)
            self._scope.pop(HELD, None)

    async def _started(self, run: str) -> StreamInfo | None:
        try:
            return await self._streams.started_by(run, self._owner)
        except StreamNotFoundError:
            return None

    async def _open(self, run: str) -> str | None:
        """Take the claim, or give the id of the one that is in the way."""
        try:
            # Without an owner, so that nobody finds it in a list of their own.
            self._held = await self._streams.open(str(uuid.uuid4()), run=f"claim-{run}", ttl=timedelta(0))
        except KeyInUseError as error:
            return error.stream
        self._scope[HELD] = True
        return None

    async def _wait(self, claim: str, client_gone: Callable[[], Awaitable[None]]) -> None:
        is_gone = False
        failure: StreamkeepError | None = None
        async with anyio.create_task_group() as waiting:

            async def leave() -> None:
                nonlocal is_gone
                await client_gone()
                is_gone = True
                waiting.cancel_scope.cancel()

            waiting.start_soon(leave)
            try:
                await self._end_of(claim)
            except StreamkeepError as error:  # raised here, it would arrive in a group
                failure = error
            waiting.cancel_scope.cancel()
        if is_gone:
            raise BrokenPipeError("the client has gone")
        if failure is not None:
            raise failure

    async def _end_of(self, claim: str) -> None:
        try:
            async with self._streams.subscribe(claim) as events:
                async for _ in events:
                    pass
        except StreamNotFoundError:
            pass  # it has ended, and is gone already


def is_endpoints_own(info: StreamInfo) -> bool:
    """Say whether the app has made a stream durable itself, by `respond` or `durable_flow`, and so sees to it itself."""
    return info.metadata.get(ANSWER) == ENDPOINTS_OWN


async def _in_time(asked: Awaitable[T]) -> T:
    with anyio.move_on_after(STORAGE_SECONDS):
        return await asked
    raise StorageError(f"the storage took more than {STORAGE_SECONDS:g} seconds")
