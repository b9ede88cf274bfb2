"""What OpenTelemetry calls what hooks tell: every name of a metric, a span and an attribute is here, and nowhere else.

Names are those of OpenTelemetry's semantic conventions for messaging and for generative AI, where these have one that means the same; a
stream is a *destination*, storing events is *sending*, and who follows a stream *receives*. Everything else begins with `streamkeep`.
Values of attributes of metrics are few: no ids, no owners, no keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

SCOPE: Final = "streamkeep"

# Attributes

SYSTEM: Final = "messaging.system"
OPERATION: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
STREAM: Final = "messaging.destination.name"
"""The stream's id; on spans only."""
TEMPORARY: Final = "messaging.destination.temporary"
COUNT: Final = "messaging.batch.message_count"
"""On a span: how many events the run has stored, or the reader was given."""
CONVERSATION: Final = "gen_ai.conversation.id"
"""The stream's key; on spans only."""
TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
GEN_AI_OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
ERROR: Final = "error.type"
OUTCOME: Final = "streamkeep.outcome"
ATTEMPT: Final = "streamkeep.attempt"
AFTER: Final = "streamkeep.after"
LINK: Final = "streamkeep.link"
"""On a link: why it is there."""

# Their values

US: Final = "streamkeep"
SEND: Final = "send"
RECEIVE: Final = "receive"
RUN: Final[Mapping[str, str | bool]] = {SYSTEM: US, OPERATION: "run", OPERATION_TYPE: SEND, TEMPORARY: True}
READ: Final[Mapping[str, str | bool]] = {SYSTEM: US, OPERATION: "read", OPERATION_TYPE: RECEIVE, TEMPORARY: True}
COMMITS: Final[Mapping[str, str | bool]] = {SYSTEM: US, OPERATION: "commit", OPERATION_TYPE: SEND}
READS: Final[Mapping[str, str | bool]] = {SYSTEM: US, OPERATION: "read", OPERATION_TYPE: RECEIVE}
OURS: Final[Mapping[str, str | bool]] = {SYSTEM: US}
ANSWERS: Final[Mapping[str, str | bool]] = {GEN_AI_OPERATION: "stream", PROVIDER: US}

STARTED_BY: Final = {LINK: "started by"}
GOES_ON_WITH: Final = {LINK: "goes on with"}
READS_FROM: Final = {LINK: "reads"}

# Spans

RUN_SPAN: Final = "run stream"
READ_SPAN: Final = "read stream"

# Metrics


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: its name, its unit (UCUM), what it says, and where the buckets of a histogram end."""

    name: str
    unit: str
    description: str
    buckets: Sequence[float] = ()


_QUICK: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ANSWERING: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

STARTED: Final = Metric("streamkeep.streams.started", "{stream}", "Streams that were opened anew here")
TAKEN_OVER: Final = Metric(
    "streamkeep.streams.taken_over", "{stream}", "Streams that are written here in place of another writer"
)
ENDED: Final = Metric(
    "streamkeep.streams.ended", "{stream}", "Streams that were ended here, by how (ABORTED: their writers had died)"
)
LEFT: Final = Metric("streamkeep.writers.left", "{writer}", "Writers here that write no more, by what has become of them")
SENT: Final = Metric("messaging.client.sent.messages", "{message}", "Events that were stored: chunks and ends")
BYTES: Final = Metric("streamkeep.stored", "By", "Bytes of the events that were stored")
COMMIT: Final = Metric("messaging.client.operation.duration", "s", "How long the storage takes for a commit", _QUICK)
CONSUMED: Final = Metric("messaging.client.consumed.messages", "{message}", "Events that readers were given")
DELIVERY: Final = Metric(
    "streamkeep.delivery.duration", "s", "How long after the beginning of its commit a reader that follows has an event", _QUICK
)
FIRST_CHUNK: Final = Metric(
    "gen_ai.server.time_to_first_token", "s", "How long it takes from a run's start until its first chunk is stored", _ANSWERING
)
RUN_DURATION: Final = Metric("gen_ai.server.request.duration", "s", "How long a run takes until its end is stored", _ANSWERING)
FAILURES: Final = Metric("streamkeep.storage.errors", "{error}", "Errors that the storage has raised")
RETRIES: Final = Metric(
    "streamkeep.storage.retries", "{attempt}", "Attempts that could not reach the storage, and are made again"
)
STREAMS: Final = Metric("streamkeep.streams.open", "{stream}", "Streams that are being written here")
QUEUED: Final = Metric("streamkeep.queued", "{event}", "Events that wait here to be stored")
READERS: Final = Metric("streamkeep.readers", "{reader}", "Readers here")
LAG: Final = Metric("streamkeep.reader.lag", "{event}", "Events that the slowest reader here has still to be given")
SESSION: Final = Metric("streamkeep.session.age", "s", "How long ago the oldest session here began")
RENEWED: Final = Metric("streamkeep.session.renewal.age", "s", "How long ago the session here gave its last sign of life")
