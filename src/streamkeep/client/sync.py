"""`streamkeep.client` for code that does not await: scripts, threads, workers, notebooks.

    from streamkeep.client.sync import subscribe

    with subscribe("https://example.com/streams/answer-42", after=last_seen) as events:
        for event in events:
            print(event.offset, event.type, event.data)

Arguments and errors are those of the functions of the same names there, but that a `client` is an `httpx2.Client`. Nothing is done twice
here: it is the same loop, over a client that blocks. There is no thread and no event loop, so it works anywhere, also behind a fork.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .._background import ran
from .._durations import check_durations
from ..events import ReadAs, StreamEvent
from ..wire import ServerSentEvent
from ._calls import READ_TIMEOUT, body_of, events_dialect, flow_dialect, flow_output, output_of, stopped, subscribe_dialect
from ._handles import BlockingHandle, EventsHandle, FlowHandle
from ._network import BlockingNetwork
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
    client: "httpx2.Client | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> "Events[ServerSentEvent]":
    """Give the server-sent events of anybody's endpoint: see `streamkeep.client.events`."""
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
    client: "httpx2.Client | None" = None,
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
    client: "httpx2.Client | None" = None,
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
    client: "httpx2.Client | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> "Events[StreamEvent[Any]]":
    """Give the events of a stream of streamkeep's: see `streamkeep.client.subscribe`."""
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
    client: "httpx2.Client | None" = None,
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
    client: "httpx2.Client | None" = None,
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
    client: "httpx2.Client | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> "FlowRun[Any]":
    """Run a Genkit flow, and give its chunks and its output: see `streamkeep.client.stream_flow`."""
    flow = flow_dialect(url, data, init, stream_id, seen, chunk_type, headers)
    return FlowRun(lambda: Reading(_over(client, read_timeout), flow, retry or Retry(), seen), flow, output_type)


def run_flow(
    url: str,
    data: object = None,
    *,
    init: object = None,
    output_type: ReadAs[Any] | None = None,
    headers: Mapping[str, str] | None = None,
    client: "httpx2.Client | None" = None,
    read_timeout: timedelta | None = None,
) -> Any:
    """Run a Genkit flow without a stream, once, and give its output: see `streamkeep.client.run_flow`."""
    return ran(flow_output(_over(client, read_timeout), url, data, init, output_type, headers))


def stop(
    url: str,
    *,
    stream_id: str | None = None,
    method: str = "DELETE",
    headers: Mapping[str, str] | None = None,
    client: "httpx2.Client | None" = None,
    retry: Retry | None = None,
    read_timeout: timedelta | None = READ_TIMEOUT,
) -> bool:
    """Stop a run; False: it had ended. See `streamkeep.client.stop`."""
    return ran(stopped(_over(client, read_timeout), url, stream_id, method, headers, retry or Retry()))


class Events(BlockingHandle[E], EventsHandle[E]):
    """The events of a stream of another server: see `streamkeep.client.Events`.

    Enter it with `with`, and iterate in one thread; any may `close` it.
    """


class FlowRun(BlockingHandle[T], FlowHandle[T]):
    """A run of a flow: see `streamkeep.client.FlowRun`. Enter it with `with`; `for` gives its chunks, `run.output()` its output."""

    def output(self) -> Any:
        """Wait for the end, and give the output. Chunks that were not taken until then are let go."""
        ran(self._entered.finish())
        return output_of(self._flow, self._output_type)


def _over(client: "httpx2.Client | None", read_timeout: timedelta | None) -> BlockingNetwork:
    check_durations(read_timeout=read_timeout)
    return BlockingNetwork(client, None if read_timeout is None else read_timeout.total_seconds())
