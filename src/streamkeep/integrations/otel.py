"""Metrics and traces by OpenTelemetry, whatever SDK and exporter the app has set up.

    streams = StreamManager.connect(url, hooks=[OpenTelemetryHooks()])

A run's span lives as long as its writer, and is the root of a trace of its own: the request that has started it is linked, and over long
before. What runs in its producer is below it. A reader's span is below whatever has subscribed, such as a request, and linked to the run's,
in whatever process that is: the run's context is kept with the stream.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from threading import Lock
from typing import Final, final
from weakref import WeakKeyDictionary

from .._extras import needed_by

with needed_by(__name__, "otel"):
    from opentelemetry import trace
    from opentelemetry.context import Context, attach, create_key, get_current, get_value, set_value
    from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, MeterProvider, Observation, get_meter
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .._info import StreamInfo
from ..hooks import Commit, Delivery, Hooks, Outcome, Reader, Sample, StorageFailure
from . import _otel_names as names
from ._otel_names import Metric

__all__ = ["OpenTelemetryHooks"]

STALE_SECONDS: Final = 120.0
"""How old what a manager has told of itself may be to count: it tells it every second, unless its event loop is blocked or gone."""
NO_ERRORS: Final[frozenset[Outcome]] = frozenset({"done", "released", "taken over", "stopped", "deleted", "CANCELLED"})
"""What a run may come to without having failed."""

Observe = Callable[[CallbackOptions], Iterable[Observation]]

_propagator: Final = TraceContextTextMapPropagator()


@final
class OpenTelemetryHooks(Hooks):
    """Metrics and traces of managers; one may be given to several.

    Args:
        meter_provider: where metrics go; the app's global one unless given.
        tracer_provider: where spans go; the app's global one unless given.
    """

    def __init__(self, meter_provider: MeterProvider | None = None, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer(names.SCOPE, tracer_provider=tracer_provider)
        self._measured = _measured_by(meter_provider)
        self._runs: dict[str, _Run] = {}
        self._reads: dict[int, _Read] = {}

    def opening(self, stream: str, writer: str) -> Mapping[str, str]:
        """Begin a run's span, and have its context kept with the stream."""
        request = trace.get_current_span().get_span_context()
        span = self._tracer.start_span(
            names.RUN_SPAN,
            context=Context(),
            kind=SpanKind.PRODUCER,
            attributes={**names.RUN, names.STREAM: stream},
            links=[Link(request, names.STARTED_BY)] if request.is_valid else None,
        )
        run = self._runs[writer] = _Run(span)
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, context=run.context)
        return carrier

    def not_opened(self, stream: str, writer: str) -> None:  # noqa: ARG002 - as all hooks have it
        """Forget the span of a run that has not begun: one that does not end is not exported."""
        self._runs.pop(writer, None)

    def started(self, stream: StreamInfo) -> None:
        """See `Hooks.started`."""
        if (run := self._runs.get(stream.writer)) is not None:
            run.is_new = True
            _describe(run.span, stream)
            self._measured.started.add(1, names.OURS, run.context)

    def taken_over(self, stream: StreamInfo, before: StreamInfo) -> None:
        """See `Hooks.taken_over`; the span is linked to that of the run that it goes on with."""
        if (run := self._runs.get(stream.writer)) is not None:
            _describe(run.span, stream)
            if (linked := _context_in(before.carrier)).is_valid:
                run.span.add_link(linked, names.GOES_ON_WITH)
            self._measured.taken_over.add(1, names.OURS, run.context)

    def producing(self, stream: StreamInfo) -> AbstractContextManager[object] | None:
        """Have what the producer does be below the run's span; where nobody traces, it stays below what its request is below."""
        run = self._runs.get(stream.writer)
        return None if run is None or not run.span.get_span_context().is_valid else _Current(run.span)

    def committed(self, commit: Commit) -> None:
        """See `Hooks.committed`."""
        run = self._runs.get(commit.writer)
        context = None if run is None else run.context
        self._measured.commit.record(commit.seconds, names.COMMITS, context)
        if not commit.events:
            return
        self._measured.sent += commit.events
        self._measured.bytes += commit.bytes
        if run is None:
            return
        run.events += commit.events
        if run.is_new and commit.events > commit.is_end:
            run.is_new = False
            seconds = time.monotonic() - run.began_at
            run.span.set_attribute(names.TIME_TO_FIRST_CHUNK, seconds)
            self._measured.first_chunk.record(seconds, names.ANSWERS, context)

    def ended(self, stream: StreamInfo, outcome: Outcome) -> None:
        """See `Hooks.ended`."""
        run = self._runs.get(stream.writer)
        self._measured.ended.add(1, {**names.OURS, names.OUTCOME: outcome}, None if run is None else run.context)

    def writer_left(self, stream: StreamInfo, outcome: Outcome) -> None:
        """End a run's span."""
        run = self._runs.pop(stream.writer, None)
        if run is None:
            return
        is_failed = outcome not in NO_ERRORS
        failed = {names.ERROR: outcome} if is_failed else {}
        self._measured.left.add(1, {**names.OURS, names.OUTCOME: outcome}, run.context)
        self._measured.run_duration.record(time.monotonic() - run.began_at, {**names.ANSWERS, **failed}, run.context)
        run.span.set_attributes({names.OUTCOME: outcome, names.COUNT: run.events, **failed})
        if is_failed:
            run.span.set_status(Status(StatusCode.ERROR, outcome))
        run.span.end()

    def reader_entered(self, reader: Reader) -> None:
        """Begin a reader's span, below what has subscribed."""
        linked = _context_in(reader.stream.carrier)
        span = self._tracer.start_span(
            names.READ_SPAN,
            kind=SpanKind.CONSUMER,
            attributes={
                **names.READ,
                names.STREAM: reader.stream.id,
                **({} if reader.after is None else {names.AFTER: reader.after}),
            },
            links=[Link(linked, names.READS_FROM)] if linked.is_valid else None,
        )
        self._reads[reader.number] = _Read(span)

    def delivered(self, delivery: Delivery) -> None:
        """See `Hooks.delivered`."""
        read = self._reads.get(delivery.reader.number)
        context = None if read is None else read.context
        self._measured.consumed += delivery.events
        if delivery.seconds is not None:
            self._measured.delivery.record(delivery.seconds, names.READS, context)
        if read is not None:
            read.events += delivery.events

    def reader_left(self, reader: Reader) -> None:
        """End a reader's span."""
        if (read := self._reads.pop(reader.number, None)) is not None:
            read.span.set_attribute(names.COUNT, read.events)
            read.span.end()

    def storage_failed(self, failure: StorageFailure) -> None:
        """See `Hooks.storage_failed`."""
        counter = self._measured.retries if failure.is_retried else self._measured.failures
        counter.add(1, {**names.OURS, names.OPERATION: failure.operation, names.ERROR: failure.error})

    def sampled(self, sample: Sample) -> None:
        """See `Hooks.sampled`."""
        self._measured.samples.take(sample)


class _Measured:
    """What is measured for all hooks of a provider: an SDK takes only the first callback under a name."""

    def __init__(self, meter: Meter) -> None:
        self.started: Final = _counter(meter, names.STARTED)
        self.taken_over: Final = _counter(meter, names.TAKEN_OVER)
        self.ended: Final = _counter(meter, names.ENDED)
        self.left: Final = _counter(meter, names.LEFT)
        # What is counted for each commit is counted here, and read when it is wanted: an SDK takes longer for it than memory for a commit.
        self.sent = self.bytes = self.consumed = 0
        _observable_counter(meter, names.SENT, names.COMMITS, lambda: self.sent)
        _observable_counter(meter, names.BYTES, names.OURS, lambda: self.bytes)
        _observable_counter(meter, names.CONSUMED, names.READS, lambda: self.consumed)
        self.commit: Final = _histogram(meter, names.COMMIT)
        self.delivery: Final = _histogram(meter, names.DELIVERY)
        self.first_chunk: Final = _histogram(meter, names.FIRST_CHUNK)
        self.run_duration: Final = _histogram(meter, names.RUN_DURATION)
        self.failures: Final = _counter(meter, names.FAILURES)
        self.retries: Final = _counter(meter, names.RETRIES)
        self.samples: Final = _Samples(meter)


_measured: Final = WeakKeyDictionary[MeterProvider, _Measured]()
_measured_globally: list[_Measured] = []
_measuring: Final = Lock()


def _measured_by(provider: MeterProvider | None) -> _Measured:
    with _measuring:  # managers are made in many threads
        if provider is None:
            if not _measured_globally:
                _measured_globally.append(_Measured(get_meter(names.SCOPE)))
            return _measured_globally[0]
        if provider not in _measured:
            _measured[provider] = _Measured(provider.get_meter(names.SCOPE))
        return _measured[provider]


class _Spanned:
    """A span, and the context of what is measured in it."""

    def __init__(self, span: Span) -> None:
        self.span: Final = span
        self.context: Final = trace.set_span_in_context(span, Context())
        self.events = 0


class _Run(_Spanned):
    """A run: when it began, and whether its first chunk is still to come, with a stream that is new."""

    def __init__(self, span: Span) -> None:
        super().__init__(span)
        self.began_at: Final = time.monotonic()
        self.is_new = False


_Read = _Spanned


_current_key: Final = create_key("streamkeep-run")


class _Current:
    """Has a span be the current one within, and what else the context has, such as baggage, be as it was.

    What was before comes back without a token: blocks may be left in another order, or in another task, than they were entered.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        self.before = Context()
        self._is_over = False

    def __enter__(self) -> None:
        self.before = get_current()
        attach(set_value(_current_key, self, trace.set_span_in_context(self._span)))

    def __exit__(self, *exc_info: object) -> None:
        self._is_over = True
        here = context = get_current()
        while isinstance(inner := get_value(_current_key, context), _Current) and inner.is_over_in(context):
            context = inner.before
        if context is not here:
            attach(context)

    def is_over_in(self, context: Context) -> bool:
        """Whether this was left, and its span is still the current one in a context."""
        return self._is_over and trace.get_current_span(context) is self._span


class _Samples:
    """The last samples of managers, for gauges that are read in any thread."""

    def __init__(self, meter: Meter) -> None:
        self._samples: dict[str, tuple[int, float, Sample]] = {}
        for metric, value in (
            (names.STREAMS, lambda sample: sample.streams),
            (names.QUEUED, lambda sample: sample.queued),
            (names.READERS, lambda sample: sample.readers),
        ):
            _observable_sum(meter, metric, self._summing(value))
        for metric, age in (
            (names.LAG, lambda sample: sample.lag),
            (names.SESSION, lambda sample: sample.session_seconds),
            (names.RENEWED, lambda sample: sample.renewed_seconds),
        ):
            _gauge(meter, metric, self._greatest(age))

    def take(self, sample: Sample) -> None:
        """Take one in the place of the same manager's last one."""
        if sample == Sample(sample.session, 0, 0, 0, 0, None, None):
            self._samples.pop(sample.session, None)
        else:
            self._samples[sample.session] = (os.getpid(), time.monotonic(), sample)

    def _those(self) -> Sequence[Sample]:
        """Give those of this process: a forked child has inherited its parent's."""
        since, here = time.monotonic() - STALE_SECONDS, os.getpid()
        return [sample for process, at, sample in [*self._samples.values()] if process == here and at >= since]

    def _summing(self, value: Callable[[Sample], int]) -> Observe:
        return lambda _options: [Observation(sum(map(value, self._those())), names.OURS)]

    def _greatest(self, value: Callable[[Sample], float | None]) -> Observe:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            found = [number for number in map(value, self._those()) if number is not None]
            return [Observation(max(found), names.OURS)] if found else []

        return observe


def _describe(span: Span, stream: StreamInfo) -> None:
    if stream.key:
        span.set_attribute(names.CONVERSATION, stream.key)
    if stream.attempt:
        span.set_attribute(names.ATTEMPT, stream.attempt)


def _context_in(carrier: Mapping[str, str]) -> SpanContext:
    return trace.get_current_span(_propagator.extract(carrier, context=Context())).get_span_context()


def _counter(meter: Meter, metric: Metric) -> Counter:
    return meter.create_counter(metric.name, metric.unit, metric.description)


def _histogram(meter: Meter, metric: Metric) -> Histogram:
    return meter.create_histogram(
        metric.name, metric.unit, metric.description, explicit_bucket_boundaries_advisory=metric.buckets
    )


def _observable_counter(meter: Meter, metric: Metric, attributes: Mapping[str, str | bool], value: Callable[[], int]) -> None:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value(), attributes)]

    meter.create_observable_counter(metric.name, [observe], metric.unit, metric.description)


def _observable_sum(meter: Meter, metric: Metric, observe: Observe) -> None:
    meter.create_observable_up_down_counter(metric.name, [observe], metric.unit, metric.description)


def _gauge(meter: Meter, metric: Metric, observe: Observe) -> None:
    meter.create_observable_gauge(metric.name, [observe], metric.unit, metric.description)
