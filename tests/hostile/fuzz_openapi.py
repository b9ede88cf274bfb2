"""schemathesis against what is said of the HTTP interface: requests by the description and against it, answers as it says.

For `durable_flow` that is the app's own OpenAPI, for the reading app `docs/reference/streams.openapi.json`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import schemathesis
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import negative_data_rejection, positive_data_acceptance
from tests.hostile.fuzz_decoders import Property
from tests.hostile.servers import KNOWN, Target
from tests.hostile.sockets import WAIT_SECONDS

Operation = APIOperation[Any, Any, Any, Any]

READING: Final = Path(__file__).parents[2] / "docs/reference/streams.openapi.json"

# Neither says something of us: an offset that looks right may not have been reached, and a POST that resumes a stream never
# reads its body.
EXCLUDED: Final = [positive_data_acceptance, negative_data_rejection]


def operations_of_flows(target: Target) -> Iterator[Operation]:
    """Give what a server says of its flows."""
    return _operations(schemathesis.openapi.from_url(f"{_url(target)}/openapi.json"))


def operations_of_reading() -> Iterator[Operation]:
    """Give what the documentation says of the reading app."""
    return _operations(schemathesis.openapi.from_dict(json.loads(READING.read_text())))


def probe(
    target: Target,
    operation: Operation,
    *,
    mode: GenerationMode,
    examples: int,
    seed: int,
    known: bool = False,
    below: str = "",
) -> int:
    """Send requests for one operation, and check each answer; give how many. Raises schemathesis's failures.

    With `known` the stream that is asked for is there; `below` is where the operation's app is mounted.
    """

    def send(case: Case[Any]) -> None:
        case.call_and_validate(base_url=_url(target) + below, excluded_checks=EXCLUDED, timeout=WAIT_SECONDS)

    fixed: dict[str, Any] = {"path_parameters": {"stream": KNOWN}} if known else {}
    return Property(send, {"case": operation.as_strategy(mode, **fixed)}).holds(seed=seed, examples=examples)


def _operations(schema: Any) -> Iterator[Operation]:
    for found in schema.get_all_operations():
        yield found.ok()


def _url(target: Target) -> str:
    return "http://{}:{}".format(*target.address)
