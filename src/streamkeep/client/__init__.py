"""Streams of other servers: read to the end whatever becomes of connections, run flows, stop what runs. Extra: `streamkeep[client]`.

    from streamkeep.client import subscribe

    async with subscribe("https://example.com/streams/answer-42", after=last_seen) as events:
        async for event in events:
            print(event.offset, event.type, event.data)

`streamkeep.client.sync` is the same for code that does not await. Of what is raised, see `streamkeep.errors.RemoteError`.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .._durations import check_durations
from ..events import ReadAs, StreamEvent
from ..wire import ServerSentEvent
from ._calls import READ_TIMEOUT, body_of, events_dialect, flow_dialect, flow_output, output_of, stopped, subscribe_dialect
from ._handles import AwaitedHandle, EventsHandle, FlowHandle
from ._network import AsyncNetwork
from ._reading import Reading
from ._retry import Retry

if TYPE_CHECKING:
    import httpx2

__all__ = ["Events", "FlowRun", "Retry", "ServerSentEvent", "events", "run_flow", "stop", "stream_flow", "subscribe"]

E = TypeVar("E")
T = TypeVar("T")


def events(
    url: str,
    *,
    after: str | None = None,
    until: Callable[[ServerSentEvent], bool] | None = None,
    reconnects_at_end: bool = False,
    method: str = "GET",
    json: object = None,
    content: bytes | str | None = None,
    data: Mapping[str, str | Sequence[str]] | None = None,
    headers: Mapping[str, str] | None = None,
    client: "httpx2.AsyncClient | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> "Events[ServerSentEvent]":
    """Give the server-sent events of anybody's endpoint, with ids that `Last-Event-ID` goes on behind.

    Each event that has an id comes once. An event without one may be lost, or come again, with a connection. Where no id has come yet, a
    connection that is lost behind an event is a StreamLostError: to ask again would begin again.

    The end is a 204, the event that `until` says, or, without that, the clean end of an answer.

    Args:
        url: where they are.
        after: the id of the last event that was seen.
        until: says of an event whether it is the last one. Then any other end of an answer is a lost connection.
        reconnects_at_end: the clean end of an answer is a lost connection, as for the browser's `EventSource`.
        method: `GET`, or `POST`. A POST whose answer was lost before an id came is sent again only if it has an `Idempotency-Key`.
        json: what is sent as the body, as JSON.
        content: the body as it is; `headers` say of what type.
        data: the body as a form, `application/x-www-form-urlencoded`. One of these three.
        headers: more headers; no other server ever gets them.
        client: the client to use, with its headers, cookies, authentication, proxies and certificates; it is not closed. It needs as many
            connections as streams are read at a time. Unless given, one is opened.
        retry: when to come back, and when to give up.
        read_timeout: a connection that brings nothing for so long, not even a heartbeat, is lost. None: never.

    Raises InvalidArgumentError; when entered, and when read, RefusedError, UnexpectedAnswerError, StreamLostError.
    """
    dialect = events_dialect(
        url, after, until, method, body_of(json, content, data), headers, reconnects_at_end=reconnects_at_end
    )
    return Events(lambda: Reading(_over(client, read_timeout), dialect, retry or Retry()), dialect)


@overload
def subscribe(
    url: str,
    *,
    after: int | str | None = None,
    last: int | None = None,
    follow: bool = True,
    method: str = "GET",
    json: object = None,
    content: bytes | str | None = None,
    data: Mapping[str, str | Sequence[str]] | None = None,
    headers: Mapping[str, str] | None = None,
    client: "httpx2.AsyncClient | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> "Events[StreamEvent[Any]]": ...


@overload
def subscribe(
    url: str,
    *,
    after: int | str | None = None,
    last: int | None = None,
    follow: bool = True,
    chunk_type: ReadAs[T],
    output_type: ReadAs[Any] | None = None,
    method: str = "GET",
    json: object = None,
    content: bytes | str | None = None,
    data: Mapping[str, str | Sequence[str]] | None = None,
    headers: Mapping[str, str] | None = None,
    client: "httpx2.AsyncClient | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> "Events[StreamEvent[T]]": ...


def subscribe(
    url: str,
    *,
    after: int | str | None = None,
    last: int | None = None,
    follow: bool = True,
    chunk_type: ReadAs[Any] | None = None,
    output_type: ReadAs[Any] | None = None,
    method: str = "GET",
    json: object = None,
    content: bytes | str | None = None,
    data: Mapping[str, str | Sequence[str]] | None = None,
    headers: Mapping[str, str] | None = None,
    client: "httpx2.AsyncClient | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> "Events[StreamEvent[Any]]":
    """Give the events of a stream of streamkeep's, as `StreamManager.subscribe` does where the storage is.

    The URL is that of a stream under a mounted `StreamsHTTP`, or of an endpoint that returns `follow(…)`; or, with `method="POST"`, of one
    that returns `respond(…, framing=SSEFraming())`. Each event comes once and in order, with its offset; a gap is an UnexpectedAnswerError.
    The iteration ends behind DONE or ERROR; at once where nothing is left, or there is nothing to follow.

    Args:
        url: where it is. Its query may say `after`, `last` and `follow`, too, instead of the arguments.
        after: the offset, or the cursor, of the last event that was seen. A cursor never goes on in a later stream of the same id.
        last: only so many of those that are stored, and what comes; 0: from now on. Only of a mounted `StreamsHTTP`.
        follow: False: it ends behind what is stored. Only of a mounted `StreamsHTTP`.
        chunk_type: what `event.chunk` is decoded into.
        output_type: the same for `event.output`.
        method: as for `events`, and so is all below.
        json: what is sent as the body, as JSON.
        content: the body as it is.
        data: the body as a form.
        headers: more headers.
        client: the client to use.
        retry: when to come back, and when to give up.
        read_timeout: a connection that brings nothing for so long is lost.

    Raises as `events` does. There is no such stream: RefusedError with `status` NOT_FOUND.
    """
    dialect = subscribe_dialect(
        url, after, last, chunk_type, output_type, method, body_of(json, content, data), headers, follow=follow
    )
    return Events(lambda: Reading(_over(client, read_timeout), dialect, retry or Retry()), dialect)


@overload
def stream_flow(
    url: str,
    data: object = None,
    *,
    init: object = None,
    stream_id: str | None = None,
    seen: int = 0,
    output_type: ReadAs[Any] | None = None,
    headers: Mapping[str, str] | None = None,
    client: "httpx2.AsyncClient | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> "FlowRun[Any]": ...


@overload
def stream_flow(
    url: str,
    data: object = None,
    *,
    init: object = None,
    stream_id: str | None = None,
    seen: int = 0,
    chunk_type: ReadAs[T],
    output_type: ReadAs[Any] | None = None,
    headers: Mapping[str, str] | None = None,
    client: "httpx2.AsyncClient | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> "FlowRun[T]": ...


def stream_flow(
    url: str,
    data: object = None,
    *,
    init: object = None,
    stream_id: str | None = None,
    seen: int = 0,
    chunk_type: ReadAs[Any] | None = None,
    output_type: ReadAs[Any] | None = None,
    headers: Mapping[str, str] | None = None,
    client: "httpx2.AsyncClient | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> "FlowRun[Any]":
    """Run a Genkit flow, and give its chunks and its output; it is the `streamFlow` of Genkit's JavaScript client.

    The server is one of ours (`durable_flow`), or Genkit's own. If it names a stream, a lost connection is gone on with, behind what was
    seen. If not, it is a StreamLostError. The start is sent again where that cannot run the flow twice: while the server cannot be reached,
    or refuses for now; in any case if `headers` have an `Idempotency-Key`, which ours know.

    Args:
        url: the flow's.
        data: its input.
        init: what a session begins with.
        stream_id: go on with this run instead; the flow is not started, and `data` is not sent.
        seen: how many chunks of that run were had before, such as `StreamLostError.events` says; they do not come again.
        chunk_type: what chunks are decoded into.
        output_type: the same for the output.
        headers: as for `events`, and so is all below.
        client: the client to use.
        retry: when to come back, and when to give up.
        read_timeout: a connection that brings nothing for so long is lost. Genkit's own servers have no heartbeat: None for slow flows.

    Raises as `events` does. The flow has failed: RefusedError with its status.
    """
    flow = flow_dialect(url, data, init, stream_id, seen, chunk_type, headers)
    return FlowRun(lambda: Reading(_over(client, read_timeout), flow, retry or Retry(), seen), flow, output_type)


async def run_flow(
    url: str,
    data: object = None,
    *,
    init: object = None,
    output_type: ReadAs[Any] | None = None,
    headers: Mapping[str, str] | None = None,
    client: "httpx2.AsyncClient | None" = None,
    read_timeout: timedelta | None = None,
) -> Any:
    """Run a Genkit flow without a stream, once, and give its output; it is the `runFlow` of Genkit's JavaScript client.

    Arguments are those of `stream_flow`. RefusedError: the flow has failed, or was not run. StreamLostError: the connection was lost, and
    whether it has run is unknown.
    """
    return await flow_output(_over(client, read_timeout), url, data, init, output_type, headers)


async def stop(
    url: str,
    *,
    stream_id: str | None = None,
    method: str = "DELETE",
    headers: Mapping[str, str] | None = None,
    client: "httpx2.AsyncClient | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> bool:
    """Stop a run. False: it had ended, which an earlier try whose answer was lost may have done.

    Args:
        url: the stream's; or the flow's, with the stream's id; or that of an endpoint that returns `cancel(…)`.
        stream_id: the stream of a flow.
        method: `POST` for where DELETE does not get through; then the URL ends in `/cancel`.
        headers: as for `events`, and so is all below.
        client: the client to use.
        retry: when to try again, and when to give up.
        read_timeout: a connection that brings nothing for so long is lost.

    Raises as `events` does. There is no such stream: RefusedError with `status` NOT_FOUND.
    """
    return await stopped(_over(client, read_timeout), url, stream_id, method, headers, retry or Retry())


class Events(AwaitedHandle[E], EventsHandle[E]):
    """The events of a stream of another server, as `events` and `subscribe` give them.

    Enter it with `async with`, which raises RefusedError if the server refuses it, and iterate. Leaving the block closes the connection.
    One task at a time may iterate, and any may leave, by `aclose()`; a cancelled wait loses nothing. After a StreamLostError, iterating
    goes on trying.
    """


class FlowRun(AwaitedHandle[T], FlowHandle[T]):
    """A run of a flow, as `stream_flow` gives it: `async for` gives its chunks, `await run.output()` its output.

    Enter it with `async with`, which starts it; leaving the block closes the connection, and stops nothing: `stop` does.
    """

    async def output(self) -> Any:
        """Wait for the end, and give the output. Chunks that were not taken until then are let go. Raises as iterating does."""
        await self._entered.finish()
        return output_of(self._flow, self._output_type)


def _over(client: "httpx2.AsyncClient | None", read_timeout: timedelta | None) -> AsyncNetwork:
    check_durations(read_timeout=read_timeout)
    return AsyncNetwork(client, None if read_timeout is None else read_timeout.total_seconds())
